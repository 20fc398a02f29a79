"""What networks compute on the segment between two of them: the objectives of matchers that need no weights' distance.

A network is moved along its orbit so that the networks between it and a target compute something good: what a loss
says, or, without labels, what lies between the outputs of the two.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jax_scalegmn import network, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching._weights import Matching
from jax_scalegmn.symmetry import BalancedPair
from jax_scalegmn.types import Params

# (outputs, expected outputs), [examples, outputs] each -> a scalar.
Distance: TypeAlias = Callable[[Array, Array], Array]

# (moved, t) -> the objective at the point t of the segment between goal (t = 0) and moved (t = 1).
AtPoint: TypeAlias = Callable[[Params, Array], Array]


def squared_error(
    outputs: Float[Array, "examples outputs"], expected: Float[Array, "examples outputs"]
) -> Float[Array, ""]:
    """The mean squared difference: how far a merged INR or regressor is from what it should compute.

    Args:
      outputs: What the merged network computes.
      expected: What it should compute.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> float(sg.matching.squared_error(jnp.zeros((2, 3)), jnp.full((2, 3), 2.0)))
    4.0
    """
    return jnp.square(outputs - expected).mean()


def cross_entropy(
    outputs: Float[Array, "examples classes"], expected: Float[Array, "examples classes"]
) -> Float[Array, ""]:
    """The mean cross-entropy of a merged classifier, in nats, to the probabilities of the expected logits.

    Args:
      outputs: The logits of the merged network.
      expected: The logits whose softmax it should compute.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> round(float(sg.matching.cross_entropy(jnp.zeros((2, 4)), jnp.zeros((2, 4)))), 4)  # log 4
    1.3863
    """
    return -(jax.nn.softmax(expected) * jax.nn.log_softmax(outputs)).sum(-1).mean()


def check_data(
    arch: Architecture,
    x: Any,
    loss_fn: Callable[..., Any] | None,
    apply_fn: Callable[..., Any] | None = None,
) -> None:
    """Checks that there is one thing to compare functions by: a loss, or inputs.

    Args:
      arch: The architecture.
      x: The inputs, [examples, ...].
      loss_fn: The loss.
      apply_fn: What computes outputs from x, if that is not the architecture.

    Raises:
      ValueError: If there is none or more than one, or if the inputs do not fit.
    """
    if loss_fn is not None:
        if apply_fn is not None:
            raise ValueError("Got both loss_fn and apply_fn; expected one: loss_fn computes the outputs itself.")
        return
    if x is None:
        raise ValueError("x is None and there is no loss_fn; expected inputs [examples, ...] or a loss of params.")
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        if apply_fn is None:
            network.check_examples(arch, x)  # it says what the architecture expects
        raise ValueError(
            f"x is a {type(x).__name__} that is no array: {error}; expected one array, [examples, ...]."
        ) from error
    if apply_fn is None:
        network.check_examples(arch, x)
    elif jnp.ndim(x) < 1 or not jnp.size(x):
        raise ValueError(f"x has shape {jnp.shape(x)}; expected one example or more, [examples, ...].")


def check_times(times: Any) -> None:
    """Checks the points of a segment at which merged networks are judged.

    Args:
      times: The points.

    Raises:
      ValueError: If there are none, or (where values are known) if one is not in [0, 1].
    """
    values = np.asarray(times) if stacks.is_concrete(times) else np.zeros(np.shape(times))
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"times are {times}; expected one or more numbers in [0, 1], like (0.25, 0.5, 0.75).")


def solved(
    solve: Callable[..., tuple[Matching, dict[str, Array]]],
    kept: Callable[..., tuple[Matching, dict[str, Array]]],
    *given: Any,
    options: Any,
    loss_fn: Callable[[Any], Array] | None,
    apply_fn: Callable[[Any, Array], Array] | None,
) -> Matching:
    """The matching that a search finds, compiled; what it began with is checked where the values are known.

    Args:
      solve: (*given, options=, loss_fn=, apply_fn=) -> the matching, and the `ends`.
      kept: The same without functions of the caller, as a program that is kept.
      *given: The networks and arrays.
      options: What the program depends on.
      loss_fn: The caller's loss.
      apply_fn: The caller's function.

    Raises:
      ValueError: If an end point or the start has no finite loss.
    """
    if loss_fn is None and apply_fn is None:
        found, at_ends = kept(*given, options=options)
    else:  # functions of the caller may close over data, which a program that is kept would keep in memory
        own = functools.partial(solve, options=options, loss_fn=loss_fn, apply_fn=apply_fn)
        found, at_ends = jax.jit(own)(*given)
    if stacks.is_concrete((found, at_ends)):
        _check_losses(found, at_ends)
    return found


def ends(
    pair: BalancedPair,
    x: ArrayLike | None,
    loss_fn: Callable[[Any], Array] | None,
    apply_fn: Callable[[Any, Array], Array] | None,
) -> dict[str, Float[Array, ""]]:
    """By the name of an end point a number that is finite if the network can be searched with.

    Args:
      pair: Both networks in their balanced gauges.
      x: The inputs, [examples, ...]; None with a loss.
      loss_fn: Maps params to a scalar; None for the outputs on x.
      apply_fn: (params, x) -> outputs; None for `network.apply`.
    """
    if loss_fn is not None:
        at = segment_loss(pair, loss_fn)
        return {"target": at(pair.source, jnp.asarray(0.0)), "params": at(pair.source, jnp.asarray(1.0))}
    first, last = end_outputs(pair, x, apply_fn)
    return {"target": jnp.abs(first).max(), "params": jnp.abs(last).max()}


def at_point(
    pair: BalancedPair,
    x: ArrayLike | None,
    distance: Distance,
    loss_fn: Callable[[Any], Array] | None,
    apply_fn: Callable[[Any, Array], Array] | None,
) -> AtPoint:
    """The loss on the segment, or without one the distance to the interpolated outputs.

    Args:
      pair: Both networks in their balanced gauges.
      x: The inputs, [examples, ...]; None with a loss.
      distance: (outputs, expected outputs) -> a scalar.
      loss_fn: Maps params to a scalar; None for the distance.
      apply_fn: (params, x) -> outputs; None for `network.apply`.
    """
    return segment_distance(pair, x, distance, apply_fn) if loss_fn is None else segment_loss(pair, loss_fn)


def over(at: AtPoint, points: Float[Array, " points"]) -> Callable[[Params], Array]:
    """The mean of an objective over points of the segment, as a function of the moved network.

    Args:
      at: (moved, t) -> the objective at a point.
      points: The points.
    """
    return lambda moved: jax.vmap(lambda t: at(moved, t))(points).mean()


def segment_loss(pair: BalancedPair, loss_fn: Callable[[Any], Array]) -> AtPoint:
    """The loss between goal and moved, in the gauge of the target as it was given.

    Args:
      pair: Both networks in their balanced gauges.
      loss_fn: Maps params to a scalar.
    """

    def loss(moved: Params, t: Array) -> Array:
        return loss_fn(pair.in_given_gauge(stacks.lerp(pair.goal, moved, t)))

    return loss


def segment_distance(
    pair: BalancedPair, x: ArrayLike | None, distance: Distance, apply_fn: Callable[[Any, Array], Array] | None = None
) -> AtPoint:
    """distance(f(lerp(goal, moved, t)), (1 - t) f(goal) + t f(source)): it needs no labels.

    Args:
      pair: Both networks in their balanced gauges.
      x: The inputs, [examples, ...].
      distance: (outputs, expected outputs) -> a scalar.
      apply_fn: (params, x) -> outputs; None for `network.apply`.
    """
    first, last = end_outputs(pair, x, apply_fn)

    def loss(moved: Params, t: Array) -> Array:
        t = t.astype(first.dtype)
        return distance(outputs(pair, stacks.lerp(pair.goal, moved, t), x, apply_fn), (1 - t) * first + t * last)

    return loss


def end_outputs(
    pair: BalancedPair, x: ArrayLike | None, apply_fn: Callable[[Any, Array], Array] | None
) -> tuple[Array, Array]:
    """What both networks compute, [examples, *outputs] each.

    Args:
      pair: Both networks in their balanced gauges.
      x: The inputs, [examples, ...].
      apply_fn: (params, x) -> outputs; None for `network.apply`.

    Raises:
      ValueError: If the networks' outputs are not one array.
    """
    first, last = (outputs(pair, params, x, apply_fn) for params in (pair.goal, pair.source))
    for found in (first, last):
        if not isinstance(found, jax.Array):
            raise ValueError(
                f"The network returns a {type(found).__name__}; expected one array of outputs. Pass an apply_fn that "
                "returns the array to compare, or a loss_fn."
            )
    return first, last


def outputs(pair: BalancedPair, params: Params, x: Any, apply_fn: Callable[[Any, Array], Array] | None) -> Array:
    """What a network computes, [examples, *outputs].

    Args:
      pair: Both networks in their balanced gauges.
      params: The network.
      x: The inputs, [examples, ...].
      apply_fn: (params, x) -> outputs; None for `network.apply`.
    """
    if apply_fn is not None:
        return apply_fn(params, jnp.asarray(x))
    convolve = network.convolve_by_patches
    return jax.vmap(lambda one: network.apply(pair.arch, params, one, convolve=convolve))(jnp.asarray(x))


# --- private ------------------------------------------------------------------------------------------------------


def _check_losses(found: Matching, at_ends: dict[str, Array]) -> None:
    for name, value in at_ends.items():
        if not np.isfinite(value):
            raise ValueError(
                f"The loss or an output of {name} is {value}; expected finite numbers at both ends of the segment. "
                "Check that network on the data."
            )
    if found.start_loss is not None and not np.isfinite(found.start_loss):
        raise ValueError(
            f"The loss at the start is {found.start_loss}; expected a finite number. Begin at another start."
        )

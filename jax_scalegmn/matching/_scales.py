"""Positive scales fitted to what the merged network computes.

Around a ReLU a neuron's inputs can be multiplied by any positive number and its outputs divided by it. The
norm-balanced gauge settles these scales by the norms of two networks, whatever they compute. Merged networks depend on
them, as on permutations; and they are continuous, so that gradient steps find better ones.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float

from jax_scalegmn import stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching import _differentiable, _functions, _weights
from jax_scalegmn.matching._functions import Distance, squared_error
from jax_scalegmn.matching._weights import Matching
from jax_scalegmn.symmetry import BalancedPair, Element
from jax_scalegmn.types import Key, Params

LEARNING_RATE = 0.05


@stacks.any_container("params", "target", calls=("loss_fn", "apply_fn"))
def fit_scales(
    arch: Architecture,
    params: Params,
    target: Params,
    x: ArrayLike | None,
    *,
    distance: Distance = squared_error,
    loss_fn: Callable[[Any], Array] | None = None,
    apply_fn: Callable[[Any, Array], Array] | None = None,
    start: Element | Matching | None = None,
    times: Sequence[float] | Float[Array, " points"] = (0.25, 0.5, 0.75),
    num_steps: int = 100,
    learning_rate: float = LEARNING_RATE,
    examples_per_step: int | None = None,
    key: Key | None = None,
) -> Matching:
    """Fits the positive scales of an element by gradient steps on what the merged network computes.

    The objective is that of `search_matching`: the mean over t in `times` of
    distance(f(lerp(target, moved, t)), (1 - t) f(target) + t f(params)) on the inputs x, without labels, or the mean of
    loss_fn(lerp(target, moved, t)). Adam moves the logarithms of all positive scales at once, its learning rate falling
    to 0 along a cosine; permutations and signs stay. Both networks keep their functions exactly, and the result is
    never worse than the start on x. It costs a gradient of the merged network in every step, and helps after any
    matcher: most after those that look at weights alone.

    Give it many inputs: on a few hundred it fits these alone. With `examples_per_step` every step draws as many of them
    anew, so that thousands cost no more than a few hundred, and thousands of steps do not fit any of them.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 8, 1), "relu")
    >>> params, target = (sg.network.init(arch, key) for key in jax.random.split(jax.random.key(0)))
    >>> x = jax.random.normal(jax.random.key(1), (32, 2))
    >>> found = sg.matching.fit_scales(arch, params, target, x)
    >>> bool(found.loss < found.start_loss)
    True

    Args:
      arch: The architecture of both networks, with positive scales, like those of ReLU.
      params: The network to transform.
      target: The network to come close to.
      x: The inputs on which functions are compared, [examples, ...] as `network.apply` takes one; None with `loss_fn`.
      distance: (outputs, expected outputs) -> a scalar: `squared_error`, or `cross_entropy` for classifiers.
      loss_fn: Maps params to a scalar, in place of `distance`: a loss with labels, say.
      apply_fn: (params, x) -> outputs of the whole batch; None for `network.apply`.
      start: The element whose scales are fitted, or the matching that holds it. None: `matching.weight_matching`.
      times: The points of the segment between target (0) and the moved network (1).
      num_steps: The number of Adam's steps.
      learning_rate: Adam's first learning rate, of the logarithms.
      examples_per_step: The number of inputs that every step draws from x; None for all of them. Then `loss` and
        `start_loss` are means over batches of this size that cover x, but for a rest that fills none.
      key: The key by which inputs are drawn.

    Returns:
      The matching, with its `loss`, the start's `start_loss` and the number of `evaluations` of the objective; `sweeps`
      are the steps, and it is converged if the last tenth of them lowered the loss by a thousandth at
      most (where inputs are drawn, the mean loss of the last tenth against that of the tenth before).

    Raises:
      ValueError: If networks, start or inputs do not fit the architecture, if it has no positive scales, on options out
        of their range, without x and `loss_fn`, if inputs are to be drawn without a key or for a `loss_fn`, or (where
        values are known) if an end point or the start has no finite loss.
    """
    check_sizes(arch, "fit_scales")
    _functions.check_times(times)
    _differentiable._check_counts(num_steps=num_steps)
    _differentiable._check_positive(learning_rate=learning_rate)
    _functions.check_data(arch, x, loss_fn, apply_fn)
    _check_drawn(x, loss_fn, examples_per_step, key)
    begin = start.element if isinstance(start, Matching) else start
    _differentiable._check_networks(arch, params, target, begin)
    options = _Options(distance, num_steps, learning_rate, examples_per_step)
    given = (arch, params, target, None if x is None else jnp.asarray(x), key, begin, jnp.asarray(times, float))
    return _functions.solved(_solve, _solved, *given, options=options, loss_fn=loss_fn, apply_fn=apply_fn)


class Fitted(NamedTuple):
    """Scales that were fitted.

    Attributes:
      element: The element with them, between the networks as they were given.
      loss: Its objective.
      start_loss: The objective without them.
      converged: Whether the last tenth of the steps lowered it by a thousandth at most.
    """

    element: Element
    loss: Float[Array, ""]
    start_loss: Float[Array, ""]
    converged: Bool[Array, ""]


class Objective(NamedTuple):
    """What scales are fitted to.

    Attributes:
      whole: Maps a moved network to the objective on all inputs.
      drawn: Maps a moved network and a key to the objective on inputs drawn by the key; None: every step takes all.
    """

    whole: Callable[[Params], Array]
    drawn: Callable[[Params, Key], Array] | None = None


def fit(
    arch: Architecture,
    pair: BalancedPair,
    objective: Objective,
    begin: Element,
    *,
    num_steps: int,
    learning_rate: float = LEARNING_RATE,
    key: Key | None = None,
) -> Fitted:
    """Positive scales after gradient steps, the first being those of the pair's gauge: never worse than these.

    Where every step sees the whole objective, they are the best that a step saw.

    Args:
      arch: The architecture, with its positive scales.
      pair: Both networks.
      objective: What they are fitted to.
      begin: The permutations and signs, from `pair.source` to `pair.goal`.
      num_steps: The number of Adam's steps.
      learning_rate: Adam's first learning rate.
      key: The key by which inputs are drawn; None where none are.
    """
    identity, moved = symmetry.identity(arch), symmetry.act(pair.arch, begin, pair.source)
    tx = optax.apply_if_finite(optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps)), num_steps)
    drawn = objective.drawn

    def scales(logs: dict[str, Array]) -> Element:
        return Element(identity.permutation, identity.scale | {name: jnp.exp(log) for name, log in logs.items()})

    def loss(logs: dict[str, Array], key: Key | None = None) -> Array:
        scaled = symmetry.act(arch, scales(logs), moved)
        return objective.whole(scaled) if key is None or drawn is None else drawn(scaled, key)

    def keep(best: tuple[Any, Array], logs: dict[str, Array], value: Array) -> tuple[Any, Array]:
        better = value < best[1]  # never, where it is not a number
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), (logs, value), best)

    def step(state: tuple[Any, Any, tuple[Any, Array]], key: Key | None) -> tuple[Any, Array]:
        logs, opt_state, best = state
        value, gradient = jax.value_and_grad(loss)(logs, key)
        best = best if drawn else keep(best, logs, value)
        updates, opt_state = tx.update(gradient, opt_state)
        return (optax.apply_updates(logs, updates), opt_state, best), value

    none = {layer.name: jnp.zeros(layer.width) for layer in arch.hidden if layer.scaling.has_sizes}
    start_loss = loss(none)
    keys = None if key is None else jax.random.split(key, num_steps)
    (last, _, best), values = jax.lax.scan(step, (none, tx.init(none), (none, start_loss)), keys, length=num_steps)
    logs, lowest = keep(best, last, loss(last))
    before, after = jnp.min(values[: max(1, num_steps - num_steps // 10)]), lowest
    if drawn:  # the value of one step says more about its inputs
        tenth = max(1, num_steps // 10)
        before, after = values[-2 * tenth : -tenth].mean(), values[-tenth:].mean()
    element = pair.between_given(symmetry.compose(arch, scales(logs), begin))
    return Fitted(element, lowest, start_loss, before - after <= 1e-3 * jnp.abs(after))


def with_scales_of(arch: Architecture, pair: BalancedPair, start: Element) -> BalancedPair:
    """The pair, its goal not in the balanced gauge but in that which the start's positive scales imply.

    Between `pair.source` and this goal, the start's permutations and signs are the start itself.

    Args:
      arch: The architecture, with its positive scales.
      pair: Both networks in their balanced gauges.
      start: An element between the networks as they were given.
    """
    to_goal, from_source = symmetry.inverse(arch, pair.from_goal), symmetry.inverse(arch, pair.to_source)
    between = symmetry.compose(arch, to_goal, symmetry.compose(arch, start, from_source))
    positive = Element(symmetry.identity(arch).permutation, jax.tree.map(jnp.abs, between.scale))
    goal = symmetry.act(arch, symmetry.inverse(arch, positive), pair.goal)
    return pair._replace(goal=goal, from_goal=symmetry.compose(arch, pair.from_goal, positive))


def check_sizes(arch: Architecture, what: str) -> None:
    """Checks that an architecture has positive scales.

    Args:
      arch: The architecture.
      what: What is asked to fit them.

    Raises:
      ValueError: If it has none.
    """
    if not any(layer.scaling.has_sizes for layer in arch.hidden):
        raise ValueError(
            f"{what} fits positive scales, and '{arch}' has no hidden layer with them; expected an activation like "
            "relu. Without scales, search_matching finds permutations and signs."
        )


# --- private ------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """What a compiled fit depends on, apart from arrays; as in `fit_scales`."""

    distance: Distance
    num_steps: int
    learning_rate: float
    examples_per_step: int | None


def _check_drawn(
    x: ArrayLike | None, loss_fn: Callable[..., Any] | None, examples_per_step: int | None, key: Key | None
) -> None:
    if examples_per_step is None:
        if key is not None:
            raise ValueError("Got a key without examples_per_step; expected both, to draw inputs of x, or neither.")
        return
    if loss_fn is not None:
        raise ValueError("Got both loss_fn and examples_per_step; expected one: a loss of params has its own inputs.")
    if not 1 <= examples_per_step <= len(jnp.asarray(x)):
        raise ValueError(
            f"examples_per_step is {examples_per_step}; expected 1 to {len(jnp.asarray(x))}, the inputs given, or None "
            "for all of them."
        )
    if key is None:
        raise ValueError("key is None; expected a jax.random.key by which examples_per_step inputs are drawn.")


def _solve(
    arch: Architecture,
    params: Params,
    target: Params,
    x: Array | None,
    key: Key | None,
    begin: Element | None,
    points: Array,
    options: _Options,
    loss_fn: Callable[[Params], Array] | None = None,
    apply_fn: Callable[[Params, Any], Any] | None = None,
) -> tuple[Matching, dict[str, Array]]:
    """The matching, and the losses at both ends."""
    pair, first = _differentiable._begin(arch, params, target, begin)
    if begin is not None:
        pair = with_scales_of(arch, pair, begin)

    def on(x: Array | None) -> Callable[[Params], Array]:
        return _functions.over(_functions.at_point(pair, x, options.distance, loss_fn, apply_fn), points)

    ends = functools.partial(_functions.ends, pair, loss_fn=loss_fn, apply_fn=apply_fn)
    if x is None or options.examples_per_step is None:
        objective, at_ends = Objective(on(x)), ends(x)
    else:
        number = options.examples_per_step
        batches = _in_batches(x, number)  # all at once may not fit the memory
        at_ends = jax.tree.map(jnp.max, jax.lax.map(ends, batches))
        objective = Objective(
            lambda moved: jax.lax.map(lambda batch: on(batch)(moved), batches).mean(),
            lambda moved, key: on(x[jax.random.randint(key, (number,), 0, len(x))])(moved),
        )
    fitted = fit(
        arch, pair, objective, first, num_steps=options.num_steps, learning_rate=options.learning_rate, key=key
    )
    found = Matching(
        fitted.element,
        _weights.similarity(arch, symmetry.act(arch, fitted.element, params), target),
        jnp.asarray(options.num_steps),
        fitted.converged,
        fitted.loss,
        fitted.start_loss,
        jnp.asarray(options.num_steps + 2),
    )
    return found, at_ends


_solved = jax.jit(_solve, static_argnames="options")


def _in_batches(x: Array, size: int) -> Array:
    """[batches, size, ...], without the rest that fills no batch."""
    return x[: len(x) // size * size].reshape(-1, size, *x.shape[1:])

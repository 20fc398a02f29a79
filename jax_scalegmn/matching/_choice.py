"""The best of several matchers, by a loss on data."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_scalegmn import stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching._weights import Matching
from jax_scalegmn.types import Params


class Choice(NamedTuple):
    """The result of `best_of`.

    >>> from jax_scalegmn.matching import Choice
    >>> Choice._fields
    ('matching', 'best', 'losses')

    Attributes:
      matching: The best matching. Its `loss` is that of `losses`; `start_loss` and `evaluations` are None.
      best: Which method found it.
      losses: The loss of every method's merged network.
    """

    matching: Matching
    best: Int[Array, "*networks"]
    losses: Float[Array, "*networks methods"]


def best_of(
    arch: Architecture,
    params: Params,
    target: Params,
    methods: Sequence[Callable[[Params, Params], Matching]],
    loss_fn: Callable[[Any], Array],
    *,
    times: Sequence[float] = (0.5,),
) -> Choice:
    """Runs several matchers and keeps the one whose merged network has the lowest loss.

    Merged networks are compared by the mean over t in `times` of loss_fn(lerp(target, moved, t)). Similarity does not
    rank them: of two alignments of one pair, the less similar one can have the better midpoint. The loss should be on
    held-out data. A loss that is NaN is the worst.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> target = sg.network.init(arch, jax.random.key(0))
    >>> element = sg.symmetry.random(arch, jax.random.key(1))
    >>> params = sg.symmetry.act(arch, sg.symmetry.inverse(arch, element), target)
    >>> loss_fn = lambda params: sg.network.apply(arch, params, jax.numpy.ones(2)).sum() ** 2
    >>> unmoved = lambda params, target: sg.matching.unmatched(arch, params, target)
    >>> moved = lambda params, target: unmoved(params, target)._replace(element=element)
    >>> choice = jax.jit(lambda: sg.matching.best_of(arch, params, target, (unmoved, moved), loss_fn))()
    >>> bool(choice.matching.loss == choice.losses.min())
    True

    Args:
      arch: The architecture of both networks.
      params: The network to transform.
      target: The network to come close to.
      methods: Each maps (params, target) to a matching, like functools.partial(matching.weight_matching, arch).
      loss_fn: Maps params to a scalar on data, the lower the better.
      times: The points of the segment between target (0) and the moved network (1).

    Returns:
      The best matching, the first of those that tie.

    Raises:
      ValueError: Without a method or a time, or (where values are known) if no method has a finite loss.
    """
    if not methods or not len(times):
        raise ValueError(f"Got {len(methods)} methods and times {times}; expected one or more of each.")
    matchings = [method(params, target) for method in methods]
    points = jnp.asarray(times, float)

    def loss_of(matching: Matching) -> Array:
        moved = symmetry.act(arch, matching.element, params)
        return jax.lax.map(lambda t: loss_fn(stacks.lerp(target, moved, t)), points).mean()

    losses = jnp.stack([loss_of(matching) for matching in matchings])
    if stacks.is_concrete(losses) and not np.isfinite(losses).any():
        raise ValueError(f"The losses are {losses}; expected a finite one. Check data and networks.")
    index = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))

    def chosen(*values: Any) -> Any:
        return jnp.stack([jnp.asarray(value) for value in values])[index]

    # A matching's own loss is no loss that others have.
    common = [matching._replace(loss=None, start_loss=None, evaluations=None) for matching in matchings]
    best = jax.tree.map(chosen, *common)
    return Choice(best._replace(loss=losses[index]), index, losses)

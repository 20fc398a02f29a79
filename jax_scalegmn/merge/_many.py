"""Many networks into one, each searched against the mean of those before it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jax_scalegmn import matching, stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching import Matching
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Key, Params


class Many(NamedTuple):
    """The result of `merge_many`.

    >>> from jax_scalegmn.merge import Many
    >>> Many._fields
    ('params', 'elements', 'losses', 'start_losses', 'evaluations', 'sweeps', 'converged')

    Attributes:
      params: The merged network, the mean of the moved ones.
      elements: The element that moves each network, with a leading axis [networks]; act(element, network) keeps its
        function.
      losses: What each network's last search reached. Without a last round the first network is not searched; it has
        NaN here and in `start_losses`, 0 evaluations and sweeps, and is converged.
      start_losses: The loss that each of these searches began with.
      evaluations: How many times each network's objective was computed, over all its searches.
      sweeps: The sweeps of each network's last search.
      converged: Whether the last of them changed nothing.
    """

    params: Any
    elements: Element
    losses: Float[Array, "*batch networks"]
    start_losses: Float[Array, "*batch networks"]
    evaluations: Int[Array, "*batch networks"]
    sweeps: Int[Array, "*batch networks"]
    converged: Bool[Array, "*batch networks"]


@stacks.any_container("stack", fields=("params",), calls=("loss_fn", "apply_fn"))
def merge_many(
    arch: Architecture,
    stack: Params,
    x: ArrayLike | None,
    key: Key,
    *,
    order: Sequence[int] | None = None,
    last_round: bool = False,
    loss_fn: Callable[[Any], Array] | None = None,
    apply_fn: Callable[[Any, Array], Array] | None = None,
    **options: Any,
) -> Many:
    """Merges N networks into one: each is searched against the mean of those before it, at its share of the new mean.

    The search is `matching.search_matching`, at the very point at which the network joins the mean; it begins at weight
    matching. The result is one good mean, and no frame: a merge of some of the moved networks can be a bad one.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((1, 2, 1), "gelu")
    >>> x, key = jax.numpy.linspace(-1, 1, 4)[:, None], jax.random.key(0)
    >>> stack = sg.symmetry.orbit(arch, sg.network.init(arch, key), key, 3)
    >>> many = jax.jit(lambda: sg.merge.merge_many(arch, stack, x, key, max_sweeps=1))()
    >>> bool((many.losses[1:] <= many.start_losses[1:]).all()), many.params["Dense_0"]["kernel"].shape
    (True, (1, 2))

    Args:
      arch: The architecture of all networks.
      stack: At least 2 networks, every array with a leading axis [networks].
      x: The inputs on which functions are compared, [examples, ...], as for `matching.search_matching`.
      key: Consumed by the searches.
      order: The places of the networks in the order in which they join; None for that of the stack. The first keeps its
        element, the identity.
      last_round: Whether each network is searched once more, from its element, against the mean of all others.
      loss_fn: As in `matching.search_matching`.
      apply_fn: As in `matching.search_matching`.
      **options: As in `matching.search_matching`, except `times` and `start`.

    Returns:
      The merged network, in the dtypes of the networks, with their elements in the order of the stack.

    Raises:
      ValueError: As `matching.search_matching`, on fewer than 2 networks, an order that does not have every place once,
        or the options `times` and `start`.
    """
    count = stacks.count(stack, least=2)
    places = list(range(count)) if order is None else [int(place) for place in order]
    if sorted(places) != list(range(count)):
        raise ValueError(f"order is {order}; expected every number from 0 to {count - 1} once.")
    if taken := {"times", "start"} & options.keys():
        raise ValueError(f"The options have {sorted(taken)}; expected neither times nor start: merge_many sets them.")
    wide = stacks.member(stacks.at_least_float32(stack), jnp.asarray(places))
    if loss_fn is None and apply_fn is None:
        many = _merged(arch, wide, x, key, last_round, tuple(sorted(options.items())))
    else:  # functions of the caller may close over data, which a program that is kept would keep in memory
        own = (*options.items(), ("loss_fn", loss_fn), ("apply_fn", apply_fn))
        many = jax.jit(functools.partial(_merge, last_round=last_round, options=own))(arch, wide, x, key)
    back = jnp.argsort(jnp.asarray(places))
    params = jax.tree.map(lambda mean, leaf: mean.astype(jnp.asarray(leaf).dtype), many.params, stack)
    return Many(params, *stacks.member(tuple(many[1:]), back))


# --- private ------------------------------------------------------------------------------------------------------


def _merge(
    arch: Architecture, stack: Params, x: Any, key: Key, last_round: bool, options: tuple[tuple[str, Any], ...]
) -> Many:
    """The networks in the order of the stack, merged; options of `matching.search_matching` by name."""
    join_key, round_key = jax.random.split(key)
    many = _join_all(arch, stack, x, join_key, dict(options))
    return _again(arch, stack, many, x, round_key, dict(options)) if last_round else many


_merged = jax.jit(_merge, static_argnames=("last_round", "options"))


def _join_all(arch: Architecture, stack: Params, x: Any, key: Key, options: dict[str, Any]) -> Many:
    """The networks in the order of the stack, each joined to the mean of those before it."""
    first = stacks.member(stack, 0)

    def join(mean: Params, inputs: tuple[Params, Array, Key]) -> tuple[Params, tuple[Any, ...]]:
        params, before, key = inputs
        t = 1 / (before + 1)
        found = matching.search_matching(arch, params, mean, x, key, times=t[None], **options)
        moved = symmetry.act(arch, found.element, params)
        return stacks.lerp(mean, moved, t), _kept(found)

    rest = jax.tree.map(lambda leaf: leaf[1:], stack)
    befores = jnp.arange(1, stacks.count(stack))
    mean, found = jax.lax.scan(join, first, (rest, befores, jax.random.split(key, len(befores))))
    begin = (symmetry.identity(arch), jnp.nan, jnp.nan, 0, 0, True)

    def with_first(one: Any, others: Array) -> Array:
        return jnp.concatenate([jnp.asarray(one, others.dtype)[None], others])

    return Many(mean, *jax.tree.map(with_first, begin, found))


def _kept(found: Matching) -> tuple[Any, ...]:
    """What `Many` has of a matching, in its order."""
    return found.element, found.loss, found.start_loss, found.evaluations, found.sweeps, found.converged


def _again(arch: Architecture, stack: Params, many: Many, x: Any, key: Key, options: dict[str, Any]) -> Many:
    """Each network in turn searched once more, against the mean of all others as they are moved so far."""
    count = stacks.count(stack)
    share = jnp.asarray(1 / count)

    def again(mean: Params, inputs: tuple[Params, Element, Array, Key]) -> tuple[Params, tuple[Any, ...]]:
        params, element, evaluations, key = inputs
        moved = symmetry.act(arch, element, params)
        others = stacks.lerp(moved, mean, count / (count - 1))
        found = matching.search_matching(arch, params, others, x, key, start=element, times=share[None], **options)
        mean = stacks.lerp(others, symmetry.act(arch, found.element, params), share)
        return mean, _kept(found._replace(evaluations=evaluations + jnp.asarray(found.evaluations)))

    each = (stack, many.elements, many.evaluations, jax.random.split(key, count))
    mean, found = jax.lax.scan(again, many.params, each)
    return Many(mean, *found)

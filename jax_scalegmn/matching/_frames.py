"""Many networks in one frame: N elements that bring N networks next to each other, and how well pairs agree.

A frame is one common order, sign and scale of neurons that N networks share; Crisostomi et al. (2024, arXiv
2405.17897) call it the universe. Pairwise matchings need not be cycle-consistent: with g_ij the element that moves
network i next to network j, g_jk g_ij != g_ik. Elements e_i into one frame are: g_ij = e_j^-1 e_i.
"""

import enum
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_scalegmn import architecture, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.matching import _weights
from jax_scalegmn.matching._weights import Matching, Start
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params


class Reference(enum.Enum):
    """The network whose order of neurons and signs the others are brought into at first.

    >>> from jax_scalegmn.matching import Reference
    >>> [reference.name for reference in Reference]
    ['FIRST', 'CENTRAL']
    """

    FIRST = "first"
    """The first network of the stack: N - 1 matchings."""
    CENTRAL = "central"
    """The network that is most similar to all others once they are matched to it: N (N - 1) matchings."""


class Frame(NamedTuple):
    """Networks in one frame: their neurons have one common order, sign and scale.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> copies = sg.symmetry.orbit(arch, sg.network.init(arch, jax.random.key(0)), jax.random.key(1), 3)
    >>> frame = sg.matching.align_to(arch, copies, sg.stacks.stack(*[sg.stacks.member(copies, 0)] * 3))
    >>> frame.aligned["Dense_0"]["kernel"].shape, frame.mean["Dense_0"]["kernel"].shape
    ((3, 2, 3), (2, 3))

    Attributes:
      elements: The element that moves each network into the frame, with a leading axis [networks].
      aligned: The moved networks, `symmetry.act` by `elements`, with a leading axis [networks].
      mean: Their average, one network.
      similarity: The cosine <aligned_i, mean> / (|aligned_i| |mean|) of each, without balancing; 0 for zeros.
      rounds: The number of passes over the networks.
      converged: Whether the last pass changed nothing.
    """

    elements: Element
    aligned: Any
    mean: Any
    similarity: Float[Array, "*batch networks"]
    rounds: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]


class Consistency(NamedTuple):
    """How far pairwise elements agree with each other; `cycle_consistency` measures it.

    >>> from jax_scalegmn.matching import Consistency
    >>> Consistency._fields
    ('fraction', 'log_ratio')

    Attributes:
      fraction: The share of all neurons and triples i, j, k for which i -> j -> k and i -> k lead to the same place
        with the same sign.
      log_ratio: The largest |log| of the ratio of the two routes' scales, over neurons that both bring to one place; 0
        if there are none.
    """

    fraction: Float[Array, "*batch"]
    log_ratio: Float[Array, "*batch"]


@stacks.any_container("stack", fields=("aligned", "mean"))
def align_all(
    arch: Architecture,
    stack: Params,
    *,
    frame: Reference = Reference.FIRST,
    max_rounds: int | Int[Array, ""] = 20,
    **options: Any,
) -> Frame:
    """Brings N networks into one frame, each next to the mean of the others.

    Minimizes sum_i |act(e_i, params_i) - mean|^2 (MergeMany of Ainsworth et al. 2023, arXiv 2209.04836, algorithm 2).
    First all are matched to the reference. Then, in rounds, each in turn is matched to the mean of all others as they
    are aligned so far, from its element so far and from the forward start, and moves if that brings it closer.

    From round to round the sum never rises. Permutations and signs keep |params_i|, so that lowering it is raising
    sum_{i != j} <moved_i, moved_j>, of which network i's part is <moved_i, sum_{j != i} moved_j>: what its matching
    maximizes. That holds for one network at a time, so the turns are sequential. Matching all at once to the mean of
    all would not raise the sum either, but each network is part of that mean, and holds itself back.

    Positive scales change norms. So each network is moved to its norm-balanced gauge (`symmetry.balance`) before,
    only permutations and signs are sought, and `aligned` and `mean` are in the balanced gauge of the networks: the
    mean is that of balanced networks, and itself balanced only where they agree.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> copies = sg.symmetry.orbit(arch, params, jax.random.key(1), 3)
    >>> frame = sg.matching.align_all(arch, copies)
    >>> frame.similarity.round(4).tolist(), bool(frame.converged)
    ([1.0, 1.0, 1.0], True)

    Args:
      arch: The architecture of all networks.
      stack: At least 2 networks, every array with a leading axis [networks].
      frame: The network to begin with, which keeps its order of neurons and its signs.
      max_rounds: The most passes over the networks; 0 returns all of them matched to the reference. It may be traced:
        one compiled program serves all numbers.
      **options: As in `matching.weight_matching`, except `start`. With scale=False neither scales nor signs are used,
        and all networks stay in the gauge in which they were given.

    Returns:
      The frame.

    Raises:
      ValueError: If a network does not fit the architecture, or on fewer than 2 networks, negative rounds, or `start`.
    """
    _check_stack(arch, stack, "stack")
    if (stacks.is_concrete(max_rounds) and max_rounds < 0) or "start" in options:
        raise ValueError(
            f"max_rounds is {max_rounds} and the options are {sorted(options)}; expected a number >= 0 and no "
            "'start': the frame begins at `frame`."
        )
    wide = stacks.at_least_float32(stack)
    scales = jax.vmap(lambda params: symmetry.balance(arch, params))(wide)
    if not options.get("scale", True):
        scales = scales._replace(scale=jax.tree.map(jnp.ones_like, scales.scale))
    # Positive scales are settled; from here on all elements preserve norms.
    signs_only = _without_positive(arch)
    balanced = _act(arch, scales, wide)
    reference = _most_central(signs_only, balanced, options) if frame is Reference.CENTRAL else jnp.asarray(0)
    elements, rounds, converged = _rounds(signs_only, balanced, reference, max_rounds, *_parted(options))

    from_reference = symmetry.inverse(signs_only, stacks.member(elements, reference))

    def from_given(element: Element, scale: Element) -> Element:
        return symmetry.compose(arch, symmetry.compose(arch, from_reference, element), scale)

    return _frame(arch, stack, jax.vmap(from_given)(elements, scales), rounds, converged)


@stacks.any_container("stack", "targets", fields=("aligned", "mean"))
def align_to(arch: Architecture, stack: Params, targets: Params, **options: Any) -> Frame:
    """Moves each of N networks next to its own target: N matchings in one vmapped call.

    The frame is that of the targets, such as the networks that an autoencoder decodes, all in one order of neurons. So
    the originals come into one frame with N matchings instead of N (N - 1) / 2, and keep their functions.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> targets = sg.stacks.stack(*(sg.network.init(arch, key) for key in jax.random.split(jax.random.key(0))))
    >>> moved = jax.vmap(lambda params: sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), params))
    >>> frame = sg.matching.align_to(arch, moved(targets), targets)
    >>> bool((frame.aligned["Dense_0"]["kernel"] == targets["Dense_0"]["kernel"]).all())
    True

    Args:
      arch: The architecture of all networks.
      stack: At least 2 networks, every array with a leading axis [networks].
      targets: One target for each, with the same leading axis.
      **options: As in `matching.weight_matching`.

    Returns:
      The frame, in the gauge of the targets; one round, converged if all matchings are.

    Raises:
      ValueError: If a network does not fit the architecture, on fewer than 2, or on another number of targets.
    """
    count = _check_stack(arch, stack, "stack")
    if _check_stack(arch, targets, "targets") != count:
        raise ValueError(
            f"targets hold {stacks.count(targets)} networks; expected {count}, one for each network of the stack."
        )

    def match(params: Params, target: Params) -> Matching:
        return _weights.weight_matching(arch, params, target, **options)

    matchings = jax.vmap(match)(stack, targets)
    return _frame(arch, stack, matchings.element, jnp.asarray(1), matchings.converged.all())


@stacks.any_container("stack", fields=("aligned", "mean"))
def framed(arch: Architecture, stack: Params, elements: Element) -> Frame:
    """Moves each of N networks by its own element, as a learned frame finds it (`models.Frame`).

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params, element = sg.network.init(arch, jax.random.key(0)), sg.symmetry.random(arch, jax.random.key(1))
    >>> moved = sg.symmetry.act(arch, sg.symmetry.inverse(arch, element), params)
    >>> elements = sg.stacks.stack(sg.symmetry.identity(arch), element)
    >>> sg.matching.framed(arch, sg.stacks.stack(params, moved), elements).similarity.round(4).tolist()
    [1.0, 1.0]

    Args:
      arch: The architecture of all networks.
      stack: At least 2 networks, every array with a leading axis [networks].
      elements: The element that moves each into the frame, with the same leading axis.

    Returns:
      The frame: no rounds, and converged, since nothing is searched.

    Raises:
      ValueError: If a network or an element does not fit the architecture, on fewer than 2 networks, or on another
        number of elements.
    """
    count = _check_stack(arch, stack, "stack")
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(elements)}
    if sizes != {(count,)}:
        raise ValueError(
            f"The elements have leading sizes {sorted(sizes)}; expected ({count},), one for each network of the stack, "
            "as jax.vmap returns them."
        )
    return _frame(arch, stack, elements, jnp.asarray(0), jnp.asarray(True))


@stacks.any_container("stack")
def pairwise(arch: Architecture, stack: Params, **options: Any) -> Matching:
    """Matches every network to every other: N (N - 1) weight matchings, N - 1 at a time.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> copies = sg.symmetry.orbit(arch, sg.network.init(arch, jax.random.key(0)), jax.random.key(1), 3)
    >>> matchings = sg.matching.pairwise(arch, copies)
    >>> matchings.element.permutation["hidden_0"].shape, matchings.similarity.shape
    ((3, 3, 3), (3, 3))

    Args:
      arch: The architecture of all networks.
      stack: At least 2 networks, every array with a leading axis [networks].
      **options: As in `matching.weight_matching`.

    Returns:
      The matchings, with leading axes [networks, networks]: entry [i, j] moves network i next to network j; on the
      diagonal is the identity, with similarity 1.

    Raises:
      ValueError: If a network does not fit the architecture, or on fewer than 2.
    """
    _check_stack(arch, stack, "stack")
    return _table(arch, stack, *_parted(options))


def relative(arch: Architecture, elements: Element) -> Element:
    """Computes the pairwise elements that follow from elements into one frame: entry [i, j] is e_j^-1 e_i.

    They are cycle-consistent by construction (Crisostomi et al. 2024, arXiv 2405.17897).

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> elements = jax.vmap(lambda key: sg.symmetry.random(arch, key))(jax.random.split(jax.random.key(0), 4))
    >>> pairs = sg.matching.relative(arch, elements)
    >>> float(sg.matching.cycle_consistency(arch, pairs).fraction)
    1.0

    Args:
      arch: The architecture.
      elements: The elements into the frame, with a leading axis [networks].

    Returns:
      The elements with leading axes [networks, networks].

    Raises:
      ValueError: If the elements do not fit the architecture.
    """
    back = jax.vmap(lambda element: symmetry.inverse(arch, element))(elements)
    to_all = jax.vmap(lambda inverse, element: symmetry.compose(arch, inverse, element), (0, None))
    return jax.vmap(lambda element: to_all(back, element))(elements)


def cycle_consistency(arch: Architecture, elements: Element) -> Consistency:
    """Measures how far i -> j -> k agrees with i -> k (Crisostomi et al. 2024, arXiv 2405.17897).

    Over all triples with i != j != k; k may be i: there and back again should be the identity. All other triples agree
    whatever the elements are.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> copies = sg.symmetry.orbit(arch, sg.network.init(arch, jax.random.key(0)), jax.random.key(1), 3)
    >>> consistency = sg.matching.cycle_consistency(arch, sg.matching.pairwise(arch, copies).element)
    >>> float(consistency.fraction), float(consistency.log_ratio)
    (1.0, 0.0)

    Args:
      arch: The architecture.
      elements: With leading axes [networks, networks]; [i, j] moves network i next to network j, as those of
        `pairwise`.

    Returns:
      The share of neurons that agree, and the largest difference of scales.

    Raises:
      ValueError: If the elements do not fit the architecture, are not square, or are those of fewer than 2 networks.
    """
    count = _square_size(elements)
    first, between, last = (index.reshape(-1) for index in np.indices((count, count, count)))
    triples = (first != between) & (between != last)
    first, between, last = first[triples], between[triples], last[triples]

    def pairs(i: np.ndarray, j: np.ndarray) -> Element:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[i, j], elements)

    direct = pairs(first, last)
    compose = jax.vmap(lambda left, right: symmetry.compose(arch, left, right))
    around = compose(pairs(between, last), pairs(first, between))
    agree, log_ratios = [], []
    for neurons in arch.hidden:
        same_place = around.permutation[neurons.name] == direct.permutation[neurons.name]
        scales = around.scale[neurons.name], direct.scale[neurons.name]
        agree.append((same_place & (jnp.sign(scales[0]) == jnp.sign(scales[1]))).reshape(-1))
        log_ratio = jnp.abs(jnp.log(jnp.abs(scales[0])) - jnp.log(jnp.abs(scales[1])))
        log_ratios.append(jnp.where(same_place, log_ratio, 0).reshape(-1))
    return Consistency(jnp.concatenate(agree).mean(), jnp.concatenate(log_ratios).max())


# --- private ------------------------------------------------------------------------------------------------------

# Two cosines count as equal if they differ by up to this many roundings of 1, so that networks with equal neurons do
# not swap them for ever.
_TIE = 8


class _Progress(NamedTuple):
    """What `_rounds` carries: each network's element and the network moved by it, and how far the passes are."""

    elements: Element
    aligned: Any
    passes: Int[Array, ""]
    converged: Bool[Array, ""]


def _most_central(arch: Architecture, stack: Any, options: dict[str, Any]) -> Array:
    """The index of the network that the others come closest to."""
    return jnp.argmax(pairwise(arch, stack, **options).similarity.sum(0))


_Static: TypeAlias = tuple[tuple[str, Any], ...]


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], _Static]:
    """The options of a weight matching: those that are arrays, and those that a compiled program depends on."""
    arrays = {name: value for name, value in options.items() if name == "key" or isinstance(value, Element)}
    return arrays, tuple(sorted((name, value) for name, value in options.items() if name not in arrays))


@functools.partial(jax.jit, static_argnames="static")
def _table(arch: Architecture, stack: Any, arrays: dict[str, Any], static: _Static) -> Matching:
    """The matchings of all ordered pairs, with leading axes [networks, networks]."""
    count = stacks.count(stack)
    moved, fixed = np.nonzero(~np.eye(count, dtype=bool))

    def match(pair: tuple[Array, Array]) -> Matching:
        params, target = (stacks.member(stack, index) for index in pair)
        return _weights.weight_matching(arch, params, target, **arrays, **dict(static))

    matchings = jax.lax.map(match, (jnp.asarray(moved), jnp.asarray(fixed)), batch_size=count - 1)
    itself = Matching(symmetry.identity(arch), jnp.asarray(1.0), jnp.asarray(0), jnp.asarray(True))

    def table(diagonal: Array, pairs: Array) -> Array:
        filled = jnp.broadcast_to(diagonal, (count, count, *diagonal.shape)).astype(pairs.dtype)
        return filled.at[moved, fixed].set(pairs)

    return jax.tree.map(table, itself, matchings)


@functools.partial(jax.jit, static_argnames="static")
def _rounds(
    arch: Architecture,
    stack: Any,
    reference: Array,
    max_rounds: int | Array,
    arrays: dict[str, Any],
    static: _Static,
) -> tuple[Element, Array, Array]:
    """Elements, rounds, and whether the last round moved none.

    Pass 0 brings all networks to the reference; every later pass is a round, which brings each to the others' mean. One
    loop does both, so that the matching of a network is compiled once.
    """
    count = stacks.count(stack)
    options = dict(static) | arrays

    def turn(progress: _Progress, index: Array) -> tuple[_Progress, Array]:
        to_reference = jnp.arange(count) == reference
        others = jnp.arange(count) != index
        # With weights of 0, not as a difference: that would round by more than a tie.
        target = stacks.average(progress.aligned, jnp.where(progress.passes == 0, to_reference, others).astype(float))
        params, element = stacks.member((stack, progress.elements), index)
        element, aligned, changed = _closer(arch, params, element, target, options)
        elements, networks = jax.tree.map(
            lambda leaf, value: leaf.at[index].set(value),
            (progress.elements, progress.aligned),
            (element, aligned),
        )
        return progress._replace(elements=elements, aligned=networks), changed

    def one_pass(progress: _Progress) -> _Progress:
        done, changed = jax.lax.scan(turn, progress, jnp.arange(count))
        return done._replace(passes=progress.passes + 1, converged=~changed.any() & (progress.passes > 0))

    def unfinished(progress: _Progress) -> Array:
        return ~progress.converged & (progress.passes <= max_rounds)

    itself = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), symmetry.identity(arch))
    begin = _Progress(itself, jax.tree.map(jnp.asarray, stack), jnp.asarray(0), jnp.asarray(False))
    end = jax.lax.while_loop(unfinished, one_pass, begin)
    return end.elements, end.passes - 1, end.converged


def _closer(
    arch: Architecture, params: Params, element: Element, target: Params, options: dict[str, Any]
) -> tuple[Element, Params, Bool[Array, ""]]:
    """The element that brings a network closest to a target, the network moved by it, and whether it is a new one.

    Matched from its element so far and from the forward start.
    """
    walk = options | {"start": Start.FORWARD, "restarts": 0, "max_sweeps": 0}
    starts = stacks.stack(element, _weights.weight_matching(arch, params, target, **walk).element)

    def match(start: Element) -> Element:
        return _weights.weight_matching(arch, params, target, start=start, **options).element

    candidates = jax.tree.map(lambda own, new: jnp.concatenate([own[None], new]), element, jax.vmap(match)(starts))
    # All are compared by one program: a network that did not move must not seem closer by a rounding error.
    moved = jax.vmap(lambda candidate: symmetry.act(arch, candidate, params))(candidates)
    similarity = jax.vmap(lambda candidate: _weights.similarity(arch, candidate, target))(moved)
    best = jnp.argmax(similarity.at[0].add(_TIE * jnp.finfo(similarity.dtype).eps))
    return *stacks.member((candidates, moved), best), best > 0


def _frame(arch: Architecture, stack: Any, elements: Element, rounds: Array, converged: Array) -> Frame:
    aligned = _act(arch, elements, stack)
    mean = stacks.average(aligned)
    # Without positive layers nothing is balanced before the cosine is taken.
    signs_only, center = _without_positive(arch), stacks.at_least_float32(mean)
    similarity = jax.vmap(lambda params: _weights.similarity(signs_only, params, center))(
        stacks.at_least_float32(aligned)
    )
    return Frame(elements, aligned, mean, similarity, rounds, converged)


def _without_positive(arch: Architecture) -> Architecture:
    """The architecture whose elements are permutations and signs, which preserve norms."""
    return architecture.restrict(arch, Scaling.SIGN)


def _act(arch: Architecture, elements: Element, stack: Any) -> Any:
    return jax.vmap(lambda element, params: symmetry.act(arch, element, params))(elements, stack)


def _check_stack(arch: Architecture, stack: Any, name: str) -> int:
    """Checks a stack of networks with hidden neurons, and returns their number."""
    if not arch.hidden:
        raise ValueError(
            f"{arch.name!r} has no hidden neurons, so that all its networks have one frame: merge them as they are."
        )
    return architecture.check_stack(arch, stack, least=2, name=name)


def _square_size(elements: Element) -> int:
    """The number of networks between which the elements are, checked."""
    shapes = {jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(elements)}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2:
        raise ValueError(
            f"The elements have leading sizes {sorted(shapes)}; expected [networks, networks] of 2 networks or more, "
            "as matching.pairwise returns. Those of a frame go through matching.relative."
        )
    return shape[0]

"""Many networks in one frame: N elements that bring N networks next to each other, and how well pairs agree.

A frame is one common order, sign and scale of neurons that N networks share; Crisostomi et al. (2024, arXiv
2405.17897) call it the universe. Pairwise matchings need not be cycle-consistent: with g_ij the element that moves
network i next to network j, g_jk g_ij != g_ik. Elements e_i into one frame are: g_ij = e_j^-1 e_i.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jax_scalegmn import architecture, distributed, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.matching import _many, _weights
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
    mesh: Mesh | None = None,
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
      mesh: Devices (`distributed.mesh`) over whose axis "data" the networks are shared out, ceil(networks / devices) on
        each. The matchings to find a CENTRAL network are shared out as well; the turns of the rounds are sequential, so
        that all devices compute each of them, and communicate one network and one mean. None: one device.
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
    if not isinstance(frame, Reference):
        raise ValueError(f"frame is {frame!r}; expected Reference.FIRST or Reference.CENTRAL.")
    if mesh is not None:
        return _align_all_over_devices(arch, stack, frame, int(max_rounds), mesh, options)
    wide = stacks.at_least_float32(stack)
    scales = jax.vmap(lambda params: symmetry.balance(arch, params))(wide)
    if not options.get("scale", True):
        scales = scales._replace(scale=jax.tree.map(jnp.ones_like, scales.scale))
    # Positive scales are settled; from here on all elements preserve norms.
    signs_only = _without_positive(arch)
    balanced = _act(arch, scales, wide)
    reference = _most_central(signs_only, balanced, options) if frame is Reference.CENTRAL else jnp.asarray(0)
    elements, rounds, converged = _rounds(signs_only, balanced, reference, max_rounds, *_many.parted(options))

    from_reference = symmetry.inverse(signs_only, stacks.member(elements, reference))

    def from_given(element: Element, scale: Element) -> Element:
        return symmetry.compose(arch, symmetry.compose(arch, from_reference, element), scale)

    return _frame(arch, stack, jax.vmap(from_given)(elements, scales), rounds, converged)


@stacks.any_container("stack", "targets", fields=("aligned", "mean"))
def align_to(arch: Architecture, stack: Params, targets: Params, *, mesh: Mesh | None = None, **options: Any) -> Frame:
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
      mesh: Devices (`distributed.mesh`) over whose axis "data" the networks are shared out: the same elements; the mean
        is summed over devices. None: one device.
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

    if mesh is not None:
        matchings = _many.many(arch, stack, targets, mesh=mesh, **options)
        return _frame_over_devices(
            arch, stack, matchings.element, jnp.asarray(1), distributed.gather(matchings.converged).all(), mesh
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
def pairwise(arch: Architecture, stack: Params, *, mesh: Mesh | None = None, **options: Any) -> Matching:
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
      mesh: Devices (`distributed.mesh`) over whose axis "data" the pairs are shared out; each holds the whole stack,
        and nothing is communicated. None: one device.
      **options: As in `matching.weight_matching`.

    Returns:
      The matchings, with leading axes [networks, networks]: entry [i, j] moves network i next to network j; on the
      diagonal is the identity, with similarity 1.

    Raises:
      ValueError: If a network does not fit the architecture, or on fewer than 2.
    """
    count = _check_stack(arch, stack, "stack")
    arrays, static = _many.parted(options)
    if mesh is None:
        return _table(arch, stack, arrays, static)
    moved, fixed = np.nonzero(~np.eye(count, dtype=bool))
    matchings = _pairs_over_devices(static, mesh, count - 1)((moved, fixed), arch, stack, arrays)
    return distributed.place_rows(_square(arch, matchings, count, np), mesh)


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
    _square_size(elements)
    return _consistency(arch, elements)


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


def _most_central(arch: Architecture, stack: Any, options: dict[str, Any], mesh: Mesh | None = None) -> Array:
    """The index of the network that the others come closest to."""
    similarity = pairwise(arch, stack, mesh=mesh, **options).similarity
    return jnp.argmax(jnp.asarray(distributed.gather(similarity) if mesh else similarity).sum(0))


# How many neurons of triples `_consistency` compares at once.
_COMPARED = 1 << 20


@jax.jit
def _consistency(arch: Architecture, elements: Element) -> Consistency:
    """All triples, some at a time: those of one network between the two others, and of as many first ones as fit."""
    count, width = _square_size(elements), sum(neurons.width for neurons in arch.hidden)
    at_once = max(
        size
        for size in range(1, count + 1)
        if count % size == 0 and size * count * width <= max(_COMPARED, count * width)
    )
    rows = jnp.arange(count)

    def through(between: Array) -> tuple[Array, Array]:
        onward = jax.tree.map(lambda leaf: leaf[between], elements)

        def begin_at(first: Array) -> tuple[Array, Array]:
            start, direct = jax.tree.map(lambda leaf: leaf[first, between], elements), stacks.member(elements, first)
            around = jax.vmap(lambda last: symmetry.compose(arch, last, start))(onward)
            agree, log_ratio = _compare(arch, around, direct)
            counted = (first != between) & (rows != between)
            return jnp.where(counted, agree, 0).sum(), jnp.where(counted, log_ratio, 0).max()

        agree, log_ratio = jax.lax.map(begin_at, rows, batch_size=at_once)
        return agree.sum() / (width * (count - 1) ** 2), log_ratio.max()

    fractions, log_ratios = jax.lax.map(through, rows)
    return Consistency(fractions.mean(), log_ratios.max())


def _compare(arch: Architecture, around: Element, direct: Element) -> tuple[Array, Array]:
    """For each pair of elements how many neurons they bring to one place with one sign, and how their scales differ."""
    agree, log_ratio = [], []
    for neurons in arch.hidden:
        same_place = around.permutation[neurons.name] == direct.permutation[neurons.name]
        scales = around.scale[neurons.name], direct.scale[neurons.name]
        agree.append((same_place & (jnp.sign(scales[0]) == jnp.sign(scales[1]))).sum(-1))
        gap = jnp.abs(jnp.log(jnp.abs(scales[0])) - jnp.log(jnp.abs(scales[1])))
        log_ratio.append(jnp.where(same_place, gap, 0).max(-1))
    return jnp.stack(agree).sum(0), jnp.stack(log_ratio).max(0)


@functools.partial(jax.jit, static_argnames="static")
def _table(arch: Architecture, stack: Any, arrays: dict[str, Any], static: _many.Static) -> Matching:
    """The matchings of all ordered pairs, with leading axes [networks, networks]."""
    count = stacks.count(stack)
    moved, fixed = np.nonzero(~np.eye(count, dtype=bool))

    def match(pair: tuple[Array, Array]) -> Matching:
        params, target = (stacks.member(stack, index) for index in pair)
        return _weights.weight_matching(arch, params, target, **arrays, **dict(static))

    matchings = jax.lax.map(match, (jnp.asarray(moved), jnp.asarray(fixed)), batch_size=count - 1)
    return _square(arch, matchings, count)


@functools.lru_cache(maxsize=16)
def _pairs_over_devices(static: _many.Static, mesh: Mesh, at_once: int) -> Callable[..., Matching]:
    """The matchings of pairs of networks of a stack, given by their numbers."""

    def match(moved: Array, fixed: Array, arch: Architecture, stack: Any, arrays: dict[str, Any]) -> Matching:
        params, target = (stacks.member(stack, index) for index in (moved, fixed))
        return _weights.weight_matching(arch, params, target, **arrays, **dict(static))

    return distributed.make_map(match, mesh, rows_at_once=at_once)


def _square(arch: Architecture, matchings: Matching, count: int, xp: Any = jnp) -> Matching:
    """The matchings of all ordered pairs as a table, with the identity on the diagonal, in JAX or NumPy."""
    moved, fixed = np.nonzero(~np.eye(count, dtype=bool))
    itself = Matching(symmetry.identity(arch), jnp.asarray(1.0), jnp.asarray(0), jnp.asarray(True))

    def table(diagonal: Any, pairs: Any) -> Any:
        filled = xp.broadcast_to(diagonal, (count, count, *diagonal.shape)).astype(pairs.dtype)
        if xp is jnp:
            return filled.at[moved, fixed].set(pairs)
        filled[moved, fixed] = pairs
        return filled

    return jax.tree.map(table, itself, matchings)


class _Held(NamedTuple):
    """The networks of a stack that a device holds: all, or, over the axis "data", some from `first` on."""

    networks: int
    first: Int[Array, ""] | int = 0
    shared_out: bool = False

    def numbers(self) -> Array:
        return self.first + jnp.arange(self.networks)

    def average(self, stack: Any, weights: Array) -> Any:
        """The weighted mean of the networks of all devices; `weights` are those of the ones held."""
        if not self.shared_out:
            return stacks.average(stack, weights)
        total = jax.lax.psum(weights.sum(), "data")

        def mean(leaf: Array) -> Array:
            if not stacks.is_floating(leaf):
                return leaf[0]
            return jax.lax.psum(jnp.tensordot(weights / total, leaf, 1, precision="highest"), "data")

        return jax.tree.map(mean, stack)

    def member(self, tree: Any, index: Array) -> Any:
        """A network, whichever device holds it."""
        if not self.shared_out:
            return stacks.member(tree, index)
        at, own = self._place(index)
        return jax.lax.psum(jax.tree.map(lambda leaf: jnp.where(own, leaf[at], jnp.zeros_like(leaf[at])), tree), "data")

    def replaced(self, tree: Any, index: Array, values: Any) -> Any:
        """The stack with another network at this number."""
        if not self.shared_out:
            return jax.tree.map(lambda leaf, value: leaf.at[index].set(value), tree, values)
        at, own = self._place(index)
        return jax.tree.map(lambda leaf, value: leaf.at[at].set(jnp.where(own, value, leaf[at])), tree, values)

    def _place(self, index: Array) -> tuple[Array, Array]:
        at = index - self.first
        return jnp.clip(at, 0, self.networks - 1), (at >= 0) & (at < self.networks)


@functools.partial(jax.jit, static_argnames="static")
def _rounds(
    arch: Architecture,
    stack: Any,
    reference: Array,
    max_rounds: int | Array,
    arrays: dict[str, Any],
    static: _many.Static,
) -> tuple[Element, Array, Array]:
    """`_turns` of networks that are all on one device."""
    count = stacks.count(stack)
    return _turns(arch, stack, reference, max_rounds, dict(static) | arrays, count, _Held(count))


@functools.lru_cache(maxsize=16)
def _rounds_over_devices(static: _many.Static, mesh: Mesh, count: int) -> Callable[..., tuple[Element, Array, Array]]:
    """`_turns` of networks that are shared out over the devices of a mesh, padding at the end."""
    share = -(-count // distributed.num_devices(mesh))

    def rounds(stack: Any, arch: Architecture, reference: Array, max_rounds: Array, arrays: dict[str, Any]) -> Any:
        held = _Held(share, jax.lax.axis_index("data") * share, shared_out=True)
        return _turns(arch, stack, reference, max_rounds, dict(static) | arrays, count, held)

    whole, rows = PartitionSpec(), PartitionSpec("data")
    specs = (rows, whole, whole, whole, whole)
    return jax.jit(jax.shard_map(rounds, mesh=mesh, in_specs=specs, out_specs=(rows, whole, whole), check_vma=False))


def _turns(
    arch: Architecture,
    stack: Any,
    reference: Array,
    max_rounds: int | Array,
    options: dict[str, Any],
    count: int,
    held: _Held,
) -> tuple[Element, Array, Array]:
    """Elements, rounds, and whether the last round moved none.

    Pass 0 brings all networks to the reference; every later pass is a round, which brings each to the others' mean. One
    loop does both, so that the matching of a network is compiled once.
    """

    def turn(progress: _Progress, index: Array) -> tuple[_Progress, Array]:
        to_reference = held.numbers() == reference
        others = (held.numbers() != index) & (held.numbers() < count)
        # With weights of 0, not as a difference: that would round by more than a tie.
        target = held.average(progress.aligned, jnp.where(progress.passes == 0, to_reference, others).astype(float))
        params, element = held.member((stack, progress.elements), index)
        element, aligned, changed = _closer(arch, params, element, target, options)
        elements, networks = held.replaced((progress.elements, progress.aligned), index, (element, aligned))
        return progress._replace(elements=elements, aligned=networks), changed

    def one_pass(progress: _Progress) -> _Progress:
        done, changed = jax.lax.scan(turn, progress, jnp.arange(count))
        return done._replace(passes=progress.passes + 1, converged=~changed.any() & (progress.passes > 0))

    def unfinished(progress: _Progress) -> Array:
        return ~progress.converged & (progress.passes <= max_rounds)

    itself = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (held.networks, *leaf.shape)), symmetry.identity(arch))
    begin = _Progress(itself, jax.tree.map(jnp.asarray, stack), jnp.asarray(0), jnp.asarray(False))
    end = jax.lax.while_loop(unfinished, one_pass, begin)
    return end.elements, end.passes - 1, end.converged


# Compiled once for each function and mesh.
_mapped = functools.lru_cache(maxsize=32)(distributed.make_map)


def _align_all_over_devices(
    arch: Architecture, stack: Any, frame: Reference, max_rounds: int, mesh: Mesh, options: dict[str, Any]
) -> Frame:
    """`align_all` of networks that are shared out over the devices of a mesh."""
    stack, signs_only = distributed.gather(stacks.to_dict(stack)), _without_positive(arch)
    scaled = jnp.asarray(bool(options.get("scale", True)))
    scales, balanced = _mapped(_to_balanced_gauge, mesh)((stack,), arch, scaled)
    central = frame is Reference.CENTRAL
    reference = _most_central(signs_only, balanced, options, mesh) if central else jnp.asarray(0)
    arrays, static = _many.parted(options)
    rows = distributed.shard_rows(balanced, mesh).tree
    whole = distributed.replicate((signs_only, reference, jnp.asarray(max_rounds), arrays), mesh)
    elements, rounds, converged = distributed.gather(
        _rounds_over_devices(static, mesh, stacks.count(stack))(rows, *whole)
    )
    elements = jax.tree.map(lambda leaf: leaf[: stacks.count(stack)], elements)
    from_reference = symmetry.inverse(signs_only, stacks.member(elements, int(reference)))
    elements = _mapped(_from_given, mesh)((elements, scales), arch, from_reference)
    return _frame_over_devices(arch, stack, elements, jnp.asarray(rounds), jnp.asarray(converged), mesh)


def _to_balanced_gauge(params: Params, arch: Architecture, scaled: Array) -> tuple[Element, Params]:
    wide = stacks.at_least_float32(params)
    element = symmetry.balance(arch, wide)
    element = element._replace(scale=jax.tree.map(lambda s: jnp.where(scaled, s, jnp.ones_like(s)), element.scale))
    return element, symmetry.act(arch, element, wide)


def _from_given(element: Element, scale: Element, arch: Architecture, from_reference: Element) -> Element:
    return symmetry.compose(arch, symmetry.compose(arch, from_reference, element), scale)


def _moved(element: Element, params: Params, arch: Architecture) -> Params:
    return symmetry.act(arch, element, params)


def _similarity_to(params: Params, arch: Architecture, center: Params) -> Array:
    return _weights.similarity(arch, stacks.at_least_float32(params), center)


def _frame_over_devices(
    arch: Architecture, stack: Any, elements: Element, rounds: Array, converged: Any, mesh: Mesh
) -> Frame:
    """`_frame` of networks that are shared out over the devices of a mesh; the mean is that of the host."""
    aligned = _mapped(_moved, mesh)((elements, stack), arch)

    def mean_of(leaf: np.ndarray) -> np.ndarray:
        if not stacks.is_floating(leaf):
            return leaf[0]
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        return wide.mean(0).astype(leaf.dtype)

    mean = jax.tree.map(lambda leaf: jnp.asarray(mean_of(leaf)), aligned)
    center = stacks.at_least_float32(mean)
    similarity = _mapped(_similarity_to, mesh)((aligned,), _without_positive(arch), center)
    elements, aligned, similarity = distributed.place_rows((distributed.gather(elements), aligned, similarity), mesh)
    return Frame(elements, aligned, mean, similarity, rounds, jnp.asarray(converged))


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

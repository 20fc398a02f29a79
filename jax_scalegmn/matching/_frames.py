"""Many networks in one frame: N elements that bring N networks next to each other, and how well pairs agree.

Pairwise matchings contradict each other: network i next to j, and then next to k, is not where i next to k is. Elements
into one common frame cannot: what moves i next to j is by construction e_j^-1 e_i.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_scalegmn import architecture, merge, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.matching import _weights
from jax_scalegmn.matching._weights import Matching, Start
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params


class Reference(enum.Enum):
    """The network next to which a common frame begins, and whose order of neurons and signs it has."""

    FIRST = "first"
    """The first of the stack: N - 1 matchings."""
    CENTRAL = "central"
    """The one that the others come closest to, by the sum of their similarities once matched: N (N - 1) matchings."""


class Frame(NamedTuple):
    """Networks in one frame.

    Attributes:
      elements: of each network; `symmetry.act` by them gives `aligned`. Both have a leading axis [networks].
      aligned: the networks side by side.
      mean: their average.
      similarity: the cosine <aligned_i, mean> / (|aligned_i| |mean|) of each, as they stand; 0 for zeros.
      rounds: passes over the networks that were made.
      converged: whether the last one changed nothing.
    """

    elements: Element
    aligned: Any
    mean: Any
    similarity: Float[Array, "*batch networks"]
    rounds: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]


class Consistency(NamedTuple):
    """How far pairwise elements agree with each other.

    Attributes:
      fraction: of all neurons and triples, those that i -> j -> k and i -> k bring to one place with one sign.
      log_ratio: the largest |log| of the two routes' scales of a neuron that both bring to one place; 0 if none is.
    """

    fraction: Float[Array, "*batch"]
    log_ratio: Float[Array, "*batch"]


def align_all(
    arch: Architecture,
    stack: Params,
    *,
    frame: Reference = Reference.FIRST,
    max_rounds: int | Int[Array, ""] = 20,
    **options: Any,
) -> Frame:
    """N networks next to their own mean.

    Minimizes sum_i |act(e_i, params_i) - mean|^2. All are matched to the reference first. Then, in rounds, each in turn
    is matched to the mean of all others as they stand (MergeMany of Ainsworth et al. 2023, arXiv 2209.04836), from its
    element so far and from the forward start, and moves if that brings it closer.

    From round to round the sum never goes up. Permutations and signs keep |params_i|, so that lowering it is raising
    sum_{i != j} <moved_i, moved_j>, of which network i's part is <moved_i, sum_{j != i} moved_j>: what its matching
    maximizes. That holds one network at a time, so the turns are sequential. Matching all at once to the mean of all
    would keep the promise too, but each network is part of that mean, and holds itself back.

    Positive scales are no isometries. So each network is taken to its norm-balanced gauge (`symmetry.balance`) before,
    permutations and signs alone are sought, and `aligned` and `mean` are in the balanced gauge of the networks: the
    mean is that of balanced networks, and itself balanced only where they agree.

    Args:
      arch: of all networks.
      stack: at least 2 networks, every array with a leading axis [networks].
      frame: where to begin. The reference keeps its order of neurons and its signs.
      max_rounds: the most passes over the networks; 0 gives all of them matched to the reference. It may be traced: one
        program serves all numbers.
      **options: of `matching.weight_matching`, `start` apart. With scale=False neither scales nor signs are used, and
        all networks stay in the gauge in which they came.

    Raises:
      ValueError: if a network does not fit the architecture, or on fewer than 2 networks, negative rounds, or `start`.
    """
    _check_stack(arch, stack, "stack")
    if (not isinstance(max_rounds, jax.core.Tracer) and max_rounds < 0) or "start" in options:
        raise ValueError(
            f"max_rounds is {max_rounds} and the options are {sorted(options)}; expected a number >= 0 and no "
            "'start': the frame begins at `frame`."
        )
    wide = stacks.at_least_float32(stack)
    scales = jax.vmap(lambda one: symmetry.balance(arch, one))(wide)
    if not options.get("scale", True):
        scales = scales._replace(scale=jax.tree.map(jnp.ones_like, scales.scale))
    # Positive scales are settled; from here on all elements are isometries.
    free = _without_positive(arch)
    balanced = _act(arch, scales, wide)
    at = _most_central(free, balanced, options) if frame is Reference.CENTRAL else jnp.asarray(0)
    found, rounds, converged = _rounds(free, balanced, at, max_rounds, options)

    theirs = symmetry.inverse(free, stacks.member(found, at))
    whole = jax.vmap(lambda e, s: symmetry.compose(arch, symmetry.compose(arch, theirs, e), s))(found, scales)
    return _frame(arch, stack, whole, rounds, converged)


def align_to(arch: Architecture, stack: Params, targets: Params, **options: Any) -> Frame:
    """Each of N networks next to its own target: N matchings in one vmapped call.

    The targets are what has one frame, such as the networks that an autoencoder decodes, which differ by no symmetry.
    The originals come into that frame with N matchings instead of N (N - 1) / 2, and keep their functions.

    Args:
      arch: of all networks.
      stack: at least 2 networks, every array with a leading axis [networks].
      targets: as many.
      **options: of `matching.weight_matching`.

    Returns:
      The frame, in the gauge of the targets; one round, converged if all matchings are.

    Raises:
      ValueError: if a network does not fit the architecture, or on fewer than 2, or another number of targets.
    """
    count = _check_stack(arch, stack, "stack")
    if _check_stack(arch, targets, "targets") != count:
        raise ValueError(
            f"targets hold {stacks.count(targets)} networks; expected {count}, one for each network of the stack."
        )
    found = jax.vmap(lambda one, target: _weights.weight_matching(arch, one, target, **options))(stack, targets)
    return _frame(arch, stack, found.element, jnp.asarray(1), found.converged.all())


def pairwise(arch: Architecture, stack: Params, **options: Any) -> Matching:
    """Every network matched to every other: N (N - 1) matchings, N - 1 at a time.

    Args:
      arch: of all networks.
      stack: at least 2 networks, every array with a leading axis [networks].
      **options: of `matching.weight_matching`.

    Returns:
      The matchings, with leading axes [networks, models]: entry [i, j] moves network i next to network j; on the diagonal
      the identity, with similarity 1.

    Raises:
      ValueError: if a network does not fit the architecture, or on fewer than 2.
    """
    count = _check_stack(arch, stack, "stack")
    moved, still = np.nonzero(~np.eye(count, dtype=bool))

    def match(pair: tuple[Array, Array]) -> Matching:
        one, other = (stacks.member(stack, index) for index in pair)
        return _weights.weight_matching(arch, one, other, **options)

    found = jax.lax.map(match, (jnp.asarray(moved), jnp.asarray(still)), batch_size=count - 1)
    itself = Matching(symmetry.identity(arch), jnp.asarray(1.0), jnp.asarray(0), jnp.asarray(True))
    return jax.tree.map(
        lambda one, pairs: (
            jnp.broadcast_to(one, (count, count, *one.shape)).astype(pairs.dtype).at[moved, still].set(pairs)
        ),
        itself,
        found,
    )


def relative(arch: Architecture, elements: Element) -> Element:
    """The pairwise elements that elements into one frame give: entry [i, j] is e_j^-1 e_i.

    Args:
      arch: the architecture.
      elements: into the frame, with a leading axis [networks].

    Returns:
      Elements with leading axes [networks, models], cycle-consistent by construction.

    Raises:
      ValueError: if the elements do not fit the architecture.
    """
    back = jax.vmap(lambda one: symmetry.inverse(arch, one))(elements)
    return jax.vmap(lambda one: jax.vmap(lambda other: symmetry.compose(arch, other, one))(back))(elements)


def cycle_consistency(arch: Architecture, elements: Element) -> Consistency:
    """How far i -> j -> k is i -> k, over all triples with i != j != k (Crisostomi et al. 2024, arXiv 2405.17897).

    k may be i: there and back again is to be the identity. The other triples agree whatever the elements are.

    Args:
      arch: the architecture.
      elements: with leading axes [networks, models]; [i, j] moves network i next to network j, as of `pairwise`.

    Raises:
      ValueError: if the elements do not fit the architecture, are not square, or are of fewer than 2 networks.
    """
    shapes = {jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(elements)}
    if len(shapes) != 1 or len(min(shapes)) != 2 or len(set(min(shapes))) != 1 or min(min(shapes)) < 2:
        raise ValueError(
            f"The elements have leading sizes {sorted(shapes)}; expected [networks, models] of 2 networks or more, as "
            "matching.pairwise gives. Those of a frame go through matching.relative."
        )
    count = min(shapes)[0]
    first, between, last = (index.reshape(-1) for index in np.indices((count, count, count)))
    first, between, last = (index[(first != between) & (between != last)] for index in (first, between, last))
    step, onward, direct = (
        jax.tree.map(lambda leaf, i=i, j=j: jnp.asarray(leaf)[i, j], elements)
        for i, j in ((first, between), (between, last), (first, last))
    )
    around = jax.vmap(lambda left, right: symmetry.compose(arch, left, right))(onward, step)
    agree, ratios = [], []
    for neurons in arch.hidden:
        place = around.permutation[neurons.name] == direct.permutation[neurons.name]
        scales = around.scale[neurons.name], direct.scale[neurons.name]
        agree.append((place & (jnp.sign(scales[0]) == jnp.sign(scales[1]))).reshape(-1))
        ratio = jnp.abs(jnp.log(jnp.abs(scales[0])) - jnp.log(jnp.abs(scales[1])))
        ratios.append(jnp.where(place, ratio, 0).reshape(-1))
    return Consistency(jnp.concatenate(agree).mean(), jnp.concatenate(ratios).max())


# --- private ------------------------------------------------------------------------------------------------------


# So many roundings of 1 are no difference between two cosines: networks with equal neurons come to rest.
TIE = 8


def _most_central(arch: Architecture, stack: Any, options: dict[str, Any]) -> Array:
    """Which network the others come closest to."""
    return jnp.argmax(pairwise(arch, stack, **options).similarity.sum(0))


def _rounds(
    arch: Architecture, stack: Any, reference: Array, max_rounds: int | Array, options: dict[str, Any]
) -> tuple[Element, Array, Array]:
    """Elements, rounds, and whether the last one moved none: one round to the reference, then to the others' means."""
    count = stacks.count(stack)
    itself = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), symmetry.identity(arch))

    def turn(state: tuple[Element, Any, Array], index: Array) -> tuple[tuple[Element, Any, Array], Array]:
        elements, standing, rounds = state
        one, now = stacks.member(stack, index), stacks.member(elements, index)
        # With weights of 0, not as a difference: that would round by more than a tie.
        members = jnp.where(rounds < 0, jnp.arange(count) == reference, jnp.arange(count) != index)
        target = merge.average(standing, members.astype(float))
        walk = options | {"start": Start.FORWARD, "restarts": 0, "max_sweeps": 0}
        starts = stacks.stack(now, _weights.weight_matching(arch, one, target, **walk).element)
        found = jax.vmap(lambda start: _weights.weight_matching(arch, one, target, start=start, **options).element)(
            starts
        )
        candidates = jax.tree.map(lambda first, more: jnp.concatenate([first[None], more]), now, found)
        # All compared by one program: what stands where it stood must not seem closer by a rounding.
        moved = jax.vmap(lambda element: symmetry.act(arch, element, one))(candidates)
        similarity = jax.vmap(lambda there: _weights.similarity(arch, there, target))(moved)
        best = jnp.argmax(similarity.at[0].add(TIE * jnp.finfo(similarity.dtype).eps))
        elements, standing = jax.tree.map(
            lambda leaf, value: leaf.at[index].set(value),
            (elements, standing),
            stacks.member((candidates, moved), best),
        )
        return (elements, standing, rounds), best > 0

    def once(state: tuple[Element, Any, Array, Array]) -> tuple[Element, Any, Array, Array]:
        (elements, standing, rounds), moved = jax.lax.scan(turn, state[:3], jnp.arange(count))
        return elements, standing, rounds + 1, ~moved.any() & (rounds >= 0)

    def unfinished(state: tuple[Element, Any, Array, Array]) -> Array:
        return ~state[3] & (state[2] < max_rounds)

    # Round -1 is the one to the reference, so that one program serves both.
    begin = (itself, jax.tree.map(jnp.asarray, stack), jnp.asarray(-1), jnp.asarray(False))
    elements, _, rounds, converged = jax.lax.while_loop(unfinished, once, begin)
    return elements, rounds, converged


def _frame(arch: Architecture, stack: Any, elements: Element, rounds: Array, converged: Array) -> Frame:
    aligned = _act(arch, elements, stack)
    mean = merge.average(aligned)
    # As they stand: without positive layers nothing is balanced.
    free, center = _without_positive(arch), stacks.at_least_float32(mean)
    similarity = jax.vmap(lambda one: _weights.similarity(free, one, center))(stacks.at_least_float32(aligned))
    return Frame(elements, aligned, mean, similarity, rounds, converged)


def _without_positive(arch: Architecture) -> Architecture:
    """The architecture whose elements are permutations and signs, isometries all."""
    return architecture.restrict(arch, Scaling.SIGN)


def _act(arch: Architecture, elements: Element, stack: Any) -> Any:
    return jax.vmap(lambda element, one: symmetry.act(arch, element, one))(elements, stack)


def _check_stack(arch: Architecture, stack: Any, name: str) -> int:
    """Checks a stack of networks, their values where they are at hand, and returns how many it holds."""
    if not arch.hidden:
        raise ValueError(
            f"{arch.name!r} has no hidden neurons, so that all its networks have one frame: merge them as they are."
        )
    count = stacks.count(stack, least=2, name=name)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(stack)):
        architecture.check_stack(arch, stack, name=name)
    return count

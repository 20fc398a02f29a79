"""Weight matching: the group element that brings one network closest to another.

Maximizes <act(Q, params), target> over the group by coordinate ascent, one hidden neuron layer at a time
(Ainsworth et al. 2023, arXiv 2209.04836, algorithm 1; with signs as Boufalis et al. 2025, arXiv 2511.12601), both
networks in their norm-balanced gauge, which settles the positive scales. Permutations and signs are isometries, so that
is the smallest squared distance too. Everything is jit- and vmap-able; the assignment solver is an argument.
"""

import enum
import functools
import string
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jax_scalegmn import architecture, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Scaling
from jax_scalegmn.matching import assignment
from jax_scalegmn.matching.assignment import Assign
from jax_scalegmn.symmetry import Element, canonical
from jax_scalegmn.types import Key, Params


class Start(enum.Enum):
    """Where coordinate ascent begins."""

    IDENTITY = "identity"
    """Every neuron matched to the one at its own place."""
    FORWARD = "forward"
    """Layer by layer from the input, each matched by the parameters whose other axis is settled already."""


class Matching(NamedTuple):
    """What a matcher found.

    Attributes:
      element: `symmetry.act(arch, element, params)` is the matched network.
      similarity: of the matched network and the target, by `similarity`: comparable between methods, starts, scales.
      sweeps: passes over the hidden layers that were made; of methods that train, steps.
      converged: whether the last sweep changed nothing.
    """

    element: Element
    similarity: Float[Array, "*networks"]
    sweeps: Int[Array, "*networks"]
    converged: Bool[Array, "*networks"]


def weight_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    key: Key | None = None,
    *,
    permute: bool = True,
    scale: bool = True,
    start: Start | Element = Start.FORWARD,
    restarts: int = 0,
    max_sweeps: int = 100,
    assign: Assign | None = None,
) -> Matching:
    """The group element under which `params` come closest to `target`.

    A hidden layer's score is C[i, j] = <target's parameters at neuron i, params' at neuron j>, the other layers as
    matched so far. With signs the assignment maximizes |C| and the sign is C's at the matched place (+1 where C is
    0, so that no neuron is lost); parameters that no sign touches (power 0) count as they are.

    With positive scales g, the networks are compared where every neuron's incoming and outgoing norms are equal
    (`symmetry.balance`), and the element is g_target^-1 Q g_params: act(element, params) is in the target's gauge.
    The action is linear, so that merging there and merging in the balanced gauge give one function.

    Args:
      arch: of both networks.
      params: the network to transform.
      target: the network to come close to.
      key: consumed by restarts.
      permute: whether neurons may be permuted.
      scale: whether signs (SIGN layers) and positive scales (POSITIVE layers) may be used. Without, networks are
        matched as they come, by permutations.
      start: where to begin. FORWARD recovers a planted element exactly; IDENTITY can end in a local optimum; an
        element is improved, its positive scales apart, which the gauge settles.
      restarts: further starts from random permutations and signs; the most similar network of all starts wins.
      max_sweeps: the most sweeps; 0 gives the start itself.
      assign: `assignment.hungarian` (on the device) or `assignment.scipy` (on the host), or another of that form; None
        for `assignment.default` of each layer's width.

    Raises:
      ValueError: if a network does not fit the architecture, or on restarts without a key.
    """
    source = stacks.at_least_float32(architecture.unpack(arch, params))
    goal = stacks.at_least_float32(architecture.unpack(arch, target, name="target"))
    if restarts < 0 or (restarts and key is None) or max_sweeps < 0:
        raise ValueError(
            f"restarts is {restarts}, max_sweeps {max_sweeps} and key {key}; expected numbers >= 0, and a key for "
            "restarts, like jax.random.key(0)."
        )
    begin = start if isinstance(start, Element) else None
    if begin is not None:
        symmetry.check(arch, begin)
    forward = start is Start.FORWARD
    return _weight_matching(arch, source, goal, begin, key, forward, permute, scale, restarts, max_sweeps, assign)


def canonical_matching(arch: Architecture, params: Params, target: Params) -> Matching:
    """Both networks' closed-form canonical elements, one undone: c_target^-1 c_params, without any search.

    Exact for members of one orbit; of other networks it matches what `canonical.element` happens to sort alike. N
    networks need N canonical elements, not N^2 matchings.

    Raises:
      ValueError: if a network does not fit the architecture.
    """
    theirs = canonical.element(arch, target).element
    element = symmetry.compose(arch, symmetry.inverse(arch, theirs), canonical.element(arch, params).element)
    matched = symmetry.act(arch, element, params)
    return Matching(element, similarity(arch, matched, target), jnp.asarray(0), jnp.asarray(True))


def unmatched(arch: Architecture, params: Params, target: Params) -> Matching:
    """The identity, beside which what methods find is judged: both networks as they come.

    Raises:
      ValueError: if a network does not fit the architecture.
    """
    return Matching(symmetry.identity(arch), similarity(arch, params, target), jnp.asarray(0), jnp.asarray(True))


def similarity(arch: Architecture, params: Params, target: Params) -> Float[Array, ""]:
    """The cosine <a, b> / (|a| |b|) of two networks, each in its norm-balanced gauge, in [-1, 1]; 0 for zeros.

    So it does not depend on positive scales: what different methods and starts reach can be compared.

    Raises:
      ValueError: if a network does not fit the architecture.
    """
    balanced = [symmetry.balanced(arch, one) for one in (params, target)]
    return _cosine(*(architecture.unpack(arch, one) for one in balanced))


def align(arch: Architecture, params: Params, target: Params, **options: Any) -> dict[str, Any]:
    """`params` moved next to `target` by the element of `weight_matching`, which takes the same options."""
    return symmetry.act(arch, weight_matching(arch, params, target, **options).element, params)


def orbit_distance(arch: Architecture, params: Params, target: Params, **options: Any) -> Float[Array, ""]:
    """||target - act(Q, params)||^2 / ||params||^2 with the element Q of `weight_matching`, which has the same options.

    How far `target` is from the orbit of `params`, 0 for a member. The gradient flows to `target` alone: it is
    stopped through the assignment and the original.
    """
    nearest = jax.lax.stop_gradient(align(arch, *jax.lax.stop_gradient((params, target)), **options))
    values = architecture.unpack(arch, nearest)
    gaps = [a - b for a, b in zip(architecture.unpack(arch, target, name="target"), values, strict=True)]
    size = optax.tree.vdot(values, values)
    return optax.tree.vdot(gaps, gaps) / jnp.where(size > 0, size, 1)


# --- private ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=range(5, 11))
def _weight_matching(
    arch: Architecture,
    source: list[Array],
    goal: list[Array],
    begin: Element | None,
    key: Key | None,
    forward: bool,
    permute: bool,
    scale: bool,
    restarts: int,
    max_sweeps: int,
    assign: Assign | None,
) -> Matching:
    ours, theirs = (symmetry.balance(arch, architecture.pack(arch, values)) for values in (source, goal))
    balanced, target = _moved(arch, ours, source), _moved(arch, theirs, goal)
    # Positive scales are settled by the gauge: from here on elements are permutations and signs, isometries all.
    best = _best_of_layer(
        arch, *((balanced, target) if scale else (source, goal)), permute=permute, scale=scale, assign=assign
    )

    def ascend(element: Element) -> Matching:
        element, sweeps, converged = _ascend(arch, element, best, max_sweeps)
        return Matching(element, _cosine(_moved(arch, element, balanced), target), sweeps, converged)

    first = symmetry.identity(arch) if begin is None else _signs_of(begin) if scale else _unscaled(begin)
    if forward:
        first = _walk_forward(arch, first, best)
    if restarts and key is not None:
        drawn = jax.vmap(lambda k: symmetry.random(arch, k, permute=permute, scale=scale, log_scale_std=0.0))
        starts = jax.tree.map(
            lambda one, more: jnp.concatenate([one[None].astype(more.dtype), more]),
            first,
            drawn(jax.random.split(key, restarts)),
        )
        found = jax.lax.map(ascend, starts)
        found = jax.tree.map(lambda leaf: leaf[jnp.argmax(found.similarity)], found)
    else:
        found = ascend(first)
    if not scale:
        return found
    whole = symmetry.compose(arch, symmetry.inverse(arch, theirs), symmetry.compose(arch, found.element, ours))
    return found._replace(element=whole)


Best: TypeAlias = Callable[[Element, NeuronLayer, set[str] | None], tuple[Array, Array]]


def _walk_forward(arch: Architecture, element: Element, best: Best) -> Element:
    """One walk from the inputs, each layer matched by the parameters whose other axis is settled already."""
    settled = set(arch.inputs)
    for neurons in arch.hidden:
        element = _replace(element, neurons.name, *best(element, neurons, settled))
        settled.add(neurons.name)
    return element


def _ascend(arch: Architecture, element: Element, best: Best, max_sweeps: int) -> tuple[Element, Array, Array]:
    """Sweeps over the hidden layers until one changes nothing: the element, the sweeps, whether it converged."""

    def sweep(state: tuple[Element, Array, Array]) -> tuple[Element, Array, Array]:
        before, sweeps, _ = state
        after = before
        for neurons in arch.hidden:
            after = _replace(after, neurons.name, *best(after, neurons, None))
        # Solvers differ in their integers.
        after = jax.tree.map(lambda old, new: new.astype(old.dtype), before, after)
        same = [jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
        # The constant serves networks without hidden layers.
        return after, sweeps + 1, jnp.stack([jnp.asarray(True), *same]).all()

    def unfinished(state: tuple[Element, Array, Array]) -> Array:
        return ~state[2] & (state[1] < max_sweeps)

    return jax.lax.while_loop(unfinished, sweep, (element, jnp.asarray(0), jnp.asarray(False)))


def _best_of_layer(
    arch: Architecture, source: list[Array], goal: list[Array], *, permute: bool, scale: bool, assign: Assign | None
) -> Best:
    """The exact optimum over one layer, the others fixed: (permutation, scale)."""

    def best(element: Element, neurons: NeuronLayer, settled: set[str] | None) -> tuple[Array, Array]:
        # Apart: what a sign of the neuron flips, and what it does not touch (power 0, as before a normalization).
        flipping = fixed = jnp.zeros((neurons.width, neurons.width))
        for parameter, value, wanted in zip(arch.parameters, source, goal, strict=True):
            powers = {axis.neurons: axis.power for axis in parameter.neuron_axes}
            others = powers.keys() - {neurons.name}
            if neurons.name in powers and (settled is None or settled >= others):
                score = _score(
                    parameter, neurons.name, symmetry.act_on_others(element, parameter, neurons.name, value), wanted
                )
                flipping, fixed = (flipping, fixed + score) if powers[neurons.name] == 0 else (flipping + score, fixed)
        signed = scale and neurons.scaling is Scaling.SIGN
        order = jnp.arange(neurons.width)
        if permute:
            solve = assignment.default(neurons.width) if assign is None else assign
            order = solve((jnp.abs(flipping) if signed else flipping) + fixed)
        sign = jnp.ones(neurons.width)
        if signed:
            sign = jnp.where(jnp.take_along_axis(flipping, order[:, None], 1)[:, 0] < 0, -1.0, 1.0)
        return order, sign

    return best


def _score(parameter: architecture.Parameter, name: str, value: Array, wanted: Array) -> Float[Array, "n n"]:
    """<wanted at neuron i, value at neuron j>, summed over all other axes."""
    shape: list[int] = []
    left, right = [], []
    letters = iter(string.ascii_lowercase)
    for size, axis in zip(value.shape, parameter.axes, strict=True):
        if isinstance(axis, Axis) and axis.neurons == name:
            shape += [axis.repeat, size // axis.repeat]
            repeat = next(letters)
            left += [repeat, "I"]
            right += [repeat, "J"]
        else:
            shape.append(size)
            left.append(next(letters))
            right.append(left[-1])
    equation = f"{''.join(left)},{''.join(right)}->IJ"
    return jnp.einsum(equation, wanted.reshape(shape), value.reshape(shape), precision="highest")


def _replace(element: Element, name: str, permutation: Array, scale: Array) -> Element:
    return Element(element.permutation | {name: permutation}, element.scale | {name: scale})


def _signs_of(element: Element) -> Element:
    """The element without its positive scales."""
    return Element(element.permutation, {name: jnp.where(s < 0, -1.0, 1.0) for name, s in element.scale.items()})


def _unscaled(element: Element) -> Element:
    return Element(element.permutation, jax.tree.map(jnp.ones_like, element.scale))


def _moved(arch: Architecture, element: Element, values: list[Array]) -> list[Array]:
    return architecture.unpack(arch, symmetry.act(arch, element, architecture.pack(arch, values)))


def _cosine(left: list[Array], right: list[Array]) -> Array:
    norms = jnp.sqrt(optax.tree.vdot(left, left)) * jnp.sqrt(optax.tree.vdot(right, right))
    return optax.tree.vdot(left, right) / jnp.where(norms > 0, norms, 1)

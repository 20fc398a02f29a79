"""Weight matching: the group element that brings one network closest to another.

Maximises <act(Q, params), target> over the group by coordinate ascent, one hidden neuron layer at a time
(Ainsworth et al. 2023, arXiv 2209.04836, algorithm 1; with signs as Boufalis et al. 2025, arXiv 2511.12601). The
element's action is an isometry for permutations and signs, so that is the smallest squared distance too. Everything
is jit- and vmap-able; the assignment solver is an argument.
"""

import enum
import string
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, Bool, Float, Int

from jax_scalegmn import architecture, symmetry
from jax_scalegmn.architecture import Architecture, Axis, Neurons, Scaling
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params

# A score (row: neuron of the target, column: neuron of params) -> the column of each row that maximises the sum.
Assign: TypeAlias = Callable[[Float[Array, "n n"]], Int[Array, " n"]]


class Start(enum.Enum):
    """Where coordinate ascent begins."""

    IDENTITY = "identity"
    """Every neuron matched to the one at its own place."""
    FORWARD = "forward"
    """Layer by layer from the input, each matched by the parameters whose other axis is settled already."""


class Matching(NamedTuple):
    """What matching found.

    Attributes:
      element: `symmetry.act(arch, element, params)` is the matched network.
      similarity: <matched, target> / (|matched| |target|), in [-1, 1].
      sweeps: passes over the hidden layers that were made.
      converged: whether the last sweep changed nothing.
    """

    element: Element
    similarity: Float[Array, "*models"]
    sweeps: Int[Array, "*models"]
    converged: Bool[Array, "*models"]


def hungarian(score: Float[Array, "n n"]) -> Int[Array, " n"]:
    """The optimal assignment on the device, by `optax.assignment.hungarian_algorithm`."""
    rows, columns = optax.assignment.hungarian_algorithm(-score)
    return columns[jnp.argsort(rows)]


def scipy_assignment(score: Float[Array, "n n"]) -> Int[Array, " n"]:
    """The optimal assignment on the host, by `scipy.optimize.linear_sum_assignment`."""

    def solve(score: Array) -> np.ndarray:
        flat = np.asarray(score).reshape(-1, *score.shape[-2:])
        columns = [scipy.optimize.linear_sum_assignment(one, maximize=True)[1] for one in flat]
        return np.asarray(columns, np.int32).reshape(score.shape[:-1])

    shape = jax.ShapeDtypeStruct(score.shape[:-1], jnp.int32)
    return jax.pure_callback(solve, shape, score, vmap_method="expand_dims")


def weight_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    *,
    permute: bool = True,
    flip: bool = True,
    start: Start = Start.FORWARD,
    max_sweeps: int = 100,
    assign: Assign = hungarian,
) -> Matching:
    """The group element under which `params` come closest to `target`.

    A hidden layer's score is C[i, j] = <target's parameters at neuron i, params' at neuron j>, the other layers as
    matched so far. With signs the assignment maximises |C| and the sign is C's at the matched place (+1 where C is
    0, so that no neuron is lost); parameters that no sign touches (power 0) count as they are. Positive scales are left
    at 1.

    Args:
      arch: of both networks.
      params: the network to transform.
      target: the network to come close to.
      permute: whether neurons may be permuted.
      flip: whether signs may be flipped, in the layers whose group is SIGN.
      start: where to begin. FORWARD recovers a planted element exactly; IDENTITY can end in a local optimum.
      max_sweeps: the most sweeps; 0 gives the start itself.
      assign: `hungarian` (on the device) or `scipy_assignment` (on the host), or another of that form.

    Raises:
      ValueError: if a network does not fit the architecture.
    """
    source = architecture.unpack(arch, params)
    goal = architecture.unpack(arch, target, name="target")
    best = _best_of_layer(arch, source, goal, permute=permute, flip=flip, assign=assign)

    element = symmetry.identity(arch)
    if start is Start.FORWARD:
        settled = {
            neurons.name for neurons in arch.neurons if neurons.scaling is Scaling.FIXED and _sends(arch, neurons)
        }
        for neurons in arch.hidden:
            element = _replace(element, neurons.name, *best(element, neurons, settled))
            settled.add(neurons.name)

    def sweep(state: tuple[Element, Array, Array]) -> tuple[Element, Array, Array]:
        before, _, sweeps = state
        after = before
        for neurons in arch.hidden:
            after = _replace(after, neurons.name, *best(after, neurons, None))
        same = [jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
        # The constant serves networks without hidden layers.
        return after, jnp.stack([jnp.asarray(True), *same]).all(), sweeps + 1

    def unfinished(state: tuple[Element, Array, Array]) -> Array:
        return ~state[1] & (state[2] < max_sweeps)

    begin = (element, jnp.asarray(False), jnp.asarray(0))
    element, converged, sweeps = jax.lax.while_loop(unfinished, sweep, begin)
    matched = architecture.unpack(arch, symmetry.act(arch, element, params))
    norms = jnp.sqrt(_inner(matched, matched)) * jnp.sqrt(_inner(goal, goal))
    similarity = _inner(matched, goal) / jnp.where(norms > 0, norms, 1)
    return Matching(element, similarity, sweeps, converged)


def align(arch: Architecture, params: Params, target: Params, **options: Any) -> dict[str, dict[str, Array]]:
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
    size = _inner(values, values)
    return _inner(gaps, gaps) / jnp.where(size > 0, size, 1)


# --- private ------------------------------------------------------------------------------------------------------


def _best_of_layer(
    arch: Architecture, source: list[Array], goal: list[Array], *, permute: bool, flip: bool, assign: Assign
) -> Callable[[Element, Neurons, set[str] | None], tuple[Array, Array]]:
    """The exact optimum over one layer, the others fixed: (permutation, scale)."""

    def best(element: Element, neurons: Neurons, settled: set[str] | None) -> tuple[Array, Array]:
        # Apart: what a sign of the neuron flips, and what it does not touch (power 0, as before a normalisation).
        flipping = fixed = jnp.zeros((neurons.width, neurons.width))
        for parameter, value, wanted in zip(arch.parameters, source, goal, strict=True):
            powers = {axis.neurons: axis.power for axis in parameter.neuron_axes}
            others = powers.keys() - {neurons.name}
            if neurons.name in powers and (settled is None or settled >= others):
                score = _score(parameter, neurons.name, _partly_act(element, parameter, neurons.name, value), wanted)
                flipping, fixed = (flipping, fixed + score) if powers[neurons.name] == 0 else (flipping + score, fixed)
        signed = flip and neurons.scaling is Scaling.SIGN
        order = jnp.arange(neurons.width)
        if permute:
            order = assign((jnp.abs(flipping) if signed else flipping) + fixed)
        scale = jnp.ones(neurons.width)
        if signed:
            scale = jnp.where(jnp.take_along_axis(flipping, order[:, None], 1)[:, 0] < 0, -1.0, 1.0)
        return order, scale

    return best


def _partly_act(element: Element, parameter: architecture.Parameter, skip: str, value: Array) -> Array:
    """The element's action on one parameter, on all axes but those of the layer `skip`."""
    for position, axis in enumerate(parameter.axes):
        if isinstance(axis, Axis) and axis.neurons != skip and axis.neurons in element.permutation:
            value = symmetry.act_on_axis(element, axis, position, value)
    return value


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
    return jnp.einsum(equation, wanted.reshape(shape), value.reshape(shape))


def _sends(arch: Architecture, neurons: Neurons) -> bool:
    return any(p.neuron_axes[0].neurons == neurons.name for p in arch.parameters if len(p.neuron_axes) == 2)


def _replace(element: Element, name: str, permutation: Array, scale: Array) -> Element:
    return Element(element.permutation | {name: permutation}, element.scale | {name: scale})


def _inner(left: list[Array], right: list[Array]) -> Array:
    return jnp.stack([jnp.vdot(a, b) for a, b in zip(left, right, strict=True)]).sum()

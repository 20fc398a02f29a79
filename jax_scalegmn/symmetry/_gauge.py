"""The norm-balanced gauge: of all positive rescalings of one network, the one with the smallest weights.

Positive scales move a relu network along its orbit and leave its function unchanged, so that a distance between the
weights of two networks says little. In this gauge every orbit has one member up to permutations, and distances between
those members are comparable.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_scalegmn import architecture, stacks
from jax_scalegmn.architecture import Architecture, Axis, Scaling
from jax_scalegmn.symmetry import _elements
from jax_scalegmn.symmetry._elements import Element
from jax_scalegmn.types import Params


@stacks.any_container("params")
def balance(arch: Architecture, params: Params, *, max_sweeps: int = 1000) -> Element:
    """The positive rescaling after which every neuron's incoming and outgoing norms are equal.

    It minimizes the network's squared norm over its orbit, sum_p |p|^2 exp(2 sum_axes power log s), which is convex
    in log s and has one minimum (Stock et al. 2019, arXiv 1902.10416, section 3). For one layer the closed form is
    s^4 = |outgoing|^2 / |incoming|^2, where biases count as incoming; sweeps over the layers go on until no log s
    changes by more than eight machine epsilons. A neuron that has weights on one side alone, as after pruning, gets
    norm 1 there. That is the minimum of the squared norm with 2 log s of this neuron subtracted (incoming weights
    alone) or added (outgoing weights alone). A neuron without any weights keeps scale 1.

    Args:
      arch: The architecture.
      params: The network; `jax.vmap` for many.
      max_sweeps: The largest number of sweeps over the layers. Chains of a few layers need about ten.

    Returns:
      The element: identity permutations, positive scales in POSITIVE and NONZERO layers, 1 in others.

    Raises:
      ValueError: If params do not fit the architecture.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {
    ...     "Dense_0": {"kernel": jnp.array([[1.0, 3.0]]), "bias": jnp.zeros(2)},
    ...     "Dense_1": {"kernel": jnp.array([[4.0], [3.0]]), "bias": jnp.zeros(1)},
    ... }
    >>> sg.symmetry.balance(sg.mlp((1, 2, 1)), params).scale["hidden_0"].round(4).tolist()
    [2.0, 1.0]
    """
    element = _elements.identity(arch)
    sizes = _squared_sizes(arch, params)
    if not sizes:
        return element
    powers = tuple(tuple(axes.items()) for axes, _ in sizes)
    logs = _settled(arch, [size for _, size in sizes], powers, max_sweeps)
    return Element(element.permutation, element.scale | {name: jnp.exp(values) for name, values in logs.items()})


@stacks.any_container("params", returns=True)
def balanced(arch: Architecture, params: Params) -> dict[str, Any]:
    """The network in its balanced gauge: the same function with the smallest weights of all its rescalings.

    Args:
      arch: The architecture.
      params: The network; `jax.vmap` for many.

    Returns:
      The balanced params.

    Raises:
      ValueError: If params do not fit the architecture.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {
    ...     "Dense_0": {"kernel": jnp.array([[1.0]]), "bias": jnp.zeros(1)},
    ...     "Dense_1": {"kernel": jnp.array([[4.0]]), "bias": jnp.zeros(1)},
    ... }
    >>> balanced = sg.symmetry.balanced(sg.mlp((1, 1, 1)), params)
    >>> balanced["Dense_0"]["kernel"].round(4).item(), balanced["Dense_1"]["kernel"].round(4).item()
    (2.0, 2.0)
    """
    return _elements.act(arch, balance(arch, params), params)


class BalancedPair(NamedTuple):
    """Two networks in their balanced gauges, between which only permutations and signs are left to find.

    Attributes:
      arch: The architecture with permutations and signs alone (`architecture.restrict` to SIGN), isometries all.
      source: The balanced params, in float32 or wider.
      goal: The balanced target, in float32 or wider.
      to_source: The element that balanced the params: positive scales.
      from_goal: The element that takes the balanced target back to the given one: positive scales.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> params, target = (sg.network.init(arch, key) for key in jax.random.split(jax.random.key(0)))
    >>> pair = sg.symmetry.balanced_pair(arch, params, target)
    >>> pair.arch.hidden[0].scaling.value
    'permutation'
    """

    arch: Architecture
    source: dict[str, Any]
    goal: dict[str, Any]
    to_source: Element
    from_goal: Element

    def between_given(self, element: Element) -> Element:
        """The element between the given networks that `element` is between the balanced ones.

        With e from `source` to `goal` it is g_target^-1 e g_params: act(it, params) is in the target's own gauge.
        """
        return _elements.compose(self.arch, self.from_goal, _elements.compose(self.arch, element, self.to_source))

    def in_given_gauge(self, params: Params) -> dict[str, Any]:
        """A network of the balanced gauge, like one between `goal` and `source`, in that of the target as given."""
        return _elements.act_in_any_gauge(self.arch, self.from_goal, params)


@stacks.any_container("params", "target")
def balanced_pair(arch: Architecture, params: Params, target: Params) -> BalancedPair:
    """Brings two networks into their balanced gauges, for methods that search for permutations and signs.

    Search on `pair.source`, `pair.goal` and `pair.arch`; then `pair.between_given` returns the element between the
    networks as they were given, positive scales included.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "relu")
    >>> target = sg.network.init(arch, jax.random.key(0))
    >>> params = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1), permute=False), target)
    >>> pair = sg.symmetry.balanced_pair(arch, params, target)
    >>> jax.numpy.allclose(pair.source["Dense_0"]["kernel"], pair.goal["Dense_0"]["kernel"], atol=1e-5).item()
    True
    >>> element = pair.between_given(sg.symmetry.identity(arch))
    >>> aligned = sg.symmetry.act(arch, element, params)
    >>> jax.numpy.allclose(aligned["Dense_0"]["kernel"], target["Dense_0"]["kernel"], atol=1e-5).item()
    True

    Args:
      arch: The architecture of both networks.
      params: The network that will be moved.
      target: The network that it is compared with.

    Returns:
      The balanced networks and the way back.

    Raises:
      ValueError: If a network does not fit the architecture.
    """
    given = architecture.unpack(arch, params), architecture.unpack(arch, target, name="target")
    source, goal = (architecture.pack(arch, stacks.at_least_float32(values)) for values in given)
    to_source, to_goal = balance(arch, source), balance(arch, goal)
    return BalancedPair(
        architecture.restrict(arch, Scaling.SIGN),
        _elements.act(arch, to_source, source),
        _elements.act(arch, to_goal, goal),
        to_source,
        _elements.inverse(arch, to_goal),
    )


# --- private ------------------------------------------------------------------------------------------------------


def _squared_sizes(arch: Architecture, params: Params) -> list[tuple[dict[str, int], Array]]:
    """For every parameter that a positive scale changes: the powers of its axes, and its squares summed over the rest.

    The array of sums has one axis for each entry of the mapping of powers, in its order.
    """
    positive = {neurons.name for neurons in arch.hidden if neurons.scaling.has_sizes}
    sizes = []
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        powers = {axis.neurons: axis.power for axis in parameter.neuron_axes if axis.neurons in positive and axis.power}
        if not powers:
            continue
        squares = jnp.square(jax.lax.stop_gradient(stacks.at_least_float32(value)))
        shape: list[int] = []
        summed: list[int] = []
        for size, axis in zip(value.shape, parameter.axes, strict=True):
            if isinstance(axis, Axis) and axis.neurons in powers:
                summed.append(len(shape))
                shape += [axis.repeat, size // axis.repeat]
            else:
                summed.append(len(shape))
                shape.append(size)
        sizes.append((powers, squares.reshape(shape).sum(tuple(summed))))
    return sizes


@functools.partial(jax.jit, static_argnames="powers")
def _settled(
    arch: Architecture, squares: list[Array], powers: tuple[tuple[tuple[str, int], ...], ...], max_sweeps: int | Array
) -> dict[str, Array]:
    """By layer the logarithms of the balancing scales, from what `_squared_sizes` returns; compiled once."""
    layers = [neurons.name for neurons in arch.hidden if neurons.scaling.has_sizes]
    sizes = [(dict(axes), size) for axes, size in zip(powers, squares, strict=True)]
    touching = {name: [(axes, size) for axes, size in sizes if name in axes] for name in layers}
    dtype = jnp.result_type(*(size for _, size in sizes))
    zeros = {name: jnp.zeros(arch.neuron_layer(name).width, dtype) for name in layers}

    def sides(name: str, logs: dict[str, Array]) -> tuple[Array, Array]:
        incoming, outgoing = (_total(touching[name], name, power, logs) for power in (1, -1))
        return incoming, outgoing

    given = {name: sides(name, zeros) for name in layers}
    one_sided = {name: (incoming > 0) != (outgoing > 0) for name, (incoming, outgoing) in given.items()}

    def sweep(state: tuple[dict[str, Array], Array, Array]) -> tuple[dict[str, Array], Array, Array]:
        logs, _, sweeps = state
        largest = jnp.zeros((), dtype)
        for name in layers:
            step = _step(*sides(name, logs), one_sided[name])
            logs = logs | {name: logs[name] + step.astype(dtype)}
            largest = jnp.maximum(largest, jnp.abs(step).max().astype(dtype))
        return logs, largest, sweeps + 1

    def unfinished(state: tuple[dict[str, Array], Array, Array]) -> Array:
        return (state[1] > 8 * jnp.finfo(dtype).eps) & (state[2] < max_sweeps)

    logs, *_ = jax.lax.while_loop(unfinished, sweep, (zeros, jnp.asarray(jnp.inf, dtype), jnp.asarray(0)))
    return logs


def _step(incoming: Float[Array, " n"], outgoing: Float[Array, " n"], one_sided: Bool[Array, " n"]) -> Array:
    """What is added to log s, by a layer's squared norms of both sides: equal norms, or norm 1 of the only side."""
    # While neighboring layers balance each other a sum may overflow or underflow; its logarithm would be NaN.
    known = [(side > 0) & jnp.isfinite(side) for side in (incoming, outgoing)]
    below, above = (_log(side, usual) for side, usual in zip((incoming, outgoing), known, strict=True))
    to_norm_1 = jnp.where(one_sided, 0.5 * (above - below), 0.0)  # the logarithm of the other side is 0
    return jnp.where(known[0] & known[1], 0.25 * (above - below), to_norm_1)


def _total(
    touching: list[tuple[dict[str, int], Array]], name: str, power: int, logs: Mapping[str, Array]
) -> Float[Array, " n"]:
    """The squared norm of each neuron's parameters with that power, under the scales exp(logs)."""
    total = jnp.zeros(logs[name].shape, logs[name].dtype)
    for powers, size in touching:
        if powers[name] == power:
            letters = "ab"[: len(powers)]
            factors = [jnp.exp(2 * exponent * logs[layer]) for layer, exponent in powers.items()]
            own = letters[list(powers).index(name)]
            total += jnp.einsum(f"{letters},{','.join(letters)}->{own}", size, *factors, precision="highest")
    return total


def _log(value: Array, usual: Array) -> Array:
    return jnp.log(jnp.where(usual, value, 1))

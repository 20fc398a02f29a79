"""The norm-balanced gauge: of all positive rescalings of one network, the one with the smallest weights.

Positive scales move a relu network along its orbit without a change of its function, so that distances between
networks as they come say little. In this gauge every orbit has one member up to permutations, and distances between
those members say what the networks have in common.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import architecture, stacks
from jax_scalegmn.architecture import Architecture, Axis, Scaling
from jax_scalegmn.symmetry import _elements
from jax_scalegmn.symmetry._elements import Element
from jax_scalegmn.types import Params


def balance(arch: Architecture, params: Params, *, max_sweeps: int = 1000) -> Element:
    """The rescalings after which every POSITIVE neuron's incoming and outgoing norms are equal.

    They minimize the network's squared norm over its orbit, sum_p |p|^2 exp(2 sum_axes power log s), which is convex
    in log s and has one minimum (Stock et al. 2019, arXiv 1902.10416, section 3). Layer by layer the closed form is
    s^4 = |outgoing|^2 / |incoming|^2, with biases incoming; sweeps go on until no scale changes by more than eight
    roundings. A neuron without incoming or without outgoing weights keeps scale 1: no scale balances it.

    Args:
      arch: the architecture.
      params: of one network; `jax.vmap` for many.
      max_sweeps: the most passes over the layers. Chains of a few layers need some ten.

    Returns:
      The element: identity permutations, scale 1 in layers of other groups.

    Raises:
      ValueError: if params do not fit the architecture.
    """
    layers = [neurons.name for neurons in arch.hidden if neurons.scaling is Scaling.POSITIVE]
    element = _elements.identity(arch)
    sizes = _squared_sizes(arch, params)
    touching = {name: [(axes, size) for axes, size in sizes if name in axes] for name in layers}
    if not sizes:
        return element

    def sweep(state: tuple[dict[str, Array], Array, Array]) -> tuple[dict[str, Array], Array, Array]:
        logs, _, sweeps = state
        largest = jnp.zeros((), dtype)
        for name in layers:
            incoming, outgoing = (_total(touching[name], name, power, logs) for power in (1, -1))
            # Between neighbors that balance each other the two sums may leave float32; logarithms would then be NaN.
            usual = (incoming > 0) & (outgoing > 0) & jnp.isfinite(incoming) & jnp.isfinite(outgoing)
            step = jnp.where(usual, 0.25 * (_log(outgoing, usual) - _log(incoming, usual)), 0.0)
            logs = logs | {name: logs[name] + step.astype(dtype)}
            largest = jnp.maximum(largest, jnp.abs(step).max().astype(dtype))
        return logs, largest, sweeps + 1

    def unfinished(state: tuple[dict[str, Array], Array, Array]) -> Array:
        return (state[1] > 8 * jnp.finfo(dtype).eps) & (state[2] < max_sweeps)

    dtype = jnp.result_type(*(size for _, size in sizes))
    zeros = {name: jnp.zeros(arch.neuron_layer(name).width, dtype) for name in layers}
    logs, *_ = jax.lax.while_loop(unfinished, sweep, (zeros, jnp.asarray(jnp.inf, dtype), jnp.asarray(0)))
    return Element(element.permutation, element.scale | {name: jnp.exp(logs[name]) for name in layers})


def balanced(arch: Architecture, params: Params) -> dict[str, Any]:
    """The network in its balanced gauge: the same function with the smallest weights of all its rescalings."""
    return _elements.act(arch, balance(arch, params), params)


# --- private ------------------------------------------------------------------------------------------------------


def _squared_sizes(arch: Architecture, params: Params) -> list[tuple[dict[str, int], Array]]:
    """Of every parameter that a positive scale changes: the powers of its axes, and its squares summed over all else.

    The array has one axis for each entry of the mapping, in its order.
    """
    positive = {neurons.name for neurons in arch.hidden if neurons.scaling is Scaling.POSITIVE}
    found = []
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
        found.append((powers, squares.reshape(shape).sum(tuple(summed))))
    return found


def _total(
    touching: list[tuple[dict[str, int], Array]], name: str, power: int, logs: Mapping[str, Array]
) -> Float[Array, " n"]:
    """The squared norm of each neuron's parameters with that power, at the scales so far."""
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

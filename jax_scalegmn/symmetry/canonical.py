"""Canonical forms: one network for all that differ by a symmetry, in closed form.

Permutations, signs and positive scales are taken off; for the phases of sines see `symmetry.wrap_phase`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture, stacks
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter
from jax_scalegmn.symmetry import _elements, _gauge
from jax_scalegmn.symmetry._elements import Element
from jax_scalegmn.types import Params

__all__ = ["CanonicalElement", "element", "form"]


class CanonicalElement(NamedTuple):
    """The element that brings a network to its canonical form, and how certain the form is.

    Attributes:
      element: `symmetry.act(arch, element, params)` is the canonical form.
      margin: The distance to the nearest tie: the smallest gap between two neurons' keys, or between a key and its
        negative where the group has signs, relative to the root mean square of the keys in their layer. Below a few
        ulps (about 1e-6 in float32) the canonical form is numerically ambiguous; two equal neurons have margin 0.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> result = sg.symmetry.canonical.element(arch, sg.network.init(arch, jax.random.key(0)))
    >>> bool(result.margin > 1e-3)
    True
    """

    element: Element
    margin: Float[Array, ""]


@stacks.any_container("params")
def element(arch: Architecture, params: Params) -> CanonicalElement:
    """The element that takes every member of an orbit to one network, its canonical form.

    First positive scales are replaced by those of the norm-balanced gauge (`symmetry.balance`). Then, layer by layer
    from the inputs, every neuron gets a key: the product of its parameters whose other axis is in canonical order
    already with a fixed random direction. Where the group has signs they make the key positive. Neurons are sorted by
    their keys, the largest first.

    The order depends on single keys, so that two networks close to each other can have distant canonical forms. To
    compare networks use `matching.weight_matching`; this identifies members of one orbit.

    Args:
      arch: The architecture. Neuron layers of which no parameter leads back to the inputs keep their order, with margin
        0.
      params: The network; `jax.vmap` for many.

    Returns:
      The element and its margin.

    Raises:
      ValueError: If params do not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> moved = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), params)
    >>> forms = [sg.symmetry.act(arch, sg.symmetry.canonical.element(arch, p).element, p) for p in (params, moved)]
    >>> jax.numpy.allclose(forms[0]["Dense_0"]["kernel"], forms[1]["Dense_0"]["kernel"], atol=1e-6).item()
    True
    """
    scales = _gauge.balance(arch, params)
    values = architecture.unpack(arch, _elements.act(arch, scales, params))
    isometry, settled = _elements.identity(arch), set(arch.inputs)
    margin = jnp.asarray(jnp.inf)
    for neurons in arch.hidden:
        flipping, fixed = _keys(arch, values, isometry, neurons, settled)
        signed = neurons.scaling.has_signs
        key = fixed + (jnp.abs(flipping) if signed else flipping)
        order = jnp.argsort(-key)
        size = jnp.sqrt(jnp.square(key).mean())
        gaps = [jnp.diff(-key[order]), jnp.abs(flipping)] if signed else [jnp.diff(-key[order])]
        nearest = jnp.concatenate([*gaps, size[None]]).min() / jnp.where(size > 0, size, 1)
        margin = jnp.minimum(margin, nearest)
        isometry.permutation[neurons.name] = order
        if signed:
            isometry.scale[neurons.name] = jnp.where(flipping[order] < 0, -1.0, 1.0)
        settled.add(neurons.name)
    return CanonicalElement(_elements.compose(arch, isometry, scales), margin)


@stacks.any_container("params", returns=True)
def form(arch: Architecture, params: Params) -> dict[str, Any]:
    """The canonical form of a network: one network for all members of its orbit, with the same function.

    Args:
      arch: The architecture.
      params: The network; `jax.vmap` for many.

    Returns:
      The params of the canonical form (see `element`).

    Raises:
      ValueError: If params do not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> moved = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), params)
    >>> forms = [sg.symmetry.canonical.form(arch, p)["Dense_0"]["kernel"] for p in (params, moved)]
    >>> jax.numpy.allclose(*forms, atol=1e-6).item()
    True
    """
    return _elements.act(arch, element(arch, params).element, params)


# --- private ------------------------------------------------------------------------------------------------------


def _keys(
    arch: Architecture, values: list[Any], isometry: Element, neurons: NeuronLayer, settled: set[str]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The keys of one layer's neurons in two parts: what a sign of the neuron flips, and what it does not touch.

    Only parameters whose other axis is among the `settled` layers count, with their permutations and signs so far,
    `isometry`.
    """
    flipping = fixed = jnp.zeros(neurons.width)
    for index, (parameter, value) in enumerate(zip(arch.parameters, values, strict=True)):
        axes = {axis.neurons: axis for axis in parameter.neuron_axes}
        if neurons.name in axes and axes.keys() - {neurons.name} <= settled:
            moved = _elements.act_on_others(isometry, parameter, neurons.name, value)
            key = _projected(parameter, neurons.name, moved, index)
            flipping, fixed = (flipping + key, fixed) if axes[neurons.name].shows_sign else (flipping, fixed + key)
    return flipping, fixed


def _projected(parameter: Parameter, neurons: str, value: Array, index: int) -> Float[Array, " n"]:
    """The product of each neuron's entries with a fixed direction, one for the parameter of that index."""
    position, axis = next(
        (i, axis) for i, axis in enumerate(parameter.axes) if isinstance(axis, Axis) and axis.neurons == neurons
    )
    entries = jnp.moveaxis(value, position, -1).reshape(-1, value.shape[position] // axis.repeat)
    direction = np.random.default_rng(index).normal(size=len(entries))
    return jnp.asarray(direction, entries.dtype) @ entries

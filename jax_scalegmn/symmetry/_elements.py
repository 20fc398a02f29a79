"""The symmetry group of an architecture: its elements and how they act on params.

An element carries, for every hidden neuron layer, a permutation and a scale. Neuron i of the transformed network is
neuron `permutation[i]` of the given one, times `scale[i]`: W'_l = Q_{l-1}^{-1} W_l Q_l and b'_l = b_l Q_l with
monomial matrices Q_l (arXiv 2406.10685, section 4). Only this module changes params by symmetry.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.types import Key, Params


class Element(NamedTuple):
    """One group element. Keys of both mappings: the names of the hidden neuron layers."""

    permutation: dict[str, Int[Array, "*networks n"]]
    scale: dict[str, Float[Array, "*networks n"]]


def identity(arch: Architecture) -> Element:
    """The element that changes nothing."""
    return Element(
        {neurons.name: jnp.arange(neurons.width) for neurons in arch.hidden},
        {neurons.name: jnp.ones(neurons.width) for neurons in arch.hidden},
    )


def random(
    arch: Architecture, key: Key, *, permute: bool = True, scale: bool = True, log_scale_std: float = 1.0
) -> Element:
    """A random element, each layer's drawn independently.

    Args:
      arch: the architecture.
      key: consumed.
      permute: uniform permutations (group P), or none.
      scale: uniform signs where the layer's group is SIGN, exp(log_scale_std * normal) where it is POSITIVE (group
        D), or none. With both: PD.
      log_scale_std: the standard deviation of the logarithm of positive scales.
    """
    element = identity(arch)
    for index, neurons in enumerate(arch.hidden):
        permutation_key, scale_key = jax.random.split(jax.random.fold_in(key, index))
        if permute:
            element.permutation[neurons.name] = jax.random.permutation(permutation_key, neurons.width)
        if scale:
            element.scale[neurons.name] = _random_scale(neurons, scale_key, log_scale_std)
    return element


def compose(arch: Architecture, left: Element, right: Element) -> Element:
    """The element that does `right` first: act(compose(left, right), p) = act(left, act(right, p))."""
    check(arch, left)
    check(arch, right)
    permutation, scale = {}, {}
    for neurons in arch.hidden:
        order = left.permutation[neurons.name]
        permutation[neurons.name] = right.permutation[neurons.name][order]
        scale[neurons.name] = left.scale[neurons.name] * right.scale[neurons.name][order]
    return Element(permutation, scale)


def inverse(arch: Architecture, element: Element) -> Element:
    """The element that undoes another."""
    check(arch, element)
    permutation = {neurons.name: jnp.argsort(element.permutation[neurons.name]) for neurons in arch.hidden}
    scale = {name: 1 / element.scale[name][order] for name, order in permutation.items()}
    return Element(permutation, scale)


def act(arch: Architecture, element: Element, params: Params) -> dict[str, Any]:
    """The transformed params: the same function, another copy of it.

    Args:
      arch: the architecture.
      element: of one network; `jax.vmap` for many.
      params: of one network.

    Raises:
      ValueError: if params or element do not fit the architecture.
    """
    check(arch, element)
    values = []
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        for position, axis in enumerate(parameter.axes):
            if isinstance(axis, Axis) and axis.neurons in element.permutation:
                value = act_on_axis(element, axis, position, value)
        values.append(value)
    return architecture.pack(arch, values)


def orbit(
    arch: Architecture, params: Params, key: Key, size: int, *, permute: bool = True, scale: bool = True
) -> dict[str, Any]:
    """`size` random copies of one network, every array with a leading axis [networks]."""
    keys = jax.random.split(key, size)
    return jax.vmap(lambda k: act(arch, random(arch, k, permute=permute, scale=scale), params))(keys)


def act_on_axis(element: Element, axis: Axis, position: int, value: Array) -> Array:
    """The action along one axis of one parameter; `act` is this on every axis."""
    order, scale = element.permutation[axis.neurons], element.scale[axis.neurons]
    offsets = jnp.arange(axis.repeat) * order.shape[0]
    value = jnp.take(value, (offsets[:, None] + order).reshape(-1), axis=position)
    if axis.power == 0:
        return value
    factor = jnp.tile(scale if axis.power > 0 else 1 / scale, axis.repeat).astype(value.dtype)
    return value * jnp.expand_dims(factor, [i for i in range(value.ndim) if i != position])


def act_on_others(element: Element, parameter: Parameter, neurons: str, value: Array) -> Array:
    """The action on one parameter along all axes but that of one neuron layer."""
    for position, axis in enumerate(parameter.axes):
        if isinstance(axis, Axis) and axis.neurons != neurons and axis.neurons in element.permutation:
            value = act_on_axis(element, axis, position, value)
    return value


def check(arch: Architecture, element: Element) -> None:
    """Checks that an element has a permutation and a scale for every hidden layer.

    Raises:
      ValueError: if it is of another architecture, or a batch.
    """
    for field, mapping in element._asdict().items():
        shapes = {name: jnp.shape(value) for name, value in mapping.items()}
        expected = {neurons.name: (neurons.width,) for neurons in arch.hidden}
        if shapes != expected:
            raise ValueError(
                f"element.{field} has layers {shapes}; {arch.name!r} expects {expected}. Use jax.vmap for a batch."
            )


# --- private ------------------------------------------------------------------------------------------------------


def _random_scale(neurons: NeuronLayer, key: Key, log_scale_std: float) -> Array:
    if neurons.scaling is Scaling.SIGN:
        return jax.random.rademacher(key, (neurons.width,), float)
    if neurons.scaling is Scaling.POSITIVE:
        return jnp.exp(log_scale_std * jax.random.normal(key, (neurons.width,)))
    return jnp.ones(neurons.width)

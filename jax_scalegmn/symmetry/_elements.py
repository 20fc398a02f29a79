"""The symmetry group of an architecture: its elements and how they act on params.

An element has a permutation and a scale for every hidden neuron layer. Neuron i of the transformed network is neuron
`permutation[i]` of the given one, times `scale[i]`: W'_l = Q_{l-1}^{-1} W_l Q_l and b'_l = b_l Q_l with monomial
matrices Q_l (arXiv 2406.10685, section 4). Only this module changes params by symmetry.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_scalegmn import architecture, stacks
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.types import Key, Params


class Element(NamedTuple):
    """One element of an architecture's symmetry group.

    Attributes:
      permutation: By hidden neuron layer: the given network's neuron at each place of the transformed one, [n].
      scale: By hidden neuron layer: the factor of the neuron at each place of the transformed network, [n].

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> sg.symmetry.random(sg.mlp((2, 3, 1), "tanh"), jax.random.key(0)).permutation["hidden_0"].shape
    (3,)
    """

    permutation: dict[str, Int[Array, "*networks n"]]
    scale: dict[str, Float[Array, "*networks n"]]


def identity(arch: Architecture) -> Element:
    """The element that changes nothing.

    Args:
      arch: The architecture.

    >>> import jax_scalegmn as sg
    >>> sg.symmetry.identity(sg.mlp((2, 3, 1))).permutation["hidden_0"].tolist()
    [0, 1, 2]
    """
    return Element(
        {neurons.name: jnp.arange(neurons.width) for neurons in arch.hidden},
        {neurons.name: jnp.ones(neurons.width) for neurons in arch.hidden},
    )


def random(
    arch: Architecture, key: Key, *, permute: bool = True, scale: bool = True, log_scale_std: float = 1.0
) -> Element:
    """Draws a random element, each layer independently.

    Args:
      arch: The architecture.
      key: A random key; it is consumed.
      permute: Whether to draw uniform permutations (group P).
      scale: Whether to draw scales (group D): uniform signs where the layer's group is SIGN, exp(log_scale_std *
        normal) where it is POSITIVE, products of both where it is NONZERO. With permutations the group is PD.
      log_scale_std: The standard deviation of the logarithm of positive scales.

    Returns:
      The element; `jax.vmap` over keys for a stack.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> element = sg.symmetry.random(sg.siren((2, 4, 1)), jax.random.key(0))
    >>> sorted(element.permutation["hidden_0"].tolist()), set(abs(element.scale["hidden_0"]).tolist())
    ([0, 1, 2, 3], {1.0})
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
    """The element that does `right` first: act(compose(left, right), p) = act(left, act(right, p)).

    Args:
      arch: The architecture.
      left: The element that acts second.
      right: The element that acts first.

    Raises:
      ValueError: If an element does not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> element = sg.symmetry.random(arch, jax.random.key(0))
    >>> there_and_back = sg.symmetry.compose(arch, sg.symmetry.inverse(arch, element), element)
    >>> there_and_back.permutation["hidden_0"].tolist(), there_and_back.scale["hidden_0"].tolist()
    ([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0])
    """
    _check_shapes(arch, left)
    _check_shapes(arch, right)
    permutation, scale = {}, {}
    for neurons in arch.hidden:
        order = left.permutation[neurons.name]
        permutation[neurons.name] = right.permutation[neurons.name][order]
        scale[neurons.name] = left.scale[neurons.name] * right.scale[neurons.name][order]
    return Element(permutation, scale)


def inverse(arch: Architecture, element: Element) -> Element:
    """The element that undoes another: act(inverse(e), act(e, p)) = p.

    Args:
      arch: The architecture.
      element: The element to undo.

    Raises:
      ValueError: If the element does not fit the architecture.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> element = sg.symmetry.Element({"hidden_0": jnp.array([2, 0, 1])}, {"hidden_0": jnp.array([1.0, 2.0, 4.0])})
    >>> back = sg.symmetry.inverse(sg.mlp((2, 3, 1)), element)
    >>> back.permutation["hidden_0"].tolist(), back.scale["hidden_0"].tolist()
    ([1, 2, 0], [0.5, 0.25, 1.0])
    """
    _check_shapes(arch, element)
    permutation = {neurons.name: jnp.argsort(element.permutation[neurons.name]) for neurons in arch.hidden}
    scale = {name: 1 / element.scale[name][order] for name, order in permutation.items()}
    return Element(permutation, scale)


@stacks.any_container("params", returns=True)
def act(arch: Architecture, element: Element, params: Params) -> dict[str, Any]:
    """Transforms a network by a group element: other params, the same function.

    W'_l = Q_{l-1}^{-1} W_l Q_l and b'_l = b_l Q_l with the monomial matrix Q_l of each layer (arXiv 2406.10685, section
    4).

    Args:
      arch: The architecture.
      element: The group element; `jax.vmap` for many.
      params: The network.

    Returns:
      The transformed params.

    Raises:
      ValueError: If params or element do not fit the architecture; where values are known (`stacks.is_concrete`), also
        if the element is not of its group, or has a scale so large or small that the params cannot hold it.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> moved = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), params)
    >>> bool((moved["Dense_0"]["kernel"] == params["Dense_0"]["kernel"]).all())
    False
    >>> images = [sg.network.render(arch, one, (4, 4)) for one in (params, moved)]
    >>> bool(abs(images[0] - images[1]).max() < 1e-5)
    True
    """
    check(arch, element)
    if stacks.is_concrete(element):
        _check_dtypes(arch, element, params)
    return act_in_any_gauge(arch, element, params)


def act_in_any_gauge(arch: Architecture, element: Element, params: Params) -> dict[str, Any]:
    """`act` without a look at values: a restricted architecture's params may be moved by positive scales as well."""
    values = []
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        for position, axis in enumerate(parameter.axes):
            if isinstance(axis, Axis) and axis.neurons in element.permutation:
                value = act_on_axis(element, axis, position, value)
        values.append(value)
    return architecture.pack(arch, values)


@stacks.any_container("params", returns=True)
def orbit(
    arch: Architecture, params: Params, key: Key, size: int, *, permute: bool = True, scale: bool = True
) -> dict[str, Any]:
    """Draws random networks with the function of a given one.

    Args:
      arch: The architecture.
      params: The network.
      key: A random key; it is consumed.
      size: How many networks to draw.
      permute: As in `random`.
      scale: As in `random`.

    Returns:
      The networks, every array with a leading axis [size].

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> sg.symmetry.orbit(arch, params, jax.random.key(1), 5)["Dense_0"]["kernel"].shape
    (5, 2, 3)
    """
    keys = jax.random.split(key, size)
    return jax.vmap(lambda k: act(arch, random(arch, k, permute=permute, scale=scale), params))(keys)


def act_on_axis(element: Element, axis: Axis, position: int, value: Array) -> Array:
    """The action along one axis of one parameter; `act` is this on every axis.

    Args:
      element: The group element.
      axis: The axis of the parameter, whose neuron layer is a hidden one.
      position: The position of that axis in the array.
      value: The parameter's array.

    Returns:
      The array, permuted and scaled along the axis.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> element = sg.symmetry.Element({"hidden_0": jnp.array([1, 0])}, {"hidden_0": jnp.array([1.0, -1.0])})
    >>> sg.symmetry.act_on_axis(element, sg.Axis("hidden_0", 1), 0, jnp.array([3.0, 5.0])).tolist()
    [5.0, -3.0]
    """
    order, scale = element.permutation[axis.neurons], element.scale[axis.neurons]
    offsets = jnp.arange(axis.repeat) * order.shape[0]
    value = jnp.take(value, (offsets[:, None] + order).reshape(-1), axis=position)
    if axis.power == 0:
        return value
    scale = jnp.abs(scale) if axis.unsigned else scale
    factor = jnp.tile(scale if axis.power > 0 else 1 / scale, axis.repeat).astype(value.dtype)
    return value * jnp.expand_dims(factor, [i for i in range(value.ndim) if i != position])


def act_on_others(element: Element, parameter: Parameter, neurons: str, value: Array) -> Array:
    """The action on one parameter along all axes but that of one neuron layer.

    Args:
      element: The group element.
      parameter: The description of the parameter.
      neurons: The name of the neuron layer whose axis is left unchanged.
      value: The parameter's array.

    Returns:
      The array, permuted and scaled along its other axes.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((1, 2, 2, 1), "tanh")
    >>> order, sign = jnp.array([1, 0]), jnp.array([1.0, -1.0])
    >>> element = sg.symmetry.Element({"hidden_0": order, "hidden_1": order}, {"hidden_0": sign, "hidden_1": sign})
    >>> kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> sg.symmetry.act_on_others(element, arch.parameters[2], "hidden_1", kernel).tolist()
    [[3.0, 4.0], [-1.0, -2.0]]
    """
    for position, axis in enumerate(parameter.axes):
        if isinstance(axis, Axis) and axis.neurons != neurons and axis.neurons in element.permutation:
            value = act_on_axis(element, axis, position, value)
    return value


def check(arch: Architecture, element: Element) -> None:
    """Checks that an element has a permutation and a scale of its group for every hidden layer.

    Shapes are looked at always, values where they are known: not inside `jax.jit` and `jax.vmap`.

    Args:
      arch: The architecture.
      element: The element.

    Raises:
      ValueError: If it belongs to another architecture, is a batch, has an order that is no permutation, or a scale
        that does not keep the function: other than +1 and -1 in SIGN layers, than positive numbers with a normal
        reciprocal in POSITIVE layers, which in NONZERO layers may be negative, and than 1 in PERMUTATION layers.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> sg.symmetry.check(sg.mlp((2, 3, 1)), sg.symmetry.identity(sg.mlp((5, 3, 2))))
    >>> sg.symmetry.check(sg.siren((2, 3, 1)), sg.symmetry.random(sg.mlp((2, 3, 1)), jax.random.key(0)))
    Traceback (most recent call last):
    ...
    ValueError: element.scale['hidden_0'] has 0.28437... at place 0; expected +1 or -1, ...
    """
    _check_shapes(arch, element)
    if stacks.is_concrete(element):
        for neurons in arch.hidden:
            _check_permutation(neurons, np.asarray(element.permutation[neurons.name]))
            _check_scale(neurons, np.asarray(element.scale[neurons.name]))


# --- private ------------------------------------------------------------------------------------------------------


def _check_shapes(arch: Architecture, element: Element) -> None:
    for field, mapping in element._asdict().items():
        shapes = {name: jnp.shape(value) for name, value in mapping.items()}
        expected = {neurons.name: (neurons.width,) for neurons in arch.hidden}
        if shapes != expected:
            raise ValueError(
                f"element.{field} has layers {shapes}; {arch.name!r} expects {expected}. Use jax.vmap for a batch."
            )


def _check_permutation(neurons: NeuronLayer, order: np.ndarray) -> None:
    missing = np.setdiff1d(np.arange(neurons.width), order)
    if missing.size:
        raise ValueError(
            f"element.permutation[{neurons.name!r}] lacks {missing.size} of {neurons.width} neurons, like neuron "
            f"{missing[0]}; expected a permutation of 0 to {neurons.width - 1}."
        )


_EXPECTED_SCALES = {
    Scaling.SIGN: "+1 or -1, since the layer's group is SIGN",
    Scaling.POSITIVE: "positive numbers, since the layer's group is POSITIVE, whose reciprocals are normal numbers",
    Scaling.NONZERO: "numbers but 0, since the layer's group is NONZERO, whose reciprocals are normal numbers",
    Scaling.PERMUTATION: "1, since the layer's group is PERMUTATION",
}


def _check_scale(neurons: NeuronLayer, scale: np.ndarray) -> None:
    size = np.abs(scale) if neurons.scaling.has_signs else scale
    good = (size > 0) & _invertible(size, scale.dtype) if neurons.scaling.has_sizes else size == 1
    if not good.all():
        place = int(np.argmin(good))
        raise ValueError(
            f"element.scale[{neurons.name!r}] has {scale[place]} at place {place}; expected "
            f"{_EXPECTED_SCALES[neurons.scaling]}. Another scale would change the function."
        )


def _check_dtypes(arch: Architecture, element: Element, params: Params) -> None:
    """Checks that the params' own dtypes hold every scale and its reciprocal."""
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        for axis in parameter.neuron_axes:
            if not axis.power or axis.neurons not in element.scale:
                continue
            scale = np.asarray(element.scale[axis.neurons])
            good = _invertible(np.abs(scale), value.dtype)
            if not good.all():
                place, limit = int(np.argmin(good)), _largest_scale(value.dtype)
                raise ValueError(
                    f"element.scale[{axis.neurons!r}] has {scale[place]} at place {place}, and {parameter} "
                    f"is of {value.dtype}; expected at most {limit:.4g}, and at least its reciprocal. Use a smaller "
                    "scale, or wider params."
                )


def _invertible(size: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Where a number and its reciprocal are normal numbers of a dtype."""
    limit = _largest_scale(dtype)
    wide = size.astype(np.float64)
    return (wide <= limit) & (wide >= 1 / limit)  # NaN is neither


def _largest_scale(dtype: np.dtype) -> float:
    if not jnp.issubdtype(dtype, jnp.floating):
        return math.inf
    info = jnp.finfo(dtype)
    return min(float(info.max), 1 / float(info.tiny))


def _random_scale(neurons: NeuronLayer, key: Key, log_scale_std: float) -> Array:
    shape = (neurons.width,)
    match neurons.scaling:
        case Scaling.SIGN:
            return jax.random.rademacher(key, shape, float)
        case Scaling.POSITIVE:
            return jnp.exp(log_scale_std * jax.random.normal(key, shape))
        case Scaling.NONZERO:
            sign_key, size_key = jax.random.split(key)
            size = jnp.exp(log_scale_std * jax.random.normal(size_key, shape))
            return jax.random.rademacher(sign_key, shape, size.dtype) * size
    return jnp.ones(shape)

"""What each layer of a network computes on one example."""

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import stacks
from jax_scalegmn.architecture import (
    Activation,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    MaxPool,
    Norm,
    Residual,
)
from jax_scalegmn.network._sine import sine
from jax_scalegmn.types import Params

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "sine": sine,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "elu": jax.nn.elu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}

# The layers that have params of their own.
Unit: TypeAlias = Dense | Conv | Norm

# (layer, its params, a map [height, width, in]) -> [height, width, out], the bias included.
Convolve: TypeAlias = Callable[[Conv, Params, Array], Array]


def convolve(layer: Conv, params: Params, x: Float[Array, "h w in"]) -> Float[Array, "_h _w out"]:
    """Convolves one example by XLA's convolution.

    Args:
      layer: The convolution.
      params: The layer's own params, {"kernel": [height, width, in, out], "bias": [out]}; the bias may be missing.
      x: The map of one example; one that is too small for the kernel results in an empty map.

    Returns:
      The map before the activation, [height, width, out].

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> layer = sg.architecture.Conv("Conv_0", None, (1, 1), "VALID")
    >>> sg.network.convolve(layer, {"kernel": jnp.ones((2, 2, 1, 3))}, jnp.ones((4, 5, 1))).shape
    (3, 4, 3)
    """
    margins = layer.padding if isinstance(layer.padding, str) else [(layer.padding, layer.padding)] * 2
    maps = jax.lax.conv_general_dilated(
        x[None], params["kernel"], layer.strides, margins, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return maps[0] + params.get("bias", 0)


def convolve_by_patches(layer: Conv, params: Params, x: Float[Array, "h w in"]) -> Float[Array, "_h _w out"]:
    """Convolves one example as `convolve` does, by one matrix product of all patches of the image.

    Where many kernels are convolved at once, under `jax.vmap` over networks, or gradients are taken inside compiled
    loops, it is several times faster than XLA's convolution on CPU; for a single network outside of loops it is slower.

    Args:
      layer: The convolution.
      params: The layer's own params, {"kernel": [height, width, in, out], "bias": [out]}; the bias may be missing.
      x: The map of one example; one that is too small for the kernel results in an empty map.

    Returns:
      The map before the activation, [height, width, out].

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> layer = sg.architecture.Conv("Conv_0", None, (1, 1), "VALID")
    >>> params, x = {"kernel": jnp.arange(12.0).reshape(2, 2, 1, 3)}, jnp.arange(20.0).reshape(4, 5, 1)
    >>> bool((sg.network.convolve_by_patches(layer, params, x) == sg.network.convolve(layer, params, x)).all())
    True
    """
    kernel, padding = params["kernel"], layer.padding
    if isinstance(padding, int):
        margins = [(padding, padding)] * 2
    else:
        margins = jax.lax.padtype_to_pads(x.shape[:2], kernel.shape[:2], layer.strides, padding)
    x = jnp.pad(x, [*margins, (0, 0)])
    counts = [
        max(0, (side - size) // stride + 1)
        for side, size, stride in zip(x.shape, kernel.shape, layer.strides, strict=False)
    ]
    # The window's top left corner takes every place (i, j) of the kernel in turn.
    spans = [(count - 1) * stride + 1 if count else 0 for count, stride in zip(counts, layer.strides, strict=True)]
    patches = [
        x[i : i + spans[0] : layer.strides[0], j : j + spans[1] : layer.strides[1]]
        for i, j in np.ndindex(*kernel.shape[:2])
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1]) + params.get("bias", 0)


def preactivation(
    layer: Unit | Residual, params: Params, x: Float[Array, "*in"], *, convolve: Convolve = convolve
) -> Float[Array, "*out"]:
    """What a layer computes before its activation, on one example.

    Args:
      layer: A Dense, a Conv or a normalization; or a Residual, of which x, the sum of its sides, is returned unchanged.
      params: The layer's own params, like {"kernel", "bias"}.
      x: The layer's input; a map too small for a Conv results in an empty one.
      convolve: How a Conv is computed: `convolve` or `convolve_by_patches`.

    Raises:
      ValueError: If a stored variance is negative.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> layer = sg.architecture.Dense("Dense_0", sg.architecture.known_activation("relu"))
    >>> params = {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.zeros(2)}
    >>> sg.network.preactivation(layer, params, jnp.array([2.0])).tolist()
    [2.0, -2.0]
    """
    match layer:
        case Dense():
            return x @ params["kernel"] + params.get("bias", 0)
        case Conv():
            return convolve(layer, params, x)
        case Residual():
            return x
        case _:
            return _normalize(layer, params, x)


def layer_output(
    layer: Unit | Residual, params: Params, x: Float[Array, "*in"], *, convolve: Convolve = convolve
) -> Float[Array, "*out"]:
    """What a layer computes on one example: the activation of `preactivation`.

    The offset that a Dense can have is not part of it: it is added to what the next layer reads.

    Args:
      layer: As for `preactivation`.
      params: As for `preactivation`.
      x: As for `preactivation`.
      convolve: As for `preactivation`.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> layer = sg.architecture.Dense("Dense_0", sg.architecture.known_activation("relu"))
    >>> params = {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.zeros(2)}
    >>> sg.network.layer_output(layer, params, jnp.array([2.0])).tolist()
    [2.0, 0.0]
    """
    return activate(layer.activation, preactivation(layer, params, x, convolve=convolve))


def activate(activation: Activation | None, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Applies an activation to every entry; None is the identity.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.network.activate(sg.architecture.known_activation("relu"), jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]

    Args:
      activation: The activation, with its frequency, or None.
      x: The pre-activations.
    """
    if activation is None:
        return x
    if activation.name == "leaky_relu":
        return jax.nn.leaky_relu(x, activation.slope)
    return ACTIVATIONS[activation.name](activation.frequency * x)


def pool(layer: MaxPool | AvgPool, x: Float[Array, "h w channels"]) -> Float[Array, "_h _w channels"]:
    """The pooled map, without padding."""
    window, strides = (*layer.window, 1), (*layer.strides, 1)
    if isinstance(layer, MaxPool):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "VALID") / math.prod(layer.window)


# --- private ------------------------------------------------------------------------------------------------------


def _normalize(layer: Norm, params: Params, x: Float[Array, "*hw channels"]) -> Float[Array, "*hw channels"]:
    match layer:
        case BatchNorm():
            mean, var = params["mean"], params["var"]
            if stacks.is_concrete(var) and np.min(var) < 0:
                raise ValueError(
                    f"The var of {layer.name!r} has the entry {np.min(var)}; expected variances, >= 0. Draw or "
                    "predict its root, or its logarithm."
                )
            normed = (x - mean) * jax.lax.rsqrt(var + layer.epsilon)
        case LayerNorm():
            normed = _standardize(x, -1, layer.epsilon)
        case GroupNorm():
            runs = x.reshape(-1, layer.groups, x.shape[-1] // layer.groups)
            normed = _standardize(runs, (0, 2), layer.epsilon).reshape(x.shape)
    return normed * params["scale"] + params["bias"]


def _standardize(x: Array, axis: int | tuple[int, int], epsilon: float) -> Array:
    # In two passes: the mean of the squares less the squared mean cancels in float32 (jax.nn.standardize).
    centered = x - x.mean(axis, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(axis, keepdims=True) + epsilon)

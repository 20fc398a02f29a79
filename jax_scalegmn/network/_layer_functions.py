"""What each layer of a network computes on one example."""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn.architecture import Activation, AvgPool, BatchNorm, Conv, Dense, GroupNorm, LayerNorm, MaxPool, Norm
from jax_scalegmn.types import Params

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "sine": jnp.sin,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}

# The layers that have params of their own.
Unit: TypeAlias = Dense | Conv | Norm


def compute(layer: Unit, params: Params, x: Float[Array, "*in"]) -> Float[Array, "*out"]:
    """What a layer with params of its own gives in front of its activation.

    Args:
      layer: a Dense, a Conv or a normalization.
      params: the layer's own, like {"kernel", "bias"}.
      x: of one example; a Conv, whose image is too small, gives an empty map.

    Raises:
      ValueError: if a stored variance is negative.
    """
    match layer:
        case Dense():
            return x @ params["kernel"] + params.get("bias", 0)
        case Conv():
            margins = layer.padding if isinstance(layer.padding, str) else [(layer.padding, layer.padding)] * 2
            maps = jax.lax.conv_general_dilated(
                x[None], params["kernel"], layer.strides, margins, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return maps[0] + params.get("bias", 0)
        case _:
            return _normalize(layer, params, x)


def convolve_by_patches(layer: Conv, params: Params, x: Float[Array, "h w in"]) -> Float[Array, "_h _w out"]:
    """What `compute` gives for a Conv, as one matrix product of all patches of the image.

    Where many kernels are convolved at once, under `jax.vmap` over networks, or gradients are taken inside compiled
    loops, it is several times faster than XLA's convolution on CPU; for a single network outside of loops it is slower.

    Args:
      layer: the convolution.
      params: the layer's own, {"kernel": [height, width, in, out], "bias": [out]}.
      x: of one example; one that is too small gives an empty map.
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


def activate(activation: Activation | None, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The activation of every entry; None for the identity."""
    if activation is None:
        return x
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
            if not isinstance(var, jax.core.Tracer) and np.min(var) < 0:
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
    centerd = x - x.mean(axis, keepdims=True)
    return centerd * jax.lax.rsqrt(jnp.square(centerd).mean(axis, keepdims=True) + epsilon)

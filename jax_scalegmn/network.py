"""The networks that an `Architecture` describes: initialise them and compute their function."""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture, Conv, Dense, Flatten, GlobalMeanPool
from jax_scalegmn.types import Key, Params

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

# (arch, index among the affine layers, fan-in) -> the half-widths of the uniform distributions of kernel and bias.
Initialization: TypeAlias = Callable[[Architecture, int, int], tuple[float, float]]


def standard(arch: Architecture, index: int, fan_in: int) -> tuple[float, float]:
    """Each activation's usual initialisation.

    Sine: U(1/fan_in) in the first layer, U(sqrt(6/fan_in)/w0) behind it (arXiv 2006.09661, section 3.2). Relu:
    U(sqrt(6/fan_in)) (He et al. 2015, equation 10). Others and outputs: U(sqrt(3/fan_in)), which keeps the variance.
    Biases: U(1/sqrt(fan_in)) before sines, whose phases they are; 0 elsewhere.
    """
    activation = _affine(arch)[index].activation
    name = activation.name if activation else None
    if name == "sine":
        kernel = 1 / fan_in if index == 0 else math.sqrt(6 / fan_in) / activation.frequency  # type: ignore[union-attr]
        return kernel, 1 / math.sqrt(fan_in)
    gain = 6 if name in ("relu", "leaky_relu") else 3
    return math.sqrt(gain / fan_in), 0.0


def near_zero(arch: Architecture, index: int, fan_in: int) -> tuple[float, float]:
    """The regime of the published INR data sets: a small first layer and biases that start at 0.

    Their fitted MNIST INRs (2-32-32-1, w0 = 30) have kernels of standard deviation 0.065, 0.020 and 0.10 and biases
    below 0.054. First layer U(0.1), sine layers U(sqrt(6/fan_in)/w0), the output U(1/sqrt(fan_in)).
    """
    activation = _affine(arch)[index].activation
    if activation is None:
        return 1 / math.sqrt(fan_in), 0.0
    if activation.name != "sine":
        raise ValueError(f"near_zero is of SIRENs; {arch.name!r} has a layer with {activation.name!r}. Use standard.")
    return 3 / activation.frequency if index == 0 else math.sqrt(6 / fan_in) / activation.frequency, 0.0


def init(arch: Architecture, key: Key, *, initialization: Initialization = standard) -> dict[str, dict[str, Array]]:
    """Random params of one network; `jax.vmap` over keys for many.

    Raises:
      ValueError: if `arch` has no layers to initialise.
    """
    values = []
    for index, layer in enumerate(_affine(arch)):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, index))
        shapes = {p.path[-1]: arch.shape(p) for p in arch.parameters if p.path[0] == layer.name}
        kernel, bias = initialization(arch, index, math.prod(shapes["kernel"][:-1]))
        values.append(jax.random.uniform(kernel_key, shapes["kernel"], minval=-kernel, maxval=kernel))
        values.append(jax.random.uniform(bias_key, shapes["bias"], minval=-bias, maxval=bias))
    return architecture.pack(arch, values)


def apply(arch: Architecture, params: Params, x: Float[Array, "..."]) -> Float[Array, " outputs"]:
    """The network's function on one example; `jax.vmap` for more.

    Args:
      arch: the architecture.
      params: its params.
      x: [in] for dense networks, [height, width, channels] for convolutional ones.

    Returns:
      The outputs, [out].

    Raises:
      ValueError: if params or x do not fit the architecture.
    """
    architecture.unpack(arch, params)
    _affine(arch)
    first = arch.layers[0]
    rank = 3 if isinstance(first, Conv) else 1
    if x.ndim != rank or x.shape[-1] != arch.neurons[0].width:
        expected = "[height, width, channels]" if rank == 3 else "[inputs]"
        raise ValueError(
            f"x has shape {x.shape}; {arch.name!r} expects one example {expected} with {arch.neurons[0].width} in the "
            "last axis. Use jax.vmap for a batch."
        )
    size = x.shape
    for layer in arch.layers:
        match layer:
            case Dense():
                x = x @ params[layer.name]["kernel"] + params[layer.name]["bias"]
                x = _activate(layer, x) + layer.offset
            case Conv():
                kernel = params[layer.name]["kernel"]
                maps = jax.lax.conv_general_dilated(
                    x[None], kernel, layer.strides, layer.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                if not maps.size:
                    raise ValueError(
                        f"x has shape {size}, too small for the kernels of {arch.name!r} up to {layer.name!r}."
                    )
                x = _activate(layer, maps[0] + params[layer.name]["bias"])
            case GlobalMeanPool():
                x = x.mean((0, 1))
            case Flatten():
                x = x.reshape(-1)
    return x


def coordinates(height: int, width: int) -> np.ndarray:
    """Pixel positions for an INR, [height * width, 2]: (column, row) in [-1, 1], columns fastest.

    As the published INRs have them: both axes linspace(-1, 1), the column is the first input.
    """
    grid = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height), indexing="xy")
    return np.stack(grid, -1).reshape(-1, 2).astype(np.float32)


def render(arch: Architecture, params: Params, size: tuple[int, int]) -> Float[Array, "height width"]:
    """The image [height, width] that an INR with inputs (column, row) and one output draws.

    Raises:
      ValueError: if the architecture does not map two coordinates to one value.
    """
    if (arch.neurons[0].width, arch.neurons[-1].width) != (2, 1):
        raise ValueError(
            f"{arch.name!r} maps {arch.neurons[0].width} inputs to {arch.neurons[-1].width} outputs; an INR of a gray "
            "image maps 2 coordinates to 1 value."
        )
    pixels = jax.vmap(lambda x: apply(arch, params, x))(jnp.asarray(coordinates(*size)))
    return pixels.reshape(size)


def _affine(arch: Architecture) -> list[Dense | Conv]:
    layers = [layer for layer in arch.layers if isinstance(layer, Dense | Conv)]
    if not layers:
        raise ValueError(
            f"{arch.name!r} does not say how to compute its function (layers is empty). Call your own function, or use "
            "a builder: architecture.mlp, siren or cnn."
        )
    return layers


def _activate(layer: Dense | Conv, x: Array) -> Array:
    if layer.activation is None:
        return x
    return ACTIVATIONS[layer.activation.name](layer.activation.frequency * x)

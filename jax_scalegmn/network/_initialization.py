"""Random params of the networks that an `Architecture` describes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Activation, Architecture, Conv, Dense, Norm, Parameter
from jax_scalegmn.types import Key

# (arch, index among the affine layers, fan-in) -> the half-widths of the uniform distributions of kernel and bias.
Initialization: TypeAlias = Callable[[Architecture, int, int], tuple[float, float]]


def standard(arch: Architecture, index: int, fan_in: int) -> tuple[float, float]:
    """Each activation's usual initialization.

    Sine: U(1/fan_in) in the first layer, U(sqrt(6/fan_in)/w0) behind it (arXiv 2006.09661, section 3.2). Relu:
    U(sqrt(6/fan_in)) (He et al. 2015, equation 10). Others and outputs: U(sqrt(3/fan_in)), which keeps the variance.
    Biases: U(1/sqrt(fan_in)) before sines, whose phases they are; 0 elsewhere. The activation of a layer in front of a
    normalization is the one behind that.
    """
    activation = affine(arch)[index].activation
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
    activation = affine(arch)[index].activation
    if activation is None:
        return 1 / math.sqrt(fan_in), 0.0
    if activation.name != "sine":
        raise ValueError(f"near_zero is of SIRENs; {arch.name!r} has a layer with {activation.name!r}. Use standard.")
    return 3 / activation.frequency if index == 0 else math.sqrt(6 / fan_in) / activation.frequency, 0.0


def init(arch: Architecture, key: Key, *, initialization: Initialization = standard) -> dict[str, Any]:
    """Random params of one network; `jax.vmap` over keys for many.

    Normalizations start at scale 1, bias 0, mean 0 and var 1.

    Raises:
      ValueError: if `arch` has no layers to initialize, or parameters that are of none of them.
    """
    shapes = arch.array_shapes
    values: dict[tuple[str, ...], Array] = {}
    for index, (path, _) in enumerate(affine(arch)):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, index))
        kernel, bias = ((*path, name) for name in ("kernel", "bias"))
        sizes = initialization(arch, index, math.prod(shapes[kernel][:-1]))
        values[kernel] = jax.random.uniform(kernel_key, shapes[kernel], minval=-sizes[0], maxval=sizes[0])
        if bias in shapes:
            values[bias] = jax.random.uniform(bias_key, shapes[bias], minval=-sizes[1], maxval=sizes[1])
    for at, layer in architecture.walk(arch.layers):
        if isinstance(layer, Norm):
            starts = {(*at, layer.name, name): start for name, start in _NORM_STARTS.items()}
            values |= {path: jnp.full(shapes[path], start) for path, start in starts.items() if path in shapes}
    if values.keys() != shapes.keys():
        foreign = [architecture.describe(path) for path in shapes if path not in values]
        raise ValueError(
            f"{arch.name!r} has parameters of none of its layers: {foreign}. Name a layer for each, or initialize the "
            "network yourself."
        )
    return architecture.pack(arch, [values[parameter.path][_block(arch, parameter)] for parameter in arch.parameters])


class Affine(NamedTuple):
    """A layer with a kernel: the path of its params, and the activation behind it and its normalization."""

    path: tuple[str, ...]
    activation: Activation | None


def affine(arch: Architecture) -> list[Affine]:
    """The layers with a kernel, in order.

    Raises:
      ValueError: if there is none, as of a network with a function of its own.
    """
    found: list[Affine] = []
    layers = list(architecture.walk(arch.layers))
    for index, (at, layer) in enumerate(layers):
        if isinstance(layer, Dense | Conv):
            behind = layers[index + 1][1] if index + 1 < len(layers) else None
            found.append(Affine((*at, layer.name), (behind if isinstance(behind, Norm) else layer).activation))
    if not found:
        raise ValueError(
            f"{arch.name!r} does not say how to compute its function (layers is empty). Call your own function, or use "
            "a builder: architecture.mlp, siren or cnn."
        )
    return found


# --- private ------------------------------------------------------------------------------------------------------

_NORM_STARTS = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}


def _block(arch: Architecture, parameter: Parameter) -> tuple[slice, ...]:
    """Where a block stands in its array."""
    ends = zip(parameter.offset, arch.shape(parameter), strict=True)
    return tuple(slice(start, start + size) for start, size in ends)

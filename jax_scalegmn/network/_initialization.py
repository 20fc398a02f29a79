"""Random params of the networks that an `Architecture` describes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Activation, Architecture, Conv, Dense, Norm
from jax_scalegmn.types import Key

# (arch, index among the layers with a kernel, fan-in) -> the half-widths of the uniform distributions of kernel and
# bias.
Initialization: TypeAlias = Callable[[Architecture, int, int], tuple[float, float]]


def standard(arch: Architecture, index: int, fan_in: int) -> tuple[float, float]:
    """Each activation's usual initialization, as the half-widths of uniform distributions U around 0.

    Sine: U(1/fan_in) in the first layer, U(sqrt(6/fan_in)/w0) in the later ones (arXiv 2006.09661, section 3.2). Relu:
    U(sqrt(6/fan_in)) (He et al. 2015, equation 10). Others and outputs: U(sqrt(3/fan_in)), which keeps the variance.
    Biases: U(1/sqrt(fan_in)) before sines, whose phases they are; 0 elsewhere. For a layer that a normalization follows
    the activation after the normalization counts.

    Args:
      arch: The architecture.
      index: The number of the layer among those with a kernel.
      fan_in: How many inputs each of its neurons has.

    Returns:
      The half-widths of kernel and bias.

    >>> import jax_scalegmn as sg
    >>> sg.network.standard(sg.siren((2, 16, 1)), 0, 2)[0]
    0.5
    >>> sg.network.standard(sg.mlp((6, 16, 1)), 0, 6)
    (1.0, 0.0)
    """
    activation = affine(arch)[index].activation
    if activation is not None and activation.name == "sine":
        kernel = 1 / fan_in if index == 0 else math.sqrt(6 / fan_in) / activation.frequency
        return kernel, 1 / math.sqrt(fan_in)
    gain = 6 if activation is not None and activation.name in ("relu", "leaky_relu") else 3
    return math.sqrt(gain / fan_in), 0.0


def near_zero(arch: Architecture, index: int, fan_in: int) -> tuple[float, float]:
    """The initialization of the published INR data sets: a small first layer and biases that start at 0.

    Their fitted MNIST INRs (2-32-32-1, w0 = 30) have kernels of standard deviation 0.065, 0.020 and 0.10 and biases
    below 0.054. First layer U(3/w0), later sine layers U(sqrt(6/fan_in)/w0), the output U(1/sqrt(fan_in)).

    Args:
      arch: A SIREN.
      index: The number of the layer among those with a kernel.
      fan_in: How many inputs each of its neurons has.

    Returns:
      The half-widths of kernel and bias.

    Raises:
      ValueError: If the layer's activation is not a sine.

    >>> import jax_scalegmn as sg
    >>> sg.network.near_zero(sg.siren((2, 16, 1), w0=30.0), 0, 2)
    (0.1, 0.0)
    """
    activation = affine(arch)[index].activation
    if activation is None:
        return 1 / math.sqrt(fan_in), 0.0
    if activation.name != "sine":
        raise ValueError(f"near_zero is for SIRENs; {arch.name!r} has a layer with {activation.name!r}. Use standard.")
    return 3 / activation.frequency if index == 0 else math.sqrt(6 / fan_in) / activation.frequency, 0.0


def init(arch: Architecture, key: Key, *, initialization: Initialization = standard) -> dict[str, Any]:
    """Draws random params of one network; `jax.vmap` over keys for many.

    Normalizations start at scale 1, bias 0, mean 0 and var 1.

    Args:
      arch: The architecture, with layers.
      key: A random key; it is consumed.
      initialization: `standard`, `near_zero`, or another function with that signature.

    Returns:
      The params.

    Raises:
      ValueError: If `arch` has no layers to initialize, or parameters that belong to no layer.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> sg.network.init(arch, jax.random.key(0))["Dense_0"]["kernel"].shape
    (2, 3)
    >>> stack = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 5))
    >>> stack["Dense_0"]["kernel"].shape
    (5, 2, 3)
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
            f"{arch.name!r} has parameters that belong to none of its layers: {foreign}. Name a layer for each, or "
            "initialize the network yourself."
        )
    return architecture.pack(arch, architecture.unpack(arch, architecture.unflatten(values)))


class Affine(NamedTuple):
    """A layer with a kernel: the path of its params, and the activation after it and its normalization."""

    path: tuple[str, ...]
    activation: Activation | None


def affine(arch: Architecture) -> list[Affine]:
    """The layers with a kernel, in order.

    Raises:
      ValueError: If the architecture has none, like one without layers.
    """
    layers = list(architecture.walk(arch.layers))
    following = [*(layer for _, layer in layers), None][1:]
    layers_with_kernel = [
        Affine((*at, layer.name), (after if isinstance(after, Norm) else layer).activation)
        for (at, layer), after in zip(layers, following, strict=True)
        if isinstance(layer, Dense | Conv)
    ]
    if not layers_with_kernel:
        raise ValueError(
            f"{arch.name!r} does not say how to compute its function (layers is empty). Call your own function, or use "
            "a builder: architecture.mlp, siren or cnn."
        )
    return layers_with_kernel


# --- private ------------------------------------------------------------------------------------------------------

_NORM_STARTS = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}

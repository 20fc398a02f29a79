"""The networks that an `Architecture` describes: initialise them and compute their function."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture
from jax_scalegmn.architecture import (
    Activation,
    Architecture,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    GlobalMeanPool,
    GroupNorm,
    Layer,
    LayerNorm,
    MaxPool,
    Norm,
    Residual,
)
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

# What a batch normalisation stores beside its weights: Flax's collection "batch_stats".
STATISTICS = ("mean", "var")

# (arch, index among the affine layers, fan-in) -> the half-widths of the uniform distributions of kernel and bias.
Initialization: TypeAlias = Callable[[Architecture, int, int], tuple[float, float]]


def standard(arch: Architecture, index: int, fan_in: int) -> tuple[float, float]:
    """Each activation's usual initialisation.

    Sine: U(1/fan_in) in the first layer, U(sqrt(6/fan_in)/w0) behind it (arXiv 2006.09661, section 3.2). Relu:
    U(sqrt(6/fan_in)) (He et al. 2015, equation 10). Others and outputs: U(sqrt(3/fan_in)), which keeps the variance.
    Biases: U(1/sqrt(fan_in)) before sines, whose phases they are; 0 elsewhere. The activation of a layer in front of a
    normalisation is the one behind that.
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


def init(arch: Architecture, key: Key, *, initialization: Initialization = standard) -> dict[str, Any]:
    """Random params of one network; `jax.vmap` over keys for many.

    Normalisations start at scale 1, bias 0, mean 0 and var 1.

    Raises:
      ValueError: if `arch` has no layers to initialise, or parameters that are of none of them.
    """
    shapes = {parameter.path: arch.shape(parameter) for parameter in arch.parameters}
    values: dict[tuple[str, ...], Array] = {}
    for index, (path, _) in enumerate(_affine(arch)):
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
            f"{arch.name!r} has parameters of none of its layers: {foreign}. Name a layer for each, or initialise the "
            "network yourself."
        )
    return architecture.pack(arch, [values[parameter.path] for parameter in arch.parameters])


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
    rank = 3 if any(isinstance(layer, Conv) for _, layer in architecture.walk(arch.layers)) else 1
    if x.ndim != rank or x.shape[-1] != arch.neurons[0].width:
        expected = "[height, width, channels]" if rank == 3 else "[inputs]"
        raise ValueError(
            f"x has shape {x.shape}; {arch.name!r} expects one example {expected} with {arch.neurons[0].width} in the "
            "last axis. Use jax.vmap for a batch."
        )
    return _forward(arch, arch.layers, params, x, x.shape)


def merge_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The params of a network with batch normalisations from Flax's variables: statistics stand beside weights.

    {"params": {"BatchNorm_0": {"scale", "bias"}, ...}, "batch_stats": {"BatchNorm_0": {"mean", "var"}, ...}} becomes
    {"BatchNorm_0": {"scale", "bias", "mean", "var"}, ...}. Without "batch_stats" it is variables["params"].

    Raises:
      ValueError: without "params", with a further collection, or if both collections have one path.
    """
    if "params" not in variables or set(variables) - {"params", "batch_stats"}:
        raise ValueError(
            f"variables has the collections {sorted(variables)}; expected 'params' and, with batch normalisation, "
            "'batch_stats'. Pass what the module's init returned, and leave other collections out."
        )
    return _merged(variables["params"], variables.get("batch_stats", {}), ())


def split_variables(params: Params) -> dict[str, Any]:
    """Flax's variables of params: the inverse of `merge_variables`.

    What is called "mean" or "var" goes to "batch_stats", which is left out where there is nothing to put.
    """
    weights, statistics = _split(params)
    return {"params": weights} | ({"batch_stats": statistics} if statistics else {})


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


_NORM_STARTS = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}


class _Affine(NamedTuple):
    """A layer with a kernel: the path of its params, and the activation behind it and its normalisation."""

    path: tuple[str, ...]
    activation: Activation | None


def _affine(arch: Architecture) -> list[_Affine]:
    found: list[_Affine] = []
    layers = list(architecture.walk(arch.layers))
    for index, (at, layer) in enumerate(layers):
        if isinstance(layer, Dense | Conv):
            behind = layers[index + 1][1] if index + 1 < len(layers) else None
            found.append(_Affine((*at, layer.name), (behind if isinstance(behind, Norm) else layer).activation))
    if not found:
        raise ValueError(
            f"{arch.name!r} does not say how to compute its function (layers is empty). Call your own function, or use "
            "a builder: builders.mlp, siren or cnn."
        )
    return found


def _forward(arch: Architecture, layers: tuple[Layer, ...], params: Params, x: Array, size: tuple[int, ...]) -> Array:
    """The layers on one example, with their params; `size` is the shape of the network's input."""
    for layer in layers:
        match layer:
            case Dense():
                x = x @ params[layer.name]["kernel"] + params[layer.name].get("bias", 0)
                x = _activate(layer.activation, x) + layer.offset
            case Conv():
                kernel, padding = params[layer.name]["kernel"], layer.padding
                margins = padding if isinstance(padding, str) else [(padding, padding)] * 2
                maps = jax.lax.conv_general_dilated(
                    x[None], kernel, layer.strides, margins, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                if not maps.size:
                    raise ValueError(
                        f"x has shape {size}, too small for the kernels of {arch.name!r} up to {layer.name!r}."
                    )
                x = _activate(layer.activation, maps[0] + params[layer.name].get("bias", 0))
            case BatchNorm() | LayerNorm() | GroupNorm():
                x = _activate(layer.activation, _normalise(layer, params[layer.name], x))
            case MaxPool() | AvgPool():
                if any(side < window for side, window in zip(x.shape, layer.window, strict=False)):
                    raise ValueError(
                        f"x has shape {size}, too small for {arch.name!r}: a map of {x.shape[:2]} is left for pooling "
                        f"windows of {layer.window}. Take larger images or fewer poolings."
                    )
                x = _pool(layer, x)
            case Residual():
                inner = params if layer.name is None else params[layer.name]
                branch, shortcut = (_forward(arch, side, inner, x, size) for side in (layer.branch, layer.shortcut))
                if branch.shape != shortcut.shape:
                    raise ValueError(
                        f"{arch.name!r}: the branch of Residual {layer.name!r} gives {branch.shape}, its shortcut "
                        f"{shortcut.shape}; expected one shape. Put a convolution with the branch's strides in the "
                        "shortcut."
                    )
                x = _activate(layer.activation, branch + shortcut)
            case GlobalMeanPool():
                x = x.mean((0, 1))
            case Flatten():
                x = x.reshape(-1)
    return x


def _activate(activation: Activation | None, x: Array) -> Array:
    if activation is None:
        return x
    return ACTIVATIONS[activation.name](activation.frequency * x)


def _normalise(layer: Norm, params: Params, x: Float[Array, "*hw channels"]) -> Float[Array, "*hw channels"]:
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
            normed = _standardise(x, -1, layer.epsilon)
        case GroupNorm():
            runs = x.reshape(-1, layer.groups, x.shape[-1] // layer.groups)
            normed = _standardise(runs, (0, 2), layer.epsilon).reshape(x.shape)
    return normed * params["scale"] + params["bias"]


def _standardise(x: Array, axis: int | tuple[int, int], epsilon: float) -> Array:
    # In two passes: the mean of the squares less the squared mean cancels in float32 (jax.nn.standardize).
    centred = x - x.mean(axis, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis, keepdims=True) + epsilon)


def _pool(layer: MaxPool | AvgPool, x: Float[Array, "h w channels"]) -> Float[Array, "_h _w channels"]:
    window, strides = (*layer.window, 1), (*layer.strides, 1)
    if isinstance(layer, MaxPool):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "VALID") / math.prod(layer.window)


def _merged(weights: Any, statistics: Any, path: tuple[str, ...]) -> dict[str, Any]:
    merged = dict(weights)
    for key, node in statistics.items():
        where = (*path, key)
        if key not in merged:
            merged[key] = node
        elif isinstance(node, Mapping) and isinstance(merged[key], Mapping):
            merged[key] = _merged(merged[key], node, where)
        else:
            raise ValueError(
                f"params and batch_stats both have {architecture.describe(where)}; expected each path in one. Rename "
                "it in the module."
            )
    return merged


def _split(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    weights: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for key, node in params.items():
        if isinstance(node, Mapping):
            inner_weights, inner_statistics = _split(node)
            weights |= {key: inner_weights} if inner_weights else {}
            statistics |= {key: inner_statistics} if inner_statistics else {}
        else:
            (statistics if key in STATISTICS else weights)[key] = node
    return weights, statistics

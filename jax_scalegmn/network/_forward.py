"""The networks that an `Architecture` describes: initialize them, compute their function, look inside."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture
from jax_scalegmn.architecture import (
    Architecture,
    AvgPool,
    Axis,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    GlobalMeanPool,
    Layer,
    MaxPool,
    Residual,
)
from jax_scalegmn.network import _initialization, _layer_functions, _variables, moments
from jax_scalegmn.network._layer_functions import Unit
from jax_scalegmn.types import Params


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
    return apply_with(arch, params, x, Hook())


class Hook:
    """What `apply_with` calls at every layer; override a method to see or to replace what passes there.

    Paths are those of a layer's params, like ("ResNetBlock_0", "Conv_1").
    """

    def compute(self, path: tuple[str, ...], layer: Unit, params: Params, x: Array) -> Array:
        """What a Dense, a Conv or a normalization gives in front of its activation, from its params and its input."""
        return _layer_functions.compute(layer, params, x)

    def behind(self, path: tuple[str, ...], layer: Unit | Residual, x: Array) -> Array:
        """What stands behind the activation of such a layer, or behind the sum of a Residual and its activation."""
        return x


class ByPatches(Hook):
    """The same function with every convolution as one matrix product: `layer_functions.convolve_by_patches`."""

    def compute(self, path: tuple[str, ...], layer: Unit, params: Params, x: Array) -> Array:
        if isinstance(layer, Conv):
            return _layer_functions.convolve_by_patches(layer, params, x)
        return super().compute(path, layer, params, x)


def apply_with(arch: Architecture, params: Params, x: Float[Array, "..."], hook: Hook) -> Float[Array, " outputs"]:
    """`apply`, with a hook at every layer.

    What the hook gathers is traced like all else: return it from the function that is vmapped or jitted. Inside
    `jax.vmap(..., axis_name=moments.EXAMPLES)` it can take `moments.over_examples`.

    Raises:
      ValueError: if params or x do not fit the architecture.
    """
    architecture.unpack(arch, params)
    rank = _input_rank(arch)
    if x.ndim != rank or x.shape[-1] != arch.neuron_layers[0].width:
        raise ValueError(
            f"x has shape {x.shape}; {arch.name!r} expects one example {_INPUTS[rank]} with {arch.neuron_layers[0].width} in "
            "the last axis. Use jax.vmap for a batch."
        )
    return _forward(arch, arch.layers, params, x, x.shape, (), hook)


def activations(arch: Architecture, params: Params, x: Float[Array, "..."]) -> dict[str, tuple[Array, ...]]:
    """The values of every hidden neuron layer on one example, wherever they stand behind their activation.

    The group acts on them as on the neurons: activations of act(Q, params) are the same, permuted and scaled by Q.
    What goes into a normalization, which another power of the scale reaches, is left out; so is what a branch and a
    shortcut give before they are added. A layer that no such place shows has none.

    Returns:
      By neuron layer the places in the order of the computation, each [*positions, width]. A residual stream has one
      behind its stem and one behind every sum.

    Raises:
      ValueError: if params or x do not fit the architecture.
    """
    places = _places(arch)
    found: dict[str, list[Array]] = {neurons.name: [] for neurons in arch.hidden}

    class Keep(Hook):
        def behind(self, path: tuple[str, ...], layer: Unit | Residual, x: Array) -> Array:
            for name, start in places.get((path, layer), {}).items():
                found[name].append(x[..., start : start + arch.neuron_layer(name).width])
            return x

    apply_with(arch, params, x, Keep())
    return {name: tuple(values) for name, values in found.items()}


def train_apply(
    arch: Architecture, params: Params, x: Float[Array, "examples ..."], *, momentum: float = 0.9
) -> tuple[Float[Array, "examples outputs"], dict[str, Any]]:
    """The network's function on a whole batch, as in training: batch normalizations use the batch's statistics.

    As Flax's BatchNorm with use_running_average=False: mean and biased variance over examples and positions (Ioffe and
    Szegedy 2015, arXiv 1502.03167, algorithm 1).

    Args:
      arch: the architecture.
      params: of one network.
      x: the batch.
      momentum: of the stored statistics, in [0, 1]: stored = momentum * stored + (1 - momentum) * batch.

    Returns:
      The outputs, and the params in which every `mean` and `var` has moved towards the batch's.

    Raises:
      ValueError: if params or x do not fit the architecture, or on a momentum outside [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1], like 0.9.")
    check_examples(arch, x)

    def one(x: Array) -> tuple[Array, dict[tuple[str, ...], Array]]:
        moved: dict[tuple[str, ...], Array] = {}

        class Normalize(Hook):
            def compute(self, path: tuple[str, ...], layer: Unit, params: Params, x: Array) -> Array:
                if isinstance(layer, BatchNorm):
                    batch = moments.over_examples(x)._asdict()
                    for name, value in batch.items():
                        moved[*path, name] = momentum * params[name] + (1 - momentum) * value
                    params = {**params, **batch}
                return _layer_functions.compute(layer, params, x)

        return apply_with(arch, params, x, Normalize()), moved

    outputs, moved = jax.vmap(one, axis_name=moments.EXAMPLES, out_axes=(0, None))(x)
    return outputs, _variables.replace(params, moved)


def check_examples(arch: Architecture, x: Float[Array, "..."], *, name: str = "x") -> None:
    """Checks a batch of inputs: its shape always, its values wherever they are at hand, outside jit and vmap.

    Raises:
      ValueError: if they do not fit the architecture, are none, or hold a NaN or an infinity.
    """
    rank = _input_rank(arch)
    if jnp.ndim(x) != rank + 1 or jnp.shape(x)[-1] != arch.neuron_layers[0].width or 0 in jnp.shape(x):
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}; {arch.name!r} expects one example or more, [examples, "
            f"{_INPUTS[rank][1:]} with {arch.neuron_layers[0].width} in the last axis. Pass x[None] for one example."
        )
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(finite := np.asarray(x)).all():
        example = int(np.argwhere(~np.isfinite(finite))[0, 0])
        raise ValueError(
            f"{name}[{example}] holds a NaN or an infinity; expected finite numbers. Leave such examples out."
        )


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
    if (arch.neuron_layers[0].width, arch.neuron_layers[-1].width) != (2, 1):
        raise ValueError(
            f"{arch.name!r} maps {arch.neuron_layers[0].width} inputs to {arch.neuron_layers[-1].width} outputs; an INR of a gray "
            "image maps 2 coordinates to 1 value."
        )
    pixels = jax.vmap(lambda x: apply(arch, params, x))(jnp.asarray(coordinates(*size)))
    return pixels.reshape(size)


# --- private ------------------------------------------------------------------------------------------------------

# The rank of one example -> its shape in words.
_INPUTS = {1: "[inputs]", 3: "[height, width, channels]"}


def _input_rank(arch: Architecture) -> int:
    _initialization.affine(arch)
    return 3 if any(isinstance(layer, Conv) for _, layer in architecture.walk(arch.layers)) else 1


def _forward(
    arch: Architecture,
    layers: tuple[Layer, ...],
    params: Params,
    x: Array,
    size: tuple[int, ...],
    at: tuple[str, ...],
    hook: Hook,
) -> Array:
    """The layers on one example, with their params, which stand at `at`; `size` is the shape of the network's input."""
    for layer in layers:
        match layer:
            case Residual():
                inner, path = (params, at) if layer.name is None else (params[layer.name], (*at, layer.name))
                sides = [_forward(arch, side, inner, x, size, path, hook) for side in (layer.branch, layer.shortcut)]
                if sides[0].shape != sides[1].shape:
                    raise ValueError(
                        f"{arch.name!r}: the branch of Residual {layer.name!r} gives {sides[0].shape}, its shortcut "
                        f"{sides[1].shape}; expected one shape. Put a convolution with the branch's strides in the "
                        "shortcut."
                    )
                x = hook.behind(path, layer, _layer_functions.activate(layer.activation, sides[0] + sides[1]))
            case MaxPool() | AvgPool():
                if any(side < window for side, window in zip(x.shape, layer.window, strict=False)):
                    raise ValueError(
                        f"x has shape {size}, too small for {arch.name!r}: a map of {x.shape[:2]} is left for pooling "
                        f"windows of {layer.window}. Take larger images or fewer poolings."
                    )
                x = _layer_functions.pool(layer, x)
            case GlobalMeanPool():
                x = x.mean((0, 1))
            case Flatten():
                x = x.reshape(-1)
            case _:
                path = (*at, layer.name)
                x = hook.compute(path, layer, params[layer.name], x)
                if not x.size:
                    raise ValueError(
                        f"x has shape {size}, too small for the kernels of {arch.name!r} up to {layer.name!r}."
                    )
                x = hook.behind(path, layer, _layer_functions.activate(layer.activation, x))
                if isinstance(layer, Dense):
                    x = x + layer.offset
    return x


def _places(arch: Architecture) -> dict[tuple[tuple[str, ...], Layer], dict[str, int]]:
    """The layers behind which hidden neurons show: path and layer -> neuron layers, with where each starts there."""
    places: dict[tuple[tuple[str, ...], Layer], dict[str, int]] = {}

    def visit(layers: tuple[Layer, ...], at: tuple[str, ...], *, side: bool) -> dict[str, int]:
        """The neuron layers that the last of these layers feeds; as the side of a sum it is no place of its own."""
        fed: dict[str, int] = {}
        units = [layer for layer in layers if isinstance(layer, Unit | Residual)]
        for layer in units:
            if isinstance(layer, Residual):
                path = at if layer.name is None else (*at, layer.name)
                visit(layer.shortcut, path, side=True)
                fed = visit(layer.branch, path, side=True)
            else:
                path = (*at, layer.name)
                fed = _feeds(arch, path, layer)
            if not (side and layer is units[-1] and layer.activation is None):
                places[path, layer] = fed
        return fed

    visit(arch.layers, (), side=False)
    return places


def _feeds(arch: Architecture, path: tuple[str, ...], layer: Unit) -> dict[str, int]:
    """The hidden neuron layers whose group scales what a layer gives, with where each starts in the last axis."""
    array = (*path, "kernel" if isinstance(layer, Dense | Conv) else "scale")
    hidden = {neurons.name for neurons in arch.hidden}
    ends = [(p.axes[-1], p.offset[-1]) for p in arch.parameters if p.path == array]
    return {
        axis.neurons: start
        for axis, start in ends
        if isinstance(axis, Axis) and axis.power == 1 and axis.neurons in hidden
    }

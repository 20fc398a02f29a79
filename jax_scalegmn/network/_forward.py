"""The function of a network, the values of its neurons, and its function in training mode."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture, stacks
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
from jax_scalegmn.network import _layer_functions, _traced, _variables, moments
from jax_scalegmn.network._layer_functions import Convolve, Unit
from jax_scalegmn.types import Params

State = TypeVar("State")

# (path, layer, the layer's params, its input, state) -> (its output, the next state).
Visit: TypeAlias = Callable[[tuple[str, ...], Unit | Residual, Params, Array, State], tuple[Array, State]]

# The states of `activations` (by neuron layer) and of `train_apply` (by path).
_Values: TypeAlias = dict[str, tuple[Array, ...]]
_Moved: TypeAlias = dict[tuple[str, ...], Array]


@stacks.any_container("params")
def apply(
    arch: Architecture, params: Params, x: Float[Array, "..."], *, convolve: Convolve = _layer_functions.convolve
) -> Float[Array, "*outputs"]:
    """Computes the network's function on one example; `jax.vmap` for more.

    Args:
      arch: The architecture.
      params: The network.
      x: The example: [inputs] for dense networks, [height, width, channels] for convolutional ones. The user's own
        function, of an inferred architecture, takes inputs as it was traced with, or without their batch axis.
      convolve: How a convolution is computed: `convolve`, or `convolve_by_patches`, which is faster under `jax.vmap`
        over networks and inside compiled loops on CPU. The user's own function takes these two alone.

    Returns:
      The outputs, [outputs]; of the user's own function whatever it returns.

    Raises:
      ValueError: If params or x do not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> sg.network.apply(arch, params, jax.numpy.ones(2)).shape
    (1,)
    """

    if arch.function is not None:
        by_patches = convolve is _layer_functions.convolve_by_patches
        if not by_patches and convolve is not _layer_functions.convolve:
            raise ValueError(
                f"{arch.name!r} has a function of its own, whose convolutions convolve={convolve!r} cannot compute; "
                "expected network.convolve or network.convolve_by_patches."
            )
        return _traced.output(arch, params, x, by_patches=by_patches)

    def visit(_: tuple[str, ...], layer: Unit | Residual, params: Params, x: Array, state: None) -> tuple[Array, None]:
        return _layer_functions.layer_output(layer, params, x, convolve=convolve), state

    return forward(arch, params, x, visit, None)[0]


@stacks.any_container("params")
def forward(
    arch: Architecture, params: Params, x: Float[Array, "..."], visit: Visit[State], state: State
) -> tuple[Float[Array, " outputs"], State]:
    """Computes the network's function on one example with a function of your own at every layer.

    Like `jax.lax.scan` it threads a state through the layers, in the order in which they are computed: y, state =
    visit(path, layer, params, x, state). `visit` decides what the layer outputs, after its activation:
    `layer_output(layer, params, x)` is what `apply` computes; it may use other params, change the output, or put values
    into the state. Inside `jax.vmap(..., axis_name=moments.EXAMPLES)` it can call `moments.over_examples`.

    Args:
      arch: The architecture.
      params: The network.
      x: One example, as for `apply`.
      visit: (path, layer, params, x, state) -> (output, state). It is called for every Dense, Conv and normalization,
        with the path of the layer's params, like ("ResNetBlock_0", "Conv_1"), these params and its input; and for every
        Residual with the path of the params inside of it, these, and the sum of its two sides as x.
      state: What the first call gets.

    Returns:
      The outputs, [outputs], and the last state.

    Raises:
      ValueError: If params or x do not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> def visit(path, layer, params, x, shapes):
    ...     y = sg.network.layer_output(layer, params, x)
    ...     return y, shapes | {path: y.shape}
    >>> y, shapes = sg.network.forward(arch, params, jax.numpy.ones(2), visit, {})
    >>> shapes
    {('Dense_0',): (3,), ('Dense_1',): (1,)}
    """
    architecture.unpack(arch, params)
    stacks.check_floating(params)
    rank, width = arch.input_rank, arch.neuron_layers[0].width
    if x.ndim != rank or x.shape[-1] != width:
        raise ValueError(
            f"x has shape {x.shape}; {arch.name!r} expects one example {_INPUTS[rank]} with {width} in the last axis. "
            "Use jax.vmap for a batch."
        )
    return _walk(_Call(arch, x.shape, visit), arch.layers, (), params, x, state)


@stacks.any_container("params")
def activations(arch: Architecture, params: Params, x: Float[Array, "..."]) -> dict[str, tuple[Array, ...]]:
    """Returns the values of every hidden neuron layer on one example, after its activation; before an even one, abs.

    For the user's own function they are the values right after the last parameter that acts on them, before the
    activation, and sums of residual streams.

    The group acts on them as on the neurons: activations of act(Q, params) are the same, permuted and scaled by Q.
    Inputs of normalizations and the two summands of a residual are omitted: the group acts on them with another power.

    Args:
      arch: The architecture.
      params: The network.
      x: One example, as for `apply`.

    Returns:
      By neuron layer a tuple of its values in the order of the computation, each [*positions, width]. A residual stream
      has one after its stem and one after every sum; a layer without any post-activation value has ().

    Raises:
      ValueError: If params or x do not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 4, 1))
    >>> values = sg.network.activations(arch, sg.network.init(arch, jax.random.key(0)), jax.numpy.ones(2))
    >>> {name: [value.shape for value in places] for name, places in values.items()}
    {'hidden_0': [(3,)], 'hidden_1': [(4,)]}
    """
    if arch.function is not None:
        return _traced.activations(arch, params, x)
    places = _places(arch)

    def visit(
        path: tuple[str, ...], layer: Unit | Residual, params: Params, x: Array, values: _Values
    ) -> tuple[Array, _Values]:
        z = _layer_functions.preactivation(layer, params, x)
        y = _layer_functions.activate(layer.activation, z)
        seen = z if layer.activation is not None and layer.activation.is_even else y
        starts = places.get((path, layer), {})
        own = {name: seen[..., start : start + arch.neuron_layer(name).width] for name, start in starts.items()}
        return y, values | {name: (*values[name], value) for name, value in own.items()}

    none: _Values = {neurons.name: () for neurons in arch.hidden}
    return forward(arch, params, x, visit, none)[1]


@stacks.any_container("params")
def train_apply(
    arch: Architecture, params: Params, x: Float[Array, "examples ..."], *, momentum: float = 0.9
) -> tuple[Float[Array, "examples outputs"], dict[str, Any]]:
    """Computes the network's function on a whole batch in training mode: batch normalizations use its statistics.

    As Flax's BatchNorm with use_running_average=False: mean and biased variance over examples and positions (Ioffe and
    Szegedy 2015, arXiv 1502.03167, algorithm 1).

    Args:
      arch: The architecture.
      params: The network.
      x: The batch, [examples, inputs] or [examples, height, width, channels].
      momentum: The momentum of the stored statistics, in [0, 1]: stored = momentum * stored + (1 - momentum) * batch.

    Returns:
      The outputs, [examples, outputs], and the params in which every `mean` and `var` has moved towards the batch's.

    Raises:
      ValueError: If params or x do not fit the architecture, or on a momentum outside [0, 1].

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.vgg(((2,),), 3, input_channels=1, norm="batch")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> x = jax.random.uniform(jax.random.key(1), (4, 6, 6, 1))
    >>> y, moved = jax.jit(sg.network.train_apply)(arch, params, x)
    >>> y.shape, bool((moved["BatchNorm_0"]["var"] < params["BatchNorm_0"]["var"]).all())
    ((4, 3), True)
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1], like 0.9.")
    check_examples(arch, x)

    def visit(
        path: tuple[str, ...], layer: Unit | Residual, params: Params, x: Array, moved: _Moved
    ) -> tuple[Array, _Moved]:
        if isinstance(layer, BatchNorm):
            batch = moments.over_examples(x)._asdict()
            new = {(*path, name): momentum * params[name] + (1 - momentum) * value for name, value in batch.items()}
            params, moved = {**params, **batch}, moved | new
        return _layer_functions.layer_output(layer, params, x), moved

    def of_example(x: Array) -> tuple[Array, _Moved]:
        return forward(arch, params, x, visit, {})

    outputs, moved = jax.vmap(of_example, axis_name=moments.EXAMPLES, out_axes=(0, None))(x)
    return outputs, _variables.replace(params, moved)


def check_examples(arch: Architecture, x: Any, *, name: str = "x") -> None:
    """Checks a batch of inputs: its shape always, its values wherever they are known, outside jit and vmap.

    Args:
      arch: The architecture.
      x: The batch, [examples, inputs] or [examples, height, width, channels].
      name: What error messages call the batch.

    Raises:
      ValueError: If the batch does not fit the architecture, has no examples, or holds a NaN or an infinity.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.network.check_examples(sg.mlp((2, 3, 1)), jnp.zeros((5, 2)))
    >>> sg.network.check_examples(sg.mlp((2, 3, 1)), jnp.full((5, 2), jnp.nan))
    Traceback (most recent call last):
    ...
    ValueError: x[0] holds a NaN or an infinity; expected finite numbers. Leave such examples out.
    """
    if arch.function is not None:
        _traced.check_examples(arch, x, name=name)
    else:
        _check_shape(arch, x, name)
    if stacks.is_concrete(x) and not np.isfinite(finite := np.asarray(x)).all():
        example = int(np.argwhere(~np.isfinite(finite))[0, 0])
        raise ValueError(
            f"{name}[{example}] holds a NaN or an infinity; expected finite numbers. Leave such examples out."
        )


# --- private ------------------------------------------------------------------------------------------------------


def _check_shape(arch: Architecture, x: Any, name: str) -> None:
    rank, width = arch.input_rank, arch.neuron_layers[0].width
    try:
        np.shape(x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is a {type(x).__name__} that is no array: {error}; {arch.name!r} expects one array, [examples, "
            f"{_INPUTS[rank][1:]} with {width} in the last axis."
        ) from error
    if jnp.ndim(x) != rank + 1 or jnp.shape(x)[-1] != width or 0 in jnp.shape(x):
        cure = "Pass x[None] for one example."
        if rank == 1 and jnp.ndim(x) > 2 and math.prod(jnp.shape(x)[1:]) == width:
            cure = f"Flatten each example: {name}.reshape(len({name}), -1)."
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}; {arch.name!r} expects one example or more, [examples, "
            f"{_INPUTS[rank][1:]} with {width} in the last axis. {cure}"
        )


# The rank of one example -> its shape in words.
_INPUTS = {1: "[inputs]", 3: "[height, width, channels]"}


class _Call(NamedTuple):
    """What stays the same during one `forward`: `shape` is that of the network's input, for error messages."""

    arch: Architecture
    shape: tuple[int, ...]
    visit: Visit


def _walk(
    call: _Call, layers: tuple[Layer, ...], at: tuple[str, ...], params: Params, x: Array, state: Any
) -> tuple[Array, Any]:
    """Layers on one example; `params` is the mapping at the path `at` that has their params by name."""
    for layer in layers:
        match layer:
            case Residual():
                x, state = _residual(call, layer, at, params, x, state)
            case MaxPool() | AvgPool():
                x = _pool(call, layer, x)
            case GlobalMeanPool():
                x = x.mean((0, 1))
            case Flatten():
                x = x.reshape(-1)
            case _:
                x, state = call.visit((*at, layer.name), layer, params[layer.name], x, state)
                if not x.size:
                    raise ValueError(
                        f"x has shape {call.shape}, too small for the kernels of {call.arch.name!r} up to "
                        f"{layer.name!r}."
                    )
                if isinstance(layer, Dense):
                    x = x + layer.offset
    return x, state


def _residual(
    call: _Call, layer: Residual, at: tuple[str, ...], params: Params, x: Array, state: Any
) -> tuple[Array, Any]:
    inner, path = (params, at) if layer.name is None else (params[layer.name], (*at, layer.name))
    branch, state = _walk(call, layer.branch, path, inner, x, state)
    shortcut, state = _walk(call, layer.shortcut, path, inner, x, state)
    if branch.shape != shortcut.shape:
        raise ValueError(
            f"{call.arch.name!r}: the branch of Residual {layer.name!r} outputs {branch.shape}, its shortcut "
            f"{shortcut.shape}; expected one shape. Put a convolution with the branch's strides in the shortcut."
        )
    return call.visit(path, layer, inner, branch + shortcut, state)


def _pool(call: _Call, layer: MaxPool | AvgPool, x: Array) -> Array:
    if any(side < window for side, window in zip(x.shape, layer.window, strict=False)):
        raise ValueError(
            f"x has shape {call.shape}, too small for {call.arch.name!r}: a map of {x.shape[:2]} is left for pooling "
            f"windows of {layer.window}. Take larger images or fewer poolings."
        )
    return _layer_functions.pool(layer, x)


def _places(arch: Architecture) -> dict[tuple[tuple[str, ...], Layer], dict[str, int]]:
    """The layers whose outputs are hidden neurons: path and layer -> neuron layers, each with its start there."""
    places: dict[tuple[tuple[str, ...], Layer], dict[str, int]] = {}

    def visit(layers: tuple[Layer, ...], at: tuple[str, ...], *, side: bool) -> dict[str, int]:
        """The neuron layers that the last of these layers feeds; the `side` of a sum does not end with a place."""
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
    """The hidden neuron layers whose group scales a layer's output, with where each starts in the last axis."""
    array = (*path, "kernel" if isinstance(layer, Dense | Conv) else "scale")
    hidden = {neurons.name for neurons in arch.hidden}
    ends = [(p.axes[-1], p.offset[-1]) for p in arch.parameters if p.path == array]
    return {
        axis.neurons: start
        for axis, start in ends
        if isinstance(axis, Axis) and axis.power == 1 and axis.neurons in hidden
    }

"""The layers of `sequential`: what each stores and what it computes on a batch, as PyTorch's modules do."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A side of a window, or (height, width).
Size: TypeAlias = int | tuple[int, int]
Shapes: TypeAlias = dict[str, tuple[int, ...]]
Tensors: TypeAlias = Mapping[str, Array]

_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "abs": jnp.abs,
    "elu": jax.nn.elu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "hardtanh": lambda x: jnp.clip(x, -1, 1),
}


_INSTEAD = {
    "gelu": "Say gelu_exact (PyTorch's default) or gelu_tanh (Flax's).",
    "prelu": "It has weights of its own: put PReLU() or PReLU(per_channel=True) into the list.",
}


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense layer, x @ weight.T + bias, as torch.nn.Linear: weight [features, in], bias [features].

    Attributes:
      features: The number of its neurons.
      use_bias: Whether it has a bias.
      name: The module's name in a file, like "fc1" or "layer1.0.conv1"; None for its place in the list, as in
        torch.nn.Sequential.

    >>> import jax_scalegmn as sg
    >>> sg.sequential([sg.layers.Dense(10, use_bias=False, name="fc")], (4,)).array_shapes
    {('fc.weight',): (10, 4)}
    """

    features: int
    use_bias: bool = True
    name: str | None = None

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors for an input of that shape."""
        _check_rank(self, shape, 1)
        return {"weight": (self.features, shape[0])} | ({"bias": (self.features,)} if self.use_bias else {})

    def __call__(self, tensors: Tensors, x: Float[Array, "n in"]) -> Float[Array, "n out"]:
        """Computes the layer on a batch."""
        return x @ tensors["weight"].T + tensors.get("bias", 0)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution, as torch.nn.Conv2d: weight [features, in / groups, h, w], bias [features].

    Attributes:
      features: The number of its channels.
      kernel_size: The side of its kernels, or (height, width).
      stride: The stride, or one for each side.
      padding: The zeros on every side, or (above and below, left and right).
      groups: The number of groups of channels; that of the input for a depthwise convolution. Others are left fixed.
      use_bias: Whether it has a bias.
      name: As in `Dense`.

    >>> import jax_scalegmn as sg
    >>> layers = [sg.layers.Conv(4, 3, stride=2, padding=1), sg.layers.GlobalAvgPool()]
    >>> sg.sequential(layers, (1, 8, 8)).array_shapes
    {('0.weight',): (4, 1, 3, 3), ('0.bias',): (4,)}
    """

    features: int
    kernel_size: Size
    stride: Size = 1
    padding: Size = 0
    groups: int = 1
    use_bias: bool = True
    name: str | None = None

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors for an input of that shape."""
        _check_rank(self, shape, 3)
        if shape[0] % self.groups or self.features % self.groups:
            raise ValueError(f"{self} gets {shape[0]} channels; expected a multiple of groups, as features.")
        weight = (self.features, shape[0] // self.groups, *_pair(self.kernel_size))
        return {"weight": weight} | ({"bias": (self.features,)} if self.use_bias else {})

    def __call__(self, tensors: Tensors, x: Float[Array, "n in h w"]) -> Float[Array, "n out _h _w"]:
        """Computes the layer on a batch."""
        margins = [(side, side) for side in _pair(self.padding)]
        y = jax.lax.conv_general_dilated(
            x, tensors["weight"], _pair(self.stride), margins, feature_group_count=self.groups
        )
        return y + tensors["bias"][:, None, None] if self.use_bias else y


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A batch normalization by stored statistics, as torch.nn.BatchNorm1d and BatchNorm2d in evaluation mode.

    Attributes:
      epsilon: What is added to the variance.
      affine: Whether it has weight and bias.
      name: As in `Dense`.

    >>> import jax_scalegmn as sg
    >>> sorted(name for (name,) in sg.sequential([sg.layers.Dense(3), sg.layers.BatchNorm()], (2,)).array_shapes)
    ['0.bias', '0.weight', '1.bias', '1.running_mean', '1.running_var', '1.weight']
    """

    epsilon: float = 1e-5
    affine: bool = True
    name: str | None = None

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors for an input of that shape."""
        names = [*(("weight", "bias") if self.affine else ()), "running_mean", "running_var"]
        return dict.fromkeys(names, shape[:1])

    def __call__(self, tensors: Tensors, x: Float[Array, "n channels ..."]) -> Float[Array, "n channels ..."]:
        """Computes the layer on a batch."""
        t = {name: value.reshape(-1, *(1,) * (x.ndim - 2)) for name, value in tensors.items()}
        y = (x - t["running_mean"]) * jax.lax.rsqrt(t["running_var"] + self.epsilon)
        return y * t["weight"] + t["bias"] if self.affine else y


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation; in a list of layers its name alone is enough, where it has no options.

    Attributes:
      kind: relu, leaky_relu, relu6, abs, elu, gelu_exact (PyTorch's default), gelu_tanh (Flax's default), silu,
        sigmoid, softplus, tanh, hardtanh or sine.
      slope: The slope of leaky_relu on the negative side.
      w0: The frequency of sine, in radians: sin(w0 x).

    >>> import jax_scalegmn as sg
    >>> layers = [sg.layers.Dense(8), sg.layers.Activation("leaky_relu", slope=0.2), sg.layers.Dense(1)]
    >>> sg.sequential(layers, (2,)).hidden[0].scaling.value
    'positive'
    """

    kind: str
    slope: float = 0.01
    w0: float = 1.0

    def __post_init__(self) -> None:
        kinds = [*_FUNCTIONS, "leaky_relu", "sine"]
        if self.kind not in kinds:
            cure = _INSTEAD.get(str(self.kind).lower(), "")
            raise ValueError(f"The activation is {self.kind!r}; expected one of {', '.join(kinds)}. {cure}".strip())
        if self.slope != 0.01 and self.kind != "leaky_relu":
            raise ValueError(f"slope is {self.slope}, which {self.kind} does not have. Leave it out.")
        if self.w0 != 1.0 and self.kind != "sine":
            raise ValueError(f"w0 is {self.w0}, which {self.kind} does not have. Leave it out.")

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """It has no tensors."""
        return {}

    def __call__(self, tensors: Tensors, x: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """Computes the activation."""
        if self.kind == "leaky_relu":
            return jax.nn.leaky_relu(x, self.slope)
        return jnp.sin(self.w0 * x) if self.kind == "sine" else _FUNCTIONS[self.kind](x)


@dataclasses.dataclass(frozen=True)
class PReLU:
    """A leaky relu whose slopes are learned, as torch.nn.PReLU: weight [1], or [channels].

    Attributes:
      per_channel: Whether every channel has its own slope.
      name: As in `Dense`.

    >>> import jax_scalegmn as sg
    >>> layers = [sg.layers.Dense(8), sg.layers.PReLU(per_channel=True), sg.layers.Dense(1)]
    >>> arch = sg.sequential(layers, (2,))
    >>> arch.array_shapes["1.weight",], arch.hidden[0].scaling.value
    ((8,), 'positive')
    """

    per_channel: bool = False
    name: str | None = None

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors for an input of that shape."""
        return {"weight": shape[:1] if self.per_channel else (1,)}

    def __call__(self, tensors: Tensors, x: Float[Array, "n channels ..."]) -> Float[Array, "n channels ..."]:
        """Computes the activation."""
        slope = tensors["weight"]
        return jnp.where(x > 0, x, x * (slope.reshape(-1, *(1,) * (x.ndim - 2)) if self.per_channel else slope[0]))


@dataclasses.dataclass(frozen=True)
class _Pool:
    """What both poolings have: a window that moves over a map."""

    window: Size
    stride: Size | None = None
    padding: Size = 0

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """It has no tensors."""
        _check_rank(self, shape, 3)
        return {}


@dataclasses.dataclass(frozen=True)
class MaxPool(_Pool):
    """Max pooling, as torch.nn.MaxPool2d.

    Attributes:
      window: The side of the window, or (height, width).
      stride: The stride; None for that of the window.
      padding: The margin, which no maximum is in.

    >>> import jax_scalegmn as sg
    >>> sg.layers.MaxPool(3, stride=2, padding=1).window
    3
    """

    def __call__(self, tensors: Tensors, x: Float[Array, "n channels h w"]) -> Float[Array, "n channels _h _w"]:
        """Computes the pooling."""
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *_windows(self))


@dataclasses.dataclass(frozen=True)
class AvgPool(_Pool):
    """Mean pooling, as torch.nn.AvgPool2d, which counts the zeros of the padding.

    Attributes:
      window: The side of the window, or (height, width).
      stride: The stride; None for that of the window.
      padding: The zeros on every side.

    >>> import jax_scalegmn as sg
    >>> sg.layers.AvgPool(2).padding
    0
    """

    def __call__(self, tensors: Tensors, x: Float[Array, "n channels h w"]) -> Float[Array, "n channels _h _w"]:
        """Computes the pooling."""
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, *_windows(self)) / math.prod(_pair(self.window))


@dataclasses.dataclass(frozen=True)
class GlobalAvgPool:
    """The mean of every channel of a map, as a vector [channels].

    >>> import jax_scalegmn as sg
    >>> sg.layers.GlobalAvgPool()
    GlobalAvgPool()
    """

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """It has no tensors."""
        _check_rank(self, shape, 3)
        return {}

    def __call__(self, tensors: Tensors, x: Float[Array, "n channels h w"]) -> Float[Array, "n channels"]:
        """Computes the mean."""
        return x.mean((2, 3))


@dataclasses.dataclass(frozen=True)
class Flatten:
    """A map [channels, h, w] as one vector.

    Attributes:
      order: "channels_first", as torch.nn.Flatten: the channels are slowest; "channels_last", as Flax flattens:
        they are fastest.

    >>> import jax_scalegmn as sg
    >>> sg.layers.Flatten(order="channels_last").order
    'channels_last'
    """

    order: str = "channels_first"

    def __post_init__(self) -> None:
        if self.order not in ("channels_first", "channels_last"):
            raise ValueError(f"order is {self.order!r}; expected 'channels_first' or 'channels_last'.")

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """It has no tensors."""
        return {}

    def __call__(self, tensors: Tensors, x: Float[Array, "n ..."]) -> Float[Array, "n entries"]:
        """Flattens the map."""
        return (x if self.order == "channels_first" else jnp.moveaxis(x, 1, -1)).reshape(len(x), -1)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Nothing, as torch.nn.Dropout in evaluation mode: it takes a number among the modules of torch.nn.Sequential.

    >>> import jax_scalegmn as sg
    >>> arch = sg.sequential([sg.layers.Dense(3), "relu", sg.layers.Dropout(), sg.layers.Dense(2)], (4,))
    >>> list(arch.array_shapes)[-1]
    ('3.bias',)
    """

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """It has no tensors."""
        return {}

    def __call__(self, tensors: Tensors, x: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """Returns x."""
        return x


# The layers that have no others inside.
Single: TypeAlias = (
    Dense | Conv | BatchNorm | Activation | PReLU | MaxPool | AvgPool | GlobalAvgPool | Flatten | Dropout
)

# --- private ------------------------------------------------------------------------------------------------------


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _windows(layer: _Pool) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    stride = layer.window if layer.stride is None else layer.stride
    margins = tuple((side, side) for side in _pair(layer.padding))
    return (1, 1, *_pair(layer.window)), (1, 1, *_pair(stride)), ((0, 0), (0, 0), *margins)


def _check_rank(layer: object, shape: tuple[int, ...], rank: int) -> None:
    if len(shape) != rank:
        wanted = {1: "a vector [inputs]: put Flatten or GlobalAvgPool before it", 3: "a map [channels, height, width]"}
        raise ValueError(f"{layer} gets values of shape {shape}; expected {wanted[rank]}.")

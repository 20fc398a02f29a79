"""The layers that compute a network, and the group that commutes with each activation."""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias


class Scaling(enum.Enum):
    """The group that acts on the neurons of a layer without changing the function (arXiv 2406.10685, section 4).

    >>> import jax_scalegmn as sg
    >>> sg.architecture.SCALING_OF_ACTIVATION["tanh"]
    <Scaling.SIGN: 'sign'>
    """

    FIXED = "fixed"
    """The identity only: inputs and outputs, and layers whose group is not one of those below."""
    PERMUTATION = "permutation"
    """Permutations only: gelu, silu, sigmoid."""
    SIGN = "sign"
    """Permutations and sign flips: odd activations, sine and tanh."""
    POSITIVE = "positive"
    """Permutations and positive rescalings: homogeneous activations, relu and leaky relu."""
    NONZERO = "nonzero"
    """Permutations and rescalings by any numbers but 0, negative ones too: abs, and layers without an activation."""

    @property
    def has_signs(self) -> bool:
        """Whether neurons may change their signs."""
        return self in (Scaling.SIGN, Scaling.NONZERO)

    @property
    def has_sizes(self) -> bool:
        """Whether neurons may be rescaled by positive numbers."""
        return self in (Scaling.POSITIVE, Scaling.NONZERO)

    def common(self, other: "Scaling") -> "Scaling":
        """The largest group that both contain.

        Args:
          other: The other group.

        >>> import jax_scalegmn as sg
        >>> sg.Scaling.NONZERO.common(sg.Scaling.SIGN), sg.Scaling.POSITIVE.common(sg.Scaling.SIGN)
        (<Scaling.SIGN: 'sign'>, <Scaling.PERMUTATION: 'permutation'>)
        """
        if Scaling.FIXED in (self, other):
            return Scaling.FIXED
        return _WITH[self.has_signs and other.has_signs, self.has_sizes and other.has_sizes]


# By whether a group has signs and positive scales.
_WITH = {
    (False, False): Scaling.PERMUTATION,
    (True, False): Scaling.SIGN,
    (False, True): Scaling.POSITIVE,
    (True, True): Scaling.NONZERO,
}

# The groups that rescale neurons. A set: whoever needs an order of preference names it.
SCALED = frozenset({Scaling.SIGN, Scaling.POSITIVE, Scaling.NONZERO})

SCALING_OF_ACTIVATION: Mapping[str, Scaling] = {
    "sine": Scaling.SIGN,
    "tanh": Scaling.SIGN,
    "relu": Scaling.POSITIVE,
    "leaky_relu": Scaling.POSITIVE,
    "abs": Scaling.NONZERO,
    "gelu": Scaling.PERMUTATION,
    "gelu_exact": Scaling.PERMUTATION,
    "elu": Scaling.PERMUTATION,
    "relu6": Scaling.PERMUTATION,
    "silu": Scaling.PERMUTATION,
    "sigmoid": Scaling.PERMUTATION,
    "softplus": Scaling.PERMUTATION,
}

LEAKY_SLOPE = 0.01  # of leaky_relu, where none is named


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation function, applied to `frequency` times its input.

    Attributes:
      name: One of `SCALING_OF_ACTIVATION`. "gelu" is the approximation by tanh, Flax's default; "gelu_exact" is
        PyTorch's.
      frequency: A SIREN's w0, in radians; 1 for all others.
      slope: The slope of leaky_relu for negative inputs.

    >>> from jax_scalegmn import architecture
    >>> architecture.Activation("sine", 30.0).scaling
    <Scaling.SIGN: 'sign'>
    """

    name: str
    frequency: float = 1.0
    slope: float = LEAKY_SLOPE

    @property
    def scaling(self) -> Scaling:
        """The diagonal group that acts on what the activation reads."""
        return SCALING_OF_ACTIVATION[self.name]

    @property
    def is_even(self) -> bool:
        """Whether the activation hides the signs of what it reads."""
        return self.name == "abs"


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense layer: act(x @ kernel + bias) + offset.

    Its params are params[name] = {"kernel": [in, out], "bias": [out]}; the bias may be missing.

    >>> import jax_scalegmn as sg
    >>> sg.mlp((2, 16, 1)).layers[1]
    Dense(name='Dense_1', activation=None, offset=0.0)
    """

    name: str
    activation: Activation | None
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution: act(conv(x) + bias) on an [h, w, in] map.

    Its params are params[name] = {"kernel": [kh, kw, in, out], "bias": [out]}; the bias may be missing. The padding is
    "VALID", "SAME", or a number of zeros on every side, as PyTorch counts them.

    >>> import jax_scalegmn as sg
    >>> sg.cnn((1, 16), 10).layers[0].strides
    (2, 2)
    """

    name: str
    activation: Activation | None
    strides: tuple[int, int]
    padding: str | int


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A batch normalization: act((x - mean) / sqrt(var + epsilon) * scale + bias).

    Its params are params[name] = {"scale", "bias", "mean", "var"}, [channels] each; mean and var are the stored
    statistics, which only training changes.

    >>> import jax_scalegmn as sg
    >>> sg.vgg(((4,),), 2, norm="batch").layers[1]
    BatchNorm(name='BatchNorm_0', epsilon=1e-05, activation=Activation(name='relu', frequency=1.0, slope=0.01))
    """

    name: str
    epsilon: float
    activation: Activation | None


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """A layer normalization: as `BatchNorm`, with the mean and variance of the channels at each position.

    Its params are params[name] = {"scale", "bias"}, [channels] each.

    >>> import jax_scalegmn as sg
    >>> sg.vgg(((4,),), 2, norm="layer").layers[1].epsilon
    1e-06
    """

    name: str
    epsilon: float
    activation: Activation | None


@dataclasses.dataclass(frozen=True)
class GroupNorm:
    """A group normalization: as `LayerNorm`, with the mean and variance of all positions of a group of channels.

    The channels are cut into `groups` runs of neighbors.

    >>> import jax_scalegmn as sg
    >>> sg.vgg(((4,),), 2, norm="group", groups=1).layers[1].groups
    1
    """

    name: str
    groups: int
    epsilon: float
    activation: Activation | None


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """Max pooling: the largest entry of every window of an [h, w, channels] map, without padding.

    >>> import jax_scalegmn as sg
    >>> sg.vgg(((4,),), 2).layers[1]
    MaxPool(window=(2, 2), strides=(2, 2))
    """

    window: tuple[int, int]
    strides: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AvgPool:
    """Mean pooling: the mean of every window of an [h, w, channels] map, without padding.

    >>> import jax_scalegmn as sg
    >>> sg.vgg(((4,),), 2, pooling="mean").layers[1]
    AvgPool(window=(2, 2), strides=(2, 2))
    """

    window: tuple[int, int]
    strides: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class GlobalMeanPool:
    """Global mean pooling: the mean of an [h, w, channels] map over h and w.

    >>> import jax_scalegmn as sg
    >>> sg.cnn((1, 16), 10).layers[1]
    GlobalMeanPool()
    """


@dataclasses.dataclass(frozen=True)
class Flatten:
    """Flattens an [h, w, channels] map into one vector, channels fastest.

    >>> import jax_scalegmn as sg
    >>> sg.cnn((1, 16), 10, flatten=(28, 28)).layers[1]
    Flatten()
    """


@dataclasses.dataclass(frozen=True)
class Residual:
    """A residual block: act(branch(x) + shortcut(x)); an empty shortcut is the identity.

    The layers inside have their params in params[name], those of a submodule; if the name is None, in the same mapping
    as the layers around the block.

    >>> import jax_scalegmn as sg
    >>> block = sg.resnet(8).layers[2]
    >>> block.name, len(block.branch), len(block.shortcut)
    ('ResNetBlock_0', 4, 0)
    """

    name: str | None
    branch: "tuple[Layer, ...]"
    shortcut: "tuple[Layer, ...]"
    activation: Activation | None


Norm: TypeAlias = BatchNorm | LayerNorm | GroupNorm
Layer: TypeAlias = Dense | Conv | Norm | MaxPool | AvgPool | GlobalMeanPool | Flatten | Residual


def walk(layers: Sequence[Layer], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Layer]]:
    """Yields (path of the enclosing params mapping, layer) for every layer, with residual blocks flattened.

    The layers of a block's branch come first, then those of its shortcut.

    Args:
      layers: The layers of an architecture, or of a part of it.
      at: The path of the mapping that holds their params.

    >>> import jax_scalegmn as sg
    >>> layers = list(sg.architecture.walk(sg.resnet(8).layers))
    >>> [(path, layer.name) for path, layer in layers[:3]]
    [((), 'Conv_0'), ((), 'BatchNorm_0'), (('ResNetBlock_0',), 'Conv_0')]
    """
    for layer in layers:
        if isinstance(layer, Residual):
            yield from walk((*layer.branch, *layer.shortcut), at if layer.name is None else (*at, layer.name))
        else:
            yield at, layer


def known_activation(name: str) -> Activation:
    """The activation of that name, if its symmetry group is known.

    Args:
      name: One of `SCALING_OF_ACTIVATION`, like "relu"; "leaky_relu(0.2)" is leaky_relu with another slope.

    Raises:
      ValueError: If the group is unknown, or the slope is no finite number.

    >>> from jax_scalegmn import architecture
    >>> architecture.known_activation("leaky_relu(0.2)")
    Activation(name='leaky_relu', frequency=1.0, slope=0.2)
    """
    if isinstance(name, str) and name.startswith("leaky_relu(") and name.endswith(")"):
        text = name.removeprefix("leaky_relu(").removesuffix(")")
        try:
            slope = float(text)
        except ValueError:
            slope = math.nan
        if not math.isfinite(slope):
            raise ValueError(f"activation is {name!r}; expected a finite slope, like leaky_relu(0.2).")
        return Activation("leaky_relu", slope=slope)
    if name not in SCALING_OF_ACTIVATION:
        raise ValueError(
            f"activation is {name!r}, whose symmetry group is unknown; known are {sorted(SCALING_OF_ACTIVATION)}, and "
            "slopes as in leaky_relu(0.2). sg.sequential has PReLU, too; or infer the architecture from your function, "
            "by sg.infer."
        )
    return Activation(name)


def layer_as_json(layer: Layer) -> dict[str, Any]:
    """Describes a layer by plain JSON values, which `architecture.from_json` reads."""
    fields = dataclasses.asdict(layer)
    if (activation := fields.get("activation")) and activation["slope"] == LEAKY_SLOPE:
        del activation["slope"]
    if isinstance(layer, Residual):
        fields |= {"branch": [layer_as_json(inner) for inner in layer.branch]}
        fields |= {"shortcut": [layer_as_json(inner) for inner in layer.shortcut]}
    return {"type": type(layer).__name__, **fields}

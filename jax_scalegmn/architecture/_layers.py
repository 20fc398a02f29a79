"""The layers that compute a network, and which group commutes with each activation."""

import dataclasses
import enum
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias


class Scaling(enum.Enum):
    """What may act on the neurons of one layer without a change of the function (arXiv 2406.10685, section 4)."""

    FIXED = "fixed"
    """Nothing: inputs and outputs, and layers whose group is none of those below."""
    PERMUTATION = "permutation"
    """Permutations only: gelu, silu, sigmoid."""
    SIGN = "sign"
    """Permutations and sign flips: odd activations, sine and tanh."""
    POSITIVE = "positive"
    """Permutations and positive rescalings: homogeneous activations, relu and leaky relu."""


SCALING_OF_ACTIVATION: Mapping[str, Scaling] = {
    "sine": Scaling.SIGN,
    "tanh": Scaling.SIGN,
    "relu": Scaling.POSITIVE,
    "leaky_relu": Scaling.POSITIVE,
    "gelu": Scaling.PERMUTATION,
    "silu": Scaling.PERMUTATION,
    "sigmoid": Scaling.PERMUTATION,
    "softplus": Scaling.PERMUTATION,
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """`name` applied to `frequency` times its input; the frequency is a SIREN's w0."""

    name: str
    frequency: float = 1.0

    @property
    def scaling(self) -> Scaling:
        """The diagonal group that commutes with the activation."""
        return SCALING_OF_ACTIVATION[self.name]


@dataclasses.dataclass(frozen=True)
class Dense:
    """act(x @ kernel + bias) + offset, with params[name] = {"kernel": [in, out], "bias": [out]}, the bias if any."""

    name: str
    activation: Activation | None
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Conv:
    """act(conv(x) + bias) on [h, w, in] maps, with params[name] = {"kernel": [kh, kw, in, out], "bias": [out]}.

    Padding: "VALID", "SAME", or so many zeros on every side, as PyTorch counts them. The bias may be missing.
    """

    name: str
    activation: Activation | None
    strides: tuple[int, int]
    padding: str | int


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """act((x - mean) / sqrt(var + epsilon) * scale + bias) with params[name] = {"scale", "bias", "mean", "var"}.

    Each is [channels]; mean and var are the stored statistics, which only training changes.
    """

    name: str
    epsilon: float
    activation: Activation | None


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """As `BatchNorm`, with mean and variance of the channels at each position and without stored ones."""

    name: str
    epsilon: float
    activation: Activation | None


@dataclasses.dataclass(frozen=True)
class GroupNorm:
    """As `LayerNorm`, with mean and variance over all positions and each of `groups` runs of neighboring channels."""

    name: str
    groups: int
    epsilon: float
    activation: Activation | None


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """The largest entry of every window of an [h, w, channels] map, without padding."""

    window: tuple[int, int]
    strides: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AvgPool:
    """The mean of every window of an [h, w, channels] map, without padding."""

    window: tuple[int, int]
    strides: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class GlobalMeanPool:
    """The mean of an [h, w, channels] map over h and w."""


@dataclasses.dataclass(frozen=True)
class Flatten:
    """An [h, w, channels] map as one vector, channels fastest."""


@dataclasses.dataclass(frozen=True)
class Residual:
    """act(branch(x) + shortcut(x)); an empty shortcut is the identity.

    The layers inside have their params in params[name], a submodule's, or beside the others where name is None.
    """

    name: str | None
    branch: "tuple[Layer, ...]"
    shortcut: "tuple[Layer, ...]"
    activation: Activation | None


Norm: TypeAlias = BatchNorm | LayerNorm | GroupNorm
Layer: TypeAlias = Dense | Conv | Norm | MaxPool | AvgPool | GlobalMeanPool | Flatten | Residual


def walk(layers: Sequence[Layer], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Layer]]:
    """Every layer that computes by itself, in order, each behind the path of the mapping in which its name stands.

    In place of a `Residual` stand the layers of its branch, then those of its shortcut.
    """
    for layer in layers:
        if isinstance(layer, Residual):
            yield from walk((*layer.branch, *layer.shortcut), at if layer.name is None else (*at, layer.name))
        else:
            yield at, layer


def known_activation(name: str) -> Activation:
    """The activation of that name.

    Raises:
      ValueError: if its symmetry group is unknown.
    """
    if name not in SCALING_OF_ACTIVATION:
        raise ValueError(
            f"activation is {name!r}, whose symmetry group is unknown; known are {sorted(SCALING_OF_ACTIVATION)}. "
            "For another one write the Architecture yourself; Scaling.PERMUTATION is always safe."
        )
    return Activation(name)


def layer_as_json(layer: Layer) -> dict[str, Any]:
    """A layer as plain JSON values; `layer_from_json` reads it."""
    fields = dataclasses.asdict(layer)
    if isinstance(layer, Residual):
        fields |= {"branch": [layer_as_json(inner) for inner in layer.branch]}
        fields |= {"shortcut": [layer_as_json(inner) for inner in layer.shortcut]}
    return {"type": type(layer).__name__, **fields}


def layer_from_json(fields: Mapping[str, Any]) -> Layer:
    """The layer that `layer_as_json` described."""
    kinds = {kind.__name__: kind for kind in typing.get_args(Layer)}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items() if key != "type"}
    for side in {"branch", "shortcut"} & values.keys():
        values[side] = tuple(layer_from_json(layer) for layer in values[side])
    if isinstance(values.get("activation"), Mapping):
        values["activation"] = Activation(**values["activation"])
    return kinds[fields["type"]](**values)

"""What a network is made of: neuron layers, and for every axis of every parameter the neuron layer it indexes.

From one `Architecture` follow the symmetry group, its action, the graph, the matching problem and the tests.
"""

import dataclasses
import enum
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jax_scalegmn.types import Params


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
class Neurons:
    """One neuron layer: the units, or the channels, that share a symmetry."""

    name: str
    width: int
    scaling: Scaling


@dataclasses.dataclass(frozen=True)
class Axis:
    """A parameter's axis that indexes a neuron layer.

    `power` says how the entries follow a rescaling q of the neuron: +1 with it (its outgoing side: biases and the
    kernels that feed it), -1 against it (the kernels that read it), 0 not at all. `repeat` counts how often the
    layer stands along the axis, channels fastest: h * w where an [h, w, channels] map is flattened.
    """

    neurons: str
    power: int
    repeat: int = 1


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the params pytree; an axis that is a number is a spatial one of that size."""

    path: tuple[str, ...]
    axes: tuple[Axis | int, ...]

    @property
    def neuron_axes(self) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.axes if isinstance(axis, Axis))


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
    """As `LayerNorm`, with mean and variance over all positions and each of `groups` runs of neighbouring channels."""

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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a network is wired: the one value from which everything else follows.

    Frozen, hashable and a pytree without leaves, so that it crosses `jax.jit` and `jax.vmap` as an ordinary
    argument. It carries no arrays.

    Attributes:
      name: short and printable, like "siren 2-16-16-1".
      neurons: the neuron layers in topological order, inputs first.
      parameters: every array of the params pytree.
      layers: how `network.apply` computes the function. Empty for a network with a function of its own: all but
        `network` works on it, and `testing.assert_function_preserved` checks the description against that function.

    Raises:
      ValueError: if the parts do not fit together.
    """

    name: str
    neurons: tuple[Neurons, ...]
    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        names = [neurons.name for neurons in self.neurons]
        if len(set(names)) != len(names):
            raise ValueError(f"{self.name!r} names two neuron layers alike: {names}. Give each its own name.")
        for neurons in self.neurons:
            if neurons.width < 1:
                raise ValueError(f"{self.name!r}: neuron layer {neurons.name!r} has width {neurons.width}, not >= 1.")
        paths = [parameter.path for parameter in self.parameters]
        if len(set(paths)) != len(paths):
            raise ValueError(f"{self.name!r} describes a parameter twice: {[describe(path) for path in paths]}.")
        for parameter in self.parameters:
            _check_axes(self, parameter)

    def __str__(self) -> str:
        return self.name

    def layer(self, name: str) -> Neurons:
        """The neuron layer of that name."""
        for neurons in self.neurons:
            if neurons.name == name:
                return neurons
        raise ValueError(f"{self.name!r} has no neuron layer {name!r}; it has {[n.name for n in self.neurons]}.")

    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        """The shape of a parameter's array."""
        return tuple(
            axis if isinstance(axis, int) else self.layer(axis.neurons).width * axis.repeat for axis in parameter.axes
        )

    @property
    def hidden(self) -> tuple[Neurons, ...]:
        """The neuron layers on which a group acts."""
        return tuple(neurons for neurons in self.neurons if neurons.scaling is not Scaling.FIXED)

    @property
    def num_parameters(self) -> int:
        """How many numbers one network has."""
        return sum(math.prod(self.shape(parameter)) for parameter in self.parameters)

    def as_json(self) -> dict[str, Any]:
        """The description as plain JSON values, for files; `from_json` reads it."""
        return {
            "name": self.name,
            "neurons": [[neurons.name, neurons.width, neurons.scaling.value] for neurons in self.neurons],
            "parameters": [
                [list(parameter.path), [a if isinstance(a, int) else dataclasses.astuple(a) for a in parameter.axes]]
                for parameter in self.parameters
            ],
            "layers": [_layer_as_json(layer) for layer in self.layers],
        }


def from_json(description: Mapping[str, Any]) -> Architecture:
    """The architecture that `Architecture.as_json` described.

    Raises:
      ValueError: if the description is not one of an architecture.
    """
    try:
        return Architecture(
            name=description["name"],
            neurons=tuple(Neurons(name, width, Scaling(value)) for name, width, value in description["neurons"]),
            parameters=tuple(
                Parameter(tuple(path), tuple(a if isinstance(a, int) else Axis(*a) for a in axes))
                for path, axes in description["parameters"]
            ),
            layers=tuple(_layer_from_json(layer) for layer in description["layers"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"This is no description of an architecture ({error!r}): expected the JSON of Architecture.as_json, "
            f"got {str(description)[:200]!r}. The file is foreign or damaged."
        ) from error


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


def restrict(arch: Architecture, scaling: Scaling) -> Architecture:
    """The same network described with a smaller group: every hidden layer's group is cut down to `scaling`.

    With PERMUTATION, what reads, matches or merges networks follows permutations alone, for comparison.

    Args:
      arch: the architecture.
      scaling: PERMUTATION; or the group that some layers have, which then keep it while the others fall to PERMUTATION.

    Raises:
      ValueError: for FIXED, which would leave no symmetry at all.
    """
    if scaling is Scaling.FIXED:
        raise ValueError(f"Cannot restrict {arch.name!r} to FIXED: no symmetry would be left. Use PERMUTATION.")
    neurons = tuple(
        n if n.scaling in (Scaling.FIXED, scaling) else dataclasses.replace(n, scaling=Scaling.PERMUTATION)
        for n in arch.neurons
    )
    if neurons == arch.neurons:
        return arch
    return dataclasses.replace(arch, name=f"{arch.name} ({scaling.value} only)", neurons=neurons)


# --- params at the door ---------------------------------------------------------------------------------------------


def unpack(arch: Architecture, params: Params, *, name: str = "params") -> list[Any]:
    """The arrays of a params pytree in the order of `arch.parameters`, checked.

    Shapes are always checked; values wherever they are at hand, that is outside `jax.jit` and `jax.vmap`.

    Raises:
      ValueError: on a missing, additional or misshapen parameter, or one with a NaN or an infinity.
    """
    leaves = _leaves(params)
    expected = {parameter.path for parameter in arch.parameters}
    for path in leaves:
        if path not in expected:
            cure = "Remove it, or describe it in the Architecture."
            if path[:1] in (("params",), ("batch_stats",)):
                stored = any(other[:1] == ("batch_stats",) for other in leaves)
                cure = f"Pass network.merge_variables({name})." if stored else f"Pass {name}['params']."
            raise ValueError(
                f"{name}{describe(path)} is no parameter of {arch.name!r}, which has {_listed(arch)}. {cure}"
            )
    values = []
    for parameter in arch.parameters:
        where = f"{name}{describe(parameter.path)}"
        if parameter.path not in leaves:
            raise ValueError(f"{where} is missing; {arch.name!r} expects shape {arch.shape(parameter)}.")
        leaf = leaves[parameter.path]
        if np.shape(leaf) != arch.shape(parameter):
            raise ValueError(
                f"{where} has shape {np.shape(leaf)}; {arch.name!r} expects {arch.shape(parameter)}. "
                "PyTorch kernels are transposed (use interop.from_torch); a stack of networks needs jax.vmap."
            )
        if not isinstance(leaf, jax.core.Tracer):
            _check_finite(where, leaf)
        values.append(leaf)
    return values


def pack(arch: Architecture, values: Sequence[Any]) -> dict[str, Any]:
    """The params pytree of arrays that stand in the order of `arch.parameters`."""
    params: dict[str, Any] = {}
    for parameter, value in zip(arch.parameters, values, strict=True):
        node = params
        for key in parameter.path[:-1]:
            node = node.setdefault(key, {})
        node[parameter.path[-1]] = value
    return params


def check_stack(arch: Architecture, params: Params, *, name: str = "params") -> int:
    """Checks a stack of networks, one leading axis on every array, and returns how many it holds.

    Raises:
      ValueError: as `unpack`, or if the arrays disagree on how many networks there are.
    """
    leaves = _leaves(params)
    counts = {path: (np.shape(leaf) or (0,))[0] for path, leaf in leaves.items()}
    if len(set(counts.values())) != 1:
        listed = {describe(path): count for path, count in counts.items()}
        raise ValueError(f"The arrays of {name} disagree on how many networks they hold: {listed}.")
    for path, leaf in leaves.items():
        _check_finite(f"{name}{describe(path)}", leaf)
    jax.eval_shape(lambda stack: jax.vmap(lambda one: unpack(arch, one, name=name))(stack), dict(params))
    return int(next(iter(counts.values())))


def describe(path: Sequence[str]) -> str:
    """A path as it is written in Python: ['Dense_0']['kernel']."""
    return "".join(f"[{key!r}]" for key in path)


# --- private ------------------------------------------------------------------------------------------------------


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(tree, Mapping):
        return {where: leaf for key, node in tree.items() for where, leaf in _leaves(node, (*path, str(key))).items()}
    return {path: tree}


def _check_finite(where: str, leaf: Any) -> None:
    finite = np.isfinite(np.asarray(leaf))
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{where} holds {int((~finite).sum())} NaN or infinite entries, the first at {first}; expected finite "
            "numbers. The network diverged or its file is damaged: train or export it again."
        )


def _check_axes(arch: Architecture, parameter: Parameter) -> None:
    where = f"{arch.name!r}: parameter {describe(parameter.path)}"
    if not 1 <= len(parameter.neuron_axes) <= 2:
        raise ValueError(f"{where} has {len(parameter.neuron_axes)} neuron axes; expected 1 (a bias) or 2 (a kernel).")
    for axis in parameter.neuron_axes:
        arch.layer(axis.neurons)
        if axis.power not in (-1, 0, 1):
            raise ValueError(f"{where} has power {axis.power} on {axis.neurons!r}; expected -1, 0 or 1.")
        if axis.repeat < 1:
            raise ValueError(f"{where} repeats {axis.neurons!r} {axis.repeat} times; expected at least 1.")
    if len(parameter.neuron_axes) == 2:
        reads, feeds = parameter.neuron_axes
        if reads.neurons == feeds.neurons:
            raise ValueError(f"{where} leads from {reads.neurons!r} to itself; kernels inside one layer have no graph.")
        if reads.power > 0 or feeds.power < 0:
            raise ValueError(
                f"{where} has powers {reads.power} and {feeds.power}; a kernel's first neuron axis is the one that it "
                "reads (-1 or 0), the second the one that it feeds (0 or 1). Transpose kernels that are [out, in]."
            )


def _listed(arch: Architecture) -> str:
    return ", ".join(describe(parameter.path) for parameter in arch.parameters)


def _layer_as_json(layer: Layer) -> dict[str, Any]:
    fields = dataclasses.asdict(layer)
    if isinstance(layer, Residual):
        fields |= {"branch": [_layer_as_json(inner) for inner in layer.branch]}
        fields |= {"shortcut": [_layer_as_json(inner) for inner in layer.shortcut]}
    return {"type": type(layer).__name__, **fields}


def _layer_from_json(fields: Mapping[str, Any]) -> Layer:
    kinds = {kind.__name__: kind for kind in typing.get_args(Layer)}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items() if key != "type"}
    for side in {"branch", "shortcut"} & values.keys():
        values[side] = tuple(_layer_from_json(layer) for layer in values[side])
    if isinstance(values.get("activation"), Mapping):
        values["activation"] = Activation(**values["activation"])
    return kinds[fields["type"]](**values)

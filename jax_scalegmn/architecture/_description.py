"""The description of a network: neuron layers, and for every axis of every parameter the one that it indexes."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_scalegmn.architecture._layers import Layer, Scaling, layer_as_json, layer_from_json


@dataclasses.dataclass(frozen=True)
class NeuronLayer:
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
    """One array of the params pytree, or a block of one; an axis that is a number is a spatial one of that size.

    `start` is of a block: where it begins along every axis of the array at `path`. Blocks describe an axis along which
    several neuron layers stand, like that of a kernel that reads a concatenation, and together are the whole array.
    """

    path: tuple[str, ...]
    axes: tuple[Axis | int, ...]
    start: tuple[int, ...] = ()

    @property
    def neuron_axes(self) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.axes if isinstance(axis, Axis))

    @property
    def offset(self) -> tuple[int, ...]:
        """Where the block begins along every axis; zeros for a whole array."""
        return self.start or (0,) * len(self.axes)

    def __str__(self) -> str:
        return describe(self.path) + (f" from {self.start}" if self.start else "")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a network is wired: the one value from which everything else follows.

    Frozen, hashable and a pytree without leaves, so that it crosses `jax.jit` and `jax.vmap` as an ordinary
    argument. It carries no arrays.

    Attributes:
      name: short and printable, like "siren 2-16-16-1".
      neuron_layers: the neuron layers in topological order, inputs first.
      parameters: every array of the params pytree, or the blocks that it consists of.
      layers: how `network.apply` computes the function. Empty for a network with a function of its own: all but
        `network` works on it, and `testing.assert_function_preserved` checks the description against that function.

    Raises:
      ValueError: if the parts do not fit together.
    """

    name: str
    neuron_layers: tuple[NeuronLayer, ...]
    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        names = [neurons.name for neurons in self.neuron_layers]
        if len(set(names)) != len(names):
            raise ValueError(f"{self.name!r} names two neuron layers alike: {names}. Give each its own name.")
        for neurons in self.neuron_layers:
            if neurons.width < 1:
                raise ValueError(f"{self.name!r}: neuron layer {neurons.name!r} has width {neurons.width}, not >= 1.")
        for parameter in self.parameters:
            _check_axes(self, parameter)
        for path, blocks in _blocks(self).items():
            _check_blocks(self, path, blocks)

    def __str__(self) -> str:
        return self.name

    def neuron_layer(self, name: str) -> NeuronLayer:
        """The neuron layer of that name."""
        for neurons in self.neuron_layers:
            if neurons.name == name:
                return neurons
        raise ValueError(f"{self.name!r} has no neuron layer {name!r}; it has {[n.name for n in self.neuron_layers]}.")

    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        """The shape of a parameter's array, or of the block that it is."""
        return tuple(
            axis if isinstance(axis, int) else self.neuron_layer(axis.neurons).width * axis.repeat
            for axis in parameter.axes
        )

    @property
    def array_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The shape of every whole array, by path, in the order of `parameters`."""
        return {path: _whole_shape(self, blocks) for path, blocks in _blocks(self).items()}

    @property
    def hidden(self) -> tuple[NeuronLayer, ...]:
        """The neuron layers on which a group acts."""
        return tuple(neurons for neurons in self.neuron_layers if neurons.scaling is not Scaling.FIXED)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the fixed neuron layers that kernels read: where a walk through the network begins."""
        read = {parameter.neuron_axes[0].neurons for parameter in self.parameters if len(parameter.neuron_axes) == 2}
        return tuple(n.name for n in self.neuron_layers if n.scaling is Scaling.FIXED and n.name in read)

    @property
    def num_parameters(self) -> int:
        """How many numbers one network has."""
        return sum(math.prod(self.shape(parameter)) for parameter in self.parameters)

    def as_json(self) -> dict[str, Any]:
        """The description as plain JSON values, for files; `from_json` reads it."""
        return {
            "name": self.name,
            "neurons": [[neurons.name, neurons.width, neurons.scaling.value] for neurons in self.neuron_layers],
            "parameters": [_parameter_as_json(parameter) for parameter in self.parameters],
            "layers": [layer_as_json(layer) for layer in self.layers],
        }


def from_json(description: Mapping[str, Any]) -> Architecture:
    """The architecture that `Architecture.as_json` described.

    Raises:
      ValueError: if the description is not one of an architecture.
    """
    try:
        return Architecture(
            name=description["name"],
            neuron_layers=tuple(
                NeuronLayer(name, width, Scaling(value)) for name, width, value in description["neurons"]
            ),
            parameters=tuple(_parameter_from_json(*fields) for fields in description["parameters"]),
            layers=tuple(layer_from_json(layer) for layer in description["layers"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"This is no description of an architecture ({error!r}): expected the JSON of Architecture.as_json, "
            f"got {str(description)[:200]!r}. The file is foreign or damaged."
        ) from error


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
        for n in arch.neuron_layers
    )
    if neurons == arch.neuron_layers:
        return arch
    return dataclasses.replace(arch, name=f"{arch.name} ({scaling.value} only)", neuron_layers=neurons)


def describe(path: Sequence[str]) -> str:
    """A path as it is written in Python: ['Dense_0']['kernel']."""
    return "".join(f"[{key!r}]" for key in path)


# --- private ------------------------------------------------------------------------------------------------------


def _parameter_as_json(parameter: Parameter) -> list[Any]:
    axes = [axis if isinstance(axis, int) else dataclasses.astuple(axis) for axis in parameter.axes]
    # Whole arrays stay as they were written before there were blocks.
    return [list(parameter.path), axes, *([list(parameter.start)] if parameter.start else [])]


def _parameter_from_json(path: Sequence[str], axes: Sequence[Any], start: Sequence[int] = ()) -> Parameter:
    return Parameter(tuple(path), tuple(a if isinstance(a, int) else Axis(*a) for a in axes), tuple(start))


def _blocks(arch: Architecture) -> dict[tuple[str, ...], list[Parameter]]:
    """The blocks of every array."""
    found: dict[tuple[str, ...], list[Parameter]] = {}
    for parameter in arch.parameters:
        found.setdefault(parameter.path, []).append(parameter)
    return found


def _whole_shape(arch: Architecture, blocks: Sequence[Parameter]) -> tuple[int, ...]:
    ends = [[at + size for at, size in zip(block.offset, arch.shape(block), strict=True)] for block in blocks]
    return tuple(max(along) for along in zip(*ends, strict=True))


def _check_axes(arch: Architecture, parameter: Parameter) -> None:
    where = f"{arch.name!r}: parameter {parameter}"
    if len(parameter.neuron_axes) > 2:
        raise ValueError(f"{where} has {len(parameter.neuron_axes)} neuron axes; expected 1 (a bias) or 2 (a kernel).")
    for axis in parameter.neuron_axes:
        arch.neuron_layer(axis.neurons)
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


def _check_blocks(arch: Architecture, path: tuple[str, ...], blocks: Sequence[Parameter]) -> None:
    """The blocks of one array fill it without an overlap."""
    where = f"{arch.name!r}: array {describe(path)}"
    if len({len(block.axes) for block in blocks} | {len(block.offset) for block in blocks}) > 1:
        raise ValueError(
            f"{where} has blocks with {[len(block.axes) for block in blocks]} axes that start at "
            f"{[block.start for block in blocks]}; expected as many of each: those of one array."
        )
    if min(itertools.chain(*(block.offset for block in blocks)), default=0) < 0:
        raise ValueError(
            f"{where} has blocks that start at {[block.start for block in blocks]}; expected offsets >= 0."
        )
    shapes = [arch.shape(block) for block in blocks]
    for (one, a), (other, b) in itertools.combinations(zip(blocks, shapes, strict=True), 2):
        sides = zip(one.offset, a, other.offset, b, strict=True)
        if all(start < behind + length and behind < start + size for start, size, behind, length in sides):
            raise ValueError(
                f"{where} describes a parameter twice: the blocks of shapes {a} at {one.offset} and {b} at "
                f"{other.offset} overlap. Give each block its own start."
            )
    whole = _whole_shape(arch, blocks)
    filled = sum(math.prod(shape) for shape in shapes)
    if filled != math.prod(whole) or (len(blocks) > 1 and not all(block.start for block in blocks)):
        raise ValueError(
            f"{where} of shape {whole} has blocks for {filled} of its {math.prod(whole)} entries, that start at "
            f"{[block.start for block in blocks]}; expected blocks without a gap, each with its start."
        )

"""The description of a network: its neuron layers, and the neuron layer that each axis of each parameter indexes."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax

from jax_scalegmn import _bounded
from jax_scalegmn.architecture._function import TracedFunction
from jax_scalegmn.architecture._layers import Conv, Layer, Scaling, layer_as_json, walk


@dataclasses.dataclass(frozen=True)
class NeuronLayer:
    """A neuron layer: the units of a dense layer, or the channels of a convolution, that may be permuted.

    Attributes:
      name: Its name in the architecture.
      width: How many neurons it has.
      scaling: The group that acts on its neurons.

    >>> import jax_scalegmn as sg
    >>> sg.mlp((2, 16, 1), "tanh").neuron_layer("hidden_0")
    NeuronLayer(name='hidden_0', width=16, scaling=<Scaling.SIGN: 'sign'>)
    """

    name: str
    width: int
    scaling: Scaling


@dataclasses.dataclass(frozen=True)
class Axis:
    """The axis of a parameter that indexes a neuron layer.

    Attributes:
      neurons: The neuron layer's name.
      power: How the entries change when the neuron is rescaled by q: they are multiplied by q ** power. +1 for biases
        and for kernels that feed the layer, -1 for kernels that read it, 0 where the scale has no effect.
      repeat: How often the layer is repeated along the axis, its neurons fastest: h * w where an [h, w, channels] map
        is flattened.
      unsigned: Whether the sign of q has no effect: entries are multiplied by |q| ** power. So it is with kernels that
        read a layer after an even activation, abs. False where the power is 0.

    >>> import jax_scalegmn as sg
    >>> sg.mlp((2, 16, 1)).parameters[0].axes[1]
    Axis(neurons='hidden_0', power=1, repeat=1, unsigned=False)
    >>> sg.mlp((2, 16, 1), "abs").parameters[2].axes[0]
    Axis(neurons='hidden_0', power=-1, repeat=1, unsigned=True)
    """

    neurons: str
    power: int
    repeat: int = 1
    unsigned: bool = False

    def __post_init__(self) -> None:
        if self.power == 0:
            object.__setattr__(self, "unsigned", False)

    @property
    def shows_sign(self) -> bool:
        """Whether the entries change their signs with the neuron."""
        return self.power != 0 and not self.unsigned


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the params pytree, or a block of one.

    Blocks describe an axis along which several neuron layers follow one another, as in a kernel that reads a
    concatenation. The blocks of an array fill it without overlaps.

    Attributes:
      path: The keys that lead to the array.
      axes: For each axis of the array the neuron layer that it indexes, or a number, the size of a spatial axis.
      start: Where a block begins along every axis of its array; empty for a whole array.
      joined: The positions of those axes that are one axis of the array together with the axis before them, as where a
        [channels, h, w] map was flattened: (Axis("channels", -1), h * w, Axis("units", 1)) with joined (1,) is an array
        [channels * h * w, units]. Empty for blocks.

    >>> import jax_scalegmn as sg
    >>> bias = sg.Parameter(("Dense_0", "bias"), (sg.Axis("hidden_0", 1),))
    >>> str(bias)
    "['Dense_0']['bias']"
    """

    path: tuple[str, ...]
    axes: tuple[Axis | int, ...]
    start: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()

    @property
    def neuron_axes(self) -> tuple[Axis, ...]:
        """The axes that index neuron layers: one of a bias, two of a kernel."""
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
    """A description of a network: the value from which its symmetry group, graph and matching problem follow.

    It is frozen, hashable and a pytree without leaves, so that it passes through `jax.jit` and `jax.vmap` as an
    ordinary argument. It holds no arrays.

    Attributes:
      name: Short and printable, like "siren 2-16-16-1".
      neuron_layers: The neuron layers in topological order, inputs first.
      parameters: Every array of the params pytree, or the blocks that it consists of.
      layers: How `network.apply` computes the function. It is empty for a network with a function of its own.
      function: The network's own function, as `infer` traced it; None where `layers` compute the network, and where
        neither does: then everything works that does not need the function.

    Raises:
      ValueError: If the parts do not fit together.

    >>> import jax_scalegmn as sg
    >>> neuron_layers = (
    ...     sg.NeuronLayer("pixels", 3, sg.Scaling.FIXED),
    ...     sg.NeuronLayer("units", 5, sg.Scaling.POSITIVE),
    ...     sg.NeuronLayer("classes", 2, sg.Scaling.FIXED),
    ... )
    >>> parameters = (
    ...     sg.Parameter(("up",), (sg.Axis("pixels", -1), sg.Axis("units", 1))),
    ...     sg.Parameter(("down",), (sg.Axis("units", -1), sg.Axis("classes", 1))),
    ... )
    >>> arch = sg.Architecture("my network", neuron_layers, parameters)
    >>> arch.array_shapes
    {('up',): (3, 5), ('down',): (5, 2)}
    """

    name: str
    neuron_layers: tuple[NeuronLayer, ...]
    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...] = ()
    function: TracedFunction | None = None

    def __post_init__(self) -> None:
        names = [neurons.name for neurons in self.neuron_layers]
        if len(set(names)) != len(names):
            shown = _bounded.short(names)
            raise ValueError(f"{self.name!r} names two neuron layers alike: {shown}. Give each its own name.")
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
        """The neuron layer of that name.

        Raises:
          ValueError: If there is none.
        """
        found = self._by_name.get(name)
        if found is None:
            names = _bounded.short(list(self._by_name))
            raise ValueError(f"{self.name!r} has no neuron layer {_bounded.short(name)}; it has {names}.")
        return found

    @functools.cached_property
    def _by_name(self) -> dict[str, NeuronLayer]:
        return {neurons.name: neurons for neurons in self.neuron_layers}

    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        """The shape of a parameter: of its array, or of its block of one; axes that are joined are apart."""
        return tuple(
            axis if isinstance(axis, int) else self.neuron_layer(axis.neurons).width * axis.repeat
            for axis in parameter.axes
        )

    def block(self, parameter: Parameter) -> tuple[slice, ...]:
        """The slices that cut a parameter out of its whole array.

        >>> import jax_scalegmn as sg
        >>> arch = sg.mlp((2, 3, 1))
        >>> arch.block(arch.parameters[0])
        (slice(0, 2, None), slice(0, 3, None))
        """
        ends = zip(parameter.offset, self.shape(parameter), strict=True)
        return tuple(slice(start, start + size) for start, size in ends)

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
        """The names of the fixed neuron layers that kernels read, from which a walk through the network starts."""
        read = {parameter.neuron_axes[0].neurons for parameter in self.parameters if len(parameter.neuron_axes) == 2}
        return tuple(n.name for n in self.neuron_layers if n.scaling is Scaling.FIXED and n.name in read)

    @property
    def input_rank(self) -> int:
        """The rank of one example: 3 for the images [height, width, channels] of convolutions, 1 for vectors [inputs].

        Raises:
          ValueError: If `layers` is empty, so that the description does not tell.

        >>> import jax_scalegmn as sg
        >>> sg.mlp((2, 16, 1)).input_rank, sg.cnn((1, 16), 10).input_rank
        (1, 3)
        """
        if not self.layers:
            raise ValueError(
                f"{self.name!r} does not say how to compute its function (layers is empty, function is None). "
                "Describe it by sg.infer, or by a builder: architecture.mlp, siren or cnn."
            )
        return 3 if any(isinstance(layer, Conv) for _, layer in walk(self.layers)) else 1

    @property
    def num_parameters(self) -> int:
        """How many numbers one network has."""
        return sum(math.prod(self.shape(parameter)) for parameter in self.parameters)

    def as_json(self) -> dict[str, Any]:
        """The description as plain JSON values, for files; `from_json` reads it.

        A function of the user's own cannot be written and is left out: what is read back equals this description with
        `function=None`. Infer it again where the function is needed.
        """
        return {
            "name": self.name,
            "neurons": [[neurons.name, neurons.width, neurons.scaling.value] for neurons in self.neuron_layers],
            "parameters": [_parameter_as_json(parameter) for parameter in self.parameters],
            "layers": [layer_as_json(layer) for layer in self.layers],
        }


def restrict(arch: Architecture, scaling: Scaling) -> Architecture:
    """Describes the same network with a smaller group: permutations, and the scales of one `Scaling` at most.

    Models and matchers for the result follow permutations alone, say, for comparison.

    Args:
      arch: The architecture.
      scaling: PERMUTATION, for permutations alone; or SIGN or POSITIVE: every layer keeps what its group has in common
        with it, so that a NONZERO layer becomes a SIGN one, say.

    Returns:
      The architecture with the smaller group; `arch` itself if nothing changes.

    Raises:
      ValueError: For FIXED, which would leave no symmetry at all.

    >>> import jax_scalegmn as sg
    >>> arch = sg.architecture.restrict(sg.siren((2, 16, 1)), sg.Scaling.PERMUTATION)
    >>> arch.name, arch.hidden[0].scaling.value
    ('siren 2-16-1 w0=30 (permutation only)', 'permutation')
    """
    if scaling is Scaling.FIXED:
        raise ValueError(f"Cannot restrict {arch.name!r} to FIXED: no symmetry would be left. Use PERMUTATION.")
    neurons = tuple(dataclasses.replace(n, scaling=n.scaling.common(scaling)) for n in arch.neuron_layers)
    if neurons == arch.neuron_layers:
        return arch
    return dataclasses.replace(arch, name=f"{arch.name} ({scaling.value} only)", neuron_layers=neurons)


def describe(path: Sequence[str]) -> str:
    """Writes a path as Python does.

    Args:
      path: The keys that lead to an array.

    >>> from jax_scalegmn import architecture
    >>> architecture.describe(("Dense_0", "kernel"))
    "['Dense_0']['kernel']"
    """
    return "".join(f"[{key!r}]" for key in path)


# --- private ------------------------------------------------------------------------------------------------------


def _parameter_as_json(parameter: Parameter) -> list[Any]:
    axes = [axis if isinstance(axis, int) else _axis_as_json(axis) for axis in parameter.axes]
    # Whole arrays are written without a start, as they were before blocks existed, so that old files stay readable.
    more = [list(parameter.start), list(parameter.joined)]
    while more and not more[-1]:
        more.pop()
    return [list(parameter.path), axes, *more]


def _axis_as_json(axis: Axis) -> tuple[Any, ...]:
    return (axis.neurons, axis.power, axis.repeat, *([True] if axis.unsigned else []))


def _blocks(arch: Architecture) -> dict[tuple[str, ...], list[Parameter]]:
    """The blocks of every array, by path."""
    blocks: dict[tuple[str, ...], list[Parameter]] = {}
    for parameter in arch.parameters:
        blocks.setdefault(parameter.path, []).append(parameter)
    return blocks


def _whole_shape(arch: Architecture, blocks: Sequence[Parameter]) -> tuple[int, ...]:
    ends = [[at + size for at, size in zip(block.offset, arch.shape(block), strict=True)] for block in blocks]
    whole: list[int] = []
    for position, along in enumerate(zip(*ends, strict=True)):
        if position in blocks[0].joined:
            whole[-1] *= max(along)
        else:
            whole.append(max(along))
    return tuple(whole)


def _check_axes(arch: Architecture, parameter: Parameter) -> None:
    where = f"{arch.name!r}: parameter {parameter}"
    if len(parameter.neuron_axes) > 2:
        raise ValueError(f"{where} has {len(parameter.neuron_axes)} neuron axes; expected 1 (a bias) or 2 (a kernel).")
    wrong = [i for i in parameter.joined if not (0 < i < len(parameter.axes) and isinstance(parameter.axes[i], int))]
    if wrong or (parameter.joined and parameter.start):
        raise ValueError(
            f"{where} joins axes {parameter.joined} of {len(parameter.axes)}; expected positions of "
            "sizes after the first axis, in a whole array."
        )
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
    """Checks that the blocks of one array fill it without an overlap."""
    where, starts = f"{arch.name!r}: array {describe(path)}", _bounded.short([block.start for block in blocks])
    if len({len(block.axes) for block in blocks} | {len(block.offset) for block in blocks}) > 1:
        raise ValueError(
            f"{where} has blocks with {_bounded.short([len(block.axes) for block in blocks])} axes that start at "
            f"{starts}; expected one number of axes, that of the array, for all."
        )
    if min(itertools.chain(*(block.offset for block in blocks)), default=0) < 0:
        raise ValueError(f"{where} has blocks that start at {starts}; expected offsets >= 0.")
    shapes = [arch.shape(block) for block in blocks]
    if _fill(where, blocks, shapes) and (len(blocks) == 1 or all(block.start for block in blocks)):
        return
    for (first, shape), (second, other) in itertools.combinations(list(zip(blocks, shapes, strict=True))[:_NAMED], 2):
        sides = zip(first.offset, shape, second.offset, other, strict=True)
        if all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in sides):
            raise ValueError(
                f"{where} describes a parameter twice: the blocks of shapes {shape} at {first.offset} and {other} at "
                f"{second.offset} overlap. Give each block its own start."
            )
    whole, filled = _whole_shape(arch, blocks), sum(math.prod(shape) for shape in shapes)
    raise ValueError(
        f"{where} of shape {whole} has blocks for {filled} of its {math.prod(whole)} entries, that start at {starts}; "
        "expected blocks without a gap or overlap, each with its start."
    )


_NAMED = 200  # blocks among which the two that overlap are looked for, to name them
_MOST_CUTS = 6


def _fill(where: str, blocks: Sequence[Parameter], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether blocks fill their array exactly once, in linear time.

    They do if their indicator functions add up to that of the array. A function on a grid follows from its mixed
    difference, which for a block is +1 or -1 at its corners: so the corners have to add up.
    """
    extents = [
        tuple((start, start + size) for start, size in zip(block.offset, shape, strict=True))
        for block, shape in zip(blocks, shapes, strict=True)
    ]
    whole = tuple((0, max(end for _, end in sides)) for sides in zip(*extents, strict=True))
    cut = [axis for axis, side in enumerate(whole) if any(extent[axis] != side for extent in extents)]
    if len(cut) > _MOST_CUTS:
        raise ValueError(f"{where} has blocks that cut {len(cut)} of its axes; expected at most {_MOST_CUTS}.")
    corners: collections.Counter[tuple[int, ...]] = collections.Counter()
    for extent, sign in (*((extent, 1) for extent in extents), (whole, -1)):
        for ends in itertools.product((0, 1), repeat=len(cut)):
            place = tuple(extent[axis][end] for axis, end in zip(cut, ends, strict=True))
            corners[place] += -sign if sum(ends) % 2 else sign
    return not any(corners.values())

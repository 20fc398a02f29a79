"""From what was read of a program to the `Architecture`: which layers have a place in it, their groups and names."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from jax_scalegmn.architecture.description import Architecture, Axis, Neurons, Parameter, describe
from jax_scalegmn.architecture.layers import Scaling
from jax_scalegmn.architecture.powers import Equation, Solution, Unknowns, solve
from jax_scalegmn.architecture.reading import Reading, Value

MOST_BLOCKS = 256  # of one array; one that is cut into more is left whole, and fixed


class Array(NamedTuple):
    """A parameter of the program."""

    path: tuple[str, ...]
    value: Value


# The layers, with repeats, that stand one after another in a neuron layer of the description: one, unless no group
# acts. A number behind them tells two layers apart that one kernel would lead from and to.
Key: TypeAlias = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A part of an array's axis that indexes one neuron layer.

    Attributes:
      key: its layer.
      width: of the layer.
      repeat: how often the layer stands there.
      degree: the unknown power, of a layer on which a group may act.
      spatial: whether it is a spatial axis of a convolution.
    """

    key: Key
    width: int
    repeat: int
    degree: tuple[int, ...] | None
    spatial: bool

    @property
    def size(self) -> int:
        return self.width * self.repeat


class Block(NamedTuple):
    """A block of an array: where it starts, and the neuron layer, or the spatial axis, along each of its axes."""

    array: Array
    start: tuple[int, ...]
    pieces: tuple[Piece, ...]
    neurons: tuple[int, ...]  # the axes that index neuron layers


def assemble(name: str, reading: Reading, arrays: Sequence[Array]) -> tuple[Architecture, tuple[str, ...]]:
    """The description, and notes on what it leaves out."""
    order = {path: index for index, path in enumerate(reading.read)}
    for array in arrays:
        if array.path not in order:
            for row in array.value.axes:
                reading.layers.fix(row, "the function does not read it")
    arrays = sorted(arrays, key=lambda array: order.get(array.path, len(order)))
    _fix_what_has_no_place(reading, arrays)
    blocks = [block for array in arrays for block in _blocks(reading, arrays, array)]
    keys = _ordered(reading, blocks)
    names = _names(reading, blocks, keys)
    solutions = _solutions(reading, blocks, keys)
    neurons = tuple(
        Neurons(names[key], width, solutions[key].scaling if key in solutions else Scaling.FIXED)
        for key, width in keys.items()
    )
    whole = [array.path for array in arrays]
    counts = {path: sum(block.array.path == path for block in blocks) for path in whole}
    parameters = tuple(
        Parameter(block.array.path, _axes(block, names, solutions), block.start if counts[block.array.path] > 1 else ())
        for block in blocks
    )
    return Architecture(name, neurons, parameters), tuple(_notes(reading, blocks, names, solutions))

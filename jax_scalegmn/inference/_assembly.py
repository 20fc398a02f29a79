"""Writes what was read of a program as an `Architecture`: which layers are described, their groups and their names."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from jax_scalegmn.architecture import (
    Architecture,
    Axis,
    NeuronLayer,
    Parameter,
    Place,
    Scaling,
    TracedFunction,
    describe,
)
from jax_scalegmn.inference._powers import Equation, Solution, Unknowns, moving, solve
from jax_scalegmn.inference._reading import Reading, Seen, Value

# An array that is cut into more blocks is left whole, and fixed.
MOST_BLOCKS = 256


class Leaf(NamedTuple):
    """A leaf of the params: a parameter of the program."""

    path: tuple[str, ...]
    value: Value


# Key of a described layer: its (traced layer, repeat) parts, a single one unless no group acts. A trailing (-1, n)
# separates both ends of a kernel that would otherwise lead from a layer to itself.
Key: TypeAlias = tuple[tuple[int, int], ...]
Degree: TypeAlias = tuple[int, ...]


class Piece(NamedTuple):
    """A part of an array's axis that indexes one neuron layer.

    Attributes:
      key: The layer.
      width: The layer's width.
      repeat: The number of copies of the layer.
      degree: The unknown power, of a layer on which a group may act.
      spatial: Whether it is a spatial axis of a convolution.
      inner: The number of neighboring entries of each neuron.
    """

    key: Key
    width: int
    repeat: int
    degree: Degree | None
    spatial: bool
    inner: int = 1

    @property
    def size(self) -> int:
        return self.width * self.repeat * self.inner


class LeafBlock(NamedTuple):
    """A block of an array.

    Attributes:
      leaf: The array.
      start: Where the block starts along every axis.
      pieces: What lies along each of its axes.
      neurons: The axes that index neuron layers in the description, two at most.
    """

    leaf: Leaf
    start: tuple[int, ...]
    pieces: tuple[Piece, ...]
    neurons: tuple[int, ...]


def assemble(
    name: str, reading: Reading, leaves: Sequence[Leaf], function: TracedFunction
) -> tuple[Architecture, tuple[str, ...]]:
    """Writes the description, and notes on what it leaves out."""
    order = {path: index for index, path in enumerate(reading.read)}
    for leaf in leaves:
        if leaf.path not in order:
            for row in leaf.value.axes:
                reading.layers.fix(row, "the function does not read it")
    leaves = sorted(leaves, key=lambda leaf: order.get(leaf.path, len(order)))
    _fix_what_has_no_place(reading, leaves)
    blocks = _blocks(reading, leaves)
    keys = _ordered(reading, blocks)
    solutions = _solutions(reading, blocks, keys)
    names = _names(reading, blocks, keys, solutions)
    neurons = tuple(
        NeuronLayer(names[key], width, solutions[key].scaling if key in solutions else Scaling.FIXED)
        for key, width in keys.items()
    )
    cut = {block.leaf.path for block in blocks if any(block.start)}
    parameters = tuple(_parameter(block, names, solutions, cut=block.leaf.path in cut) for block in blocks)
    placed = _without_branches(reading, _placed(reading, blocks, parameters, names, solutions))
    function = dataclasses.replace(
        function,
        places=tuple(place for number, some in placed.items() if number in reading.places for place in some),
        sums=tuple(place for number, some in placed.items() if number not in reading.places for place in some),
        replaced=frozenset(seen.at for number, seen in reading.places.items() if number not in reading.values),
        centered=tuple(_centered(reading, parameters)),
    )
    return Architecture(name, neurons, parameters, function=function), tuple(
        _notes(reading, leaves, blocks, names, solutions)
    )


# --- private ------------------------------------------------------------------------------------------------------


def _pieces(reading: Reading, leaf: Leaf) -> list[list[Piece]]:
    """The pieces of each axis of an array. Neighbors on which no group acts are one piece."""
    layers, axes = reading.layers, []
    for row, size in zip(leaf.value.axes, leaf.value.shape, strict=True):
        if any(degree and degree[0] in reading.spatial for degree in row[0].degrees):
            axes.append([Piece((), size, 1, None, spatial=True)])
            continue
        pieces: list[Piece] = []
        for fixed, run in itertools.groupby(layers.resolve(row), layers.is_fixed):
            segments = [(s.layer, s) for s in run if isinstance(s.layer, int)]
            if fixed and (len(segments) > 1 or any(s.inner > 1 for _, s in segments)):
                width = sum(layers.size(s) for _, s in segments)
                key = tuple((layer, s.repeat * s.inner) for layer, s in segments)
                pieces.append(Piece(key, width, 1, None, False))
                continue
            for layer, s in segments:
                degree = None if fixed else s.degrees[0]
                pieces.append(Piece(((layer, 1),), layers.width(layer), s.repeat, degree, False, s.inner))
        axes.append(pieces)
    return axes


def _starts(axes: Sequence[Sequence[Piece]]) -> Iterator[tuple[tuple[int, ...], tuple[Piece, ...]]]:
    """Every block of an array: its start, and the pieces along its axes."""
    placed = []
    for pieces in axes:
        ends = itertools.accumulate(piece.size for piece in pieces)
        placed.append([(end - piece.size, piece) for end, piece in zip(ends, pieces, strict=True)])
    for block in itertools.product(*placed):
        yield tuple(start for start, _ in block), tuple(piece for _, piece in block)


def _fix_what_has_no_place(reading: Reading, leaves: Sequence[Leaf]) -> None:
    """Fixes layers until every block has at most two moving ones, no layer twice, and every array few enough blocks."""

    def offense(leaf: Leaf) -> tuple[Sequence[Piece], str] | None:
        axes = _pieces(reading, leaf)
        if math.prod(len(pieces) for pieces in axes) > MOST_BLOCKS:
            return max(axes, key=len), f"params{describe(leaf.path)} falls into too many blocks"
        slow = [piece for pieces in axes for piece in pieces if piece.degree is not None and piece.inner > 1]
        if slow and any(len(pieces) > 1 for pieces in axes):
            return slow, f"params{describe(leaf.path)} falls into blocks, and its neurons are not fastest there"
        for _, pieces in _starts(axes):
            moved = [piece for piece in pieces if piece.degree is not None]
            twice = [piece for index, piece in enumerate(moved) if piece.key in [p.key for p in moved[:index]]]
            if twice:
                return twice, f"the kernel params{describe(leaf.path)} leads from it to itself"
            if len(moved) > 2:
                narrowest = min(reversed(moved), key=lambda piece: piece.width)
                return [narrowest], f"params{describe(leaf.path)} indexes two more neuron layers; a kernel has two"
        return None

    for leaf in leaves:
        while (offending := offense(leaf)) is not None:
            pieces, reason = offending
            for piece in pieces:
                for layer, _ in piece.key:
                    reading.layers.fixed.setdefault(layer, reason)


def _blocks(reading: Reading, leaves: Sequence[Leaf]) -> list[LeafBlock]:
    axes = [_pieces(reading, leaf) for leaf in leaves]
    # An axis of one entry may be there for broadcasting only, unless a kernel has its layer.
    of_kernels = {
        piece.key
        for leaf, rows in zip(leaves, axes, strict=True)
        if any(row[0].degrees[0] and row[0].degrees[0][0] in reading.contracted for row in leaf.value.axes)
        for pieces in rows
        for piece in pieces
    }
    blocks = []
    for number, (leaf, rows) in enumerate(zip(leaves, axes, strict=True)):
        for start, pieces in _starts(rows):
            moved = [axis for axis, piece in enumerate(pieces) if piece.degree is not None]
            still = [axis for axis, piece in enumerate(pieces) if piece.degree is None and not piece.spatial]
            wide = [axis for axis in still if pieces[axis].size > 1 or pieces[axis].key in of_kernels]
            # Inputs and outputs rather than the places of a map.
            ends = reading.layers.inputs | reading.layers.outputs
            wide.sort(key=lambda axis: ({layer for layer, _ in pieces[axis].key} <= ends, axis))
            if not moved and not wide:
                wide = still[-1:]
            neurons = sorted([*moved, *wide[len(wide) - min(len(wide), 2 - len(moved)) :]])
            if len(neurons) == 2 and pieces[neurons[0]].key == pieces[neurons[1]].key:
                other = pieces[neurons[1]]
                apart = other._replace(key=(*other.key, (-1, number)))
                pieces = tuple(apart if axis == neurons[1] else piece for axis, piece in enumerate(pieces))
            blocks.append(LeafBlock(leaf, start, pieces, tuple(neurons)))
    return blocks


def _ordered(reading: Reading, blocks: Sequence[LeafBlock]) -> dict[Key, int]:
    """The neuron layers of the description with their widths, inputs first, then in the order of the program."""
    seen: dict[int, int] = {}
    for layer in reading.seen:
        for root, _ in reading.layers.roots(layer):
            seen.setdefault(root, len(seen))
    widths = {block.pieces[axis].key: block.pieces[axis].width for block in blocks for axis in block.neurons}

    def place(item: tuple[Key, int]) -> tuple[bool, int]:
        first = item[0][0][0]
        return first not in reading.layers.inputs, seen.get(first, len(seen))

    return dict(sorted(widths.items(), key=place))


def _names(
    reading: Reading, blocks: Sequence[LeafBlock], keys: Iterable[Key], solutions: dict[Key, Solution]
) -> dict[Key, str]:
    """The names of the layers: input, output, or the module whose kernel feeds the layer, the first that has it."""
    names: dict[Key, str] = {}
    taken: set[str] = set()
    having: dict[Key, list[LeafBlock]] = collections.defaultdict(list)
    for block in blocks:
        for key in dict.fromkeys(block.pieces[axis].key for axis in block.neurons):
            having[key].append(block)
    for key in keys:
        own = having[key]
        kernels = [block for block in own if len(block.neurons) == 2]
        feeding = [b for b in kernels if b.pieces[b.neurons[1]].key == key or key in solutions]
        path = (feeding or own)[0].leaf.path
        name = "/".join(path[:-1] or path)
        if not feeding and len(own[0].neurons) == 2:
            name += " rows"
        parts = {layer for layer, _ in key if layer >= 0}
        if parts <= reading.layers.inputs:
            name = "input"
        elif parts <= reading.layers.outputs:
            name = "output"
        fresh = (name if not count else f"{name}_{count}" for count in itertools.count())
        names[key] = next(n for n in fresh if n not in taken)
        taken.add(names[key])
    return names


def _placed(
    reading: Reading,
    blocks: Sequence[LeafBlock],
    parameters: Sequence[Parameter],
    names: dict[Key, str],
    solutions: dict[Key, Solution],
) -> dict[int, tuple[Place, ...]]:
    """By number, where the described layers have their pre-activations, with the parameters that multiply each."""
    equations = _by_layer(reading)
    pieces: dict[Key, list[tuple[int, Degree, int]]] = collections.defaultdict(list)
    for index, block in enumerate(blocks):
        for piece in block.pieces:
            if piece.degree is not None:
                pieces[piece.key].append((index, piece.degree, len(block.neurons)))

    def of_value(value: Seen) -> Iterator[tuple[int, Place]]:
        for axis, row in enumerate(value.axes):
            start = 0
            for segment in reading.layers.resolve(row):
                size = reading.layers.size(segment)
                key: Key = ((segment.layer, 1),)  # type: ignore[assignment]  # entries of no layer are no key
                if key in solutions and segment.repeat == segment.inner == 1 and segment.degrees[0]:
                    own = pieces[key]
                    # Powers of 0 are preferred on kernels: then only what normalizes is moved.
                    degrees = [degree for _, degree, _ in sorted(own, key=lambda item: -item[2])]
                    earlier = [some for some, at in equations[key[0][0]].items() if at < value.equations]
                    powers = moving(earlier, segment.degrees[0], degrees)
                    gains = tuple((index, powers[degree]) for index, degree, _ in own if degree in powers)
                    shifts = [i for i, _ in gains if parameters[i].path == value.unit]
                    alone = all(reading.uses[parameters[index].path] < 2 for index, _ in gains)
                    shift = shifts[0] if shifts else None
                    yield size, Place(names[key], value.at, axis, start, gains, shift, alone)
                start += size

    return {number: _apart(of_value(value)) for number, value in sorted((reading.values | reading.places).items())}


def _apart(sized: Iterable[tuple[int, Place]]) -> tuple[Place, ...]:
    """The places of one value, with their widths: the same parameters set one layer's sizes, the widest one's."""
    places = list(sized)

    def is_left(width: int, place: Place) -> bool:
        wider = (other for size, other in places if (size, other.axis) > (width, place.axis))
        return any(other.axis != place.axis and dict(other.gains).keys() & dict(place.gains) for other in wider)

    return tuple(place._replace(alone=place.alone and not is_left(width, place)) for width, place in places)


def _without_branches(reading: Reading, placed: dict[int, tuple[Place, ...]]) -> dict[int, tuple[Place, ...]]:
    """Those that REPAIR may correct one by one, if one of them is computed from another that is read elsewhere, too.

    The later one stays if parameters of its own set its mean and standard deviation, as a normalization's do.
    """
    left, taken = {}, dict[int, set[int]]()
    for number, places in placed.items():
        earlier = reading.beside.get(number)
        if earlier is not None:
            gains = {index for place in placed.get(earlier, ()) for index, _ in place.gains}
            taken[number] = gains | taken.get(earlier, set())
        if earlier is None or all(p.shift is not None and not taken[number] & dict(p.gains).keys() for p in places):
            left[number] = places
    return left


def _centered(reading: Reading, parameters: Sequence[Parameter]) -> Iterator[Place]:
    """Where a vector of the params alone is subtracted, by its blocks."""
    vectors: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for index, parameter in enumerate(parameters):
        if len(parameter.neuron_axes) == 1:
            vectors[parameter.path].append(index)
    for at, (path, axis) in sorted(reading.centered.items()):
        for index in vectors[path]:
            start = sum(parameters[index].offset)  # 0 along all axes but one
            yield Place(parameters[index].neuron_axes[0].neurons, at, axis, start, (), index)


def _solutions(reading: Reading, blocks: Sequence[LeafBlock], keys: Iterable[Key]) -> dict[Key, Solution]:
    """The group of every layer that is not fixed."""
    equations = _by_layer(reading)
    roles: dict[Key, tuple[dict, dict, dict]] = {}
    read: dict[Key, set[int]] = {}  # the places of its axis in kernels that sum over it
    for block in blocks:
        for place, axis in enumerate(block.neurons):
            piece = block.pieces[axis]
            if piece.degree is not None:
                role = 2 if len(block.neurons) == 1 else place
                roles.setdefault(piece.key, ({}, {}, {}))[role].setdefault(piece.degree)
                if role < 2 and piece.degree[0] in reading.contracted:
                    read.setdefault(piece.key, set()).add(place)
    return {
        key: solve(
            list(equations[key[0][0]]),
            Unknowns(*(tuple(some) for some in roles[key])),
            turned=read.get(key) == {1},
        )
        for key in keys
        if key in roles
    }


def _by_layer(reading: Reading) -> dict[int, dict[Equation, int]]:
    """The equations by the layers that theirs turned out to be, each with the number of the first that became it."""
    equations: dict[int, dict[Equation, int]] = collections.defaultdict(dict)
    for number, equation in enumerate(reading.equations):
        for layer, parts in reading.layers.roots(equation.layer):
            terms = tuple((coefficient, (*degree, *parts)) for coefficient, degree in equation.terms)
            equations[layer].setdefault(equation._replace(layer=layer, terms=terms), number)
    return equations


def _parameter(block: LeafBlock, names: dict[Key, str], solutions: dict[Key, Solution], *, cut: bool) -> Parameter:
    axes: list[Axis | int] = []
    joined = []
    for axis, piece in zip(_axes(block, names, solutions), block.pieces, strict=True):
        axes.append(axis)
        if isinstance(axis, Axis) and piece.inner > 1:
            joined.append(len(axes))
            axes.append(piece.inner)
    return Parameter(block.leaf.path, tuple(axes), block.start if cut else (), tuple(joined))


def _axes(block: LeafBlock, names: dict[Key, str], solutions: dict[Key, Solution]) -> tuple[Axis | int, ...]:
    axes: list[Axis | int] = [piece.size for piece in block.pieces]
    for place, axis in enumerate(block.neurons):
        piece = block.pieces[axis]
        usual = -1 if len(block.neurons) == 2 and place == 0 else 1
        power = usual
        solution = solutions.get(piece.key)
        if solution is not None and piece.degree is not None and solution.powers:
            power = solution.powers[piece.degree]
            if solution.scaling is Scaling.SIGN:
                power = usual * (power or piece.degree in solution.unsigned)
        unsigned = solution is not None and piece.degree in solution.unsigned
        axes[axis] = Axis(names[piece.key], power, piece.repeat, unsigned)
    return tuple(axes)


def _notes(
    reading: Reading,
    leaves: Sequence[Leaf],
    blocks: Sequence[LeafBlock],
    names: dict[Key, str],
    solutions: dict[Key, Solution],
) -> Iterator[str]:
    """A sentence for every axis that was left fixed, or whose group was made smaller."""
    kernels = [block for block in blocks if len(block.neurons) == 2]
    first, second = ({block.pieces[block.neurons[end]].key for block in kernels} for end in (0, 1))
    read = first & second  # one kernel writes it, another one reads it, whether they are [in, out] or [out, in]
    for leaf in leaves:
        for axis, pieces in enumerate(_pieces(reading, leaf)):
            for piece in dict.fromkeys(pieces):
                where = f"params{describe(leaf.path)} axis {axis}"
                note = _note(reading, piece, solutions.get(piece.key), piece.key in read)
                if note and (piece.key in names or piece.size > 1):
                    layer = f" ({names[piece.key]!r})" if piece.key in names else ""
                    yield f"{where}{layer}: {note}"


def _note(reading: Reading, piece: Piece, solution: Solution | None, read: bool) -> str | None:
    if solution is not None and solution.scaling is Scaling.PERMUTATION:
        positive, sign = (solution.refused[scaling] for scaling in (Scaling.POSITIVE, Scaling.SIGN))
        return f"permutations alone: positive scales fail at {positive}, signs at {sign}."
    if solution is not None and piece.degree in solution.left_alone:
        return "left alone by the rescaling that is described; a further one moves it, against another gain."
    moves = solution is not None and piece.degree is not None and solution.powers.get(piece.degree)
    if solution is not None and solution.generators > 1 and moves and not solution.left_alone:
        return (
            f"{solution.generators} independent rescalings move it; the one that is described goes through all of them."
        )
    layers = {layer for layer, _ in piece.key if layer >= 0}
    told = piece.spatial or layers <= reading.layers.inputs or (layers <= reading.layers.outputs and not read)
    if solution is not None or told:
        return None
    reasons = dict.fromkeys(reading.layers.fixed[layer] for layer in layers)
    return f"fixed: {'; '.join(reasons)}."

"""The neuron layers along the axes of a program's values, which are found, cut and unified while the program is read.

An axis is a row of segments. A segment is a layer, repeated with its neurons fastest, or entries of no layer; each
neuron of a layer may have several neighboring entries, as where a [channels, h, w] map is flattened. Layers
are unified where two axes meet, and cut where only a part of one does, as types are in type inference.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias


class Entries(enum.Enum):
    """The entries of a segment on which no group acts."""

    VARYING = "may all differ"
    EQUAL = "all equal"
    ZERO = "all zero"


# The power of a layer's scale that values are multiplied by: an unknown integer, given by its number and, if its layer
# was cut, the parts; None for the known degree 0; () for zeros, which have every degree.
Degree: TypeAlias = tuple[int, ...] | None
ANY_DEGREE: Degree = ()


class Segment(NamedTuple):
    """A part of an axis.

    Attributes:
      layer: The neuron layer, by its number, or what is known of entries without one.
      repeat: The number of copies of the layer, or the number of entries.
      degrees: The degree of each of the values that met along this axis.
      inner: The number of neighboring entries that each neuron of the layer has.
    """

    layer: int | Entries
    repeat: int
    degrees: tuple[Degree, ...] = (None,)
    inner: int = 1


Row: TypeAlias = tuple[Segment, ...]


def without_layer(kind: Entries, size: int, values: int = 1) -> Row:
    """An axis of that size on which no group acts, for a number of values."""
    return (Segment(kind, size, (ANY_DEGREE if kind is Entries.ZERO else None,) * values),)


class UnifiedLayers:
    """A union-find of a program's neuron layers: which ones are the same, and which are cut into parts.

    Attributes:
      fixed: The layers on which no group acts, with the reason.
      inputs: The layers of the program's inputs.
      outputs: The layers of its outputs, and of single neurons whose axis is removed, as before an output.
    """

    def __init__(self) -> None:
        self._widths: list[int] = []
        # A layer -> the layers it turned out to be, each with its repeat and inner.
        self._parts: dict[int, tuple[tuple[int, int, int], ...]] = {}
        self.fixed: dict[int, str] = {}
        self.inputs: set[int] = set()
        self.outputs: set[int] = set()

    def new(self, width: int) -> int:
        """A layer of which nothing is known yet."""
        self._widths.append(width)
        return len(self._widths) - 1

    def width(self, layer: int) -> int:
        return self._widths[layer]

    def size(self, segment: Segment) -> int:
        """How many entries a segment has."""
        return segment.repeat * self._unit(segment)

    def resolve(self, row: Iterable[Segment]) -> Row:
        """The axis in terms of the layers that are known so far."""
        row_now: list[Segment] = []
        for segment in row:
            parts = None if isinstance(segment.layer, Entries) else self._parts.get(segment.layer)
            if parts is None:
                resolved: Iterable[Segment] = (segment,)
            elif len(parts) == 1:
                ((layer, repeat, inner),) = parts
                resolved = self.resolve(
                    (Segment(layer, repeat * segment.repeat, segment.degrees, inner * segment.inner),)
                )
            else:
                pieces = [
                    Segment(layer, repeat, tuple(_part(degree, i) for degree in segment.degrees), inner * segment.inner)
                    for i, (layer, repeat, inner) in enumerate(parts)
                ]
                resolved = self.resolve(pieces) * segment.repeat
            for piece in resolved:
                last = row_now[-1] if row_now else None
                if last is not None and _continues(last, piece):
                    row_now[-1] = last._replace(repeat=last.repeat + piece.repeat)
                else:
                    row_now.append(piece)
        return tuple(row_now)

    def roots(self, layer: int) -> list[tuple[int, tuple[int, ...]]]:
        """The layers that a layer turned out to be, each with the parts that a degree on it gets."""
        roots: dict[tuple[int, tuple[int, ...]], None] = {}
        for segment in self.resolve((Segment(layer, 1, ((0,),)),)):
            assert isinstance(segment.layer, int)
            roots[segment.layer, (segment.degrees[0] or ())[1:]] = None
        return list(roots)

    def is_fixed(self, segment: Segment) -> bool:
        """Whether no group acts on a segment."""
        return isinstance(segment.layer, Entries) or segment.layer in self.fixed

    def fix(self, row: Iterable[Segment], reason: str) -> None:
        """Records that no group acts on the layers of an axis; the first reason for each layer is kept."""
        for segment in self.resolve(row):
            if not isinstance(segment.layer, Entries):
                self.fixed.setdefault(segment.layer, reason)

    def fix_input(self, row: Iterable[Segment]) -> None:
        """Fixes the layers of an axis of the program's input."""
        row = self.resolve(row)
        self.fix(row, "it is an input")
        self.inputs |= {segment.layer for segment in row if isinstance(segment.layer, int)}

    def fix_output(self, row: Iterable[Segment], reason: str = "it is an output") -> None:
        """Fixes the layers of an axis of the program's output, or of an axis that is removed from a value."""
        row = self.resolve(row)
        self.fix(row, reason)
        self.outputs |= {segment.layer for segment in row if isinstance(segment.layer, int)}

    def meet(self, left: Iterable[Segment], right: Iterable[Segment], reason: str) -> Row:
        """Unifies two axes of one size: layers at the same place are the same from now on.

        Each segment of the result has the degrees of both axes. A layer that meets numbers which differ from neuron to
        neuron is fixed, for that reason.
        """
        met: list[Segment] = []
        a, b = self.resolve(left), self.resolve(right)
        while a:
            size = self._common(a[0], b[0], reason)
            if size:
                (first, a), (second, b) = self._take(a, size), self._take(b, size)
                met.append(self._join(first, second))
            a, b = self.resolve(a), self.resolve(b)
        return tuple(met)

    def divide(self, row: Iterable[Segment], sizes: Sequence[int], reason: str) -> list[Row]:
        """Cuts an axis into pieces of these sizes, and its layers with it."""
        row = tuple(row)
        cuts = tuple(Segment(Entries.EQUAL, size, ()) for size in sizes if size)
        pieces = list(self.resolve(self.meet(row, cuts, reason)))
        divided: list[Row] = []
        for size in sizes:
            piece: list[Segment] = []
            while size:
                taken, rest = self._take(pieces, min(size, self.size(pieces[0])))
                piece.append(taken)
                pieces, size = list(rest), size - self.size(taken)
            divided.append(tuple(piece))
        return divided

    # --- private ------------------------------------------------------------------------------------------------------

    def _common(self, x: Segment, y: Segment, reason: str) -> int:
        """The number of entries over which two axes agree; 0 if they were changed to agree and must be read again."""
        sizes = self.size(x), self.size(y)
        if isinstance(x.layer, Entries) and isinstance(y.layer, Entries):
            return min(sizes)
        if isinstance(x.layer, Entries) or isinstance(y.layer, Entries):
            other, blank = (y, x) if isinstance(x.layer, Entries) else (x, y)
            assert isinstance(other.layer, int)
            size, unit = min(sizes), self._unit(other)
            if size % unit and other.repeat == 1 and not size % other.inner:
                self._cut(other.layer, size // other.inner)
                return 0
            uncut = blank.layer is not Entries.VARYING and not size % unit
            if not uncut and not self.is_fixed(other):
                self.fix((other,), reason)
                return 0
            return size
        if x.layer == y.layer and (x.inner == y.inner or self.is_fixed(x)):
            return min(sizes)
        return 0 if self._identify(x, y, reason) else min(sizes)

    def _identify(self, x: Segment, y: Segment, reason: str) -> bool:
        """Unifies two layers, cuts one of them, or fixes both; returns whether anything changed."""
        assert isinstance(x.layer, int)
        assert isinstance(y.layer, int)
        small, large = sorted((x, y), key=lambda s: (self._widths[s.layer], s.layer))  # type: ignore[index]
        assert isinstance(small.layer, int)
        assert isinstance(large.layer, int)
        # Neighboring entries of a neuron of both are one; the rest belong to the smaller layer's neurons.
        inner, uneven = small.inner // large.inner, small.inner % large.inner > 0
        width, wide = self._widths[small.layer] * inner, self._widths[large.layer]
        if x.layer == y.layer or uneven:
            if self.is_fixed(x) and self.is_fixed(y):
                return False
            self.fix((x, y), reason)
        elif wide > small.repeat * width:
            self._cut(large.layer, small.repeat * width)
        elif wide % width == 0:
            self._bind(large.layer, small.layer, wide // width, inner)
        elif self.is_fixed(x) and self.is_fixed(y):
            return False
        else:
            self.fix((x, y), reason)
        return True

    def _cut(self, layer: int, at: int) -> None:
        parts = self.new(at), self.new(self._widths[layer] - at)
        for part in parts:
            self._inherit(part, layer)
        self._parts[layer] = tuple((part, 1, 1) for part in parts)

    def _bind(self, layer: int, to: int, repeat: int, inner: int) -> None:
        self._inherit(to, layer)
        self._parts[layer] = ((to, repeat, inner),)

    def _unit(self, segment: Segment) -> int:
        """How many entries each copy of a segment's layer has."""
        return 1 if isinstance(segment.layer, Entries) else self._widths[segment.layer] * segment.inner

    def _inherit(self, layer: int, of: int) -> None:
        if of in self.fixed:
            self.fixed.setdefault(layer, self.fixed[of])
        for role in (self.inputs, self.outputs):
            if of in role:
                role.add(layer)

    def _take(self, row: Sequence[Segment], size: int) -> tuple[Segment, Row]:
        """The first `size` entries, which lie in one segment, and the rest."""
        first, rest = row[0], tuple(row[1:])
        left = self.size(first) - size
        if not left:
            return first, rest
        unit = self._unit(first)
        if size % unit:  # the layer is fixed; it would have been cut otherwise
            return Segment(Entries.VARYING, size, first.degrees), (Segment(Entries.VARYING, left, first.degrees), *rest)
        return first._replace(repeat=size // unit), (first._replace(repeat=left // unit), *rest)

    def _join(self, x: Segment, y: Segment) -> Segment:
        degrees = x.degrees + y.degrees
        layers = [s.layer for s in (x, y) if isinstance(s.layer, int)]
        if not layers:
            equal = Entries.VARYING not in (x.layer, y.layer)
            return Segment(Entries.EQUAL if equal else Entries.VARYING, x.repeat, degrees)
        if len(layers) == 2 and (x.layer, x.inner) != (y.layer, y.inner):  # both fixed, and of widths that do not fit
            return Segment(Entries.VARYING, self.size(x), degrees)
        return (x if isinstance(x.layer, int) else y)._replace(degrees=degrees)


def _continues(segment: Segment, following: Segment) -> bool:
    """Whether two neighbors are one segment. Two runs of equal entries are not: their numbers may differ."""
    if following.layer in (Entries.EQUAL, Entries.ZERO):
        return False
    return segment.layer == following.layer and segment[2:] == following[2:]


def _part(degree: Degree, index: int) -> Degree:
    return (*degree, index) if degree else degree

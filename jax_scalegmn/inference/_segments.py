"""What stands along the axes of values: neuron layers that are found, cut and identified while a program is read.

An axis is a row of segments. A segment is a layer, repeated with its neurons fastest, or one of `Plain`. Layers are
identified where two axes meet, and cut where only a part of one does: unification, as in type inference.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias


class Plain(enum.Enum):
    """Along a segment on which no group acts, values are:"""

    FREE = "whatever they are"
    EVEN = "all the same"
    ZERO = "all zero"


# How the values follow a rescaling of the layer: an unknown integer, by its number and, where its layer was cut, the
# parts; None for the known degree 0; () for zeros, which have every degree.
Degree: TypeAlias = tuple[int, ...] | None
ANY: Degree = ()


class Segment(NamedTuple):
    """`repeat` copies of a layer, or so many plain entries; a degree for each of the values that met there."""

    layer: int | Plain
    repeat: int
    degrees: tuple[Degree, ...] = (None,)


Row: TypeAlias = tuple[Segment, ...]


def plain(kind: Plain, size: int, values: int = 1) -> Row:
    """An axis of that size on which no group acts."""
    return (Segment(kind, size, (ANY if kind is Plain.ZERO else None,) * values),)


class Layers:
    """The neuron layers of a program, as far as they are known.

    Attributes:
      fixed: layers on which no group acts, and why.
      inputs: those that are axes of the program's input.
      outputs: those that are axes of its output, or of one neuron whose axis is taken away, as before an output.
    """

    def __init__(self) -> None:
        self._widths: list[int] = []
        self._parts: dict[int, tuple[tuple[int, int], ...]] = {}  # a layer -> the layers it turned out to be, repeated
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
        return segment.repeat * (1 if isinstance(segment.layer, Plain) else self._widths[segment.layer])

    def resolve(self, row: Iterable[Segment]) -> Row:
        """The axis in terms of the layers that are known today."""
        found: list[Segment] = []
        for segment in row:
            parts = None if isinstance(segment.layer, Plain) else self._parts.get(segment.layer)
            if parts is None:
                resolved: Iterable[Segment] = (segment,)
            elif len(parts) == 1:
                ((layer, repeat),) = parts
                resolved = self.resolve((Segment(layer, repeat * segment.repeat, segment.degrees),))
            else:
                pieces = [
                    Segment(layer, repeat, tuple(_part(degree, i) for degree in segment.degrees))
                    for i, (layer, repeat) in enumerate(parts)
                ]
                resolved = self.resolve(pieces) * segment.repeat
            for piece in resolved:
                # Runs of what is the same count as one; two even runs may hold different numbers.
                same = found and piece.layer not in (Plain.EVEN, Plain.ZERO) and found[-1][::2] == piece[::2]
                if same:
                    found[-1] = found[-1]._replace(repeat=found[-1].repeat + piece.repeat)
                else:
                    found.append(piece)
        return tuple(found)

    def roots(self, layer: int) -> list[tuple[int, tuple[int, ...]]]:
        """The layers that a layer turned out to be, each with the parts that a degree on it gets."""
        found: dict[tuple[int, tuple[int, ...]], None] = {}
        for segment in self.resolve((Segment(layer, 1, ((0,),)),)):
            assert isinstance(segment.layer, int)
            found[segment.layer, (segment.degrees[0] or ())[1:]] = None
        return list(found)

    def is_fixed(self, segment: Segment) -> bool:
        """Whether no group acts along it."""
        return isinstance(segment.layer, Plain) or segment.layer in self.fixed

    def fix(self, row: Iterable[Segment], reason: str) -> None:
        """Takes the group off all layers of an axis."""
        for segment in self.resolve(row):
            if not isinstance(segment.layer, Plain):
                self.fixed.setdefault(segment.layer, reason)

    def fix_input(self, row: Iterable[Segment]) -> None:
        """Takes the group off all layers of an axis of the program's input."""
        row = self.resolve(row)
        self.fix(row, "it is an input")
        self.inputs |= {segment.layer for segment in row if isinstance(segment.layer, int)}

    def fix_output(self, row: Iterable[Segment], reason: str = "it is an output") -> None:
        """Takes the group off all layers of an axis of the program's output, or of one that is taken off a value."""
        row = self.resolve(row)
        self.fix(row, reason)
        self.outputs |= {segment.layer for segment in row if isinstance(segment.layer, int)}

    def meet(self, left: Iterable[Segment], right: Iterable[Segment], reason: str) -> Row:
        """Two axes of one size as one: layers that stand at the same place are the same from now on.

        Each segment that comes back has the degrees of both. `reason` is given where a layer meets numbers that differ
        from neuron to neuron, and is fixed.
        """
        met: list[Segment] = []
        a, b = self.resolve(left), self.resolve(right)
        while a:
            size = self._common(a[0], b[0], reason)
            if size:
                (one, a), (other, b) = self._take(a, size), self._take(b, size)
                met.append(self._join(one, other))
            a, b = self.resolve(a), self.resolve(b)
        return tuple(met)

    def divide(self, row: Iterable[Segment], sizes: Sequence[int], reason: str) -> list[Row]:
        """An axis cut into pieces of these sizes; layers are cut with it."""
        row = tuple(row)
        cuts = tuple(Segment(Plain.EVEN, size, ()) for size in sizes if size)
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
        """How far two axes agree at their start; 0 if they had to be made agree first, so that one looks again."""
        sizes = self.size(x), self.size(y)
        if isinstance(x.layer, Plain) and isinstance(y.layer, Plain):
            return min(sizes)
        if isinstance(x.layer, Plain) or isinstance(y.layer, Plain):
            other, blank = (y, x) if isinstance(x.layer, Plain) else (x, y)
            assert isinstance(other.layer, int)
            size = min(sizes)
            if size % self._widths[other.layer] and other.repeat == 1:
                self._cut(other.layer, size)
                return 0
            uncut = blank.layer is not Plain.FREE and not size % self._widths[other.layer]
            if not uncut and not self.is_fixed(other):
                self.fix((other,), reason)
                return 0
            return size
        if x.layer == y.layer:
            return min(sizes)
        return 0 if self._identify(x, y, reason) else min(sizes)

    def _identify(self, x: Segment, y: Segment, reason: str) -> bool:
        """Whether it made two layers one, cut one of them, or fixed them."""
        assert isinstance(x.layer, int)
        assert isinstance(y.layer, int)
        small, large = sorted((x, y), key=lambda s: (self._widths[s.layer], s.layer))  # type: ignore[index]
        assert isinstance(small.layer, int)
        assert isinstance(large.layer, int)
        width, wide = self._widths[small.layer], self._widths[large.layer]
        if wide > self.size(small):
            self._cut(large.layer, self.size(small))
        elif wide % width == 0:
            self._bind(large.layer, small.layer, wide // width)
        elif self.is_fixed(x) and self.is_fixed(y):
            return False
        else:
            self.fix((x, y), reason)
        return True

    def _cut(self, layer: int, at: int) -> None:
        parts = self.new(at), self.new(self._widths[layer] - at)
        for part in parts:
            self._inherit(part, layer)
        self._parts[layer] = tuple((part, 1) for part in parts)

    def _bind(self, layer: int, to: int, repeat: int) -> None:
        self._inherit(to, layer)
        self._parts[layer] = ((to, repeat),)

    def _inherit(self, layer: int, of: int) -> None:
        if of in self.fixed:
            self.fixed.setdefault(layer, self.fixed[of])
        for role in (self.inputs, self.outputs):
            if of in role:
                role.add(layer)

    def _take(self, row: Sequence[Segment], size: int) -> tuple[Segment, Row]:
        """The first `size` entries, which lie in one segment, and what is behind them."""
        first, rest = row[0], tuple(row[1:])
        left = self.size(first) - size
        if not left:
            return first, rest
        width = 1 if isinstance(first.layer, Plain) else self._widths[first.layer]
        if size % width:  # of a fixed layer, or it would have been cut
            return Segment(Plain.FREE, size, first.degrees), (Segment(Plain.FREE, left, first.degrees), *rest)
        return first._replace(repeat=size // width), (first._replace(repeat=left // width), *rest)

    def _join(self, x: Segment, y: Segment) -> Segment:
        degrees = x.degrees + y.degrees
        layers = [s.layer for s in (x, y) if isinstance(s.layer, int)]
        if not layers:
            even = Plain.FREE not in (x.layer, y.layer)
            return Segment(Plain.EVEN if even else Plain.FREE, x.repeat, degrees)
        if len(layers) == 2 and x.layer != y.layer:  # both fixed, and of widths that do not fit
            return Segment(Plain.FREE, self.size(x), degrees)
        return Segment(layers[0], (x if isinstance(x.layer, int) else y).repeat, degrees)


def _part(degree: Degree, index: int) -> Degree:
    return (*degree, index) if degree else degree

"""What is known of a program while its operations are read: its values' axes, its layers and their equations."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn.architecture import Scaling
from jax_scalegmn.inference._powers import SCALED, Equation, equation
from jax_scalegmn.inference._segments import Degree, Layers, Plain, Row, Segment, plain


class Value(NamedTuple):
    """An array of the program.

    Attributes:
      shape: of the array.
      axes: what stands along each axis.
      constant: the number that all entries are, if it is known.
      depends: whether it depends on the params.
      path: of the parameter that it is.
    """

    shape: tuple[int, ...]
    axes: tuple[Row, ...]
    constant: float | None = None
    depends: bool = False
    path: tuple[str, ...] | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """`axes`, which of a known zero follow every rescaling."""
        return tuple(plain(Plain.ZERO, size) for size in self.shape) if self.constant == 0 else self.axes


class Reading:
    """The layers and equations of a program, as far as it is read.

    Attributes:
      layers: what is known of the neuron layers.
      equations: how degrees relate, in the order of the program.
      seen: the layers in the order of the program.
      read: the paths of the parameters in that order.
      contracted: the unknown degrees of axes that a product or convolution sums over.
      spatial: those of the spatial axes of convolutions' kernels.
    """

    def __init__(self) -> None:
        self.layers = Layers()
        self.equations: list[Equation] = []
        self.seen: dict[int, None] = {}
        self.read: dict[tuple[str, ...], None] = {}
        self.contracted: set[int] = set()
        self.spatial: set[int] = set()
        self._num_unknowns = 0

    def unknown(self) -> tuple[int, ...]:
        """A degree of which nothing is known yet."""
        self._num_unknowns += 1
        return (self._num_unknowns - 1,)

    def relate(
        self,
        segment: Segment,
        terms: Iterable[tuple[Fraction | int, Degree]],
        operation: str,
        scalings: Sequence[Scaling] = SCALED,
    ) -> None:
        """sum(coefficient * degree) = 0 on the layer of a segment."""
        if isinstance(segment.layer, Plain):
            return
        found = equation(segment.layer, terms, scalings, operation)
        if found is not None:
            self.equations.append(found)

    def keep_still(self, row: Row, operation: str, scalings: Sequence[Scaling] = SCALED) -> None:
        """No rescaling may show along an axis: all degrees are 0."""
        for segment in self.layers.resolve(row):
            self.relate(segment, [(1, segment.degrees[0])], operation, scalings)

    def give_up(self, row: Row, size: int, reason: str) -> Row:
        """An axis of that size behind an operation that mixes the entries of `row`: its layers are fixed."""
        row = self.layers.resolve(row)
        self.layers.fix(row, reason)
        if len(row) == 1 and row[0].layer in (Plain.EVEN, Plain.ZERO):
            return plain(Plain.EVEN, size)
        if row and all(segment.layer in self.layers.inputs for segment in row):
            return self.input_row(size)
        return plain(Plain.FREE, size)

    def input_row(self, size: int) -> Row:
        """An axis of the program's input."""
        row = (Segment(self.layers.new(size), 1),)
        self.layers.fix_input(row)
        return row

    def note_order(self, values: Iterable[Value]) -> None:
        """Remembers which parameters and layers came first."""
        for value in values:
            if value.path is not None:
                self.read.setdefault(value.path)
            for row in value.axes:
                for segment in row:
                    if not isinstance(segment.layer, Plain):
                        self.seen.setdefault(segment.layer)


def of_numbers(numbers: Any) -> Value:
    """The value of a literal or of an array that a function has closed over."""
    shape = np.shape(numbers)
    if isinstance(numbers, jax.core.Tracer) or jnp.issubdtype(jnp.result_type(numbers), jax.dtypes.extended):
        return Value(shape, tuple(plain(Plain.FREE, size) for size in shape))
    array = np.asarray(numbers)
    even = [
        size == 1 or bool((array == array.take([0], axis)).all()) if size else True for axis, size in enumerate(shape)
    ]
    axes = tuple(plain(Plain.EVEN if same else Plain.FREE, size) for same, size in zip(even, shape, strict=True))
    known = all(even) and array.size > 0 and not np.iscomplexobj(array)
    return Value(shape, axes, float(array.reshape(-1)[0]) if known else None)

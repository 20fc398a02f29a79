"""The state of the abstract interpretation: the axes of a program's values, its neuron layers and their equations."""

import collections
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import stacks
from jax_scalegmn.architecture import SCALED, Scaling
from jax_scalegmn.inference._powers import Equation, equation
from jax_scalegmn.inference._segments import Degree, Entries, Row, Segment, UnifiedLayers, without_layer


class Flow(NamedTuple):
    """Where an array of the program comes from.

    Attributes:
      data: Whether it depends on the inputs.
      unit: The vector that it is, moved and repeated at most, or that was added to it.
      value: The pre-activation that it is, up to what does not mix its neurons, by its number in `Reading.values`.
      own: Whether nothing else that depends on the inputs went into it since, as in a normalization.
      factor: Whether it is a parameter times numbers without neurons, as a normalization's scale over its size: what it
        multiplies is a pre-activation, not itself.
      origins: The numbers of all pre-activations that it depends on; of what no input goes into, the parameters' paths.
      around: Those of them that it depends on in another way than through one that took their place.
      whole: The parameter that it is, moved and repeated at most.
    """

    data: bool = False
    unit: tuple[str, ...] | None = None
    value: int | None = None
    own: bool = True
    factor: bool = False
    origins: frozenset[Any] = frozenset()
    around: frozenset[int] = frozenset()
    whole: tuple[str, ...] | None = None


class Seen(NamedTuple):
    """A pre-activation that the program computes.

    Attributes:
      at: Which operation computes it.
      axes: The neuron layers along its axes.
      equations: The number of equations before the operations that read it.
      unit: The vector that was added to it last.
    """

    at: tuple[int, ...]
    axes: "tuple[Row, ...]"
    equations: int
    unit: tuple[str, ...] | None


class Value(NamedTuple):
    """What is known of an array of the program.

    Attributes:
      shape: The array's shape.
      axes: The neuron layers along each axis.
      constant: The number that all entries are, if it is known.
      depends: Whether it depends on the params.
      path: The path of the parameter that it is, if it is one.
      flow: Where it comes from.
    """

    shape: tuple[int, ...]
    axes: tuple[Row, ...]
    constant: float | None = None
    depends: bool = False
    path: tuple[str, ...] | None = None
    flow: Flow = Flow()

    @property
    def rows(self) -> tuple[Row, ...]:
        """The axes; those of a known zero follow every rescaling."""
        return tuple(without_layer(Entries.ZERO, size) for size in self.shape) if self.constant == 0 else self.axes


class Reading:
    """The layers and equations of a program, as far as it has been read.

    Attributes:
      layers: The neuron layers.
      equations: The relations between degrees, in the order of the program.
      seen: The layers, in the order of the program.
      read: The paths of the parameters, in the order in which the program reads them.
      contracted: The unknown degrees of axes that a product or a convolution sums over.
      spatial: The unknown degrees of the spatial axes of convolution kernels.
      places: The pre-activations right after their last parameter, by number.
      centered: The operations that subtract a parameter alone, with its path and the axis along which it is.
      values: These, and sums of them with other values.
      earlier: By the number of a pre-activation that of the one whose place it takes, and whether nothing else that
        depends on the inputs went in between.
      beside: By the number of a pre-activation that of an earlier one, of which a parameter made it, that is read in
        another place as well.
      uses: How often parameters meet values that depend on the inputs, in whatever operation, or are returned, by path.
      num_values: How many there were, those that others replaced included.
    """

    def __init__(self) -> None:
        self.layers = UnifiedLayers()
        self.equations: list[Equation] = []
        self.seen: dict[int, None] = {}
        self.read: dict[tuple[str, ...], None] = {}
        self.contracted: set[int] = set()
        self.spatial: set[int] = set()
        self.places: dict[int, Seen] = {}
        self.centered: dict[tuple[int, ...], tuple[tuple[str, ...], int]] = {}
        self.values: dict[int, Seen] = {}
        self.earlier: dict[int, tuple[int, bool]] = {}
        self.beside: dict[int, int] = {}
        self.uses: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.num_values = 0
        self._num_unknowns = 0

    def unknown(self) -> tuple[int, ...]:
        """A new unknown degree."""
        self._num_unknowns += 1
        return (self._num_unknowns - 1,)

    def relate(
        self,
        segment: Segment,
        terms: Iterable[tuple[Fraction | int, Degree]],
        operation: str,
        scalings: frozenset[Scaling] = SCALED,
    ) -> None:
        """Records sum(coefficient * degree) = 0 on the layer of a segment."""
        if isinstance(segment.layer, Entries):
            return
        relation = equation(segment.layer, terms, scalings, operation)
        if relation is not None:
            self.equations.append(relation)

    def keep_still(self, row: Row, operation: str, scalings: frozenset[Scaling] = SCALED) -> None:
        """Requires that no rescaling shows along an axis: all its degrees are 0."""
        for segment in self.layers.resolve(row):
            self.relate(segment, [(1, segment.degrees[0])], operation, scalings)

    def give_up(self, row: Row, size: int, reason: str) -> Row:
        """Fixes the layers of `row`, whose entries an operation mixes, and returns the resulting axis of that size."""
        row = self.layers.resolve(row)
        self.layers.fix(row, reason)
        if len(row) == 1 and row[0].layer in (Entries.EQUAL, Entries.ZERO):
            return without_layer(Entries.EQUAL, size)
        if row and all(segment.layer in self.layers.inputs for segment in row):
            return self.input_row(size)
        return without_layer(Entries.VARYING, size)

    def input_row(self, size: int) -> Row:
        """A new axis of the program's input."""
        row = (Segment(self.layers.new(size), 1),)
        self.layers.fix_input(row)
        return row

    def note_order(self, values: Iterable[Value]) -> None:
        """Records in which order parameters and layers occur."""
        for value in values:
            if value.path is not None:
                self.read.setdefault(value.path)
            for row in value.axes:
                for segment in row:
                    if not isinstance(segment.layer, Entries):
                        self.seen.setdefault(segment.layer)


def of_numbers(numbers: Any) -> Value:
    """The value of a literal, or of an array that the function is closed over."""
    shape = np.shape(numbers)
    if not stacks.is_concrete(numbers) or jnp.issubdtype(jnp.result_type(numbers), jax.dtypes.extended):
        return Value(shape, tuple(without_layer(Entries.VARYING, size) for size in shape))
    array = np.asarray(numbers)
    equal = [
        size == 1 or bool((array == array.take([0], axis)).all()) if size else True for axis, size in enumerate(shape)
    ]
    axes = tuple(
        without_layer(Entries.EQUAL if same else Entries.VARYING, size) for same, size in zip(equal, shape, strict=True)
    )
    known = all(equal) and array.size > 0 and not np.iscomplexobj(array)
    return Value(shape, axes, float(array.reshape(-1)[0]) if known else None)

"""How operations carry neuron layers from their operands to their results: `apply` reads one equation of a jaxpr.

An operation that is not known fixes all layers of its operands. So a group that is found may be too small, never wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jax_scalegmn.architecture import SCALED, Scaling, called_program
from jax_scalegmn.inference import _elementwise, _shapes
from jax_scalegmn.inference._reading import Reading, Value
from jax_scalegmn.inference._segments import Degree, Entries, Segment, without_layer
from jax_scalegmn.inference._shapes import Axes

# It returns the axes of every result, or None for a form of the operation that is not known.
Operation: TypeAlias = Callable[[Reading, Any, Sequence[Value]], list[Axes] | None]

_SIGN = frozenset({Scaling.SIGN})
# By the name that their calls have in a program.
_ODD_FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {"hard_tanh": jax.nn.hard_tanh}


def apply(reading: Reading, eqn: Any, values: Sequence[Value], *, clips: bool = False) -> list[Value]:
    """The values that one equation of a jaxpr computes; what follows for layers and degrees is added to `reading`.

    With `clips` the equation is one half of an odd clip, min(max(x, -c), c).
    """
    reading.note_order(values)
    name = eqn.primitive.name
    if clips or (name == "clamp" and values[0].constant is not None and values[0].constant == -_number(values[2])):
        x = next(i for i, value in enumerate(values) if not value.constant)
        return _results(reading, eqn, values, _entry_by_entry(reading, eqn, values, rule=_elementwise.odd_in(x)))
    operation = OPERATIONS.get(name, _entry_by_entry if name in _elementwise.RULES else _unknown)
    rows = operation(reading, eqn, values)
    if rows is None:
        rows = _unknown(reading, eqn, values)
    return _results(reading, eqn, values, rows)


def known_call(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Value] | None:
    """The value of a call of a function of JAX's that is odd, though its operations are not one by one; else None."""
    function = _ODD_FUNCTIONS.get(str(eqn.params.get("name")))
    if function is None or len(values) != 1 or len(eqn.outvars) != 1:
        return None
    operand = eqn.invars[0].aval
    own = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(operand.shape, operand.dtype)).eqns
    if len(own) != 1 or str(called_program(own[0])) != str(called_program(eqn)):
        return None  # a function of the user's own, of that name
    reading.note_order(values)
    return _results(reading, eqn, values, _entry_by_entry(reading, eqn, values, rule=_elementwise.odd))


# --- private ------------------------------------------------------------------------------------------------------


def _results(reading: Reading, eqn: Any, values: Sequence[Value], rows: list[Axes]) -> list[Value]:
    name = eqn.primitive.name
    depends = any(value.depends for value in values)
    constant = values[0].constant if name in _KEEPS_CONSTANT else None
    if name == "convert_element_type" and constant != 0 and not _is_inexact(eqn.params["new_dtype"]):
        constant = None
    results = [
        Value(tuple(var.aval.shape), axes, constant, depends) for var, axes in zip(eqn.outvars, rows, strict=True)
    ]
    reading.note_order(results)
    return results


def _number(value: Value) -> float:
    return math.nan if value.constant is None else value.constant


def _unknown(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """An unknown operation: the layers of its operands are fixed, and its results have none."""
    for value in values:
        for row in value.axes:
            reading.layers.fix(row, f"`{eqn.primitive.name}` reads it, an operation whose symmetry is not known")
    return [
        tuple(without_layer(Entries.VARYING, size) for size in getattr(var.aval, "shape", ())) for var in eqn.outvars
    ]


def _entry_by_entry(
    reading: Reading, eqn: Any, values: Sequence[Value], *, rule: _elementwise.Rule | None = None
) -> list[Axes]:
    """An element-wise operation: the axes of all operands are unified."""
    name = eqn.primitive.name
    if rule is None:
        rule, values = _rule(eqn, values)
    shape = eqn.outvars[0].aval.shape
    operands = [_spread(reading, value, shape, name).rows for value in values]
    axes = []
    for rows in zip(*operands, strict=True):
        met = reading.layers.resolve(rows[0])
        for row in rows[1:]:
            met = reading.layers.meet(met, row, f"`{name}` meets it with numbers that differ from neuron to neuron")
        axes.append(tuple(_related(reading, segment, rule, name) for segment in met))
    return [tuple(axes)]


def _rule(eqn: Any, values: Sequence[Value]) -> tuple[_elementwise.Rule, Sequence[Value]]:
    """The rule of an operation, and its operands as the rule takes them."""
    name = eqn.primitive.name
    if name == "integer_pow":
        return _elementwise.power(eqn.params["y"]), values
    if name == "pow" and values[1].constant is not None and math.isfinite(values[1].constant):
        return _elementwise.power(values[1].constant), values
    if name == "convert_element_type" and _is_inexact(eqn.params["new_dtype"]):
        return _elementwise.alike, values
    if name == "mul" and all(value.flow.data for value in values):
        return _elementwise.product_of_data, values
    if name in ("max", "min"):  # an infinity does not change under any scale, just as 0 does not
        values = [v._replace(constant=0.0) if v.constant in (math.inf, -math.inf) else v for v in values]
    return _elementwise.RULES[name], values


def _spread(reading: Reading, value: Value, shape: tuple[int, ...], name: str) -> Value:
    """An operand broadcast to the shape of the result, as scalars and single entries are."""
    rows = [without_layer(Entries.EQUAL, size) for size in shape]
    if value.shape:
        for axis, (row, size) in enumerate(zip(value.axes, value.shape, strict=True)):
            if size == shape[axis]:
                rows[axis] = row
            else:
                reading.layers.fix(row, f"`{name}` repeats its one neuron")
    return value._replace(shape=shape, axes=tuple(rows))


def _related(reading: Reading, segment: Segment, rule: _elementwise.Rule, name: str) -> Segment:
    """The result's segment, whose degree is a new unknown, related to those of the operands."""
    if isinstance(segment.layer, Entries):
        # A function of zero need not be zero.
        return Segment(Entries.EQUAL if segment.layer is Entries.ZERO else segment.layer, segment.repeat)
    result = reading.unknown()

    def require(terms: Sequence[tuple[Fraction | int, Degree]], scalings: frozenset[Scaling]) -> None:
        reading.relate(segment, terms, name, scalings)

    rule(require, segment.degrees, result)
    return segment._replace(degrees=(result,))


def _reduction(extremum: bool = False, product: bool = False, index: bool = False) -> Operation:
    """A sum, maximum or product over some axes, which does not depend on the order, or the index of a maximum."""

    def operation(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
        name, gone = eqn.primitive.name, set(eqn.params["axes"])
        kept = []
        for axis, row in enumerate(values[0].axes):
            if axis in gone:
                reading.keep_still(row, name)
                if index:
                    reading.layers.fix(row, f"`{name}` tells the place of a neuron")
                continue
            if extremum or product or index:
                reading.keep_still(row, name, SCALED if product else _SIGN)
            # The place of the largest entry does not follow a scale.
            kept.append(tuple(s._replace(degrees=(None,)) for s in row) if index else row)
        return [tuple(kept)]

    return operation


def _dot_general(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """A product of matrices, or of batches of them."""
    (left_sums, right_sums), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = (value.axes for value in values)
    for i, j in zip(left_sums, right_sums, strict=True):
        _contract(reading, left[i], right[j], "dot_general")
    rows = []
    for i, j in zip(left_batch, right_batch, strict=True):
        met = reading.layers.meet(left[i], right[j], "`dot_general` meets it with numbers that differ")
        rows.append(tuple(_related(reading, segment, _elementwise.product, "dot_general") for segment in met))
    rows += [row for axis, row in enumerate(left) if axis not in (*left_sums, *left_batch)]
    rows += [row for axis, row in enumerate(right) if axis not in (*right_sums, *right_batch)]
    return [tuple(rows)]


def _contract(reading: Reading, left: Any, right: Any, name: str) -> None:
    """A sum of products along two axes: a scale on one side is undone on the other."""
    reading.contracted |= {s.degrees[0][0] for row in (left, right) for s in row if s.degrees[0]}
    layers = reading.layers
    for row, other in ((left, right), (right, left)):
        # An input with one channel, whose axis was removed and added again, has lost its layer.
        if [(segment.layer, segment.repeat) for segment in layers.resolve(row)] == [(Entries.EQUAL, 1)]:
            layers.fix_input(other)
    for segment in layers.meet(left, right, f"`{name}` sums it with numbers that differ from neuron to neuron"):
        reading.relate(segment, [(1, degree) for degree in segment.degrees], name)


def _conv_general_dilated(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes] | None:
    """A convolution, with all channels in one group or, depthwise, each in its own."""
    maps, kernel = values
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (batch, features, *places), (feeds, reads, *sides) = numbers.lhs_spec, numbers.rhs_spec
    depthwise = 1 < groups == maps.shape[features] == kernel.shape[feeds]
    if eqn.params["batch_group_count"] != 1 or not (groups == 1 or depthwise):
        return None
    for axis in [*sides, reads] if depthwise else sides:
        row = kernel.axes[axis]
        reading.layers.fix(row, "it is a spatial axis of a kernel")
        reading.spatial |= {segment.degrees[0][0] for segment in row if segment.degrees[0]}
    for axis in places:
        reading.layers.fix(maps.axes[axis], "it is a spatial axis of a convolution")
    fed = kernel.axes[feeds]
    if depthwise:
        met = reading.layers.meet(maps.axes[features], fed, "a depthwise convolution meets it with numbers that differ")
        fed = tuple(_related(reading, segment, _elementwise.product, "conv_general_dilated") for segment in met)
        reading.contracted |= {segment.degrees[0][0] for segment in kernel.axes[feeds] if segment.degrees[0]}
    else:
        _contract(reading, maps.axes[features], kernel.axes[reads], "conv_general_dilated")
    rows = [without_layer(Entries.VARYING, size) for size in eqn.outvars[0].aval.shape]
    rows[numbers.out_spec[0]], rows[numbers.out_spec[1]] = maps.axes[batch], fed
    return [tuple(rows)]


def _window(extremum: bool) -> Operation:
    """A sum or an extremum over windows, which may not cover several neurons."""

    def operation(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
        given = [eqn.params[f"window_{what}"] for what in ("dimensions", "strides", "dilation")]
        given += [eqn.params["base_dilation"], eqn.params["padding"]]
        shape, rows = eqn.outvars[0].aval.shape, []
        for axis, (row, (*ones, margins)) in enumerate(zip(values[0].axes, zip(*given, strict=True), strict=True)):
            if set(ones) != {1} or any(margins):
                row = reading.give_up(row, shape[axis], "a window covers several of its neurons")
                # Windows of equal entries differ at the margins.
                row = without_layer(Entries.VARYING, shape[axis]) if isinstance(row[0].layer, Entries) else row
            elif extremum:
                reading.keep_still(row, eqn.primitive.name, _SIGN)
            rows.append(row)
        return [tuple(rows)]

    return operation


def _cumsum(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """A running sum, which depends on the order along its axis."""
    rows, axis = list(values[0].axes), eqn.params["axis"]
    reading.layers.fix(rows[axis], "`cumsum` goes through its neurons in order")
    rows[axis] = without_layer(Entries.VARYING, values[0].shape[axis])
    return [tuple(rows)]


def _is_inexact(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))


_KEEPS_CONSTANT = {
    *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape", "rev", "slice"),
    *("squeeze", "stop_gradient", "transpose"),
}

OPERATIONS: Mapping[str, Operation] = {
    **dict.fromkeys(
        (
            *("copy", "copy_p", "device_put", "neg", "optimization_barrier", "reduce_precision", "stop_gradient"),
            *("sharding_constraint", "real", "imag", "conj"),
        ),
        _shapes.same,
    ),
    "broadcast_in_dim": _shapes.broadcast_in_dim,
    "transpose": _shapes.transpose,
    "squeeze": _shapes.squeeze,
    "rev": _shapes.rev,
    "iota": _shapes.iota,
    "slice": _shapes.slice_,
    "split": _shapes.split,
    "dynamic_slice": _shapes.dynamic_slice,
    "gather": _shapes.gather,
    "concatenate": _shapes.concatenate,
    "stack": _shapes.stack,
    "pad": _shapes.pad,
    "reshape": _shapes.reshape,
    "cumsum": _cumsum,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "reduce_sum": _reduction(),
    "reduce_max": _reduction(extremum=True),
    "reduce_min": _reduction(extremum=True),
    **dict.fromkeys(("reduce_prod", "reduce_and", "reduce_or"), _reduction(product=True)),
    **dict.fromkeys(("argmax", "argmin"), _reduction(index=True)),
    "reduce_window_sum": _window(extremum=False),
    "reduce_window_max": _window(extremum=True),
    "reduce_window_min": _window(extremum=True),
}

"""Operations that move entries: which axes of the operand become which of the result, and which are cut or mixed."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from jax_scalegmn.architecture import SCALED
from jax_scalegmn.inference._reading import Reading, Value
from jax_scalegmn.inference._segments import Entries, Row, without_layer

Axes: TypeAlias = tuple[Row, ...]


def same(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """An operation that is linear in every entry: each result has the axes of its operand."""
    return [value.axes for value in values[: len(eqn.outvars)]]


def broadcast_in_dim(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """New axes, and axes of one entry repeated, in equal entries."""
    shape = _integers(eqn.params["shape"])
    rows = [without_layer(Entries.EQUAL, size) for size in shape]
    for axis, to in enumerate(eqn.params["broadcast_dimensions"]):
        if values[0].shape[axis] == shape[to]:
            rows[to] = values[0].axes[axis]
        else:
            reading.layers.fix(values[0].axes[axis], "`broadcast_in_dim` repeats its one neuron")
    return [tuple(rows)]


def transpose(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """A permutation of the axes."""
    return [tuple(values[0].axes[axis] for axis in eqn.params["permutation"])]


def squeeze(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """Axes of one entry removed."""
    gone = {axis % len(values[0].shape) for axis in eqn.params["dimensions"]}
    for axis in gone:
        reading.layers.fix_output(values[0].axes[axis], "`squeeze` removes its axis")
    return [tuple(row for axis, row in enumerate(values[0].axes) if axis not in gone)]


def rev(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """The order along some axes reversed."""
    rows, shape = list(values[0].axes), values[0].shape
    for axis in eqn.params["dimensions"]:
        rows[axis] = reading.give_up(rows[axis], shape[axis], "`rev` turns the order of its neurons round")
    return [tuple(rows)]


def iota(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """A count along one axis."""
    along = eqn.params["dimension"]
    shape = eqn.outvars[0].aval.shape
    return [
        tuple(
            without_layer(Entries.VARYING if axis == along else Entries.EQUAL, size) for axis, size in enumerate(shape)
        )
    ]


def slice_(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """A slice of every axis, which cuts layers."""
    starts, limits = (_integers(eqn.params[f"{end}_indices"]) for end in ("start", "limit"))
    strides = _integers(eqn.params["strides"] or (1,) * len(starts))
    rows = []
    for row, size, start, limit, stride in zip(values[0].axes, values[0].shape, starts, limits, strides, strict=True):
        if stride != 1:
            rows.append(reading.give_up(row, -(-(limit - start) // stride), "`slice` takes every n-th neuron"))
        elif (start, limit) == (0, size):
            rows.append(row)
        else:
            sizes = (start, limit - start, size - limit)
            rows.append(reading.layers.divide(row, sizes, "`slice` cuts through it")[1])
    return [tuple(rows)]


def split(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """One axis cut into several results."""
    axis, sizes = eqn.params["axis"], _integers(eqn.params["sizes"])
    axes = values[0].axes
    pieces = reading.layers.divide(axes[axis], sizes, "`split` cuts through it")
    return [(*axes[:axis], piece, *axes[axis + 1 :]) for piece in pieces]


def dynamic_slice(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """A slice whose place is computed: it is not known which neurons it takes."""
    sizes = _integers(eqn.params["slice_sizes"])
    entries = zip(values[0].axes, values[0].shape, sizes, strict=True)
    reason = "`dynamic_slice` takes some of its neurons"
    return [tuple(row if size == taken else reading.give_up(row, taken, reason) for row, size, taken in entries)]


def gather(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes] | None:
    """Entries at computed places of some axes; the others are taken whole."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = values
    fill = eqn.params["fill_value"]
    layers = [s.layer for row in indices.axes for s in reading.layers.resolve(row)]
    moving = any(isinstance(layer, int) and layer not in reading.layers.fixed for layer in layers)
    # A number that is filled in would not be scaled with the neurons; NaN, the default, marks what is out of bounds.
    if moving or numbers.operand_batching_dims or (fill is not None and not np.isnan(fill)):
        return None
    shape = eqn.outvars[0].aval.shape
    rows = [without_layer(Entries.VARYING, size) for size in shape]
    offsets = iter(numbers.offset_dims)
    for axis, (row, size) in enumerate(zip(operand.axes, operand.shape, strict=True)):
        whole = sizes[axis] == size and axis not in numbers.start_index_map
        if axis in numbers.collapsed_slice_dims:
            reading.layers.fix(row, "`gather` takes some of its neurons")
        else:
            to = next(offsets)
            if whole:
                rows[to] = row
            else:
                reading.layers.fix(row, "`gather` takes some of its neurons")
    return [tuple(rows)]


def concatenate(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """Values joined along one axis; along the others they are unified."""
    along = eqn.params["dimension"]
    rows: list[Row] = []
    for axis in range(len(values[0].shape)):
        if axis == along:
            rows.append(tuple(segment for value in values for segment in value.rows[axis]))
            continue
        met = values[0].rows[axis]
        for value in values[1:]:
            met = reading.layers.meet(met, value.rows[axis], "`concatenate` puts it next to numbers that differ")
        rows.append(_alike(reading, met, "concatenate"))
    return [tuple(rows)]


def stack(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """Values of one shape along a new axis; along the others they are unified."""
    rows: list[Row] = []
    for axis in range(len(values[0].shape)):
        met = values[0].rows[axis]
        for value in values[1:]:
            met = reading.layers.meet(met, value.rows[axis], "`stack` puts it next to numbers that differ")
        rows.append(_alike(reading, met, "stack"))
    at = eqn.params["axis"] % (len(rows) + 1)
    return [(*rows[:at], without_layer(Entries.VARYING, len(values)), *rows[at:])]


def pad(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes]:
    """Margins of one number around every axis."""
    kind = Entries.ZERO if values[1].constant == 0 else Entries.EQUAL
    margins = [_integers(three) for three in eqn.params["padding_config"]]
    rows = []
    for row, size, (low, high, inner) in zip(values[0].axes, values[0].shape, margins, strict=True):
        if kind is Entries.EQUAL:  # a number other than 0 does not scale with the neurons next to it
            reading.keep_still(row, "pad")
        if inner or min(low, high) < 0:
            grown = size + low + high + inner * max(0, size - 1)
            reading.layers.fix(row, "`pad` takes its neurons apart")
            rows.append(without_layer(Entries.VARYING, grown))
        else:
            before, after = (without_layer(kind, margin) if margin else () for margin in (low, high))
            rows.append((*before, *row, *after))
    return [tuple(rows)]


def reshape(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Axes] | None:
    """Axes merged and split: one of those merged may have neurons, and a part that is split off must have all."""
    shape = _integers(eqn.params["new_sizes"])
    if eqn.params["dimensions"] is not None or 0 in shape:
        return None
    if values[0].shape == shape:
        return [values[0].axes]
    old, new = ([axis for axis, size in enumerate(sizes) if size != 1] for sizes in (values[0].shape, shape))
    rows = _single_neurons(reading, values[0], shape)
    for before, after in _groups([values[0].shape[i] for i in old], [shape[i] for i in new]):
        sizes = [shape[new[i]] for i in after]
        row = _merge(reading, [values[0].axes[old[i]] for i in before], [values[0].shape[old[i]] for i in before])
        for i, part in zip(after, _unmerge(reading, row, sizes), strict=True):
            rows[new[i]] = part
    return [tuple(rows)]


# --- private ------------------------------------------------------------------------------------------------------


def _integers(numbers: Iterable[Any]) -> tuple[int, ...]:
    """Python integers, which an equation's parameters need not be."""
    return tuple(int(number) for number in numbers)


def _alike(reading: Reading, met: Row, operation: str) -> Row:
    """An axis along which several values follow every rescaling alike."""
    row = []
    for segment in met:
        result = reading.unknown()
        for degree in segment.degrees:
            reading.relate(segment, [(1, degree), (-1, result)], operation, SCALED)
        row.append(segment._replace(degrees=(None if isinstance(segment.layer, Entries) else result,)))
    return tuple(row)


def _single_neurons(reading: Reading, value: Value, shape: Sequence[int]) -> list[Row]:
    """The axes of a reshaped value, so far only those with one entry: each from the old axis at the same place, if any.

    Any other place would do too: a layer of one neuron along an axis only says how the whole value scales.
    """
    rows = [without_layer(Entries.EQUAL, size) for size in shape]
    places = [(math.prod(shape[:axis]), axis) for axis, size in enumerate(shape) if size == 1]
    for axis in reversed(range(len(value.shape))):
        if value.shape[axis] != 1:
            continue
        here = [place for place in places if place[0] == math.prod(value.shape[:axis])]
        if here:
            places.remove(here[-1])
            rows[here[-1][1]] = value.axes[axis]
        else:
            reading.layers.fix_output(value.axes[axis], "`reshape` removes its axis")
    return rows


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old and of new axes that have the same number of entries."""
    groups: list[tuple[list[int], list[int]]] = []
    before: list[int] = []
    after: list[int] = []
    a = b = 1
    left, right = iter(enumerate(old)), iter(enumerate(new))
    while True:
        if a == b and before:
            groups.append((before, after))
            before, after, a, b = [], [], 1, 1
        side = left if a <= b else right
        index, size = next(side, (None, 1))
        if index is None:
            break
        if side is left:
            before, a = [*before, index], a * size
        else:
            after, b = [*after, index], b * size
    return groups


def _merge(reading: Reading, rows: Sequence[Row], sizes: Sequence[int]) -> Row:
    """Merges axes into one, the last fastest."""
    if len(rows) == 1:
        return rows[0]
    rows = [reading.layers.resolve(row) for row in rows]
    free = [i for i, row in enumerate(rows) if not all(reading.layers.is_fixed(segment) for segment in row)]
    if len(free) == 1 and free[0] < len(rows) - 1:
        return _with_neighbors(rows[free[0]], math.prod(sizes[: free[0]]), math.prod(sizes[free[0] + 1 :]))
    for row in rows[:-1]:
        reading.layers.fix(row, "`reshape` merges its axis with another one that has neurons")
    last = reading.layers.resolve(rows[-1])
    every = [segment for row in (*rows[:-1], last) for segment in reading.layers.resolve(row)]
    if any(isinstance(s.layer, int) and s.layer not in reading.layers.inputs for s in last):
        times = math.prod(sizes[:-1])
        return reading.layers.resolve(
            (last[0]._replace(repeat=last[0].repeat * times),) if len(last) == 1 else last * times
        )
    if all(segment.layer in (Entries.EQUAL, Entries.ZERO) for segment in every) and len(every) == len(rows):
        return without_layer(Entries.EQUAL, math.prod(sizes))
    return reading.give_up(tuple(every), math.prod(sizes), "`reshape` merges inputs")


def _with_neighbors(row: Row, times: int, inner: int) -> Row:
    """An axis merged with slower axes of `times` entries and faster ones of `inner`, which have no neurons."""
    merged = [
        segment._replace(inner=segment.inner * inner)
        if isinstance(segment.layer, int)
        else without_layer(Entries.ZERO if segment.layer is Entries.ZERO else Entries.VARYING, segment.repeat * inner)[
            0
        ]
        for segment in row
    ]
    return (merged[0]._replace(repeat=merged[0].repeat * times),) if len(merged) == 1 else tuple(merged) * times


def _unmerge(reading: Reading, row: Row, sizes: Sequence[int]) -> list[Row]:
    """Splits an axis into several of these sizes, the last fastest."""
    if len(sizes) == 1:
        return [row]
    layers, row = reading.layers, reading.layers.resolve(row)
    lead = [without_layer(Entries.VARYING, size) for size in sizes[:-1]]
    if all(isinstance(segment.layer, Entries) for segment in row):
        equal = len(row) == 1 and row[0].layer is not Entries.VARYING
        return [without_layer(Entries.EQUAL if equal else Entries.VARYING, size) for size in sizes]
    if len(row) == 1 and isinstance(row[0].layer, int):
        width = layers.width(row[0].layer)
        for axis, size in enumerate(sizes):
            if row[0].inner == math.prod(sizes[axis + 1 :]) and size % width == 0:
                parts = [without_layer(Entries.VARYING, other) for other in sizes]
                parts[axis] = (row[0]._replace(repeat=size // width, inner=1),)
                return parts
    whole = math.prod(sizes[:-1])
    if len(row) % whole == 0:
        period = row[: len(row) // whole]
        if row == period * whole and sum(layers.size(segment) for segment in period) == sizes[-1]:
            return [*lead, period]
    return [*lead, reading.give_up(row, sizes[-1], "`reshape` splits its axis")]

"""Where a program's neurons have their pre-activations: right after the last parameter that acts on them.

A parameter that acts on one of several values made of a pre-activation, as the slopes of a PReLU do, is not the last
one in that sense: `settle` keeps the earlier pre-activation.
"""

import collections
from collections.abc import Sequence
from typing import Any

from jax_scalegmn.inference._reading import Flow, Reading, Seen, Value
from jax_scalegmn.inference._segments import Entries, Row


def follow(
    reading: Reading, name: str, at: tuple[int, ...], operands: Sequence[Value], results: Sequence[Value]
) -> list[Value]:
    """The results of one operation, with where they come from; pre-activations are added to `reading`."""
    data = [operand for operand in operands if operand.flow.data]
    weights = [operand for operand in operands if operand.depends and not operand.flow.data]
    origins: frozenset[Any] = frozenset().union(*(operand.flow.origins for operand in data or operands))
    around: frozenset[int] = frozenset().union(*(operand.flow.around for operand in data))
    if data:
        _use(reading, weights)
    if not data or len(results) != 1:
        unit = None if data else _unit(name, operands)
        whole = operands[0].flow.whole if name in _MOVES and not data and operands else None
        flow = Flow(bool(data), unit, origins=origins, around=around, whole=whole)
        return [result._replace(flow=flow) for result in results]
    if name == "sub" and operands[0].flow.data and operands[1].flow.whole:
        along = [axis for axis, row in enumerate(operands[1].axes) if _indexed(row)]
        along = along if len(along) == 1 else [axis for axis in along if operands[1].shape[axis] > 1]
        if len(along) == 1:
            reading.centered[at] = operands[1].flow.whole, along[0]
    flow = _continued(reading, name, operands)
    factors = [operand for operand in data if operand.flow.factor]
    if weights and origins and name in ("mul", "div") and not any(_mixes(reading, operand) for operand in data):
        flow = Flow(True, factor=True)
    elif name in _JOINS and (weights or (name == "mul" and len(factors) == 1 < len(data))):
        flow, earlier = _joined(reading, name, at, results[0], flow, operands)
        around -= earlier
    elif len(data) == 2 and name in _SUMS and flow.value is None and _is_sum(*data):
        for operand in data:
            if operand.flow.value is not None:
                reading.values.pop(operand.flow.value, None)
        flow = Flow(True, value=_record(reading, at, results[0], None, place=False))
    if flow.value is not None and flow.value not in origins:
        origins, around = origins | {flow.value}, around | {flow.value}
    return [results[0]._replace(flow=flow._replace(origins=origins, around=around))]


def settle(reading: Reading, outputs: Sequence[Value]) -> None:
    """Removes the pre-activations that are read through a later one alone, and counts outputs of the params alone.

    Args:
      reading: The program; what is left beside an earlier pre-activation is added to `reading.beside`.
      outputs: The program's outputs.
    """
    _use(reading, [output for output in outputs if not output.flow.data])
    needed: frozenset[Any] = frozenset().union(*(output.flow.origins for output in outputs))
    later = {number: before for number, before in reading.earlier.items() if number in needed}
    followers = collections.Counter(before for before, _ in later.values())
    around = frozenset().union(*(output.flow.around for output in outputs))
    for number, (before, own) in later.items():
        if before in around or followers[before] > 1:
            if own:
                reading.beside[number] = before
            continue
        root = reading.beside.pop(before, None)
        if root is not None and own:
            reading.beside[number] = root
        reading.places.pop(before, None)
        reading.values.pop(before, None)


# --- private ------------------------------------------------------------------------------------------------------

_SUMS = frozenset({"add", "add_any", "sub"})
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
_JOINS = _SUMS | _PRODUCTS | {"mul", "div"}
# Operations that leave every entry as it is.
_MOVES = frozenset(
    {
        *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape", "squeeze", "stop_gradient"),
        *("transpose", "sharding_constraint", "optimization_barrier", "expand_dims"),
    }
)


def _use(reading: Reading, weights: Sequence[Value]) -> None:
    """Counts one use of the parameters that each of these is computed from."""
    reading.uses.update(path for weight in weights for path in weight.flow.origins)


def _indexed(row: Row) -> bool:
    """Whether an axis is one of a parameter, and not one along which it is repeated."""
    return any(not isinstance(segment.layer, Entries) for segment in row)


def _record(reading: Reading, at: tuple[int, ...], value: Value, unit: tuple[str, ...] | None, *, place: bool) -> int:
    """Adds a pre-activation, and returns its number."""
    number = reading.num_values = reading.num_values + 1
    seen = Seen(at, value.axes, len(reading.equations), unit)
    reading.values[number] = seen
    if place:
        reading.places[number] = seen
    return number


def _unit(name: str, operands: Sequence[Value]) -> tuple[str, ...] | None:
    """The vector that the result of an operation on parameters is, or that is added to it."""
    if not operands or name not in _MOVES | _SUMS:
        return None
    flows = [operand.flow for operand in operands]
    for flow in flows[:1] if name == "sub" else flows:
        if flow.unit and not any(flow.unit in other.origins for other in flows if other is not flow):
            return flow.unit
    return None


def _is_sum(left: Value, right: Value) -> bool:
    """Whether a pre-activation is added to something that is not computed from it, as an activation can be."""
    pairs = ((left.flow, right.flow), (right.flow, left.flow))
    return any(one.value is not None and one.value not in other.origins for one, other in pairs)


def _mixes(reading: Reading, operand: Value) -> bool:
    """Whether it has neurons of its own along some axis: a mean over the neurons has not."""
    rows = (reading.layers.resolve(row) for row in operand.axes)
    return any(not isinstance(s.layer, Entries) and s.layer not in reading.layers.fixed for row in rows for s in row)


def _continued(reading: Reading, name: str, operands: Sequence[Value]) -> Flow:
    """What the first operand was is what the result is, where the operation is affine in each of its neurons."""
    data = [operand for operand in operands if operand.flow.data]
    first = min(data, key=lambda operand: (operand.flow.value is None, operand.flow.factor))
    others = [operand for operand in data if operand is not first]
    known = name in _MOVES | _SUMS | {"mul", "div"}
    squared = name == "mul" and len(others) + 1 < len(data)
    inverse = name == "div" and operands[1] is first
    if not known or squared or inverse or any(_mixes(reading, o) for o in others if not o.flow.factor):
        return Flow(True)
    # What is subtracted from something else turns a shift round; what else goes in may be computed from it.
    added = name in _MOVES | _SUMS and not others and not (name == "sub" and operands[1] is first)
    unit = first.flow.unit if added else None
    factor = first.flow.factor and name in _MOVES
    return first.flow._replace(unit=unit, own=first.flow.own and not others, factor=factor)


def _joined(
    reading: Reading, name: str, at: tuple[int, ...], result: Value, flow: Flow, operands: Sequence[Value]
) -> tuple[Flow, frozenset[int]]:
    """A pre-activation, and the one that was there before the parameter, if any."""
    unit = flow.unit if name in _SUMS else None
    if name in _SUMS:
        added = operands[:1] if name == "sub" else operands
        unit = next((o.flow.unit for o in added if not o.flow.data and o.flow.unit), unit)
    number = _record(reading, at, result, unit, place=True)
    if name in _PRODUCTS or flow.value is None:
        return Flow(True, unit, number), frozenset()
    reading.earlier[number] = flow.value, flow.own
    return Flow(True, unit, number), frozenset({flow.value})

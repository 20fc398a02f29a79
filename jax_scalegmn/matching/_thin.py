"""Evaluates a program when two neurons of one layer change: only what the change reaches is computed again.

Every value has what it was, and what became of it. As long as the operations go neuron by neuron, a changed value is
thin: two neurons' entries are computed. Where a product sums over the layer, the result is what it was, plus the new
terms of these two neurons, less the old ones. From there on the whole value has changed. Under `jax.vmap` over changes
what did not change is computed once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jax_scalegmn import architecture


class Layout(NamedTuple):
    """How the neurons are along an axis: it has outer * neurons * inner entries."""

    axis: int
    outer: int
    inner: int


class Thin(NamedTuple):
    """The new entries of the changed neurons; along the axis it has outer * changed * inner entries."""

    entries: Array
    layout: Layout


class Value(NamedTuple):
    """An array of a program: what it was, and its change, the new array if it is not thin; None without one."""

    old: Any
    change: Thin | Array | None = None


class Places(NamedTuple):
    """The neurons that change.

    Attributes:
      neurons: The width of the layer.
      at: Their places; two that are the same count once.
      counts: Which of them count.
    """

    neurons: int
    at: Int[Array, " changed"]
    counts: Bool[Array, " changed"]

    def entries(self, x: Any, layout: Layout) -> Array:
        """The entries of these neurons."""
        taken = jnp.take(self._apart(x, layout), self.at, axis=layout.axis + 1)
        return taken.reshape(*x.shape[: layout.axis], -1, *x.shape[layout.axis + 1 :])

    def whole(self, value: Value) -> Any:
        """The new array."""
        if value.change is None:
            return value.old
        if not isinstance(value.change, Thin):
            return value.change
        entries, layout = value.change
        new = self._apart(entries, layout, len(self.at))
        index = (*(slice(None),) * (layout.axis + 1), self.at)
        return self._apart(value.old, layout).at[index].set(new.astype(value.old.dtype)).reshape(value.old.shape)

    def once(self, x: Array, layout: Layout) -> Array:
        """Entries of these neurons, with zeros in place of those that are there a second time."""
        apart = self._apart(x, layout, len(self.at))
        counts = self.counts.reshape(-1, *(1,) * (apart.ndim - layout.axis - 2))
        return jnp.where(counts, apart, 0).reshape(x.shape)

    def _apart(self, x: Any, layout: Layout, width: int | None = None) -> Array:
        axis, outer, inner = layout
        return jnp.reshape(x, (*x.shape[:axis], outer, width or self.neurons, inner, *x.shape[axis + 1 :]))


def evaluate(program: Any, consts: Sequence[Any], inputs: Sequence[Value], places: Places) -> list[Value]:
    """Computes a program on values that may have changed.

    Args:
      program: A jaxpr.
      consts: The values of its constants.
      inputs: Its inputs.
      places: The neurons that changed.

    Returns:
      Its outputs.
    """
    known: dict[Any, Value] = dict(zip(program.constvars, map(Value, consts), strict=True))
    known |= dict(zip(program.invars, inputs, strict=True))
    for eqn in program.eqns:
        operands = [Value(atom.val) if hasattr(atom, "val") else known[atom] for atom in eqn.invars]
        called = architecture.called_program(eqn)
        if called is not None:
            inner, own = getattr(called, "jaxpr", called), getattr(called, "consts", ())
            results = evaluate(inner, own, operands, places)
        else:
            results = _results(eqn, operands, places)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [Value(atom.val) if hasattr(atom, "val") else known[atom] for atom in program.outvars]


# --- private ------------------------------------------------------------------------------------------------------

# It returns the change of the only result; None where the whole operation must be computed again.
_Rule: TypeAlias = Callable[[Any, Sequence[Value], Places, Any], Thin | Array | None]


def _results(eqn: Any, operands: Sequence[Value], places: Places) -> list[Value]:
    """The results of one operation."""
    old = _bind(eqn, [operand.old for operand in operands])
    if all(operand.change is None for operand in operands):
        return [Value(result) for result in old]
    rule = _RULES.get(eqn.primitive.name)
    if rule is not None and any(isinstance(operand.change, Thin) for operand in operands):
        change = rule(eqn, operands, places, old[0])
        if change is not None:
            return [Value(old[0], change)]
    new = _bind(eqn, [places.whole(operand) for operand in operands])
    return [Value(was, now) for was, now in zip(old, new, strict=True)]


def _bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    options = eqn.primitive.get_bind_params(eqn.params)
    functions, options = options if isinstance(options, tuple) else ((), options)  # JAX before 0.10
    results = eqn.primitive.bind(*functions, *operands, **options)
    return list(results) if eqn.primitive.multiple_results else [results]


def _only_thin(operands: Sequence[Value]) -> Thin | None:
    """The change of the only changed operand, if it is thin."""
    changes = [operand.change for operand in operands if operand.change is not None]
    return changes[0] if len(changes) == 1 and isinstance(changes[0], Thin) else None


def _common_layout(operands: Sequence[Value]) -> Layout | None:
    """The layout of all changes, if they are thin and have one."""
    changes = [operand.change for operand in operands if operand.change is not None]
    layouts = {change.layout if isinstance(change, Thin) else None for change in changes}
    return layouts.pop() if len(layouts) == 1 else None


def _entry_by_entry(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | None:
    layout = _common_layout(operands)
    if layout is None:
        return None
    new = [
        operand.change.entries
        if isinstance(operand.change, Thin)
        else operand.old
        if not jnp.ndim(operand.old)
        else places.entries(operand.old, layout)
        for operand in operands
    ]
    return Thin(_bind(eqn, new)[0], layout)


def _along_others(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | None:
    """An operation with `axes`, or with windows, that leaves the neurons apart."""
    thin = _only_thin(operands)
    if thin is None or len(operands) > 1:
        return None
    axis, outer, inner = thin.layout
    if "axes" in eqn.params:
        if axis in eqn.params["axes"]:
            return None
        axis -= sum(other < axis for other in eqn.params["axes"])
    else:
        sizes = [eqn.params[f"window_{what}"][axis] for what in ("dimensions", "strides", "dilation")]
        if {*sizes, eqn.params["base_dilation"][axis]} != {1} or any(eqn.params["padding"][axis]):
            return None
    return Thin(_bind(eqn, [thin.entries])[0], Layout(axis, outer, inner))


def _transpose(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin:
    (thin,), order = (operand.change for operand in operands), eqn.params["permutation"]
    assert isinstance(thin, Thin)
    return Thin(jnp.transpose(thin.entries, order), thin.layout._replace(axis=list(order).index(thin.layout.axis)))


def _broadcast_in_dim(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | None:
    thin = _only_thin(operands)
    if thin is None:
        return None
    dimensions, shape = eqn.params["broadcast_dimensions"], list(eqn.params["shape"])
    axis = dimensions[thin.layout.axis]
    if shape[axis] != operands[0].old.shape[thin.layout.axis]:
        return None
    shape[axis] = thin.entries.shape[thin.layout.axis]
    return Thin(jax.lax.broadcast_in_dim(thin.entries, shape, dimensions), thin.layout._replace(axis=axis))


def _reshape(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | None:
    """Neighboring axes become one, or one becomes several; the neurons stay within one."""
    thin = _only_thin(operands)
    if thin is None or eqn.params.get("dimensions") is not None:
        return None
    axis, outer, inner = thin.layout
    shape, before = list(old.shape), math.prod(operands[0].old.shape[:axis]) * outer
    after = inner * math.prod(operands[0].old.shape[axis + 1 :])
    for new in range(len(shape)):
        left, right = math.prod(shape[:new]), math.prod(shape[new + 1 :])
        if left and right and not before % left and not after % right and shape[new] * left * right == old.size:
            layout = Layout(new, before // left, after // right)
            if layout.outer * places.neurons * layout.inner != shape[new]:
                continue
            shape[new] = layout.outer * len(places.at) * layout.inner
            return Thin(thin.entries.reshape(shape), layout)
    return None


def _squeeze(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | None:
    thin, gone = _only_thin(operands), eqn.params["dimensions"]
    if thin is None or thin.layout.axis in gone:
        return None
    axis = thin.layout.axis - sum(other < thin.layout.axis for other in gone)
    return Thin(jnp.squeeze(thin.entries, gone), thin.layout._replace(axis=axis))


def _slice(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | None:
    thin = _only_thin(operands)
    if thin is None:
        return None
    axis = thin.layout.axis
    if old.shape[axis] != operands[0].old.shape[axis]:
        return None
    limits = list(eqn.params["limit_indices"])
    limits[axis] = thin.entries.shape[axis]
    entries = jax.lax.slice(thin.entries, eqn.params["start_indices"], limits, eqn.params["strides"])
    return Thin(entries, thin.layout)


def _pad(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | None:
    thin = operands[0].change
    if operands[1].change is not None or not isinstance(thin, Thin):
        return None
    if any(eqn.params["padding_config"][thin.layout.axis]):
        return None
    return Thin(_bind(eqn, [thin.entries, operands[1].old])[0], thin.layout)


def _concatenate(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | None:
    axis = eqn.params["dimension"]
    layout = _common_layout(operands)
    if layout is not None and layout.axis != axis:
        return _entry_by_entry(eqn, operands, places, old)
    changes = [operand.change for operand in operands]
    thin = [change for change in changes if isinstance(change, Thin)]
    if len(thin) < len(operands) or {(change.layout.axis, change.layout.inner) for change in thin} != {
        (axis, thin[0].layout.inner)
    }:
        return None
    entries = jnp.concatenate([change.entries for change in thin], axis)
    return Thin(entries, Layout(axis, sum(change.layout.outer for change in thin), thin[0].layout.inner))


def _dot_general(eqn: Any, operands: Sequence[Value], places: Places, old: Any) -> Thin | Array | None:
    """A product that sums over the changed neurons, or has them in its result."""
    (sums, batches), changes = eqn.params["dimension_numbers"], [operand.change for operand in operands]
    side = next(side for side, change in enumerate(changes) if isinstance(change, Thin))
    thin, other = changes[side], changes[1 - side]
    assert isinstance(thin, Thin)
    axis = thin.layout.axis
    if axis in batches[side]:
        return None
    if axis in sums[side]:
        across = thin.layout._replace(axis=sums[1 - side][list(sums[side]).index(axis)])
        if other is not None and not (isinstance(other, Thin) and other.layout == across):
            return None
        return old + _terms(eqn, operands, places, (thin.layout, across) if side == 0 else (across, thin.layout))
    if isinstance(other, Thin):
        return None
    new = [thin.entries, operands[1 - side].old if other is None else other]
    entries = _bind(eqn, new if side == 0 else new[::-1])[0]
    free = [a for a in range(operands[side].old.ndim) if a not in (*sums[side], *batches[side])]
    at = len(batches[0]) + free.index(axis)
    if side == 1:
        at += operands[0].old.ndim - len(sums[0]) - len(batches[0])
    result = Thin(entries, thin.layout._replace(axis=at))
    if other is None:
        return result
    # The rest of the result has changed, too, with the old entries of this side.
    rest = [operands[side].old, other]
    return places.whole(Value(_bind(eqn, rest if side == 0 else rest[::-1])[0], result))


def _terms(eqn: Any, operands: Sequence[Value], places: Places, layouts: tuple[Layout, Layout]) -> Array:
    """The new terms of the changed neurons in a sum over all, less the old ones."""
    both = []
    for operand, layout, sign in zip(operands, layouts, (1, -1), strict=True):
        before = places.entries(operand.old, layout)
        after = operand.change.entries if isinstance(operand.change, Thin) else before
        pair = [after, before if sign > 0 else -before]
        pair = [places.once(entries, layout) for entries in pair] if sign > 0 else pair
        both.append(jnp.concatenate(pair, layout.axis))
    terms: Array = _bind(eqn, both)[0]
    return terms


_ENTRY_BY_ENTRY = (
    *("add", "add_any", "sub", "mul", "div", "rem", "pow", "max", "min", "atan2", "nextafter", "clamp", "select_n"),
    *("neg", "sign", "abs", "square", "sqrt", "rsqrt", "cbrt", "integer_pow", "exp", "exp2", "expm1", "log", "log1p"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "logistic"),
    *("erf", "erfc", "erf_inv", "lgamma", "digamma", "floor", "ceil", "round", "is_finite", "sine", "cosine"),
    *("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "not"),
    *("convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient", "optimization_barrier"),
)

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ENTRY_BY_ENTRY, _entry_by_entry),
    **{f"reduce_{what}": _along_others for what in ("sum", "max", "min", "prod", "and", "or")},
    **{f"reduce_window_{what}": _along_others for what in ("sum", "max", "min")},
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
}

"""Values from files, checked field by field against the annotations of dataclasses."""

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax_scalegmn._bounded import _limits

_MAX_NAME = 10_000  # letters of a text


def decode(
    kind: Any,
    value: Any,
    where: str,
    *,
    special: Mapping[Any, Callable[[Any, str], Any]] | None = None,
    check: Callable[[Any, str], None] | None = None,
) -> Any:
    """Reads a value of plain JSON as an annotated type.

    A dataclass is read from a dict of its fields; a union of dataclasses, from a dict that names one under "type"; an
    enum from its value; tuple[int, ...] from a list or tuple. Numbers are below 1e38, whole ones below 2**62, and truth
    values are no numbers.

    Args:
      kind: The type: a dataclass, an enum, str, int, float, bool, None, a tuple, a list, or a union of such.
      value: The value.
      where: The place of the value, like "layers[3].activation", for errors.
      special: Readers (value, where) of some types, in place of the above.
      check: Called with every dataclass that is made, and its place, to refuse some by a ValueError.

    Returns:
      The value in that type. What its class refuses is refused by its place.

    Raises:
      ValueError: If it is not one; the message begins with the place.
    """
    return _decode(kind, value, where, _Hooks(special or {}, check or (lambda made, where: None)))


# --- private ------------------------------------------------------------------------------------------------------

_WORDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}


class _Hooks(NamedTuple):
    special: Mapping[Any, Callable[[Any, str], Any]]
    check: Callable[[Any, str], None]


def _decode(kind: Any, value: Any, where: str, hooks: _Hooks) -> Any:
    if kind in hooks.special:
        return hooks.special[kind](value, where)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _union(typing.get_args(kind), value, where, hooks)
    if typing.get_origin(kind) in (tuple, list):
        return _sequence(kind, value, where, hooks)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where, hooks)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        values = [member.value for member in kind]
        if not isinstance(value, str | int) or value not in values:
            raise _error(where, value, f"one of {', '.join(map(repr, values))}")
        return kind(value)
    return _plain(kind, value, where)


def _place(where: str) -> str:
    return where[-300:] or "it"


def _error(where: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{_place(where)} is {_limits.short(value)}; expected {expected}.")


def _fits(kind: Any, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**62
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e38  # float32 holds it; NaN is not
    return isinstance(value, kind) and not (kind is str and len(value) > _MAX_NAME)


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is None or kind is type(None):
        kind = type(None)
    if kind not in _WORDS:
        raise TypeError(f"{kind} cannot be read from a file")
    if not _fits(kind, value):
        words = f"{_WORDS[kind]} of at most {_MAX_NAME} letters" if kind is str else _WORDS[kind]
        raise _error(where, value, words)
    return float(value) if kind is float else value


def _union(kinds: tuple[Any, ...], value: Any, where: str, hooks: _Hooks) -> Any:
    classes = {kind.__name__: kind for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(kind, type)}
    if len(classes) > 1 and isinstance(value, Mapping):
        name = value.get("type")
        if not isinstance(name, str) or name not in classes:
            raise _error(f"{where}.type".lstrip("."), name, f"one of {', '.join(sorted(classes))}")
        return _decode(classes[name], {key: v for key, v in value.items() if key != "type"}, where, hooks)
    if len(classes) == 1 and isinstance(value, Mapping):
        return _decode(next(iter(classes.values())), value, where, hooks)
    for kind in kinds:
        plain = type(None) if kind is None else kind
        if plain in _WORDS and _fits(plain, value):
            return _plain(plain, value, where)
        if typing.get_origin(kind) in (tuple, list) and isinstance(value, list | tuple):
            return _decode(kind, value, where, hooks)
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and value in [member.value for member in kind]:
            return kind(value)
    names = [_WORDS.get(type(None) if kind is None else kind, getattr(kind, "__name__", str(kind))) for kind in kinds]
    raise _error(where, value, " or ".join(names[:12]))


def _sequence(kind: Any, value: Any, where: str, hooks: _Hooks) -> Any:
    if not isinstance(value, list | tuple):
        raise _error(where, value, "a list")
    _limits.check("items", len(value), f"the length of {_place(where)}")
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and parts[-1] is not Ellipsis:
        if len(value) != len(parts):
            raise _error(where, value, f"{len(parts)} entries")
        kinds = parts
    else:
        kinds = (parts[0],) * len(value)
    pairs = enumerate(zip(kinds, value, strict=True))
    return origin(_decode(part, entry, f"{where}[{place}]", hooks) for place, (part, entry) in pairs)


def _dataclass(kind: Any, value: Any, where: str, hooks: _Hooks) -> Any:
    if not isinstance(value, Mapping):
        raise _error(where, value, f"a dict of the fields of {kind.__name__}")
    hints = _hints(kind)
    # Flax adds fields by keyword alone to its modules, which are no part of a description.
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init and not field.kw_only}
    own = f"{kind.__name__} with the fields {', '.join(fields)}"
    if value.get("type", kind.__name__) != kind.__name__:
        raise _error(f"{where}.type".lstrip("."), value["type"], own)
    if foreign := [key for key in value if key not in fields and key != "type"]:
        raise ValueError(f"{_place(where)} has {_limits.short(foreign)}; expected {own}.")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{_place(where)} has no {', '.join(missing)}; expected the fields {', '.join(fields)}.")
    given = {
        name: _decode(hints[name], value[name], f"{where}.{name}" if where else name, hooks)
        for name in fields
        if name in value
    }
    try:
        made = kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_place(where)}: {_limits.one_line(error, 500)}") from error
    hooks.check(made, where)
    return made


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)

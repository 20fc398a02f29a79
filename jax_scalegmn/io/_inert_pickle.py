"""Pickles read as plain data, opcode by opcode: nothing that they name is imported, called, compared or hashed.

The opcodes are those of https://github.com/python/cpython/blob/main/Lib/pickletools.py, which decodes their arguments.
"""

import dataclasses
import io
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, TypeAlias, cast

from jax_scalegmn import _bounded


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


@dataclasses.dataclass(eq=False, slots=True)
class Object:
    """What calling `call` with `args` would have made, and what was put into it: never called.

    Attributes:
      call: A `Global`, or whatever else was there.
      args: The arguments, a tuple in a sound pickle.
      state: What would have become its attributes.
      items: The entries of a subclass of dict.
      elements: The entries of a subclass of list.
    """

    call: Any
    args: Any
    state: Any = None
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)
    elements: list[Any] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.call if isinstance(self.call, Global) else 'object'}>"


class Key:
    """A key of a dict that is not a plain text or number; it equals only itself."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def load(
    stream: io.BufferedIOBase,
    *,
    persistent: Callable[[Any], Any] | None = None,
    encoding: str = "utf-8",
    max_bytes: int | None = None,
) -> Any:
    """Reads one pickle, and leaves the stream after its end.

    Args:
      stream: The pickle; whatever follows it stays unread.
      persistent: Reads the references to data outside of the pickle; None to refuse them.
      encoding: The encoding of the byte strings that Python 2 wrote.
      max_bytes: The size that it may have; None for the limit of metadata_bytes.

    Returns:
      Plain texts, bytes, numbers, tuples, lists (also for sets) and dicts (also for ordered ones), and `Global`,
      `Object` and `Key` for the rest. A list, dict or object may contain itself.

    Raises:
      ValueError: If the pickle is damaged, is larger than it may be, or has more opcodes than the limit.
    """
    limit = _bounded.use().metadata_bytes if max_bytes is None else max_bytes
    counted = _bounded.Counted(stream, limit, "metadata_bytes", "its pickle")
    machine = _Machine(persistent, encoding, limit)
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], counted)):
        machine.opcodes += 1
        if machine.opcodes > machine.max_opcodes:
            machine.charge(0)
        name = opcode.name
        if name == "STOP":
            return machine.pop()
        step = _STEPS.get(name)
        if step is None:
            raise ValueError(f"its pickle holds the opcode {name}, which no checkpoint needs")
        try:
            step(machine, argument)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"its pickle is damaged at the opcode {name}") from error
    raise ValueError("its pickle has no end")


# --- private ------------------------------------------------------------------------------------------------------

_ORDERED = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("__builtin__", "dict"),
}
_ENCODE = Global("_codecs", "encode")  # how Python 3 writes bytes for Python 2


class _Machine:
    """The stack of the pickle machine. Marks begin a new part of the stack."""

    def __init__(self, persistent: Callable[[Any], Any] | None, encoding: str, max_bytes: int) -> None:
        self.persistent = persistent
        self.encoding = encoding
        self.opcodes, self.max_opcodes = 0, _bounded.use().opcodes
        self.copied, self.max_bytes = 0, max_bytes
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def charge(self, opcodes: int, nbytes: int = 0) -> None:
        """Counts the work: what one opcode makes of a value that is there already may take long, and be done again."""
        self.opcodes += opcodes
        self.copied += nbytes
        if self.opcodes > self.max_opcodes:
            _bounded.check("opcodes", self.opcodes, "the number of its pickle's opcodes", is_all=False)
        if self.copied > self.max_bytes:
            _bounded.check("metadata_bytes", self.copied, "the size of its pickle's texts, in bytes,", is_all=False)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self, _: Any = None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def drop_mark(self, _: Any) -> None:
        self.pop_mark()

    def drop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def put(self, index: Any) -> None:
        self.memo[len(self.memo) if index is None else int(index)] = self.stack[-1]

    def text(self, value: Any) -> None:
        self.push(value.encode("latin1").decode(self.encoding) if isinstance(value, str) else value)

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(values[::-1]))

    def dict_of_mark(self, _: Any) -> None:
        values = self.pop_mark()
        self.push({})
        self.set_items(values)

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(Global(module, name))

    def name_on_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("its pickle names an object by something other than texts")
        self.push(Global(module, name))

    def reduce(self, _: Any) -> None:
        args, call = self.pop(), self.pop()
        self.push(self.called(call, args))

    def reduce_with_names(self, _: Any) -> None:
        self.pop()
        self.reduce(None)

    def instance(self, argument: str) -> None:
        args = tuple(self.pop_mark())
        self.name(argument)
        self.push(self.called(self.pop(), args))

    def instance_on_stack(self, _: Any) -> None:
        call, *args = self.pop_mark()
        self.push(self.called(call, tuple(args)))

    def build(self, _: Any) -> None:
        state = self.pop()
        if isinstance(self.stack[-1], Object):
            self.stack[-1].state = state

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.elements if isinstance(target, Object) else target).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        _set(target.items if isinstance(target, Object) else target, values)

    def refer(self, pid: Any) -> None:
        if self.persistent is None:
            raise ValueError("its pickle refers to data outside of it")
        self.push(self.persistent(pid))

    def called(self, call: Any, args: Any) -> Any:
        """A dict for Python's ordered and default dicts, bytes that Python 2 can read, and an `Object` for all else."""
        if call == _ENCODE and isinstance(args, tuple) and len(args) == 2 and isinstance(args[0], str):
            self.charge(0, len(args[0]))
            return args[0].encode("latin1")
        if not isinstance(call, Global) or (call.module, call.name) not in _ORDERED:
            return Object(call, args)
        made: dict[Any, Any] = {}
        pairs = args[-1] if args else None  # as Python 2 wrote them: a list of [key, value]
        if isinstance(pairs, list):
            self.charge(len(pairs))
            for key, value in pairs:
                _set(made, [key, value])
        return made


def _set(target: dict[Any, Any], values: list[Any]) -> None:
    if not isinstance(target, dict) or len(values) % 2:
        raise TypeError("entries of something that is not a dict")
    for key, value in zip(values[::2], values[1::2], strict=True):
        plain = key is None or type(key) in (str, bool) or (type(key) is int and key.bit_length() < 64)
        target[key if plain else Key(key)] = value


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _nothing(machine: _Machine, _: Any) -> None:
    """Opcodes that only describe the pickle."""


_Step: TypeAlias = Callable[[_Machine, Any], None]
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_STEPS: Mapping[str, _Step] = {
    **dict.fromkeys((*_NUMBERS, *_TEXTS, *_BYTES), _Machine.push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[int(index)])),
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_mark,
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "FROZENSET": lambda m, _: m.push(m.pop_mark()),
    "DICT": _Machine.dict_of_mark,
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.append(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.reduce_with_names,
    "INST": _Machine.instance,
    "OBJ": _Machine.instance_on_stack,
    "BUILD": _Machine.build,
    "PERSID": _Machine.refer,
    "BINPERSID": lambda m, _: m.refer(m.pop()),
}

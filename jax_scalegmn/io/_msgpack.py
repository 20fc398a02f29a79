"""Flax's msgpack files (https://github.com/msgpack/msgpack/blob/master/spec.md), read value by value from the file.

msgpack's own reader holds the file, and a copy of every array, before it can be asked for sizes. Here every declared
size is compared with what is left of the file, and arrays are read into place. The arrays are Flax's extension types.
"""

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_scalegmn import _bounded
from jax_scalegmn.io import _npz


def read(path: Path) -> Any:
    """What flax.serialization.msgpack_restore returns for a file: nested dicts of NumPy arrays, as a rule.

    Raises:
      OSError: If the file cannot be opened.
      ValueError: If it is damaged or foreign, or asks for more than the limits allow.
    """
    with _bounded.open_regular(path) as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size)
        value = reader.value(0)
        if reader.left:
            raise ValueError(f"{reader.left} bytes follow what it holds")
        return value


# --- private ------------------------------------------------------------------------------------------------------

_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # Flax's extension types
_CHUNKED = "__msgpack_chunked_array__"  # Flax's form of arrays above 1 GiB
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    **dict(zip(range(0xCA, 0xD0), (">f", ">d", ">B", ">H", ">I", ">Q"), strict=True)),
    **dict(zip(range(0xD0, 0xD4), (">b", ">h", ">i", ">q"), strict=True)),
}
# The first byte of values with a length: what they are, and the format of the length.
_LENGTHS = {
    **dict(zip(range(0xC4, 0xC7), (("bin", ">B"), ("bin", ">H"), ("bin", ">I")), strict=True)),
    **dict(zip(range(0xC7, 0xCA), (("ext", ">B"), ("ext", ">H"), ("ext", ">I")), strict=True)),
    **dict(zip(range(0xD9, 0xDC), (("str", ">B"), ("str", ">H"), ("str", ">I")), strict=True)),
    **dict(zip(range(0xDC, 0xE0), (("list", ">H"), ("list", ">I"), ("dict", ">H"), ("dict", ">I")), strict=True)),
}


class _Reader:
    """A file, and how many of its bytes are left."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.left, self.count, self.dicts = file, size, 0, 0

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{count} bytes are expected where {self.left} are left: the file is truncated")
        self.left -= count
        content: bytes = self.file.read(count)
        return content

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, level: int) -> Any:
        self.count += 1
        _bounded.check("opcodes", self.count, "the number of its values", is_all=False)
        _bounded.check("nesting", level, "the nesting of its dicts", is_all=False)
        lead = self.take(1)[0]
        if lead <= 0x7F or lead >= 0xE0:
            return lead if lead <= 0x7F else lead - 256
        if lead in _CONSTANTS:
            return _CONSTANTS[lead]
        if lead in _NUMBERS:
            return self.number(_NUMBERS[lead])
        kind, length = self.length(lead)
        if kind == "ext":
            return self.extension(length)
        if kind in ("str", "bin"):
            _bounded.check("metadata_bytes", length, "the size of a text in it, in bytes,")
            content = self.take(length)
            return content.decode() if kind == "str" else content
        self.dicts += 1
        _bounded.check("items", self.dicts, "the number of its dicts and lists", is_all=False)
        if kind == "list":
            return [self.value(level + 1) for _ in range(length)]
        return self.mapping(length, level)

    def length(self, lead: int) -> tuple[str, int]:
        """What begins with that byte, and its length."""
        if 0x80 <= lead <= 0xBF:
            return ("dict", lead & 15) if lead < 0x90 else ("list", lead & 15) if lead < 0xA0 else ("str", lead & 31)
        if 0xD4 <= lead <= 0xD8:
            return "ext", 2 ** (lead - 0xD4)
        if lead not in _LENGTHS:
            raise ValueError(f"a value begins with 0x{lead:x}, which msgpack does not use")
        kind, form = _LENGTHS[lead]
        return kind, self.number(form)

    def mapping(self, length: int, level: int) -> Any:
        made: dict[Any, Any] = {}
        for _ in range(length):
            key = self.value(level + 1)
            if not isinstance(key, str):
                raise ValueError(f"a key is {_bounded.short(key)}; expected a text")
            made[key] = self.value(level + 1)
        return _joined(made) if _CHUNKED in made else made

    def extension(self, length: int) -> Any:
        code, end = self.number(">b"), self.left - length
        if end < 0:
            raise ValueError(f"{length} bytes are expected where {self.left} are left: the file is truncated")
        if code == _COMPLEX:
            parts = self.value(0)
            if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(n, float | int) for n in parts):
                raise ValueError(f"a complex number is {_bounded.short(parts)}; expected two numbers")
            value: Any = complex(*parts)
        elif code in (_NDARRAY, _SCALAR):
            value = self.array()
            value = value[()] if code == _SCALAR else value
        else:
            raise ValueError(f"it holds an extension of type {code}, which Flax does not write")
        if self.left != end:
            raise ValueError("an array ends where its extension does not")
        return value

    def array(self) -> np.ndarray:
        if self.take(1) != b"\x93":
            raise ValueError("an array does not begin with its shape, dtype and entries")
        shape, name = self.value(0), self.value(0)
        kind, nbytes = self.length(self.take(1)[0])
        sound = isinstance(shape, list) and len(shape) <= 32 and all(type(n) is int and n >= 0 for n in shape)
        name = name.decode("latin1") if isinstance(name, bytes) else name
        if not sound or kind not in ("str", "bin") or not isinstance(name, str):
            raise ValueError(f"an array has shape {_bounded.short(shape)} and dtype {_bounded.short(name)}")
        dtype = _npz.dtype_of(name)
        if math.prod(shape) * dtype.itemsize != nbytes or nbytes > self.left:
            raise ValueError(f"an array of {dtype} {_bounded.short(shape)} has {nbytes} bytes of {self.left} left")
        entries = _bounded.memory(nbytes)
        _bounded.read_into(self.file, entries, "an array")
        self.left -= nbytes
        return np.ndarray(shape, dtype, entries)


def _joined(parts: Mapping[Any, Any]) -> np.ndarray:
    """The array of a dict of its shape and pieces."""
    shape, pieces = (parts.get(name) for name in ("shape", "chunks"))
    if not isinstance(shape, dict) or not isinstance(pieces, dict) or not pieces:
        raise ValueError("an array in pieces has no shape or pieces")
    sizes = [shape.get(str(axis)) for axis in range(len(shape))]
    arrays = [pieces.get(str(place)) for place in range(len(pieces))]
    if not all(type(n) is int and n >= 0 for n in sizes) or not all(isinstance(a, np.ndarray) for a in arrays):
        raise ValueError("an array in pieces has others than sizes and arrays")
    whole = np.concatenate([array.reshape(-1) for array in arrays])  # type: ignore[union-attr]
    if math.prod(sizes) != whole.size:  # type: ignore[arg-type]
        raise ValueError(f"an array of shape {_bounded.short(sizes)} has {whole.size} entries in its pieces")
    return whole.reshape(sizes)  # type: ignore[arg-type]

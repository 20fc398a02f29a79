"""Tensors in .safetensors files: the library checks the header, and each tensor is read into place, without a copy."""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

from jax_scalegmn import _bounded

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{kind}{bits}": np.dtype(f"{name}{bits}")
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "C64": np.dtype(np.complex64),
}


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors by name, in the order of their bytes in the file.

    Raises:
      ValueError: If a tensor has a dtype that NumPy does not know, or the header is too large. The library's own error,
        SafetensorError, passes.
    """
    arrays = {}
    with _bounded.open_regular(path) as file:
        for name, dtype, shape, start in _entries(path):
            entries = _bounded.memory(math.prod(shape) * dtype.itemsize)
            file.seek(start)
            _bounded.read_into(file, entries, f"tensor {name[:100]!r}")
            arrays[name] = np.ndarray(shape, dtype, entries)
    return arrays


def mapped(path: Path) -> dict[str, np.ndarray]:
    """As `read`, but the tensors stay in the file: the system reads what is used, and forgets it when memory is short.

    Raises:
      ValueError: As `read`.
    """
    return {
        name: np.memmap(path, dtype, "r", start, tuple(shape)) if math.prod(shape) else np.empty(shape, dtype)
        for name, dtype, shape, start in _entries(path)
    }


def metadata(path: Path) -> dict[str, str]:
    """The texts by name in the header.

    Raises:
      ValueError: If the header is too large. The library's own error, SafetensorError, passes.
    """
    check_header(path)
    with safetensors.safe_open(path, framework="numpy") as header:
        return dict(header.metadata() or {})


def check_header(path: Path) -> None:
    """Checks the size of the header, and that the file holds it.

    Raises:
      ValueError: If it does not.
    """
    with _bounded.open_regular(path) as file:
        start, size = file.read(9), os.fstat(file.fileno()).st_size
    length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    if start[8:] != b"{" or not 2 <= length <= size - 8:
        raise ValueError(f"got a file of {size} bytes that begins with {start!r}; expected the header of safetensors")
    _bounded.check("metadata_bytes", length, "the size of its header, in bytes,")


def _entries(path: Path) -> Iterator[tuple[str, np.dtype, list[int], int]]:
    """Name, dtype, shape and place of each tensor, in the order of their bytes in the file."""
    check_header(path)
    with safetensors.safe_open(path, framework="numpy") as header, _bounded.open_regular(path) as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
        for name in header.offset_keys():  # the format has no gaps between them
            entry = header.get_slice(name)
            kind, shape = entry.get_dtype(), entry.get_shape()
            if kind not in _DTYPES:
                raise ValueError(f"tensor {name[:100]!r} has dtype {kind}; expected one of {', '.join(_DTYPES)}")
            nbytes = math.prod(shape) * _DTYPES[kind].itemsize
            if nbytes > os.fstat(file.fileno()).st_size:
                raise ValueError(f"tensor {name[:100]!r} of shape {_bounded.short(shape)} is larger than the file")
            yield name, _DTYPES[kind], shape, start
            start += nbytes

"""Arrays by name in .npz files, zip archives of .npy files: sizes are compared before an array is made."""

import math
import zipfile
from collections.abc import Collection
from typing import Any

import numpy as np

from jax_scalegmn import _bounded


def read(file: Any, size: int, *, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz file, as numpy.load does, without pickles.

    Args:
      file: The open file.
      size: Its size in bytes.
      names: The arrays to read; None for all.

    Raises:
      ValueError: If an array is damaged, of Python objects, or does not have the size that its header declares, or if
        all are larger than the file may become. zipfile's and zlib's own errors pass.
    """
    with zipfile.ZipFile(file) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        wanted = {name: member for name, member in members.items() if names is None or name in names}
        nbytes = sum(archive.getinfo(member).file_size for member in wanted.values())
        _bounded.check(
            "tensor_bytes", nbytes, "the size of its arrays, in bytes,", limit=_bounded.room("tensor_bytes", size)
        )
        return {name: _array(archive, member) for name, member in wanted.items()}


def dtype_of(descr: Any) -> np.dtype:
    """The dtype of a header of NumPy: of numbers, truth values, texts, or numbers that NumPy does not know.

    Raises:
      ValueError: If it is another one.
    """
    try:
        dtype = np.dtype(descr)
    except Exception as error:  # NumPy raises many types
        raise ValueError(f"its dtype is {_bounded.short(descr)}; expected one of numbers") from error
    if dtype.hasobject or dtype.itemsize == 0 or dtype.kind not in "biufcSUV" or dtype.fields or dtype.subdtype:
        raise ValueError(f"its dtype is {_bounded.short(descr)}; expected one of numbers: Python objects are refused")
    return dtype


# --- private ------------------------------------------------------------------------------------------------------


def _array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    try:
        with _bounded.unzipped(archive, member) as stream:
            header = _bounded.npy_header(stream)
            dtype = dtype_of(header.descr)
            expected, nbytes = (
                math.prod(header.shape) * dtype.itemsize,
                archive.getinfo(member).file_size - header.begin,
            )
            if expected != nbytes:
                raise ValueError(
                    f"it is {dtype} {_bounded.short(header.shape)}, which does not fit into {nbytes} bytes"
                )
            entries = _bounded.memory(nbytes)
            _bounded.read_into(stream, entries, "it")
            stream.read(1)  # checks the archive's checksum
            return np.ndarray(header.shape, dtype, entries, order="F" if header.fortran else "C")
    except ValueError as error:
        raise ValueError(f"its member {member[:100]!r} is not an array that can be read: {error}") from error

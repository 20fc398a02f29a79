"""Writes PyTorch's files by hand, in the few pickle opcodes of `torch.save`.

PyTorch is a gigabyte that users of JAX do not have, and Python's own pickle module cannot name
`torch._utils._rebuild_tensor_v2` without importing it. The tests compare the opcodes with those of a file of
`torch.save`.
"""

import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jax_scalegmn.io._torch_views import DTYPES, STORAGES


def write(path: Path, arrays: Mapping[str, np.ndarray], wrapper: tuple[str, ...]) -> None:
    """Writes the records of torch.save (PyTorch 1.6 and newer), each tensor in its own storage.

    Args:
      path: The file.
      arrays: Contiguous tensors by name, in the machine's byte order.
      wrapper: The keys of the dicts around the state_dict, the outermost first.
    """
    content = _pickled_dict({name: _pickled(str(key), value) for key, (name, value) in enumerate(arrays.items())})
    for outer in reversed(wrapper):
        content = _pickled_dict({outer: content})
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, f"{path.stem}/data.pkl", b"\x80\x02" + content + b".")
        _add(archive, f"{path.stem}/byteorder", sys.byteorder.encode())
        for key, value in enumerate(arrays.values()):
            _add(archive, f"{path.stem}/data/{key}", value.tobytes())
        _add(archive, f"{path.stem}/version", b"3\n")


# --- private ------------------------------------------------------------------------------------------------------


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds a record that begins at a multiple of 64 bytes, as torch.load needs it to map files into memory."""
    record = zipfile.ZipInfo(name)
    record.file_size = len(content)
    header = 30 + len(name.encode()) + 4  # the local header, the name, and the head of the padding
    if len(content) > zipfile.ZIP64_LIMIT:
        header += 20  # what zipfile adds for large records
    assert archive.fp is not None
    padding = -(archive.fp.tell() + header) % 64
    record.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    archive.writestr(record, content)


def _pickled(key: str, value: np.ndarray) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks), in pickle's opcodes.

    Dtypes without a storage of their own are written by _rebuild_tensor_v3, which takes the dtype as well.
    """
    names = [name for name, dtype in STORAGES.items() if dtype == value.dtype]
    kind = _global("torch", names[0]) if names else _global("torch.storage", "UntypedStorage")
    length = value.size if names else value.nbytes
    storage = (_text("storage"), kind, _text(key), _text("cpu"), _number(length))
    stride = [step // value.itemsize for step in value.strides]
    sizes = [_pickled_tuple(*map(_number, numbers)) for numbers in (value.shape, stride)]
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = [_pickled_tuple(*storage) + b"Q", _number(0), *sizes, b"\x89", hooks]
    if names:
        return _global("torch._utils", "_rebuild_tensor_v2") + _pickled_tuple(*arguments) + b"R"
    dtype = next(name for name, dtype in DTYPES.items() if dtype == value.dtype)
    return _global("torch._utils", "_rebuild_tensor_v3") + _pickled_tuple(*arguments, _global("torch", dtype)) + b"R"


def _pickled_dict(items: Mapping[str, bytes]) -> bytes:
    entries = b"".join(_text(name) + value for name, value in items.items())
    return _global("collections", "OrderedDict") + b")R(" + entries + b"u"


def _pickled_tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1 of eight bytes

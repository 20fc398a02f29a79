"""Tensors by name in files: safetensors, npz, and PyTorch's checkpoints, without PyTorch and without running a pickle.

Checkpoints are written by hand, in the few pickle opcodes of `torch.save`: PyTorch is a gigabyte that users of JAX do
not have, and Python's own pickle module cannot name `torch._utils._rebuild_tensor_v2` without importing it. The tests
compare the opcodes with those of a file of `torch.save`.
"""

import math
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jax_scalegmn.io import _atomic, _inert_pickle

__all__ = ["read", "write"]

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

_TORCH = (".pt", ".pth")
_NPZ_DTYPES = frozenset(_STORAGES.values()) - {np.dtype(jnp.bfloat16)}  # NumPy would read bfloat16 as opaque bytes


class Wrapped(NamedTuple):
    """A file's tensors by name, and the key of the dict that the file holds them under, if any."""

    tensors: dict[str, np.ndarray]
    wrapper: str | None


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a .safetensors, .npz, .pt or .pth file by name, without PyTorch and without running code.

    A .pt or .pth file holds a state_dict, or a dict with one under "state_dict", "model_state_dict" or "model". A plain
    number next to its tensors, like the label in some published files, becomes an array without axes.

    Args:
      path: The file; its ending says the format.

    Returns:
      The tensors by name, in the order of the file. A safetensors file keeps no order: its names are sorted, with
      layer 2 before layer 10.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is truncated, foreign, holds anything but tensors, or asks for code to be run.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from jax_scalegmn.io import tensors
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.npz"
    >>> np.savez(path, weight=np.eye(2), bias=np.zeros(2))
    >>> {name: value.shape for name, value in tensors.read(path).items()}
    {'weight': (2, 2), 'bias': (2,)}
    """
    return read_wrapped(path).tensors


def read_wrapped(path: str | os.PathLike[str]) -> Wrapped:
    """As `read`, with the key of the dict in which a .pt or .pth file holds its state_dict, if any."""
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; expected the tensors of a network.")
    try:
        return _READERS[path.suffix](path)
    except Exception as error:  # a damaged or hostile file can fail anywhere in zipfile, zlib, pickle or NumPy
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"{path}: expected a {path.suffix} file of plain tensors by name; {reason}. Get it again, or save "
            "model.state_dict() again with torch.save of a recent PyTorch, or as safetensors."
        ) from error


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    wrapper: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes tensors by name to a .safetensors, .npz, .pt or .pth file, from which `read` returns the same bits.

    A .pt or .pth file is what torch.save writes: an OrderedDict of contiguous tensors on the CPU, which torch.load
    reads, also with weights_only=True. The same tensors always give the same bytes. The file is written completely or
    not at all.

    Args:
      path: The file; its ending says the format.
      tensors: NumPy or JAX arrays by name. All formats but safetensors keep their order.
      wrapper: For .pt and .pth, write a dict with the state_dict under this key, like "state_dict".
      overwrite: Replace a file that exists.

    Raises:
      FileExistsError: If the file exists and `overwrite` is not set.
      FileNotFoundError: If the folder to put it into does not exist.
      ValueError: On another ending, no tensors, an empty name, or a dtype that the format cannot hold.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from jax_scalegmn.io import tensors
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.pt"
    >>> tensors.write(path, {"weight": np.eye(2, dtype="float16")})
    >>> tensors.read(path)["weight"].dtype
    dtype('float16')
    """
    path = Path(path)
    _check_suffix(path)
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    _check_arrays(path, arrays, wrapper)
    # Contiguous, in the machine's own byte order; ascontiguousarray would add an axis to a scalar.
    arrays = {name: np.array(value, value.dtype.newbyteorder("="), order="C") for name, value in arrays.items()}
    with _atomic.atomic_path(path, overwrite=overwrite) as scratch:
        if path.suffix in _TORCH:
            _write_torch(scratch, arrays, wrapper)
        elif path.suffix == ".npz":
            _write_npz(scratch, arrays)
        else:
            safetensors.numpy.save_file(arrays, scratch, metadata={"format": "pt"})


# --- private ------------------------------------------------------------------------------------------------------


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}; got {path.suffix!r}. Rename it.")


def _check_arrays(path: Path, arrays: Mapping[str, np.ndarray], wrapper: str | None) -> None:
    """Checks that the format of `path` can hold these tensors, under that wrapper."""
    if not arrays or not all(arrays):
        raise ValueError(f"{path}: expected one tensor or more, by names; got the names {list(arrays)[:10]}.")
    if wrapper is not None and (path.suffix not in _TORCH or wrapper not in _WRAPPERS):
        raise ValueError(
            f"{path}: wrapper is {wrapper!r}; expected None, or one of {_WRAPPERS} in a .pt or .pth file. Other "
            "formats hold tensors by name and nothing else."
        )
    dtypes = _NPZ_DTYPES if path.suffix == ".npz" else frozenset(_STORAGES.values())
    for name, value in arrays.items():
        if value.dtype.newbyteorder("=") not in dtypes:
            raise ValueError(
                f"{path}: tensor {name!r} is {value.dtype}; a {path.suffix} file holds "
                f"{', '.join(sorted(map(str, dtypes)))}. Convert it, or choose another format."
            )


# --- private: reading -----------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    """One record of a checkpoint, as its pickle names it."""

    type: str
    key: str
    length: int


class _View(NamedTuple):
    """A tensor as the pickle describes it: entries of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _StateDict(dict[str, Any]):
    """Replaces an OrderedDict; the attributes that a pickle may want to set are dropped."""

    def __setstate__(self, state: object) -> None:
        pass


def _find(module: str, name: str) -> Any:
    """What to use for the objects that a checkpoint's pickle names."""
    match module, name:
        case "collections", "OrderedDict":
            return _StateDict
        case "torch", _ if name in _STORAGES:
            return name
        case "torch._utils", "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *_: _View(storage, offset, size, stride)
        case "torch._utils", "_rebuild_parameter":
            return lambda data, *_: data
    raise ValueError(f"it asks for {module}.{name}, which is refused: only tensors of real numbers are read")


def _storage(pid: Any) -> _Storage:
    kind, storage_type, key, _, length = pid
    if kind != "storage":
        raise ValueError(f"it refers to a {kind!r}, expected a storage")
    return _Storage(storage_type, key, length)


def _read_torch(path: Path) -> Wrapped:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            raise ValueError(
                f"got a file that begins with {file.read(8)!r}, not a zip archive: truncated, foreign, or of a PyTorch "
                "before 1.6"
            )
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"got a zip archive with {len(pickles)} files data.pkl, expected one: not of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        content = _inert_pickle.load(archive.read(pickles[0]), _find, persistent=_storage)
        order = f"{folder}byteorder"
        byteorder = archive.read(order).decode() if order in archive.namelist() else "little"
        wrapper, flat = _unwrapped(content)
        tensors = {
            name: _array(archive, folder, byteorder, name, value) if isinstance(value, _View) else _scalar(value)
            for name, value in flat.items()
        }
        return Wrapped(tensors, wrapper)


def _unwrapped(content: Any) -> tuple[str | None, Mapping[str, _View | int | float]]:
    """The flat dict of tensors, and perhaps numbers, that a checkpoint is or holds, and the key that holds it."""

    def is_flat(node: Any) -> bool:
        if not isinstance(node, dict) or not any(isinstance(value, _View) for value in node.values()):
            return False
        return all(isinstance(name, str) and type(value) in (_View, int, float) for name, value in node.items())

    if is_flat(content):
        return None, content
    if not isinstance(content, dict):
        raise ValueError(f"got a {type(content).__name__}, not a state_dict")
    inner = [key for key in _WRAPPERS if is_flat(content.get(key))]
    if len(inner) != 1:
        raise ValueError(
            f"got a dict with the keys {list(content)[:10]}, of which {inner} hold a flat dict of tensors; expected "
            f"just one of {_WRAPPERS}"
        )
    return inner[0], content[inner[0]]


def _scalar(value: int | float) -> np.ndarray:
    return np.array(value, np.int64 if isinstance(value, int) else np.float64)


def _array(archive: zipfile.ZipFile, folder: str, byteorder: str, name: str, view: _View) -> np.ndarray:
    """A copy of the tensor's entries; nothing is read beyond its storage."""
    storage, offset, size, stride = view
    dtype = _STORAGES[storage.type]
    raw = archive.read(f"{folder}data/{storage.key}")
    if byteorder not in ("little", "big") or len(raw) != storage.length * dtype.itemsize:
        raise ValueError(
            f"the storage of tensor {name!r} has {len(raw)} bytes in {byteorder!r} order, expected {storage.length} x "
            f"{dtype.itemsize} in little or big order"
        )
    if not _fits(view):
        raise ValueError(
            f"tensor {name!r} has offset {offset}, size {size} and stride {stride}, which its storage of "
            f"{storage.length} entries does not hold (an expanded tensor needs .contiguous() before it is saved)"
        )
    entries = np.frombuffer(raw, np.uint8).reshape(-1, dtype.itemsize)
    if byteorder != sys.byteorder:
        entries = entries[:, ::-1]
    flat = np.ascontiguousarray(entries).reshape(-1).view(dtype)
    steps = [step * dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat[offset:], size, steps).copy()


def _fits(view: _View) -> bool:
    """Whether a tensor lies within its storage and repeats none of it."""
    if any(type(n) is not int or n < 0 for n in (view.offset, *view.size, *view.stride)):
        return False
    count = math.prod(view.size)
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    return count == 0 or (count <= view.storage.length and last < view.storage.length)


def _read_npz(path: Path) -> Wrapped:
    if not zipfile.is_zipfile(path):
        raise ValueError("got a file that is not a zip archive: truncated or foreign")
    with np.load(path, allow_pickle=False) as file:
        return Wrapped({name: np.asarray(file[name]) for name in file.files}, None)


def _read_safetensors(path: Path) -> Wrapped:
    with safetensors.safe_open(path, framework="numpy") as file:
        names = sorted(file.keys(), key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)])
        return Wrapped({name: file.get_tensor(name) for name in names}, None)


_READERS: Mapping[str, Callable[[Path], Wrapped]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
}


# --- private: writing -----------------------------------------------------------------------------------------------


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As numpy.savez, which cannot take a tensor named "file" and stores the time of writing."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


def _write_torch(path: Path, arrays: Mapping[str, np.ndarray], wrapper: str | None) -> None:
    """Writes the records of torch.save (PyTorch 1.6 and newer), each tensor in its own storage."""
    state_dict = _pickled_dict({name: _pickled(str(key), value) for key, (name, value) in enumerate(arrays.items())})
    content = state_dict if wrapper is None else _pickled_dict({wrapper: state_dict})
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, f"{path.stem}/data.pkl", b"\x80\x02" + content + b".")
        _add(archive, f"{path.stem}/byteorder", sys.byteorder.encode())
        for key, value in enumerate(arrays.values()):
            _add(archive, f"{path.stem}/data/{key}", value.tobytes())
        _add(archive, f"{path.stem}/version", b"3\n")


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
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks), in pickle's opcodes."""
    name = next(name for name, dtype in _STORAGES.items() if dtype == value.dtype)
    storage = (_text("storage"), _global("torch", name), _text(key), _text("cpu"), _number(value.size))
    stride = [step // value.itemsize for step in value.strides]
    sizes = [_pickled_tuple(*map(_number, numbers)) for numbers in (value.shape, stride)]
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = (_pickled_tuple(*storage) + b"Q", _number(0), *sizes, b"\x89", hooks)
    return _global("torch._utils", "_rebuild_tensor_v2") + _pickled_tuple(*arguments) + b"R"


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

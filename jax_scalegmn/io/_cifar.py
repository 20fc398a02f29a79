"""CIFAR-10 as its authors publish it: the archives for Python and for binary readers, packed or unpacked.

Both formats are described at https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009). The files for Python are
pickles, which are read here without running what they name.
"""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_scalegmn import _bounded
from jax_scalegmn.io import _inert_pickle
from jax_scalegmn.io._inert_pickle import Global, Object

_PARTS = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_SUFFIXES = {"": "for Python", ".bin": "binary"}
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


def holds_cifar(path: Path) -> bool:
    """Whether this is a tar archive, or a folder with files of CIFAR-10, or one that its archive was unpacked in."""
    if not path.is_dir():
        with _bounded.open_regular(path) as file:
            return _is_tar(file)
    return any((folder / name).is_file() for folder in _folders(path) for name in _names())


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the arrays x_train and x_test, uint8 [images, 3 (red, green, blue), 32, 32], y_train and y_test, int32.

    Args:
      path: cifar-10-python.tar.gz or cifar-10-binary.tar.gz, or a folder with the files data_batch_1 to data_batch_5
        and test_batch (each with the ending .bin in the binary version) or with cifar-10-batches-py or -bin.

    Raises:
      FileNotFoundError: If one of the six files is missing.
      ValueError: If the archive or a file is damaged or foreign, or asks for code to be run.
    """
    path = Path(path)
    files = _unpacked(path) if path.is_dir() else _packed(path)
    suffix = next((suffix for suffix in _SUFFIXES if f"data_batch_1{suffix}" in files), None)
    expected = [f"{name}{suffix or ''}" for names in _PARTS.values() for name in names]
    missing = [name for name in expected if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{path}: expected the files {expected} of CIFAR-10; missing are {missing}. Get the archive again, or "
            "unpack all of it."
        )
    arrays = {}
    for part, names in _PARTS.items():
        batches = [_batch(f"{path}: {name}{suffix}", files[f"{name}{suffix}"], suffix or "") for name in names]
        arrays[f"x_{part}"], arrays[f"y_{part}"] = (np.concatenate(rows) for rows in zip(*batches, strict=True))
    return arrays


# --- private ------------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    return [f"{name}{suffix}" for names in _PARTS.values() for name in names for suffix in _SUFFIXES]


def _folders(path: Path) -> list[Path]:
    return [path, *(path / name for name in _FOLDERS)]


def _unpacked(path: Path) -> dict[str, bytes]:
    folder = next(folder for folder in _folders(path) if any((folder / name).is_file() for name in _names()))
    return {name: _bounded.read_bytes(folder / name, "tensor_bytes") for name in _names() if (folder / name).is_file()}


_GZIP = b"\x1f\x8b"
_MOST_MEMBERS = 1000


def _is_tar(file: Any) -> bool:
    """Whether a file begins as a tar archive does, plain or in gzip."""
    try:
        stream = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == _GZIP else file
        tarfile.TarInfo.frombuf(stream.read(512), "utf-8", "surrogateescape")
        return True
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error):
        return False


def _packed(path: Path) -> dict[str, bytes]:
    try:
        with _bounded.open_regular(path) as file:
            limit = _bounded.room("tensor_bytes", os.fstat(file.fileno()).st_size)
            stream: Any = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == _GZIP else file
            counted: Any = _bounded.Counted(stream, limit, "tensor_bytes", "what it holds")
            with tarfile.open(fileobj=counted, mode="r|") as archive:  # front to back
                return _members(archive, limit)
    except Exception as error:  # a damaged archive can fail anywhere in tarfile, gzip and zlib
        raise ValueError(
            f"{path}: expected an archive of CIFAR-10, got one that cannot be read ({_bounded.one_line(error)}). It is "
            "truncated or damaged: get it again."
        ) from error


def _members(archive: tarfile.TarFile, limit: int) -> dict[str, bytes]:
    """The content of the files that are named as CIFAR-10's."""
    files: dict[str, bytes] = {}
    for count, member in enumerate(archive):
        name = member.name.rpartition("/")[-1]
        if count >= _MOST_MEMBERS or member.size < 0 or member.issparse():
            raise ValueError(f"its member {count}, {_bounded.short(name)}, is not a file of CIFAR-10")
        if name in _names() and name not in files and member.isreg() and (content := archive.extractfile(member)):
            _bounded.check("tensor_bytes", member.size, f"the size of its {name}, in bytes,", limit=limit)
            files[name] = content.read()
            if len(files[name]) != member.size:
                raise ValueError(f"its {name} ends after {len(files[name])} of {member.size} bytes")
    return files


def _batch(name: str, content: bytes, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of one file."""
    try:
        x, y = _from_records(content) if suffix else _from_pickle(content)
    except Exception as error:  # a damaged or hostile pickle can fail anywhere
        reason = _bounded.one_line(error).rstrip(".")
        raise ValueError(
            f"{name}: expected images and labels of CIFAR-10, {_SUFFIXES[suffix]}; {reason}. It is truncated or "
            "foreign: get the archive again."
        ) from error
    if len(x) == 0 or y.min() < 0 or y.max() > 9:
        raise ValueError(f"{name}: {len(x)} images with labels {np.unique(y)[:12]}; expected labels 0..9, as CIFAR-10.")
    return x.reshape(-1, *_SHAPE), y.astype(np.int32)


def _from_records(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Reads records of one byte of label and 3,072 bytes of pixels."""
    if len(content) % (1 + _PIXELS):
        raise ValueError(f"its {len(content)} bytes are not a multiple of {1 + _PIXELS}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return rows[:, 1:], rows[:, 0]


def _from_pickle(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _inert_pickle.load(io.BytesIO(content), encoding="latin1", max_bytes=len(content))
    if not isinstance(batch, Mapping):
        raise ValueError(f"it holds a {type(batch).__name__}, not a dict")
    batch = {_key(name): value for name, value in batch.items()}
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, Object) or not isinstance(labels, list):
        names = sorted(str(name)[:60] for name in batch)[:10]
        raise ValueError(f"it holds {names}, expected an array under 'data', a list under 'labels'")
    if not all(type(label) is int for label in labels):
        raise ValueError("its labels are not integers")
    x = _array(pixels)
    if x.shape != (len(labels), _PIXELS):
        raise ValueError(f"its data has shape {x.shape}, expected {(len(labels), _PIXELS)} for {len(labels)} labels")
    return x, np.array(labels, np.int64)


def _key(name: Any) -> Any:
    """A key of the batch as a text: Python 3 read some of them as bytes."""
    value = name.value if isinstance(name, _inert_pickle.Key) else name
    return value.decode("latin1") if isinstance(value, bytes) else value if isinstance(value, str) else id(value)


def _array(node: Object) -> np.ndarray:
    """The array of unsigned bytes that a pickle describes: NumPy's _reconstruct, and its state."""
    match node.call, node.state:
        case Global(name="_reconstruct"), (_, tuple(shape), Object(args=("u1" | "uint8", *_)), fortran, raw):
            raw = raw.encode("latin1") if isinstance(raw, str) else raw
            if isinstance(raw, bytes) and all(type(n) is int for n in shape):
                return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    raise ValueError("its data is not an array of unsigned bytes")

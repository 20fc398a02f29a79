"""PyTorch's two kinds of file, the zip archive and the one before PyTorch 1.6: their pickle and their storages."""

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jax_scalegmn import _bounded
from jax_scalegmn.io import _inert_pickle, _torch_views
from jax_scalegmn.io._torch_views import Storage

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of files before PyTorch 1.6: a number


class Checkpoint(NamedTuple):
    """An open checkpoint.

    Attributes:
      content: What its pickle holds, as `_inert_pickle.load` returns it.
      storage: Reads the bytes of a storage, into an array of their own.
      byteorder: "little" or "big".
    """

    content: Any
    storage: Callable[[str, Storage], np.ndarray]
    byteorder: str


@contextlib.contextmanager
def open_zip(file: io.BufferedIOBase) -> Iterator[Checkpoint]:
    """Opens an archive of torch.save since PyTorch 1.6.

    Raises:
      ValueError: If it is not one. zipfile's own errors pass.
    """
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"got a zip archive with {len(pickles)} files data.pkl, expected one: not of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in archive.namelist():
            raise ValueError("got a TorchScript program; save the state_dict of its module with torch.save")
        stream = io.BytesIO(_member(archive, pickles[0]))
        content = _inert_pickle.load(stream, persistent=_torch_views.storage_of)
        order = f"{folder}byteorder"
        byteorder = _member(archive, order).decode() if order in archive.namelist() else "little"

        def storage(name: str, wanted: Storage) -> np.ndarray:
            expected = _nbytes(wanted)
            member = f"{folder}data/{wanted.key}"
            if member not in archive.NameToInfo or wanted.start:
                raise ValueError(f"the storage of tensor {name[:100]!r} is missing: the file is truncated")
            _check_storage(name, archive.getinfo(member).file_size, byteorder, expected, wanted)
            with _bounded.unzipped(archive, member) as stream:
                content = _read(stream, expected, name)
                stream.read(1)  # checks the archive's checksum
                return content

        yield Checkpoint(content, storage, byteorder)


@contextlib.contextmanager
def open_legacy(file: io.BufferedIOBase) -> Iterator[Checkpoint]:
    """Opens a file of torch.save before PyTorch 1.6: four pickles, then the keys of the storages, then their bytes.

    Raises:
      ValueError: If it is not one.
    """
    file.seek(len(MAGIC))
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Any:
        found = _torch_views.storage_of(pid)
        if isinstance(found, Storage):
            storages.setdefault(found.key, found)
        return found

    version = _inert_pickle.load(file)
    system = _inert_pickle.load(file)
    if version != 1001 or not isinstance(system, dict):
        raise ValueError("got a file of torch.save with another protocol than 1001")
    content = _inert_pickle.load(file, persistent=persistent)
    keys = _inert_pickle.load(file)
    begins = _storage_places(file, keys, storages)

    def storage(name: str, wanted: Storage) -> np.ndarray:
        if wanted.key not in begins:
            raise ValueError(f"the storage of tensor {name[:100]!r} is missing: the file is truncated")
        start, nbytes = begins[wanted.key]
        first, expected = wanted.start * (wanted.itemsize or 1), _nbytes(wanted)
        is_part = wanted.start > 0 and first + expected <= nbytes
        _check_storage(name, expected if is_part else nbytes, byteorder, expected, wanted)
        file.seek(start + first)
        return _read(file, expected, name)

    byteorder = "little" if system.get("little_endian", True) else "big"
    yield Checkpoint(content, storage, byteorder)


# --- private ------------------------------------------------------------------------------------------------------


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    _bounded.check("metadata_bytes", size, f"the size of its {name[-50:]}, in bytes,")
    with _bounded.unzipped(archive, name) as stream:
        return stream.read()


def _read(stream: Any, nbytes: int, name: str) -> np.ndarray:
    content = np.frombuffer(_bounded.memory(nbytes), np.uint8)
    _bounded.read_into(stream, content, f"the storage of tensor {name[:100]!r}")
    return content


def _nbytes(storage: Storage) -> int:
    return storage.length * (storage.itemsize or 1)


def _check_storage(name: str, nbytes: int, byteorder: str, expected: int, storage: Storage) -> None:
    if byteorder not in ("little", "big") or nbytes != expected:
        raise ValueError(
            f"the storage of tensor {name[:100]!r} has {nbytes} bytes in {byteorder[:20]!r} order, expected "
            f"{storage.length} x {storage.itemsize} in little or big order"
        )


def _storage_places(file: io.BufferedIOBase, keys: Any, storages: dict[str, Storage]) -> dict[str, tuple[int, int]]:
    """Where the bytes of each storage begin, and how many there are."""
    if not isinstance(keys, list) or not all(type(key) is str and key in storages for key in keys):
        raise ValueError("its storages are not those that its pickle names")
    position, size = file.tell(), os.fstat(file.fileno()).st_size
    places = {}
    for key in keys:
        file.seek(position)
        header = file.read(8)
        count = struct.unpack("<q", header)[0] if len(header) == 8 else -1
        itemsize = storages[key].itemsize
        if itemsize is None:
            raise ValueError(f"it holds a storage of an unknown kind, torch.{storages[key].type[:60]}")
        position += 8 + count * itemsize
        if count < 0 or position > size:
            raise ValueError("its storages go beyond its end: the file is truncated")
        places[key] = (position - count * itemsize, count * itemsize)
    return places

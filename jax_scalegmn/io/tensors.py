"""Tensors by name in files: any checkpoint of PyTorch, safetensors and npz, without PyTorch or running a pickle.

The content of a file says what it is, not its name. A checkpoint's pickle is read as data (`_inert_pickle`): the
tensors of one dict, or of one pickled module, become arrays. Whatever else is in the file is left unread.
"""

import io
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jax_scalegmn import _bounded
from jax_scalegmn.io import _atomic, _npz, _safetensors, _torch_dicts, _torch_files, _torch_views, _torch_write
from jax_scalegmn.io._torch_files import Checkpoint
from jax_scalegmn.io._torch_views import Storage, Unreadable, View

__all__ = ["mapped", "metadata", "read", "shared", "write"]

Contents = TypeVar("Contents")

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".checkpoint", "")  # what people call PyTorch's files

_TORCH_DTYPES = frozenset(_torch_views.STORAGES.values()) | frozenset(_torch_views.DTYPES.values())
_NPZ_DTYPES = frozenset(d for d in _TORCH_DTYPES if d.isbuiltin == 1)  # NumPy would read the others as opaque bytes
_SAFETENSORS_DTYPES = frozenset(d for d in _NPZ_DTYPES if d.kind != "c") | {np.dtype(jnp.bfloat16)}


class Wrapped(NamedTuple):
    """A file's tensors by name, and how they are stored.

    Attributes:
      tensors: The tensors.
      wrapper: The key of the dict that holds them: a text, a tuple of texts for dicts within dicts, or None.
      kind: The format: ".safetensors", ".npz", ".pt" or ".pth".
      shared: The names of tensors that share entries, as in `shared`.
    """

    tensors: dict[str, np.ndarray]
    wrapper: str | tuple[str, ...] | None
    kind: str
    shared: tuple[tuple[str, ...], ...] = ()


def read(path: str | os.PathLike[str], *, key: str | None = None) -> dict[str, np.ndarray]:
    """Reads the tensors of a file by name, without PyTorch and without running code.

    A file larger than `io.limits` allow is refused. Tensors that are one in a PyTorch file share memory.

    A PyTorch file is what torch.save writes, today or before PyTorch 1.6, and whatever it is called: a state_dict, a
    dict that holds one at any depth, or a whole module, whose state_dict is read. An optimizer's state is passed over.
    So are dicts without a tensor of two axes, such as statistics of the data, where another dict has one. A plain
    number between tensors, like the label in some published files, becomes an array without axes.

    Args:
      path: The file; its content says the format.
      key: The dict of tensors in a PyTorch file, if it holds several: its keys joined by dots, like "model_ema" or
        "models.0". "" is the file's outermost dict.

    Returns:
      The tensors by name, in the order of the file. A safetensors file keeps no order: its names are sorted, with
      layer 2 before layer 10.

    Raises:
      OSError: If there is no such file, or it cannot be opened.
      ValueError: If the file is truncated, foreign, holds several dicts of tensors or none, or a tensor that is needed
        is sparse, quantized, or has no entries.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from jax_scalegmn.io import tensors
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.npz"
    >>> np.savez(path, weight=np.eye(2), bias=np.zeros(2))
    >>> {name: value.shape for name, value in tensors.read(path).items()}
    {'weight': (2, 2), 'bias': (2,)}
    """
    return read_wrapped(path, key=key).tensors


def shared(path: str | os.PathLike[str], *, key: str | None = None) -> tuple[tuple[str, ...], ...]:
    """Says which tensors of a PyTorch file are one tensor, or overlap: a change of one changes the others.

    Such are tied weights, like a decoder's that are the transposed ones of its encoder, and a module used twice. Views
    of one storage without common entries, like the parts of one long vector, are not shared.

    Args:
      path: The file.
      key: As in `read`.

    Returns:
      The names, in groups of two or more; none for formats that store each tensor alone.

    Raises:
      OSError, ValueError: As `read`.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from jax_scalegmn.io import tensors
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.pt"
    >>> tensors.write(path, {"encoder.weight": np.eye(2), "decoder.weight": np.eye(2)})
    >>> tensors.shared(path)
    ()
    """
    return read_wrapped(path, key=key).shared


def read_wrapped(path: str | os.PathLike[str], *, key: str | None = None) -> Wrapped:
    """As `read`, with what else is needed to write the tensors back."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; expected the tensors of a network.")
    with _bounded.open_regular(path) as file:
        try:
            return _read(path, file, key)
        except _torch_dicts.ChoiceError as error:
            raise ValueError(f"{path}: {error}.") from error
        except Exception as error:  # a damaged or hostile file can fail anywhere in zipfile, zlib, NumPy or safetensors
            reason = _bounded.one_line(error).rstrip(".")
            raise ValueError(
                f"{path}: expected tensors by name, in a file of PyTorch, safetensors or npz; {reason}. "
                "Get it again, or save model.state_dict() again with torch.save of a recent PyTorch, or as safetensors."
            ) from error


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the texts by name that the header of a .safetensors file holds next to its tensors.

    Args:
      path: The file.

    Returns:
      The texts; none where the header has none.

    Raises:
      OSError: If there is no such file, or it cannot be opened.
      ValueError: If it is truncated or foreign.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from jax_scalegmn.io import tensors
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> tensors.write(path, {"weight": np.eye(2)})
    >>> tensors.metadata(path)
    {'format': 'pt'}
    """
    return _of_safetensors(_safetensors.metadata, Path(path))


def mapped(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file where they are: they may be larger than the memory.

    What is used is read from the file, so the file must stay as it is for as long as the tensors are in use. They
    cannot be written to.

    Args:
      path: The file.

    Returns:
      The tensors by name, in the order of their bytes in the file.

    Raises:
      OSError: If there is no such file, or it cannot be opened.
      ValueError: If it is truncated or foreign.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from jax_scalegmn.io import tensors
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> tensors.write(path, {"weight": np.eye(2)})
    >>> tensors.mapped(path)["weight"][1].tolist()
    [0.0, 1.0]
    """
    return _of_safetensors(_safetensors.mapped, Path(path))


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    wrapper: str | Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes tensors by name to a file of PyTorch, .safetensors or .npz, from which `read` returns the same bits.

    A PyTorch file is what torch.save writes: an OrderedDict of contiguous tensors on the CPU, which torch.load reads,
    also with weights_only=True, and load_state_dict takes. What was next to the state_dict in a file that it was read
    from, like an optimizer's state, belongs to the old weights and is not written. The same tensors always give the
    same bytes. The file is written completely or not at all.

    Args:
      path: The file; its ending says the format. PyTorch's are .pt, .pth, .ckpt, .bin, .tar, .checkpoint and none.
      tensors: NumPy or JAX arrays by name. All formats but safetensors keep their order.
      wrapper: For PyTorch's files, write a dict with the state_dict under this key, like "state_dict"; several keys
        make dicts within dicts.
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
    keys = (wrapper,) if isinstance(wrapper, str) else tuple(wrapper or ())
    _check_arrays(path, arrays, keys)
    # Contiguous, in the machine's own byte order; ascontiguousarray would add an axis to a scalar.
    arrays = {name: np.array(value, value.dtype.newbyteorder("="), order="C") for name, value in arrays.items()}
    with _atomic.atomic_path(path, overwrite=overwrite) as scratch:
        if path.suffix in TORCH_SUFFIXES:
            _torch_write.write(scratch, arrays, keys)
        elif path.suffix == ".npz":
            _write_npz(scratch, arrays)
        else:
            safetensors.numpy.save_file(arrays, scratch, metadata={"format": "pt"})


# --- private: writing -----------------------------------------------------------------------------------------------


def _check_suffix(path: Path) -> None:
    endings = tuple(dict.fromkeys((*SUFFIXES, *TORCH_SUFFIXES)))
    if path.suffix not in endings:
        shown = ", ".join(ending for ending in endings if ending)
        raise ValueError(f"{path}: expected a name that ends in {shown} or in nothing; got {path.suffix!r}. Rename it.")


def _check_arrays(path: Path, arrays: Mapping[str, np.ndarray], wrapper: tuple[str, ...]) -> None:
    """Checks that the format of `path` can hold these tensors, under that wrapper."""
    if not arrays or not all(arrays):
        raise ValueError(f"{path}: expected one tensor or more, by names; got the names {list(arrays)[:10]}.")
    if wrapper and (path.suffix not in TORCH_SUFFIXES or not all(isinstance(k, str) and k for k in wrapper)):
        raise ValueError(
            f"{path}: wrapper is {wrapper}; expected None, or keys in a file of PyTorch. Other formats hold tensors by "
            "name and nothing else."
        )
    dtypes = {".npz": _NPZ_DTYPES, ".safetensors": _SAFETENSORS_DTYPES}.get(path.suffix, _TORCH_DTYPES)
    for name, value in arrays.items():
        if value.dtype.newbyteorder("=") not in dtypes:
            raise ValueError(
                f"{path}: tensor {name!r} is {value.dtype}; a {path.suffix or 'PyTorch'} file holds "
                f"{', '.join(sorted(map(str, dtypes)))}. Convert it, or choose another format."
            )


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As numpy.savez, which cannot take a tensor named "file" and stores the time of writing."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


# --- private: reading -----------------------------------------------------------------------------------------------


def _of_safetensors(read: Callable[[Path], Contents], path: Path) -> Contents:
    """What a function reads from a file of safetensors; its errors name the file."""
    try:
        return read(path)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path}: expected a file of safetensors; {_bounded.one_line(error)}. It is truncated or foreign: write it "
            "again."
        ) from error


_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_FOREIGN = {
    b"\x89HDF": "an HDF5 file: read it with h5py",
    b"\x1f\x8b": "a gzip file: unpack it",
    b"BZh": "a bzip2 file: unpack it",
    b"\xfd7zXZ": "an xz file: unpack it",
    b"\x93NUMPY": "a single array of NumPy, without a name",
    b"\x80": "a pickle that torch.save did not write",
}


def _read(path: Path, file: io.BufferedIOBase, key: str | None) -> Wrapped:
    head = file.read(16)
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    is_zip = head.startswith(_ZIP)
    if head.startswith(_torch_files.MAGIC) or (is_zip and not _is_npz(file)):
        opened = _torch_files.open_zip if is_zip else _torch_files.open_legacy
        with opened(file) as checkpoint:
            return _read_torch(path, checkpoint, key, size)
    if key is not None:
        raise ValueError(f"key is {key[:100]!r}, but only a file of PyTorch holds dicts of tensors by keys")
    if is_zip:
        return Wrapped(_npz.read(file, size), None, ".npz")
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < size:
        arrays = _safetensors.read(path)
        return Wrapped({name: arrays[name] for name in sorted(arrays, key=_in_parts)}, None, ".safetensors")
    known = next((what for start, what in _FOREIGN.items() if head.startswith(start)), "truncated or foreign")
    raise ValueError(f"got a file that begins with {head[:8]!r}: {known}")


def _read_torch(path: Path, checkpoint: Checkpoint, key: str | None, size: int) -> Wrapped:
    chosen = _torch_dicts.choose(checkpoint.content, key)
    views: dict[str, View] = {}
    for name, entry in chosen.tensors.items():
        if isinstance(entry, Unreadable):
            raise ValueError(f"tensor {name[:100]!r} is {entry.cause}; only dense tensors of numbers are read")
        if isinstance(entry, View):
            _torch_views.check(name, entry)
            views[name] = entry
    arrays = _read_views(checkpoint, views, size)
    tensors = {
        name: arrays[name] if name in arrays else _torch_dicts.scalar(entry)  # type: ignore[arg-type]
        for name, entry in chosen.tensors.items()
    }
    keys = tuple(key for key in chosen.path if isinstance(key, str))
    wrapper = None if not keys or len(keys) < len(chosen.path) else keys[0] if len(keys) == 1 else keys
    kind = path.suffix if path.suffix in (".pt", ".pth") else ".pt"
    return Wrapped(tensors, wrapper, kind, _torch_views.shared(views))


def _read_views(checkpoint: Checkpoint, views: Mapping[str, View], size: int) -> dict[str, np.ndarray]:
    """The tensors by name. Each storage is read once; tensors that are one in the file share memory."""
    by_storage: dict[Storage, list[str]] = {}
    for name, view in views.items():
        by_storage.setdefault(view.storage, []).append(name)
    limit = _bounded.room("tensor_bytes", size)  # storages may be compressed, and tensors be many of one storage
    for nbytes in (
        sum(storage.length * (storage.itemsize or 1) for storage in by_storage),
        sum(view.nbytes for view in set(views.values())),
    ):
        _bounded.check("tensor_bytes", nbytes, "the size of its tensors, in bytes,", limit=limit)
    arrays: dict[str, np.ndarray] = {}
    for storage, names in by_storage.items():
        raw = checkpoint.storage(names[0], storage)
        own = {views[name] for name in names}
        is_kept = sum(view.nbytes for view in own) >= len(raw)
        made = {view: _torch_views.entries(view, raw, checkpoint.byteorder, is_kept=is_kept) for view in own}
        arrays |= {name: made[views[name]] for name in names}
    return arrays


def _is_npz(file: io.BufferedIOBase) -> bool:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _in_parts(name: str) -> list[Any]:
    """A name's texts and numbers, by which layer 2 is before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

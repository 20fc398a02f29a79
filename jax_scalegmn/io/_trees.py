"""Nested dicts of arrays in files: Flax's msgpack and Orbax's checkpoints. Neither can hold code that would run.

Flax and Orbax are imported where they are used: reading PyTorch's tensors needs neither, and Orbax is the extra
`checkpoint`.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_scalegmn import _bounded
from jax_scalegmn.io import _atomic, _msgpack

MSGPACK = ".msgpack"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The nested dict of arrays in a .msgpack file, or in the folder of an Orbax checkpoint.

    Arrays are NumPy's, in their own dtypes. The dicts of a .msgpack file keep their order.

    Raises:
      FileNotFoundError: If there is no such file or folder.
      ImportError: On the folder of a checkpoint, if Orbax is not installed.
      ValueError: If it is damaged or foreign.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: nothing there; expected a {MSGPACK} file or the folder of a checkpoint.")
    tree = _read_orbax(path) if path.is_dir() else _read_msgpack(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a dict of arrays by name, got a {type(tree).__name__}.")
    try:
        _bounded.check_nesting(tree, "its dicts")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tree


def write(path: str | os.PathLike[str], tree: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Writes a nested dict of arrays, to a .msgpack file or, with any other ending, as an Orbax checkpoint.

    The formats are those of flax.serialization.to_bytes and orbax.checkpoint.StandardCheckpointer. The file or folder
    is written completely or not at all.

    Raises:
      FileExistsError: If it exists and `overwrite` is not set.
      FileNotFoundError: If the folder to put it into does not exist.
      ImportError: On the folder of a checkpoint, if Orbax is not installed.
      ValueError: If `path` is a folder without a checkpoint, which is never replaced.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    with _atomic.atomic_path(path, overwrite=overwrite) as scratch:
        if path.suffix == MSGPACK:
            from flax import serialization

            # In place on a copy of ours: Flax's own copy has its keys sorted.
            scratch.write_bytes(serialization.msgpack_serialize(_copied(tree), in_place=True))
        else:
            ocp = _orbax()
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(scratch.absolute(), _copied(tree))
            except Exception as error:  # orbax and tensorstore raise many types, as on a full disk
                raise OSError(f"{path}: this checkpoint cannot be written ({error}).") from error


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Checks that `write` may write to `path`, and raises what `write` would raise."""
    path = Path(path)
    _atomic.check_free(path, overwrite=overwrite)
    if path.is_dir() and (path.suffix == MSGPACK or not (path / _METADATA).is_file()):
        raise ValueError(f"{path}: a folder that is not an Orbax checkpoint is never replaced. Choose another name.")


# --- private ------------------------------------------------------------------------------------------------------

_METADATA = "_METADATA"  # a file in every Orbax checkpoint of a tree


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError('Orbax checkpoints need orbax-checkpoint: pip install "jax-scalegmn[checkpoint]"') from error
    return orbax.checkpoint


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(node) if isinstance(node, Mapping) else np.asarray(node) for key, node in tree.items()}


def _read_msgpack(path: Path) -> Any:
    try:
        return _msgpack.read(path)
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in msgpack and NumPy
        raise ValueError(
            f"{path}: expected msgpack of arrays, as flax.serialization.to_bytes writes it; got "
            f"{_bounded.one_line(error)}. It is damaged or foreign: write it again."
        ) from error


def _read_orbax(path: Path) -> Any:
    if not (path / _METADATA).is_file():
        inner = sorted(child.parent.name for child in path.glob(f"*/{_METADATA}"))
        cure = f"Name one of its folders {inner} instead." if inner else "Name the folder of the params."
        raise ValueError(f"{path}: expected the folder of an Orbax checkpoint, which has a file {_METADATA}. {cure}")
    ocp = _orbax()
    try:
        size = _bounded.check_folder(path)
        for file in (path / _METADATA, *path.glob("array_metadatas/*"), path / "_sharding"):
            if file.is_file():
                _bounded.read_json(file)
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path.absolute()).item_metadata.tree
            _check_arrays(tree, size)
            # As NumPy arrays: the devices that wrote them need not exist here, and float64 is kept.
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(path.absolute(), restore_args=numpy)
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise ValueError(
            f"{path}: this Orbax checkpoint cannot be read ({_bounded.one_line(error)}). It is damaged: write it again."
        ) from error


def _check_arrays(tree: Any, size: int) -> None:
    """Holds the declared sizes of a checkpoint's arrays, and of their chunks, against the folder's size."""
    nbytes = 0
    for leaf in jax.tree.leaves(tree):
        shape, dtype = getattr(leaf, "shape", None) or (), getattr(leaf, "dtype", None)
        chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None) or ()  # read as a whole, however small
        entries = max(math.prod(int(n) for n in one) for one in (shape, chunk))
        nbytes += entries * (np.dtype(dtype).itemsize if dtype is not None else 8)
    limit = _bounded.room("tensor_bytes", size)
    _bounded.check("tensor_bytes", nbytes, "the size of its arrays, in bytes,", limit=limit)

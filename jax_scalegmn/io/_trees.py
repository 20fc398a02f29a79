"""Nested mappings of arrays in files: Flax's msgpack and Orbax's checkpoints. Neither holds code that could run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from jax_scalegmn.io import _atomic

MSGPACK = ".msgpack"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The nested mapping of arrays in a .msgpack file, or in the folder of an Orbax checkpoint.

    Arrays come as NumPy's, in their own dtypes. Mappings of a .msgpack file keep their order.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if it is damaged or foreign.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: nothing there; expected a {MSGPACK} file or the folder of a checkpoint.")
    tree = _read_orbax(path) if path.is_dir() else _read_msgpack(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a mapping of arrays by name, got a {type(tree).__name__}.")
    return tree


def write(path: str | os.PathLike[str], tree: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Writes a nested mapping of arrays, to a .msgpack file or, with any other ending, as an Orbax checkpoint.

    As flax.serialization.to_bytes and orbax.checkpoint.StandardCheckpointer do it. What is written is there in full or
    not at all.

    Raises:
      FileExistsError: if there is something already and `overwrite` is not set.
      FileNotFoundError: if there is no folder to put it into.
      ValueError: if `path` is a folder that is no checkpoint, which is never replaced.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    with _atomic.replacing(path, overwrite=overwrite) as written:
        if path.suffix == MSGPACK:
            # In place on a copy, since the copy that is made otherwise has its keys sorted.
            written.write_bytes(serialization.msgpack_serialize(_copied(tree), in_place=True))
        else:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(written.absolute(), _copied(tree))


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Checks that `write` may write to `path`, and raises as it does where not."""
    path = Path(path)
    _atomic.check_free(path, overwrite=overwrite)
    if path.is_dir() and (path.suffix == MSGPACK or not (path / _METADATA).is_file()):
        raise ValueError(f"{path}: a folder that is no Orbax checkpoint is never replaced. Choose another name.")


# --- private ------------------------------------------------------------------------------------------------------

_METADATA = "_METADATA"  # a file in every Orbax checkpoint of a tree


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(node) if isinstance(node, Mapping) else np.asarray(node) for key, node in tree.items()}


def _read_msgpack(path: Path) -> Any:
    try:
        return serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # a damaged file can fail anywhere in msgpack and NumPy
        raise ValueError(
            f"{path}: expected msgpack of arrays, as flax.serialization.to_bytes gives it; {error!r}. It is damaged or "
            "foreign: write it again."
        ) from error


def _read_orbax(path: Path) -> Any:
    if not (path / _METADATA).is_file():
        inner = sorted(child.parent.name for child in path.glob(f"*/{_METADATA}"))
        raise ValueError(
            f"{path}: expected the folder of an Orbax checkpoint, with a file {_METADATA}; got none"
            + (f", but in its folders {inner}. Name one of them." if inner else ". Name the folder of the params.")
        )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path.absolute()).item_metadata.tree
            # As NumPy's arrays: what devices they lay on does not matter, and float64 stays what it is.
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(path.absolute(), restore_args=numpy)
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise ValueError(
            f"{path}: this Orbax checkpoint cannot be read ({error}). It is damaged: write it again."
        ) from error

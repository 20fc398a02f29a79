"""Files and folders that are written completely or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Checks that a file or folder of that name may be written.

    Raises:
      FileExistsError: If it exists and `overwrite` is not set.
      FileNotFoundError: If the folder to put it into does not exist.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{path}: expected a name in an existing folder; {path.parent} is not one. Make the folder first."
        )
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: it exists already and is not replaced. Pass overwrite to replace it.")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write a file or folder to, which replaces `path` once the block ends and all is on the disk.

    If the block raises, `path` stays as it was. A file is replaced by one renaming. A folder takes two: between them
    the old one is in a hidden folder next to `path`.

    Args:
      path: Where the file or folder will be.
      overwrite: Replace a file or folder that exists.

    Yields:
      The path to write to, in a hidden folder next to `path`.

    Raises:
      FileExistsError: If `path` exists and `overwrite` is not set.
      FileNotFoundError: If the folder to put it into does not exist.
      ValueError: If a file would replace a folder, or a folder a file.

    >>> import pathlib, tempfile
    >>> from jax_scalegmn import io
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x.txt"
    >>> with io.atomic_path(path) as scratch:
    ...     _ = scratch.write_text("done")
    ...     print(path.exists())
    False
    >>> path.read_text()
    'done'
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as scratch:
        written = Path(scratch) / path.name
        yield written
        for file in (written, *written.rglob("*")):
            _sync(file)
        check_free(path, overwrite=overwrite)  # another program may have been faster
        if os.path.lexists(path) and _kind(written) != _kind(path):
            raise ValueError(
                f"{path}: expected to replace a {_kind(written)}, got a {_kind(path)}. Choose another name."
            )
        if path.is_dir():
            _replace_folder(path, written, Path(scratch) / "replaced")
        else:
            os.replace(written, path)
        _sync(path.absolute().parent)


# --- private ------------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"


def _replace_folder(path: Path, written: Path, old: Path) -> None:
    """Moves the folder at `path` to `old` and `written` to `path`, and the old one back where that fails."""
    os.replace(path, old)
    try:
        os.replace(written, path)
    except OSError:
        os.replace(old, path)
        raise


def _sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

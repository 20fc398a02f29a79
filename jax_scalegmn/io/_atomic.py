"""Files that are there in full or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Checks that a file or folder of that name may be written, before the work whose result it will hold.

    Raises:
      FileExistsError: if there is one already and `overwrite` is not set.
      FileNotFoundError: if there is no folder to put it into.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a name in a folder that exists; {path.parent} is none. Make it.")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: there is one already, which stays as it is. Pass overwrite to replace it.")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to, which takes the place of `path` once all is on the disk.

    Where the writing fails, `path` is what it was before. A folder is replaced in two renamings, a file in one: between
    the two the old folder lies beside its place, in a hidden one.

    Raises:
      FileExistsError: if there is a file or folder already and `overwrite` is not set.
      FileNotFoundError: if there is no folder to put it into.
      ValueError: if a file would replace a folder, or a folder a file.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as scratch:
        written = Path(scratch) / path.name
        yield written
        for file in (written, *written.rglob("*")):
            _sync(file)
        check_free(path, overwrite=overwrite)  # another program may have been faster
        if os.path.lexists(path) and written.is_dir() is not path.is_dir():
            kinds = [("file", "folder")[there.is_dir()] for there in (path, written)]
            raise ValueError(f"{path}: expected to replace a {kinds[1]}, got a {kinds[0]} there. Choose another name.")
        if path.is_dir():
            old = Path(scratch) / "replaced"
            os.replace(path, old)
            try:
                os.replace(written, path)
            except OSError:
                os.replace(old, path)
                raise
        else:
            os.replace(written, path)
        _sync(path.absolute().parent)


# --- private ------------------------------------------------------------------------------------------------------


def _sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

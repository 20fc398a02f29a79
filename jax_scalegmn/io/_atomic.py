"""Files and folders that are written completely or not at all."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors


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
        raise _exists(path)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write a file or folder to, which replaces `path` once the block ends and all is on the disk.

    If the block raises, `path` stays as it was. What replaces a file or folder gets its permissions. Without
    `overwrite`, one of several programs that write to one path at the same time wins, and the others get an error. What
    a killed program left is removed by the next one that writes to `path`.

    A file is replaced by one renaming, a folder by one exchange of names. Where the file system has no exchange, a
    folder is renamed twice: a program that is killed in between leaves the old folder in a hidden folder next to
    `path`, from which the next one that writes to `path` brings it back first.

    Args:
      path: Where the file or folder will be.
      overwrite: Replace a file or folder that exists.

    Yields:
      The path to write to, in a hidden folder next to `path`.

    Raises:
      FileExistsError: If `path` exists and `overwrite` is not set.
      FileNotFoundError: If the folder to put it into does not exist.
      OSError: If it cannot be written, as on a full disk; the error names `path`.
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
    if path.absolute().parent.is_dir():
        _remove_leftovers(path)
    check_free(path, overwrite=overwrite)
    with _scratch_folder(path) as scratch, _errors_that_name(path, scratch):
        written = scratch / path.name
        yield written
        if os.path.lexists(path) and overwrite:
            if _kind(written) != _kind(path):
                raise ValueError(
                    f"{path}: expected to replace a {_kind(written)}, got a {_kind(path)}. Choose another name."
                )
            _keep_permissions(path, written)
        for file in (written, *written.rglob("*")):
            _sync(file)
        if not overwrite:
            _move_where_nothing_is(written, path)
        elif path.is_dir():
            _replace_folder(path, written, scratch / _REPLACED)
        else:
            os.replace(written, path)
        _sync(path.absolute().parent)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Marks a folder as in use by this program, until the block or the program ends; `is_unused` is then False.

    Args:
      folder: The folder.

    Raises:
      FileNotFoundError: If there is no such folder.

    >>> import pathlib, tempfile
    >>> from jax_scalegmn import io
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with io.in_use(folder), io.is_unused(folder) as unused:
    ...     print(unused)
    False
    """
    with _open(folder) as descriptor:
        with contextlib.suppress(OSError):  # a file system without locks
            _lock(descriptor)
        yield


@contextlib.contextmanager
def is_unused(folder: Path) -> Iterator[bool]:
    """Whether no program uses a folder; if so, none can mark it as in use until the block ends.

    False also where that is unknown: in another user's folder, and on a file system without locks.

    Args:
      folder: The folder.

    Yields:
      Whether it is unused.

    >>> import pathlib, tempfile
    >>> from jax_scalegmn import io
    >>> with io.is_unused(pathlib.Path(tempfile.mkdtemp())) as unused:
    ...     print(unused)
    True
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            _lock(descriptor, alone=True)
            unused = True
        except OSError:
            unused = False
        yield unused
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, alone: bool = False) -> None:
    """Locks a folder until its descriptor is closed; OSError where others hold it, or where there are no locks."""
    if sys.platform == "win32":
        raise OSError("Windows has no locks of folders.")
    import fcntl  # Windows lacks it

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)


# --- private: the hidden folder -----------------------------------------------------------------------------------

_REPLACED = "replaced"
_LONGEST = 200  # bytes of a name that the hidden folder's name repeats; file systems allow 255


@contextlib.contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """A hidden folder next to `path`, in use by this program, that is removed in the end."""
    while True:
        scratch = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=_prefix(path)))
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(in_use(scratch))
            except FileNotFoundError:
                continue
            if not scratch.is_dir():
                continue  # another program took it for one that was left, before it was marked
            try:
                yield scratch
            finally:
                _remove(scratch, path)
            return


def _prefix(path: Path) -> str:
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.writing-"


def _remove_leftovers(path: Path) -> None:
    """Removes the hidden folders of programs that were killed while they wrote to `path`."""
    parent, prefix = path.absolute().parent, _prefix(path)
    for name in os.listdir(parent):
        if name.startswith(prefix):
            with is_unused(parent / name) as unused:
                if unused:
                    _remove(parent / name, path)


def _remove(scratch: Path, path: Path) -> None:
    """Removes a hidden folder; the folder that was moved into it returns to `path` if nothing else is there."""
    old = scratch / _REPLACED
    if old.is_dir() and not os.path.lexists(path):
        os.rename(old, path)
    shutil.rmtree(scratch, ignore_errors=True)


# --- private: the renaming ----------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path}: it exists already and is not replaced. Pass overwrite to replace it.")


def _move_where_nothing_is(written: Path, path: Path) -> None:
    """Moves a file or folder to a name that nothing has, which one of several programs can do."""
    try:
        if written.is_dir():
            if os.path.lexists(path):
                raise FileExistsError
            os.rename(written, path)  # fails on a folder with files and on a file
            return
        try:
            os.link(written, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            os.replace(written, path)
    except OSError as error:
        if error.errno in (None, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(path) from error
        raise


def _replace_folder(path: Path, written: Path, old: Path) -> None:
    """Moves `written` to `path`, and the folder there into the hidden folder, from which it returns on a failure."""
    if _exchange(written, path):
        return
    try:
        os.replace(path, old)
        os.replace(written, path)
    except BaseException:  # an interrupt too
        if old.is_dir() and not os.path.lexists(path):
            os.replace(old, path)
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges the names of two folders in one step; False where the system cannot."""
    call = _renameat2()
    at_here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return call is not None and call(at_here, os.fsencode(a), at_here, os.fsencode(b), exchange) == 0


@functools.cache
def _renameat2() -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call


# --- private: permissions, errors, the disk -----------------------------------------------------------------------


def _keep_permissions(path: Path, written: Path) -> None:
    """Gives a file the permissions of the one that it replaces.

    In a folder every file has those of the file of its name or, where there was none, what all others allowed.
    """
    replaced = {old.relative_to(path): old.stat() for old in (path, *path.rglob("*")) if old.exists()}
    for new in (written, *written.rglob("*")):
        alike = [status for status in replaced.values() if stat.S_ISDIR(status.st_mode) == new.is_dir()]
        status = replaced.get(new.relative_to(written))
        known = status is not None and stat.S_ISDIR(status.st_mode) == new.is_dir()
        if alike:
            _set_permissions(new, [status] if known and status is not None else alike)


def _set_permissions(path: Path, allowed: list[os.stat_result]) -> None:
    mode = functools.reduce(lambda all_modes, status: all_modes & status.st_mode, allowed, 0o777)
    own, (uid, gid) = path.stat(), (allowed[0].st_uid, allowed[0].st_gid)
    if (own.st_uid, own.st_gid) != (uid, gid):
        for owner in (uid, -1):  # only root may give a file away
            with contextlib.suppress(OSError):
                os.chown(path, owner, gid)
                break
    if path.stat().st_gid != gid:
        mode &= ~stat.S_IRWXG  # it was another group that might read it
    path.chmod(mode)


@contextlib.contextmanager
def _errors_that_name(path: Path, scratch: Path) -> Iterator[None]:
    """Errors of writing name the file or folder that is written, not one in the hidden folder."""
    try:
        yield
    except safetensors.SafetensorError as error:  # as on a full disk
        raise OSError(f"{path}: {error}") from error
    except OSError as error:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if names and not any(name.startswith(str(scratch)) for name in names):
            raise
        if error.errno is None:
            raise error if str(path) in str(error) else OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


def _sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    with _open(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

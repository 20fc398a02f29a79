"""Files opened and read within limits: regular ones only, and no more bytes than they declare."""

import ast
import contextlib
import io
import mmap
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jax_scalegmn._bounded import _limits

Stream: TypeAlias = Any  # what has read(size), and in part readline, tell and readinto
_CHUNK = 2**20
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file for reading bytes; through links, too. It never waits for a pipe.

    Raises:
      OSError: If there is no such file, or it cannot be opened.
      ValueError: If it is a folder, pipe, socket or device.
    """
    _check_regular(path, os.stat(path).st_mode)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)  # it may have been replaced meanwhile
    except ValueError:
        file.close()
        raise
    return file


def read_bytes(path: str | os.PathLike[str], option: str) -> bytes:
    """The content of a regular file that is not larger than a limit.

    Raises:
      OSError, ValueError: As `open_regular`, and if it is larger.
    """
    with open_regular(path) as file:
        limit = getattr(_limits.use(), option)
        content = file.read(limit + 1)
        _limits.check(option, max(len(content), os.fstat(file.fileno()).st_size), "its size, in bytes,")
        return content


def check_folder(folder: Path) -> int:
    """The number of bytes in a folder of regular files and folders.

    Raises:
      ValueError: If it holds a pipe, a socket or a device, links to such, or more entries than the limit of items.
    """
    size = count = 0
    waiting = [folder]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            count += 1
            _limits.check("items", count, f"{folder}: the number of its files")
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif not entry.is_dir():
                status = os.stat(entry.path)
                _check_regular(entry.path, status.st_mode)
                size += status.st_size
    return size


def read_into(stream: Stream, target: Any, what: str) -> None:
    """Fills a buffer of bytes from a stream, piece by piece, so that no second copy of all is made.

    Raises:
      ValueError: If the stream ends before.
    """
    view = memoryview(target).cast("B")
    readinto = getattr(stream, "readinto", None)
    done = 0
    while done < len(view):
        if isinstance(stream, io.BufferedReader) and readinto is not None:
            count = readinto(view[done:])
        else:
            piece = stream.read(min(_CHUNK, len(view) - done))
            count = len(piece)
            view[done : done + count] = piece
        if not count:
            raise ValueError(f"{what} ends after {done} of {len(view)} bytes: the file is truncated")
        done += count


def memory(nbytes: int) -> memoryview:
    """Writable bytes for an array to be read into.

    Large ones are not those of numpy.empty, which asks for huge pages: where the system has none at hand, it takes
    several times as long to make them as to read the file.
    """
    if nbytes < 2**22 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return memoryview(bytearray(nbytes))
    whole = mmap.mmap(-1, nbytes + 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(whole)[16:]  # as aligned as malloc's: JAX would share a whole page instead of copying it


class Counted:
    """A stream that refuses to read more bytes than it may, whatever a file asks for.

    Args:
      stream: The stream.
      limit: The bytes that may be read from it in all.
      option: The limit's name, for the error.
      what: What is read, for the error.
    """

    def __init__(self, stream: Stream, limit: int, option: str, what: str) -> None:
        self._stream, self._left, self._limit = stream, limit, limit
        self._option, self._what = option, what

    def read(self, size: int = -1) -> bytes:
        """Reads as a stream does; a negative size is refused where more is left than may be read."""
        if size < 0 or size > self._left:
            content = self._stream.read(self._left + 1)
        else:
            content = self._stream.read(size) if size < _CHUNK else self._in_pieces(size)
        return self._counted(content)

    def readline(self) -> bytes:
        """Reads a line."""
        return self._counted(self._stream.readline(self._left + 1))

    def tell(self) -> int:
        """Where the stream is."""
        return self._stream.tell()

    def seek(self, place: int, whence: int = 0) -> int:
        """Moves the stream, forward alone; what is passed over counts as read."""
        if whence or place < self.tell():
            raise ValueError(f"{self._what} goes back in itself")
        while place > self.tell():
            if not self.read(min(_CHUNK, place - self.tell())):
                break
        return self.tell()

    def _in_pieces(self, size: int) -> bytes:
        """A large declared size is not reserved before its bytes are there."""
        pieces: list[bytes] = []
        while size and (piece := self._stream.read(min(size, _CHUNK))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _counted(self, content: bytes) -> bytes:
        self._left -= len(content)
        if self._left < 0:
            found, what = self._limit - self._left, f"the size of {self._what}, in bytes,"
            _limits.check(self._option, found, what, limit=self._limit, is_all=False)
        return content


@contextlib.contextmanager
def unzipped(archive: zipfile.ZipFile, name: str) -> Iterator[Stream]:
    """Opens a member of a zip archive that is stored or deflated: for these zipfile reads no more than is declared.

    Raises:
      ValueError: If it is compressed by another method.
    """
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"its member {name[:100]!r} is compressed by method {member.compress_type}; expected stored or deflated"
        )
    with archive.open(member) as stream:
        yield stream


class Header(NamedTuple):
    """What the header of an .npy file declares, and where its numbers begin."""

    shape: tuple[int, ...]
    fortran: bool
    descr: Any
    begin: int


def npy_header(stream: Stream) -> Header:
    """Reads the header of an .npy file (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).

    Raises:
      ValueError: If it is damaged, or longer than NumPy's are.
    """
    start = stream.read(12)
    if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError(f"got {start[:8]!r} at its start; expected an array of NumPy")
    length, begin = (
        (struct.unpack("<H", start[8:10])[0], 10) if start[6] == 1 else (struct.unpack("<I", start[8:])[0], 12)
    )
    if not 10 <= length <= _MAX_NPY_HEADER:
        raise ValueError(f"its header has {length} bytes; expected 10 to {_MAX_NPY_HEADER}")
    text = start[begin:] + stream.read(max(0, length - (len(start) - begin)))
    fields = _literal(text.decode("utf-8" if start[6] == 3 else "latin1"))
    if len(text) < length or not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError(f"its header is {_limits.short(text)}; expected descr, fortran_order and shape")
    shape, fortran = fields["shape"], fields["fortran_order"]
    sound = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**62 for n in shape) and len(shape) <= 32
    if not sound or type(fortran) is not bool:
        raise ValueError(f"its shape is {_limits.short(shape)}; expected sizes >= 0")
    return Header(shape, fortran, fields["descr"], begin + length)


# --- private ------------------------------------------------------------------------------------------------------

_MAX_NPY_HEADER = 10_000  # NumPy's own limit


def _check_regular(path: Any, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS.items() if test(mode)), "something else")
        raise ValueError(f"{path}: expected a regular file, got {kind}. Pass the name of a file.")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(re.sub(r"(\d)L\b", r"\1", text.strip()))  # Python 2 wrote 3L
    except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f"its header is {_limits.short(text)}; expected a dict of Python") from error

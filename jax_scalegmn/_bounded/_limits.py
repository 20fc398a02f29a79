"""How much a file may ask for. The limits are the same for all readers, and a `with` block changes them."""

import contextlib
import contextvars
import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a file may ask for before it is refused. `io.limits` changes them, and errors name the one to change.

    They are far above what networks need, and low enough that no file exhausts the memory or runs for minutes.

    Attributes:
      tensor_bytes: Bytes of tensors that any file may hold, however small it is.
      expansion: Bytes of tensors or text for each byte of the file, where that is more: files are compressed.
      metadata_bytes: Bytes of a pickle, a header, a JSON text, or a line of a table.
      opcodes: Steps of a pickle, or values in a msgpack file.
      nesting: Levels of lists and dicts within each other.
      layers: Layers of a description of a network.
      items: Entries of a list in a description, files in a folder, dicts in a msgpack file, columns of a table, tensors
        of pickled modules.

    >>> from jax_scalegmn import io
    >>> io.Limits().nesting
    64
    """

    tensor_bytes: int = 2**28
    expansion: int = 64
    metadata_bytes: int = 2**24
    opcodes: int = 2_000_000
    nesting: int = 64
    layers: int = 2_000
    items: int = 100_000


_current: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits", default=Limits())  # noqa: B039 (frozen)


def use() -> Limits:
    """The limits that hold here."""
    return _current.get()


@contextlib.contextmanager
def limits(**changes: int) -> Iterator[Limits]:
    """Changes the limits of all readers until the block ends, in this thread.

    Args:
      **changes: Fields of `Limits` with their new values, whole numbers >= 1.

    Yields:
      The limits that hold in the block; those that are not named stay as they are outside.

    Raises:
      ValueError: On another name, or a value that is no whole number >= 1.

    >>> from jax_scalegmn import io
    >>> with io.limits(metadata_bytes=2**30) as changed:
    ...     print(changed.metadata_bytes, changed.nesting)
    1073741824 64
    """
    names = [field.name for field in dataclasses.fields(Limits)]
    for name, value in changes.items():
        if name not in names or type(value) is not int or value < 1:
            raise ValueError(
                f"limits got {name}={short(value)}; expected whole numbers >= 1 for some of {', '.join(names)}."
            )
    token = _current.set(dataclasses.replace(use(), **changes))
    try:
        yield use()
    finally:
        _current.reset(token)


def check(option: str, found: int, what: str, *, limit: int | None = None, is_all: bool = True) -> None:
    """Refuses what is larger than a limit.

    Args:
      option: The field of `Limits`.
      found: The size.
      what: What has this size, a phrase that is followed by its number: "its pickle, in bytes,".
      limit: The limit where it depends on the file; None for the field itself.
      is_all: Whether there may be no more than was found.

    Raises:
      ValueError: If it is larger; the message names the option.
    """
    limit = getattr(use(), option) if limit is None else limit
    if found > limit:
        size, enough = (short(found), found) if is_all else (f"{short(found)} or more", 2 * found)
        raise ValueError(
            f"{what} is {size}; expected at most {limit}. If you trust the file, raise the limit: "
            f"`with jax_scalegmn.io.limits({option}={short(enough)}):`, or --limits {option}={short(enough)}"
        )


def room(option: str, size: int) -> int:
    """How many bytes a file of `size` bytes may become: those of the option, or `expansion` times its size."""
    limit: int = getattr(use(), option)
    return max(limit, use().expansion * size)


class _Repr(reprlib.Repr):
    """Texts of values of any size and nesting, in bounded time."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 300 else f"<a number of {x.bit_length()} bits>"


_repr = _Repr()


def short(value: Any, length: int = 200) -> str:
    """The text of a value for an error, in at most `length` letters, however large the value is."""
    text = _repr.repr(value)
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def one_line(error: BaseException, length: int = 1000) -> str:
    """An error's message in one line of at most `length` letters; its class too if it is no ValueError or OSError."""
    text = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    text = " ".join(text[: 4 * length].split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."

"""Pickles read as plain data: nothing that they name is imported or called."""

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any


def load(
    pickled: bytes,
    find: Callable[[str, str], Any],
    *,
    persistent: Callable[[Any], Any] | None = None,
    encoding: str = "utf-8",
) -> Any:
    """Reads a pickle of built-in containers, numbers, texts and what `find` returns.

    Args:
      pickled: The pickle.
      find: (module, name) -> what to use for the object of that name; it raises to refuse one. A pickle may change and
        call what it gets: return strings and functions made on the spot, never the library's own objects.
      persistent: Reads the references to data outside of the pickle; None to refuse them.
      encoding: The encoding of the byte strings that Python 2 wrote.

    Raises:
      ValueError: If the pickle refers to more objects than it can hold, or `find` refuses one.
      Exception: Whatever pickle raises on damaged files.
    """
    slots = [int(arg or 0) for code, arg, _ in pickletools.genops(pickled) if code.name in ("PUT", "LONG_BINPUT")]
    if max(slots, default=0) > len(pickled):  # the unpickler would reserve gigabytes for them
        raise ValueError(f"its pickle has {len(pickled)} bytes, but refers to the {max(slots)}th of its objects")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return find(module, name)

        def persistent_load(self, pid: Any) -> Any:
            if persistent is None:
                raise ValueError("its pickle refers to data outside of it")
            return persistent(pid)

    return Unpickler(io.BytesIO(pickled), encoding=encoding).load()

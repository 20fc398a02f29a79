"""What all readers share: limits, and files, JSON and fields that are checked by them. Standard library alone."""

from jax_scalegmn._bounded._fields import decode
from jax_scalegmn._bounded._files import (
    Counted,
    check_folder,
    memory,
    npy_header,
    open_regular,
    read_bytes,
    read_into,
    unzipped,
)
from jax_scalegmn._bounded._json import check_nesting, read_json
from jax_scalegmn._bounded._limits import Limits, check, limits, one_line, room, short, use

__all__ = [
    "Counted",
    "Limits",
    "check",
    "check_folder",
    "check_nesting",
    "decode",
    "limits",
    "memory",
    "npy_header",
    "one_line",
    "open_regular",
    "read_bytes",
    "read_into",
    "read_json",
    "room",
    "short",
    "unzipped",
    "use",
]

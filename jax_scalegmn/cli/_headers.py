"""Refuses networks that cannot be of one architecture by the headers of their files alone, without JAX."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LONGEST = 100_000_000  # bytes of a header of .safetensors, which the format allows


def check(paths: Sequence[Path], *, by_name: bool) -> None:
    """Compares the tensors that the headers of .safetensors and .npz files name.

    Args:
      paths: The files; other formats, and files that cannot be read, are left to what reads them.
      by_name: Whether all networks must have the same names, as a function of the user's own reads them.

    Raises:
      ValueError: As `compare`.
    """
    known = [(path, _shapes(path)) for path in paths]
    known = [(path, shapes) for path, shapes in known if shapes]
    for path, shapes in known[1:]:
        compare(known[0][0], known[0][1] or {}, path, shapes or {}, by_name=by_name)


def compare(
    first: Path, expected: Mapping[str, Sequence[int]], path: Path, got: Mapping[str, Sequence[int]], *, by_name: bool
) -> None:
    """Compares the shapes of two networks' tensors, given by name.

    Raises:
      ValueError: If a tensor of one name has two shapes; with `by_name` also if a name is missing or additional.
    """
    for name in expected.keys() & got.keys():
        a, b = tuple(expected[name]), tuple(got[name])
        if a != b and (np.prod(a), np.prod(b)) != (1, 1):
            raise ValueError(
                f"{path}: {name!r} has shape {b}, and {a} in {first}; expected networks of one architecture. Pass two "
                "that are trained alike."
            )
    if by_name and expected.keys() != got.keys():
        missing, additional = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
        raise ValueError(
            f"{path}: missing are {missing[:3]}, additional {additional[:3]} next to {first}; --module gets tensors "
            "by their names, which have to be the same in all networks. Rename them."
        )


# --- private ------------------------------------------------------------------------------------------------------


def _shapes(path: Path) -> dict[str, Sequence[int]] | None:
    """The shapes of a file's tensors by name; None if its header does not tell."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] == b"PK\x03\x04":
                return _npz_shapes(path)
            length = int.from_bytes(start, "little")
            header: dict[str, Any] = json.loads(file.read(length)) if 2 <= length <= _LONGEST else {}
            return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"} or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        return None


def _npz_shapes(path: Path) -> dict[str, Sequence[int]] | None:
    shapes: dict[str, Sequence[int]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not name.endswith(".npy"):
                return None
            with archive.open(name) as entry:
                version = np.lib.format.read_magic(entry)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shapes[name.removesuffix(".npy")] = read(entry)[0]
    return shapes

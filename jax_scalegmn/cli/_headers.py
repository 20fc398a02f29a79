"""Refuses networks that cannot be of one architecture by the headers of their files alone, without JAX."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_scalegmn import _bounded


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
        if a != b and (math.prod(a), math.prod(b)) != (1, 1):
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
        with _bounded.open_regular(path) as file:
            start = file.read(8)
            if start[:4] == b"PK\x03\x04":
                return _npz_shapes(file)
            length = int.from_bytes(start, "little")
            if not 2 <= length <= _bounded.use().metadata_bytes:
                return None
            header: dict[str, Any] = _bounded.read_json(file.read(length))
            shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
            sizes = [size for shape in shapes.values() for size in (shape if isinstance(shape, list) else [None])]
            return shapes if all(type(size) is int and 0 <= size < 2**62 for size in sizes) else None
    except Exception:  # a damaged file can fail anywhere in zipfile and zlib; what reads it says so
        return None


def _npz_shapes(file: Any) -> dict[str, Sequence[int]] | None:
    shapes: dict[str, Sequence[int]] = {}
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if not name.endswith(".npy"):
                return None
            with _bounded.unzipped(archive, name) as entry:
                shapes[name.removesuffix(".npy")] = _bounded.npy_header(entry).shape
    return shapes

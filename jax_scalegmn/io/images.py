"""Labeled gray images, from scikit-learn or from files on the disk. Nothing is downloaded."""

import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jax_scalegmn import _bounded
from jax_scalegmn.io import _cifar, _npz

__all__ = ["Images", "digits", "load"]

# The arrays of a data set, with the IDX file that holds each and the number of its axes.
_ARRAYS = {
    "x_train": ("train-images", 3),
    "y_train": ("train-labels", 1),
    "x_test": ("t10k-images", 3),
    "y_test": ("t10k-labels", 1),
}


class Images(NamedTuple):
    """Labeled gray images.

    Attributes:
      images: The pixels in [0, 1], float32 [images, height, width].
      labels: The class of each image, int32 [images].

    >>> import numpy as np
    >>> from jax_scalegmn.io import images
    >>> images.Images(np.zeros((5, 8, 8), "float32"), np.arange(5, dtype="int32")).images.shape
    (5, 8, 8)
    """

    images: Float[np.ndarray, "images height width"]
    labels: Int[np.ndarray, " images"]


def digits() -> Images:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998, UCI).

    Raises:
      ImportError: If scikit-learn is not installed.

    >>> from jax_scalegmn.io import images
    >>> images.digits().images.shape
    (1797, 8, 8)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('images.digits needs scikit-learn: pip install "jax-scalegmn[experiments]"') from error
    pixels, labels = load_digits(return_X_y=True)
    return Images((pixels.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int32))


def load(path: str | os.PathLike[str]) -> tuple[Images, Images]:
    """Reads the official train and test parts of a data set as gray images, each part in its official order.

    Pixels 0..255 are scaled to [0, 1]. The gray of a color image is the mean of its three channels (as in arXiv
    2511.12601).

    Args:
      path: One of
        - an npz file with x_train and x_test, uint8 [images, height, width], and y_train and y_test, integers [images];
        - a folder with the four IDX files of MNIST or Fashion-MNIST (train-images-idx3-ubyte, ..., or
          train-images.idx3-ubyte, ...), plain or gzipped; if both exist, the plain file is read;
        - CIFAR-10: cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or a folder with either unpacked.

    Returns:
      The train and the test images.

    Raises:
      FileNotFoundError: If there is no such file, or the folder lacks one.
      ValueError: If a file is truncated, foreign or of another shape or dtype.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from jax_scalegmn.io import images
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "images.npz"
    >>> x, y = np.full((3, 8, 8), 255, "uint8"), np.arange(3)
    >>> np.savez(path, x_train=x, y_train=y, x_test=x[:1], y_test=y[:1])
    >>> train, test = images.load(path)
    >>> train.images.shape, test.images.shape, float(train.images.max())
    ((3, 8, 8), (1, 8, 8), 1.0)
    """
    path = Path(path)
    if path.exists() and _cifar.holds_cifar(path):  # refuses devices and pipes
        colors = _cifar.read(path)
        return _gray(colors, "train"), _gray(colors, "test")
    if path.is_dir():
        arrays = {name: _read_idx(_find_idx(path, stem, axes), axes) for name, (stem, axes) in _ARRAYS.items()}
    elif path.is_file():
        arrays = _read_npz(path)
    else:
        raise FileNotFoundError(
            f"{path}: nothing there. Expected an npz file with {', '.join(_ARRAYS)}, a folder with the IDX files of "
            "MNIST or Fashion-MNIST, or an archive of CIFAR-10."
        )
    return _images(path, arrays, "train"), _images(path, arrays, "test")


# --- private ------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with _bounded.open_regular(path) as file:
        try:
            arrays = _npz.read(file, os.fstat(file.fileno()).st_size, names=_ARRAYS)
        except Exception as error:  # a damaged archive can fail anywhere in zipfile, zlib or NumPy
            raise ValueError(
                f"{path}: expected an npz file of plain arrays, got one that cannot be read "
                f"({_bounded.one_line(error)}). It is truncated, foreign, or holds pickled objects: get it again, or "
                "save it with numpy.savez from uint8 arrays."
            ) from error
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"{path}: expected the arrays {list(_ARRAYS)}, missing are {missing}. Add or rename them.")
    return arrays


def _find_idx(folder: Path, stem: str, axes: int) -> Path:
    names = [f"{stem}{dot}idx{axes}-ubyte{suffix}" for suffix in ("", ".gz") for dot in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: expected one of the files {names}. Put all four IDX files into the folder.")


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes: its magic number, its sizes (big-endian), its entries."""
    with _bounded.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if path.suffix != ".gz":
            return _idx_entries(path, file, size, axes)
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                return _idx_entries(path, stream, size, axes)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path}: expected a gzip file, got one that cannot be read ({_bounded.one_line(error)}). It is "
                "truncated or foreign: get it again."
            ) from error


def _idx_entries(path: Path, stream: Any, size: int, axes: int) -> np.ndarray:
    magic, start = bytes((0, 0, 8, axes)), 4 + 4 * axes
    head = stream.read(start)
    if head[:4] != magic or len(head) < start:
        raise ValueError(
            f"{path}: expected the magic number 0x{magic.hex()} (unsigned bytes, {axes} axes) and {axes} sizes, got "
            f"0x{head[:4].hex()} and {len(head)} bytes in all. It is truncated or another file: get it again."
        )
    shape = struct.unpack(f">{axes}I", head[4:])
    count = math.prod(shape)
    _bounded.check(
        "tensor_bytes", count, f"{path}: the size of its images, in bytes,", limit=_bounded.room("tensor_bytes", size)
    )
    try:
        if isinstance(stream, io.BufferedReader) and size - start != count:  # not compressed
            raise ValueError(f"got {size - start}")
        entries = np.frombuffer(_bounded.memory(count), np.uint8)
        _bounded.read_into(stream, entries, "it")
        if stream.read(1):
            raise ValueError("got more")
    except ValueError as error:
        raise ValueError(
            f"{path}: expected {count} entries for shape {shape}; {error}. It is truncated or foreign: get it again."
        ) from error
    return entries.reshape(shape)


def _gray(colors: Mapping[str, np.ndarray], part: str) -> Images:
    return Images(colors[f"x_{part}"].mean(1, dtype=np.float32) / 255, colors[f"y_{part}"])


def _images(path: Path, arrays: Mapping[str, np.ndarray], part: str) -> Images:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if x.dtype != np.uint8 or x.ndim != 3 or x.size == 0:
        raise ValueError(
            f"{path}: x_{part} is {x.dtype} {x.shape}, expected uint8 [images, height, width] and at least one pixel. "
            "Convert colors to gray, and [0, 1] to 0..255."
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ValueError(
            f"{path}: y_{part} is {y.dtype} {y.shape}, expected integers {x.shape[:1]}, one for each image of "
            f"x_{part}. The files belong to different sets, or the labels are one-hot: use their argmax."
        )
    return Images(np.divide(x, 255, dtype=np.float32), y.astype(np.int32))

"""Images come in their official order, scaled to [0, 1]; a damaged or foreign file is named and refused."""

import gzip
import os
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jax_scalegmn import io
from jax_scalegmn.io import images

STEMS = {"x_train": "train-images", "y_train": "train-labels", "x_test": "t10k-images", "y_test": "t10k-labels"}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = {f"x_{part}": rng.integers(0, 256, (n, 4, 3), np.uint8) for part, n in (("train", 5), ("test", 2))}
    labels = {f"y_{part}": rng.integers(0, 10, n).astype(np.uint8) for part, n in (("train", 5), ("test", 2))}
    return pixels | labels


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, values: dict[str, np.ndarray], *, dot: str = "-", gzipped: bool = False) -> None:
    for name, array in values.items():
        path = folder / f"{STEMS[name]}{dot}idx{array.ndim}-ubyte{'.gz' if gzipped else ''}"
        path.write_bytes(gzip.compress(idx(array)) if gzipped else idx(array))


def assert_loaded(path: Path, values: dict[str, np.ndarray]) -> None:
    for part, loaded in zip(("train", "test"), images.load(path), strict=True):
        assert loaded.images.dtype == np.float32
        assert loaded.labels.dtype == np.int32
        np.testing.assert_array_equal(loaded.images, values[f"x_{part}"].astype(np.float32) / 255)
        np.testing.assert_array_equal(loaded.labels, values[f"y_{part}"])


def test_digits_are_1797_images_in_0_1():
    pictures, labels = images.digits()
    assert pictures.shape == (1797, 8, 8)
    assert pictures.dtype == np.float32
    assert (pictures.min(), pictures.max()) == (0, 1)
    assert labels.dtype == np.int32
    assert set(labels) == set(range(10))


def test_digits_name_the_extra_that_installs_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "jax-scalegmn\[experiments\]"'):
        images.digits()


def test_npz_comes_in_its_parts_and_order(tmp_path):
    np.savez(tmp_path / "images.npz", **arrays())
    assert_loaded(tmp_path / "images.npz", arrays())


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("gzipped", [False, True])
def test_idx_folders_hold_the_same_as_npz(tmp_path, dot, gzipped):
    write_idx(tmp_path, arrays(), dot=dot, gzipped=gzipped)
    assert_loaded(tmp_path, arrays())


def test_the_plain_file_wins_over_its_gzipped_copy(tmp_path):
    write_idx(tmp_path, {name: 255 - array for name, array in arrays().items()}, gzipped=True)
    write_idx(tmp_path, arrays())
    assert_loaded(tmp_path, arrays())


def test_black_is_0_and_white_is_1(tmp_path):
    np.savez(tmp_path / "images.npz", **arrays() | {"x_test": np.array([[[0]], [[255]]], np.uint8)})
    np.testing.assert_array_equal(images.load(tmp_path / "images.npz")[1].images.reshape(-1), [0, 1])


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: nothing there. Expected an npz"):
        images.load(tmp_path / "nowhere")
    write_idx(tmp_path, {name: array for name, array in arrays().items() if name != "y_test"})
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        images.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((5, 4, 3), np.float32)}, "x_train is float32.*expected uint8"),
        ({"x_train": np.zeros((5, 4, 3, 3), np.uint8)}, r"x_train is uint8 \(5, 4, 3, 3\)"),
        ({"x_test": np.zeros((0, 4, 3), np.uint8), "y_test": np.zeros(0, np.uint8)}, "at least one pixel"),
        ({"y_train": np.zeros(4, np.uint8)}, r"y_train is uint8 \(4,\), expected integers \(5,\)"),
        ({"y_test": np.zeros((2, 10), np.uint8)}, r"y_test is uint8 \(2, 10\).*argmax"),
        ({"y_test": np.zeros(2, np.float32)}, "y_test is float32"),
        ({"y_test": np.array([0, None], object)}, "pickled objects"),
    ],
)
def test_npz_of_other_arrays_is_refused(tmp_path, changes, message):
    np.savez(tmp_path / "images.npz", **arrays() | changes)
    with pytest.raises(ValueError, match=message) as caught:
        images.load(tmp_path / "images.npz")
    assert "images.npz" in str(caught.value)


def test_npz_without_an_array_is_refused(tmp_path):
    np.savez(tmp_path / "images.npz", **{name: array for name, array in arrays().items() if name != "y_test"})
    with pytest.raises(ValueError, match=r"expected the arrays .* missing are \['y_test'\]"):
        images.load(tmp_path / "images.npz")


def flipped(content: bytes) -> bytes:
    """The bytes with one of them changed, in the middle of the first array."""
    return content[:200] + bytes([content[200] ^ 255]) + content[201:]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-30], lambda c: c[:100], lambda c: b"", lambda c: b"hello", flipped],
    ids=["without its end", "only its beginning", "empty", "text", "one byte changed"],
)
def test_damaged_npz_is_refused(tmp_path, damage):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"images\.npz: expected an npz file"):
        images.load(path)


def test_sizes_are_held_against_the_limits_before_anything_is_unpacked(tmp_path):
    write_idx(tmp_path, arrays(), gzipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 2**16, 2**8, 2**8) + bytes(2**20)))
    with pytest.raises(ValueError, match=r"train-images.*in bytes, is 4294967296; .*limits\(tensor_bytes=4294967296\)"):
        images.load(tmp_path)
    np.savez_compressed(tmp_path / "x.npz", **arrays() | {"x_train": np.zeros(2**20, np.uint8)})
    with io.limits(tensor_bytes=2**18), pytest.raises(ValueError, match=r"x\.npz.*limits\(tensor_bytes=\d+\)"):
        images.load(tmp_path / "x.npz")


def test_special_files_are_refused(tmp_path):
    os.symlink("/dev/zero", tmp_path / "zero.npz")
    os.mkfifo(tmp_path / "pipe")
    for name in ("zero.npz", "pipe"):
        with pytest.raises(ValueError, match=rf"{name}: expected a regular file"):
            images.load(tmp_path / name)


def test_an_end_of_zip_without_a_zip_is_refused(tmp_path):
    content = bytes(64) + b"PK\6\7" + bytes(12) + b"\2\0\0\0PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2)
    (tmp_path / "z.npz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "q.npz", "w") as archive:
        for name in arrays():
            archive.writestr(f"{name}.npy", b"hi")
    for name in ("z.npz", "q.npz"):
        with pytest.raises(ValueError, match=rf"{name}: expected an npz file"):
            images.load(tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], "expected 60 entries for shape .* (got 59|ends after 59 of 60)"),
        (lambda c: c + b"\0", "got (61|more)"),
        (lambda c: c[:10], "expected the magic number 0x00000803.*10 bytes"),
        (lambda c: b"", "expected the magic number"),
        (lambda c: b"\0\0\x08\x01" + c[4:], "got 0x00000801"),
        (lambda c: b"\0\0\x0d\x03" + c[4:], "got 0x00000d03"),
    ],
    ids=["one byte less", "one byte more", "only its beginning", "empty", "labels", "floats"],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_damaged_idx_is_refused(tmp_path, damage, message, gzipped):
    write_idx(tmp_path, arrays(), gzipped=gzipped)
    content = damage(idx(arrays()["x_train"]))
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if gzipped else ''}"
    path.write_bytes(gzip.compress(content) if gzipped else content)
    with pytest.raises(ValueError, match=message) as caught:
        images.load(tmp_path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-9], lambda c: c[: len(c) // 2], lambda c: b"hello", lambda c: c[:-8] + b"abcd" + c[-4:]],
    ids=["without its end", "half", "text", "wrong checksum"],
)
def test_damaged_gzip_is_refused(tmp_path, damage):
    write_idx(tmp_path, arrays(), gzipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz: expected a gzip file"):
        images.load(tmp_path)


def test_labels_of_another_set_are_refused(tmp_path):
    write_idx(tmp_path, arrays() | {"y_train": np.zeros(6, np.uint8)})
    with pytest.raises(ValueError, match=r"expected integers \(5,\), one for each image"):
        images.load(tmp_path)

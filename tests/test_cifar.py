"""CIFAR-10 is read from its authors' archives, unpacked or not; damaged and hostile files are refused."""

import contextlib
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jax_scalegmn.io import _cifar, images, limits

NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def batch(number: int) -> tuple[np.ndarray, list[int]]:
    """Three images as the files hold them, [3, 3072], and their labels."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (3, 3072), np.uint8), rng.integers(0, 10, 3).tolist()


def by_python_2(pixels: np.ndarray, labels: list[int], *, fortran: bool = False) -> bytes:
    """The pickle that Python 2 and NumPy 1 write, protocol 2, code by code: texts are byte strings."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R" + b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = b"".join(b"M" + struct.pack("<H", n) for n in pixels.shape) + b"\x86"
    content = pixels.tobytes("F" if fortran else "C")
    array += b"(K\x01" + shape + dtype + (b"\x88" if fortran else b"\x89") + text(content) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = text(b"batch_label") + text(b"a batch") + text(b"labels") + numbers + text(b"data") + array
    return b"\x80\x02}(" + entries + text(b"filenames") + b"](" + text(b"a.png") + b"eu."


def by_python_3(protocol: int) -> Callable[..., bytes]:
    return lambda pixels, labels: pickle.dumps({b"data": pixels, b"labels": labels}, protocol)


def binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()


def write(folder: Path, encode: Callable[..., bytes] = by_python_2, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        (folder / f"{name}{suffix}").write_bytes(encode(*batch(number)))
    (folder / "batches.meta").write_bytes(b"anything")
    return folder


def pack(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def assert_read(path: Path) -> None:
    arrays = _cifar.read(path)
    pixels, labels = (np.concatenate(rows) for rows in zip(*map(batch, range(5)), strict=True))
    np.testing.assert_array_equal(arrays["x_train"], pixels.reshape(15, 3, 32, 32))
    np.testing.assert_array_equal(arrays["y_train"], labels)
    np.testing.assert_array_equal(arrays["x_test"].reshape(3, 3072), batch(5)[0])
    np.testing.assert_array_equal(arrays["y_test"], batch(5)[1])


@pytest.mark.parametrize(
    ("encode", "suffix", "name"),
    [
        (by_python_2, "", "cifar-10-batches-py"),
        (lambda pixels, labels: by_python_2(pixels, labels, fortran=True), "", "cifar-10-batches-py"),
        (by_python_3(2), "", "cifar-10-batches-py"),
        (by_python_3(4), "", "cifar-10-batches-py"),
        (binary, ".bin", "cifar-10-batches-bin"),
    ],
    ids=["Python 2", "Python 2, by columns", "protocol 2", "protocol 4", "binary"],
)
def test_archives_and_folders_hold_the_same(tmp_path, encode, suffix, name):
    folder = write(tmp_path / name, encode, suffix)
    assert_read(folder)
    assert_read(tmp_path)
    assert_read(pack(folder, tmp_path / "cifar.tar.gz"))


def test_the_written_pickle_is_what_numpy_reads():
    pixels, labels = batch(0)
    content = pickle.loads(by_python_2(pixels, labels), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], pixels)
    assert content[b"labels"] == labels


def test_gray_is_the_mean_of_the_channels(tmp_path):
    train, test = images.load(pack(write(tmp_path / "cifar-10-batches-py"), tmp_path / "cifar.tar.gz"))
    assert train.images.dtype == np.float32
    assert train.labels.dtype == np.int32
    assert train.images.shape == (15, 32, 32)
    expected = batch(5)[0].reshape(3, 3, 1024).astype(float).mean(1).reshape(3, 32, 32) / 255
    np.testing.assert_allclose(test.images, expected, atol=1e-6)


def test_files_that_are_missing_are_named(tmp_path):
    (write(tmp_path) / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing are \['data_batch_3'\]"):
        images.load(tmp_path)


def test_an_archive_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "notes.txt", "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"x\.tar: expected the files \['data_batch_1'"):
        images.load(tmp_path / "x.tar")


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_archives_are_refused(tmp_path, kept):
    path = pack(write(tmp_path / "cifar-10-batches-py"), tmp_path / "cifar.tar.gz")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz: expected an archive .* truncated"):
        images.load(path)


def in_place_of(pixels: object, labels: object) -> bytes:
    return pickle.dumps({"data": pixels, "labels": labels})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (by_python_2(*batch(2))[:-900], "truncated or foreign"),
        (b"", "truncated or foreign"),
        (pickle.dumps([1, 2]), "holds a list, not a dict"),
        (pickle.dumps({"data": 1}), r"holds \['data'\], expected an array under 'data'"),
        (in_place_of(batch(2)[0][:, :-1], batch(2)[1]), r"shape \(3, 3071\), expected \(3, 3072\)"),
        (in_place_of(batch(2)[0], [1, 2]), r"shape \(3, 3072\), expected \(2, 3072\) for 2 labels"),
        (in_place_of(batch(2)[0].astype(np.float32), [1, 2, 3]), "not an array of unsigned bytes"),
        (in_place_of(batch(2)[0], [1, 2, "cat"]), "its labels are not integers"),
        (in_place_of(batch(2)[0], [1, 2, 10]), r"labels \[ 1  2 10\]; expected labels 0..9"),
        (b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.", "holds a Object, not a dict"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "holds a list, not a dict"),
        (b"\x80\x02}(t" + b"2\x86" * 60 + b"K\x01s.", "expected an array under 'data'"),  # 2**60 values in a key
        (b"\x80\x02X\x01\x00\x00\x00xQ.", "refers to data outside of it"),
    ],
)
def test_damaged_and_hostile_pickles_are_refused(tmp_path, content, message):
    (write(tmp_path) / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_3: .*{message}"):
        images.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (binary(*batch(2))[:-1], "9218 bytes are not a multiple of 3073"),
        (binary(batch(2)[0], [1, 2, 200]), "expected labels 0..9"),
        (b"", "0 images"),
    ],
)
def test_damaged_records_are_refused(tmp_path, content, message):
    (write(tmp_path, binary, ".bin") / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_3\.bin: .*{message}"):
        images.load(tmp_path)


def archive_of(path: Path, sizes: dict[str, int], **fields: object) -> Path:
    """An archive of zeros, with further fields in the headers."""
    with tarfile.open(path, "w:gz") as archive:
        for name, size in sizes.items():
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(bytes(size)))
    return path


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d/data_batch_1": 2**20}, r"limits\(tensor_bytes="),
        ({"d/other": 2**20}, r"limits\(tensor_bytes="),
        ({f"d/{number}": 0 for number in range(1001)}, "member 1000, .* is not a file of CIFAR-10"),
    ],
)
def test_archives_of_zeros_are_bounded(tmp_path, sizes, message):
    with limits(tensor_bytes=2**19 if len(sizes) == 1 else 2**28), pytest.raises(ValueError, match=message):
        images.load(archive_of(tmp_path / "x.tar.gz", sizes))


def test_sparse_files_and_other_compressions_are_refused(tmp_path):
    member = tarfile.TarInfo("d/data_batch_1")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" * 2  # one piece: where it begins and its size
    header[483:495] = b"77777777777\0"  # 8 GiB, once unpacked
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}".encode() + b"\0 "
    (tmp_path / "sparse.tar").write_bytes(bytes(header) + bytes(1024))
    with tarfile.open(tmp_path / "c.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("d/data_batch_1"), io.BytesIO())
    for name in ("sparse.tar", "c.tar.xz"):
        with pytest.raises(ValueError, match=rf"{name}: expected an"):
            images.load(tmp_path / name)


def test_any_changed_bytes_of_an_archive_end_in_images_or_a_value_error(tmp_path):
    path = pack(write(tmp_path / "d"), tmp_path / "c.tar.gz")
    good = path.read_bytes()
    for at in range(0, len(good), len(good) // 40):
        path.write_bytes(good[:at] + b"\xff" * 8 + good[at + 8 :])
        with contextlib.suppress(ValueError, FileNotFoundError):
            images.load(path)


def test_links_in_an_archive_are_not_followed(tmp_path):
    folder = write(tmp_path / "cifar-10-batches-py")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in NAMES[1:]:
            archive.add(folder / name, name)
        link = tarfile.TarInfo(NAMES[0])
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link, io.BytesIO())
    with pytest.raises(FileNotFoundError, match=r"missing are \['data_batch_1'\]"):
        images.load(tmp_path / "x.tar")

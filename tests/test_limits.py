"""Limits that all readers share, and the checks by which they hold: sizes, nesting, special files, fields of JSON."""

import contextlib
import io as streams
import json
import os
import socket
import struct
import threading
import time
import zipfile

import numpy as np
import pytest

from jax_scalegmn import _bounded, io
from jax_scalegmn.architecture import Layer


def seconds(call):
    begin = time.process_time()
    with contextlib.suppress(ValueError):
        call()
    return time.process_time() - begin


def test_limits_change_in_their_block_alone_and_nest():
    before = _bounded.use()
    with io.limits(nesting=3):
        with io.limits(metadata_bytes=10) as both:
            assert (both.nesting, both.metadata_bytes, both.opcodes) == (3, 10, before.opcodes)
        assert _bounded.use().metadata_bytes == before.metadata_bytes
        others = []
        thread = threading.Thread(target=lambda: others.append(_bounded.use()))
        thread.start()
        thread.join()
        assert others == [before]
    assert _bounded.use() == before == io.Limits()


@pytest.mark.parametrize("changes", [{"nesting": 0}, {"nesting": True}, {"depth": 3}])
def test_unknown_limits_are_refused(changes):
    with pytest.raises(ValueError, match=r"expected whole numbers >= 1 for some of tensor_bytes, .*nesting"):
        io.limits(**changes).__enter__()


def test_a_refusal_names_the_size_the_limit_and_the_option_that_lifts_it():
    with pytest.raises(
        ValueError, match=r"its size is 65; expected at most 64\. .*io\.limits\(nesting=65\):`, or --limits nesting=65"
    ):
        _bounded.check("nesting", 65, "its size")
    with io.limits(nesting=65):
        _bounded.check("nesting", 65, "its size")


def test_a_file_has_room_by_its_size_or_by_the_option():
    limits = io.Limits()
    assert _bounded.room("tensor_bytes", 100) == limits.tensor_bytes
    assert _bounded.room("tensor_bytes", 10**9) == limits.expansion * 10**9


def self_containing():
    value = {}
    value["itself"] = value
    return value


def doubled(levels):
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize("kind", ["doubled", "text", "number", "list", "dict"])
def test_texts_of_values_are_short_and_quick(kind):
    values = {"doubled": doubled(60), "text": "x" * 10**7, "number": 10**100_000, "list": list(range(10**6))}
    value = values.get(kind, {"a": {"b": "c" * 999}})
    assert seconds(lambda: _bounded.short(value)) < 1
    assert len(_bounded.short(value)) <= 200


def test_an_error_becomes_one_line_of_bounded_length():
    assert _bounded.one_line(ValueError("a\n  b\tc")) == "a b c"
    assert _bounded.one_line(KeyError("a")) == "KeyError: 'a'"
    assert len(_bounded.one_line(ValueError("word " * 10**6))) <= 1000


# --- files ---------------------------------------------------------------------------------------------------------


def special_files(folder):
    os.mkfifo(folder / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket"))
    listening.close()
    os.symlink("/dev/zero", folder / "link")
    os.symlink(folder / "pipe", folder / "link_to_pipe")
    (folder / "folder").mkdir()
    return {"pipe": "a pipe", "socket": "a socket", "link": "a device", "link_to_pipe": "a pipe", "folder": "a folder"}


def test_special_files_are_refused_without_waiting(tmp_path):
    for name, kind in special_files(tmp_path).items():
        with pytest.raises(ValueError, match=rf"{name}: expected a regular file, got {kind}"):
            _bounded.open_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        _bounded.open_regular(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"abc")
    os.symlink(tmp_path / "file", tmp_path / "link_to_file")
    with _bounded.open_regular(tmp_path / "link_to_file") as file:
        assert file.read() == b"abc"


def test_a_folder_with_a_special_file_is_refused_and_others_are_counted(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(bytes(10))
    (tmp_path / "a" / "b" / "y").write_bytes(bytes(5))
    assert _bounded.check_folder(tmp_path) == 15
    with io.limits(items=3), pytest.raises(ValueError, match="number of its files is 4"):
        _bounded.check_folder(tmp_path)
    os.symlink("/dev/zero", tmp_path / "a" / "b" / "zero")
    with pytest.raises(ValueError, match="zero: expected a regular file, got a device"):
        _bounded.check_folder(tmp_path)


def test_a_file_larger_than_the_limit_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(bytes(101))
    with io.limits(metadata_bytes=100), pytest.raises(ValueError, match="size, in bytes, is 101; expected at most 100"):
        _bounded.read_bytes(tmp_path / "x", "metadata_bytes")
    with io.limits(metadata_bytes=101):
        assert len(_bounded.read_bytes(tmp_path / "x", "metadata_bytes")) == 101


def test_a_counted_stream_reads_no_more_than_it_may():
    def counted(limit):
        return _bounded.Counted(streams.BytesIO(b"line\n" * 4), limit, "metadata_bytes", "the pickle")

    assert counted(20).read() == b"line\n" * 4
    assert counted(20).read(2**40) == b"line\n" * 4
    stream = counted(20)
    assert (stream.readline(), stream.tell(), stream.seek(15), stream.read(9)) == (b"line\n", 5, 15, b"line\n")
    with pytest.raises(ValueError, match="goes back"):
        stream.seek(0)
    for call in (lambda: counted(19).read(), lambda: counted(4).readline(), lambda: counted(9).seek(15)):
        with pytest.raises(ValueError, match=r"the pickle, in bytes, is \d+ or more; .*metadata_bytes="):
            call()


def test_a_large_declared_length_is_not_reserved(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100))
    with open(tmp_path / "x", "rb") as file:
        assert len(_bounded.Counted(file, 2**50, "metadata_bytes", "x").read(2**45)) == 100


@pytest.mark.parametrize("open_it", [streams.BytesIO, lambda content: streams.BufferedReader(streams.BytesIO(content))])
def test_reading_into_an_array_needs_all_of_it(open_it):
    target = np.empty(5, np.uint8)
    _bounded.read_into(open_it(bytes(range(9))), target, "x")
    assert target.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="x ends after 3 of 5 bytes"):
        _bounded.read_into(open_it(bytes(3)), target, "x")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods_whose_output_zipfile_does_not_bound_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x", "w", method) as archive:
        archive.writestr("a", bytes(10))
    with zipfile.ZipFile(tmp_path / "x") as archive, pytest.raises(ValueError, match="expected stored or deflated"):
        _bounded.unzipped(archive, "a").__enter__()


# --- headers of NumPy ----------------------------------------------------------------------------------------------


def npy(array, version):
    stream = streams.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("array", [np.ones((2, 3), np.float32), np.array(7), np.asfortranarray(np.ones((2, 3), ">i2"))])
def test_a_header_is_read_as_numpy_reads_it(array, version):
    content = npy(array, version)
    header = _bounded.npy_header(streams.BytesIO(content))
    assert (header.shape, np.dtype(header.descr), header.begin) == (
        array.shape,
        array.dtype,
        len(content) - array.nbytes,
    )
    assert header.fortran == (array.flags.f_contiguous and not array.flags.c_contiguous)


def header(text, version=1):
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hi",
        b"\x93NUMPY\x01\x00\xff\xff",
        header(b"(" * 9000),
        header(b"-" * 9000),
        header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"),
        header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}"),
        header(b"{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}"),
        header(b"{'descr': '<f4', 'shape': (1,)}"),
        header(b"{[]: 1}    "),
        header(b" " * 20_000, 2),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{}",
    ],
)
def test_a_damaged_header_is_a_value_error(content):
    with pytest.raises(ValueError):  # noqa: PT011 (each has its own words)
        _bounded.npy_header(streams.BytesIO(content))


# --- JSON ----------------------------------------------------------------------------------------------------------


def test_json_is_read_from_texts_bytes_and_files(tmp_path):
    value = {"a": [1, {"b": 'quo"te[['}], "c": None}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert _bounded.read_json(tmp_path / "x.json") == value
    assert _bounded.read_json(json.dumps(value)) == value
    assert _bounded.read_json(json.dumps(value).encode("utf-16")) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nesting"),
        ('{"a":' * 65 + "1" + "}" * 65, "nesting of its JSON is 65"),
        ('"' + '\\"' * 500_000, "Unterminated"),
        ("1" * 5000, "digits"),
        ("", "Expecting value"),
        (b"\xff\xfe\xff", "utf-16"),
        ("[1,]" + " " * 17_000_000, "metadata_bytes"),
    ],
)
def test_json_that_cannot_be_read_is_a_short_value_error_at_once(text, words):
    with pytest.raises(ValueError, match=rf"^here: expected JSON, .*{words}") as caught:
        _bounded.read_json(text, what="here")
    assert len(str(caught.value)) < 1000
    assert seconds(lambda: _bounded.read_json(text, what="here")) < 2


def test_brackets_in_texts_are_no_nesting():
    assert _bounded.read_json(json.dumps("[" * 100)) == "[" * 100


def test_a_json_file_that_is_none_is_named(tmp_path):
    os.symlink("/dev/zero", tmp_path / "zero.json")
    with pytest.raises(ValueError, match=r"zero\.json: expected JSON, .*got a device"):
        _bounded.read_json(tmp_path / "zero.json")
    with pytest.raises(FileNotFoundError):
        _bounded.read_json(tmp_path / "nothing.json")


def test_the_nesting_of_values_is_checked_in_linear_time():
    _bounded.check_nesting(doubled(60), "x")
    for value in (doubled(70), self_containing()):
        with pytest.raises(ValueError, match="nesting of x is 65"):
            _bounded.check_nesting(value, "x")


# --- fields --------------------------------------------------------------------------------------------------------

DENSE = {"type": "Dense", "name": "Dense_0", "activation": {"name": "relu", "frequency": 1.0}, "offset": 0}
CONV = {"type": "Conv", "name": "Conv_0", "activation": None, "strides": [2, 2], "padding": "SAME"}


def test_fields_become_the_annotated_types():
    block = {"type": "Residual", "name": None, "branch": [CONV], "shortcut": [], "activation": None}
    layer = _bounded.decode(Layer, block, "layers[0]")
    assert (layer.branch[0].strides, layer.name) == ((2, 2), None)
    assert _bounded.decode(Layer, DENSE, "layers[0]").activation.name == "relu"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], r"layers\[0\] is \[\]; expected"),
        ({}, r"layers\[0\]\.type is None; expected one of AvgPool"),
        (DENSE | {"type": []}, r"layers\[0\]\.type is \[\]"),
        (DENSE | {"name": [1]}, r"layers\[0\]\.name is \[1\]; expected a text"),
        (DENSE | {"name": "x" * 20_000}, r"layers\[0\]\.name is 'xx"),
        (DENSE | {"offset": "x"}, r"layers\[0\]\.offset is 'x'; expected a finite number"),
        (DENSE | {"offset": True}, r"layers\[0\]\.offset is True; expected a finite number"),
        (DENSE | {"offset": float("inf")}, r"layers\[0\]\.offset is inf; expected a finite number"),
        (DENSE | {"offset": 10**4000}, r"layers\[0\]\.offset is <a number of"),
        (DENSE | {"activation": 5}, r"layers\[0\]\.activation is 5; expected Activation or null"),
        (DENSE | {"activation": {"frequency": 1.0}}, r"layers\[0\]\.activation has no name"),
        (
            DENSE | {"activation": {"name": "relu", "frequency": None}},
            r"layers\[0\]\.activation\.frequency is None; exp",
        ),
        (DENSE | {"more": 1}, r"layers\[0\] has \['more'\]; expected Dense with the fields name, activation, offset"),
        (CONV | {"strides": [2]}, r"layers\[0\]\.strides is \[2\]; expected 2 entries"),
        (CONV | {"strides": [2, 2.5]}, r"layers\[0\]\.strides\[1\] is 2\.5; expected a whole number"),
        (CONV | {"padding": 1.5}, r"layers\[0\]\.padding is 1\.5; expected a text or a whole number"),
    ],
)
def test_a_wrong_field_is_named_by_its_place(value, words):
    with pytest.raises(ValueError, match=rf"^{words}"):
        _bounded.decode(Layer, value, "layers[0]")

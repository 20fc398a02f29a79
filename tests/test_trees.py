"""Flax's msgpack and Orbax's checkpoints are read and written with the same bits; damaged ones are refused."""

import json
import os
import struct
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import support
from flax import serialization

from jax_scalegmn import io
from jax_scalegmn.io import _trees

TREE = {
    "params": {
        "Dense_10": {"kernel": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.ones(2, ml_dtypes.bfloat16)},
        "Dense_2": {"kernel": np.ones((2, 1), np.float16), "bias": np.full(1, 1 / 3)},  # the last in float64
    },
    "batch_stats": {"Norm": {"mean": np.zeros(3, np.float32)}},
}
NAMES = ["x.msgpack", "x"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_in_the_same_bits(tmp_path, name):
    _trees.write(tmp_path / name, TREE)
    support.assert_identical(_trees.read(tmp_path / name), TREE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_flax_writes_is_read_and_written_in_the_same_bytes(tmp_path):
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.to_bytes(jax.tree.map(jnp.asarray, TREE)))
    tree = _trees.read(path)
    _trees.write(tmp_path / "y.msgpack", tree)
    assert (tmp_path / "y.msgpack").read_bytes() == path.read_bytes()
    _trees.write(tmp_path / "z.msgpack", TREE)
    assert list(_trees.read(tmp_path / "z.msgpack")["params"]) == ["Dense_10", "Dense_2"], "keys are sorted"


def test_what_orbax_writes_is_read_and_what_is_written_orbax_reads(tmp_path):
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), TREE)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", jax.tree.map(jnp.asarray, single))
    support.assert_identical(_trees.read(tmp_path / "theirs"), single)
    _trees.write(tmp_path / "ours", single)
    with ocp.StandardCheckpointer() as checkpointer:
        support.assert_identical(checkpointer.restore(tmp_path / "ours"), single)
        support.assert_identical(checkpointer.restore(tmp_path / "ours", single), single)


def test_without_orbax_checkpoints_name_the_extra_and_msgpack_works(tmp_path, monkeypatch):
    _trees.write(tmp_path / "x", TREE)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    for call in (lambda: _trees.read(tmp_path / "x"), lambda: _trees.write(tmp_path / "y", TREE)):
        with pytest.raises(ImportError, match=r'need orbax-checkpoint: pip install "jax-scalegmn\[checkpoint\]"'):
            call()
    _trees.write(tmp_path / "x.msgpack", TREE)
    support.assert_identical(_trees.read(tmp_path / "x.msgpack"), TREE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.msgpack"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_there_is_only_replaced_on_request(tmp_path, name):
    path = tmp_path / name
    _trees.write(path, TREE)
    with pytest.raises(FileExistsError, match="it exists already"):
        _trees.write(path, {"x": np.ones(1)})
    support.assert_identical(_trees.read(path), TREE)
    _trees.write(path, {"x": np.ones(1)}, overwrite=True)
    support.assert_identical(_trees.read(path), {"x": np.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not an Orbax checkpoint is never replaced"):
        _trees.write(tmp_path / name, TREE, overwrite=True)
    assert (tmp_path / name / "thesis.tex").exists()


@pytest.mark.parametrize("content", [b"", b"hello", None, b"\xc7\x06\x01\x93\x90\xa1O\xa1x"], ids=repr)
def test_damaged_msgpack_is_refused(tmp_path, content):
    path = tmp_path / "x.msgpack"
    _trees.write(path, TREE)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(ValueError, match=r"x\.msgpack: expected"):
        _trees.read(path)


def test_scalars_complex_numbers_and_arrays_in_pieces_are_those_of_flax(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    tree = {
        "long": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "scalar": np.float32(2.5),
        "complex": 1 + 2j,
        "others": [1, -1, 300, -300, 2**40, 0.5, None, True, "text", b"bytes", [1, 2], "x" * 300],
        "empty": {},
    }
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(dict(tree)))
    read = _trees.read(tmp_path / "x.msgpack")
    theirs = serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())
    assert read["others"] == theirs["others"] == tree["others"]
    assert (read["complex"], read["empty"], type(read["scalar"])) == (1 + 2j, {}, np.float32)
    np.testing.assert_array_equal(read["long"], tree["long"])
    assert read["long"].flags.writeable


def nested(levels, inner=b"\xc0"):
    return b"\x81\xa1k" * levels + inner


def array(shape, name, declared):
    inner = b"\x93" + msgpack.packb(shape) + msgpack.packb(name) + b"\xc6" + struct.pack(">I", declared) + bytes(8)
    return b"\x81\xa1k\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (nested(600), "nesting of its dicts is 65 or more"),
        (nested(100_000), "nesting of its dicts"),
        (b"\x81\xa1k" + b"\x91" * 600 + b"\xc0", "nesting of its dicts"),
        (b"\x81\xa1k\xdd\xff\xff\xff\xff", "file is truncated"),
        (b"\x81\xa1k\xdf\xff\xff\xff\xff", "file is truncated"),
        (b"\x81\xa1k\xc6\x00\xff\xff\xff", "file is truncated"),
        (b"\x81\xa1k\xc6\xff\xff\xff\xff", r"limits\(metadata_bytes=4294967295\)"),
        (b"\x81\xa1k\xc9\xff\xff\xff\xff\x01\x93", "file is truncated"),
        (b"\x81\xa1k\xdc\xff\xff" + b"\x80" * 65535, r"number of its dicts and lists is 1001 or more"),
        (b"\x81\xa1k\xdc\xff\xff" + b"\xc0" * 65535, r"number of its values is 2001 or more"),
        (b"\x81\x90\xc0", r"a key is \[\]; expected a text"),
        (b"\x81\x01\xc0", "a key is 1; expected a text"),
        (b"\x81\xa1k\xc1", "0xc1, which msgpack does not use"),
        (b"\x81\xa1\xff\xc0", "UnicodeDecodeError|utf-8"),
        (b"\x81\xa1k\xd4\x07\x00", "extension of type 7"),
        (b"\x80\x80", "1 bytes follow what it holds"),
        (b"\x93\x01\x02\x03", "a dict of arrays by name, got a list"),
        (array([2], "<f4", 8) + b"", None),
        (array([3], "<f4", 8), r"float32 \[3\] has 8 bytes"),
        (array([2**40], "<f4", 2**32 - 1), "has 4294967295 bytes"),
        (array([-2], "<f4", 8), r"shape \[-2\]"),
        (array([8], "O", 8), "Python objects are refused"),
        (array([2], "f4,f4", 8), "expected one of numbers"),
        (array([2**60], "V0", 8), "expected one of numbers"),
        (array(["x"], "<f4", 8), r"shape \['x'\]"),
    ],
)
def test_hostile_msgpack_is_refused_briefly(tmp_path, content, words):
    path = tmp_path / "x.msgpack"
    path.write_bytes(content)
    with io.limits(items=1000, opcodes=2000):
        if words is None:
            assert _trees.read(path)["k"].tolist() == [0, 0]
            return
        with pytest.raises(ValueError, match=rf"x\.msgpack: .*({words})") as caught:
            _trees.read(path)
    assert len(str(caught.value)) < 2000


def test_special_files_are_refused(tmp_path):
    os.symlink("/dev/zero", tmp_path / "zero.msgpack")
    os.mkfifo(tmp_path / "pipe.msgpack")
    for name in ("zero.msgpack", "pipe.msgpack"):
        with pytest.raises(ValueError, match=rf"{name}: expected .*regular file"):
            _trees.read(tmp_path / name)
    _trees.write(tmp_path / "x", TREE)
    os.mkfifo(tmp_path / "x" / "pipe")
    with pytest.raises(ValueError, match=r"x: this Orbax checkpoint .*pipe: expected a regular file"):
        _trees.read(tmp_path / "x")


def test_an_orbax_checkpoint_is_held_against_the_limits(tmp_path):
    _trees.write(tmp_path / "x", {"k": np.zeros(2**18, np.float32)})
    with (
        io.limits(tensor_bytes=2**19, expansion=1),
        pytest.raises(ValueError, match=r"bytes, is 1048576; .*tensor_b"),
    ):
        _trees.read(tmp_path / "x")
    (tmp_path / "x" / "_METADATA").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"x: this Orbax .*nesting of its JSON is 100000") as caught:
        _trees.read(tmp_path / "x")
    assert len(str(caught.value)) < 2000


def test_a_chunk_that_is_larger_than_its_array_is_held_against_the_limits(tmp_path):
    """Tensorstore would make room for it, and end the whole program where there is none."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "x", {"k": np.zeros((4, 2), np.float32)})
    description = tmp_path / "x" / "k" / ".zarray"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"chunks": [4, 2**40]}))
    with pytest.raises(ValueError, match=r"x: this Orbax checkpoint .*size of its arrays, in bytes, is 17592186044416"):
        _trees.read(tmp_path / "x")


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has a file _METADATA\. Name the folder"):
        _trees.read(tmp_path)
    _trees.write(tmp_path / "x", TREE)
    with pytest.raises(ValueError, match=r"its folders \['x'\]"):
        _trees.read(tmp_path)
    for file in (tmp_path / "x").rglob("manifest.ocdbt"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        _trees.read(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="absent: nothing there"):
        _trees.read(tmp_path / "absent")

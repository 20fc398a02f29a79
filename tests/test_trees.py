"""Flax's msgpack and Orbax's checkpoints are read and written with the same bits; damaged ones are refused."""

import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import support
from flax import serialization

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

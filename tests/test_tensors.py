"""PyTorch files are read and written without PyTorch and without running them."""

import os
import pickle
import pickletools
import struct
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jax_scalegmn import io
from jax_scalegmn.io import tensors

FIXTURES = Path(__file__).parent / "fixtures"


# --- a writer of PyTorch's format, opcode by opcode -----------------------------------------------------------------


def ref(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def tensor(storage: str, key: str, length: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    record = tup(text("storage"), ref("torch", storage), text(key), text("cpu"), number(length)) + b"Q"
    no_hooks = ref("collections", "OrderedDict") + b")R"
    view = record, number(offset), tup(*map(number, size)), tup(*map(number, stride)), b"\x89", no_hooks
    return ref("torch._utils", "_rebuild_tensor_v2") + tup(*view) + b"R"


def write_torch(
    path: Path, content: bytes, records: Mapping[str, bytes] | None = None, *, byteorder: str = "little"
) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("any/prefix/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("any/prefix/byteorder", byteorder)
        for key, record in (records or {}).items():
            archive.writestr(f"any/prefix/data/{key}", record)
    return path


FOUR = {"0": np.arange(4, dtype="<f4").tobytes()}  # a storage of four floats
GOOD = tensor("FloatStorage", "0", 4, 0, (4,), (1,))


# --- reading files --------------------------------------------------------------------------------------------------


def test_a_file_of_torch_save_is_read_with_the_values_of_pytorch():
    expected = np.load(FIXTURES / "siren.npz")  # of the same torch.nn.Module, through NumPy
    state_dict = tensors.read(FIXTURES / "siren.pt")
    assert list(state_dict) == [f"seq.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    for name, value in state_dict.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[name])
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", jnp.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    ],
)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_every_dtype_is_read_in_both_byte_orders(tmp_path, storage, dtype, byteorder):
    values = np.array([0, 1, 3, 100]).astype(dtype)
    raw = values.view(np.uint8).reshape(4, -1)
    stored = raw if byteorder == sys.byteorder else raw[:, ::-1]
    content = mapping({"x": tensor(storage, "7", 4, 0, (4,), (1,))})
    path = write_torch(tmp_path / "x.pt", content, {"7": stored.tobytes()}, byteorder=byteorder)
    read = tensors.read(path)["x"]
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


def test_views_of_one_storage_are_told_apart(tmp_path):
    base = np.arange(24, dtype="<f4").reshape(4, 6)
    views = {
        "transposed": (base.T, tensor("FloatStorage", "0", 24, 0, (6, 4), (1, 6))),
        "strided": (base[1:3, ::2], tensor("FloatStorage", "0", 24, 6, (2, 3), (6, 2))),
        "scalar": (base[3, 5], tensor("FloatStorage", "0", 24, 23, (), ())),
        "empty": (base[:0], tensor("FloatStorage", "0", 24, 0, (0, 6), (6, 1))),
    }
    content = mapping({name: opcodes for name, (_, opcodes) in views.items()})
    read = tensors.read(write_torch(tmp_path / "x.pth", content, {"0": base.tobytes()}))
    for name, (expected, _) in views.items():
        np.testing.assert_array_equal(read[name], expected)
    read["transposed"][:] = 0
    assert read["strided"].any(), "tensors share memory"


def test_parameters_and_metadata_are_read_as_their_tensors(tmp_path):
    hooks = ref("collections", "OrderedDict") + b")R"
    parameter = ref("torch._utils", "_rebuild_parameter") + tup(GOOD, b"\x88", hooks) + b"R"
    metadata = mapping({"_metadata": mapping({})}) + b"b"  # torch.save sets it as an attribute of the OrderedDict
    content = ref("collections", "OrderedDict") + b")R(" + text("x") + parameter + b"u" + metadata
    read = tensors.read(write_torch(tmp_path / "x.pt", content, FOUR))
    np.testing.assert_array_equal(read["x"], np.arange(4))


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_a_training_checkpoint_is_unwrapped(tmp_path, wrapper):
    content = mapping({"epoch": number(3), wrapper: mapping({"x": GOOD}), "optimizer": mapping({"lr": number(1)})})
    read = tensors.read(write_torch(tmp_path / "x.pt", content, FOUR))
    assert list(read) == ["x"]


def test_npz_and_safetensors_hold_the_same(tmp_path):
    state_dict = {f"seq.{i}.{kind}": np.full(3, i, np.float32) for i in range(12) for kind in ("weight", "bias")}
    np.savez(tmp_path / "x.npz", **state_dict)
    safetensors.numpy.save_file(state_dict, tmp_path / "x.safetensors")
    from_npz, from_safetensors = (tensors.read(tmp_path / f"x.{s}") for s in ("npz", "safetensors"))
    assert list(from_npz) == list(state_dict)
    assert [name.rpartition(".")[0] for name in from_safetensors][::2] == [f"seq.{i}" for i in range(12)]
    for name, value in state_dict.items():
        np.testing.assert_array_equal(from_npz[name], value)
        np.testing.assert_array_equal(from_safetensors[name], value)


def touch(marker: Path) -> bytes:
    return tup(text(f"touch {marker}"))


def touch_by_eval(marker: Path) -> bytes:
    return tup(text(f"__import__('pathlib').Path('{marker}').touch()"))


HOSTILE = {
    "os.system": lambda marker: ref("os", "system") + touch(marker) + b"R",
    "posix.system": lambda marker: ref("posix", "system") + touch(marker) + b"R",
    "by name on the stack": lambda marker: text("os") + text("system") + b"\x93" + touch(marker) + b"R",
    "by INST": lambda marker: b"(" + text(f"touch {marker}") + b"ios\nsystem\n",
    "by OBJ": lambda marker: b"(" + ref("os", "system") + text(f"touch {marker}") + b"o",
    "builtins": lambda marker: ref("builtins", "eval") + touch_by_eval(marker) + b"R",
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_pickle_is_not_run(tmp_path, attack, wrapped):
    marker = tmp_path / "owned"
    content = HOSTILE[attack](marker)
    if wrapped:
        content = mapping({"epoch": content, "model": mapping({"x": GOOD})})
    path = write_torch(tmp_path / "x.pt", content, FOUR)
    if wrapped:
        assert list(tensors.read(path)) == ["x"]
    else:
        with pytest.raises(ValueError, match=r"x\.pt: .*got an object of (os|posix|builtins)\.(system|eval)"):
            tensors.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_tensor_is_left_out_and_not_run(tmp_path, attack):
    marker = tmp_path / "owned"
    evil = HOSTILE[attack](marker)
    rebuilt = ref("torch._utils", "_rebuild_parameter") + tup(evil, b"\x88", evil) + b"R"
    path = write_torch(tmp_path / "x.pt", mapping({"x": GOOD, "y": rebuilt, "z": evil}), FOUR)
    assert list(tensors.read(path)) == ["x"]
    assert not marker.exists()


@pytest.mark.parametrize("attack", HOSTILE)
def test_the_hostile_pickles_are_hostile(tmp_path, attack):
    marker = tmp_path / "owned"
    pickle.loads(b"\x80\x02" + HOSTILE[attack](marker) + b".")
    assert marker.exists()


@pytest.mark.parametrize("state", [mapping({"__defaults__": tup()}), b"N" + mapping({"__defaults__": tup()}) + b"\x86"])
@pytest.mark.parametrize("target", [("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")])
def test_a_pickle_cannot_change_what_reads_the_next_one(tmp_path, target, state):
    content = mapping({"evil": ref(*target) + state + b"b", "x": GOOD})
    assert list(tensors.read(write_torch(tmp_path / "x.pt", content, FOUR))) == ["x"]
    test_parameters_and_metadata_are_read_as_their_tensors(tmp_path)


def one(*args: Any) -> bytes:
    return mapping({"x": tensor(*args)})


@pytest.mark.parametrize(
    ("content", "records", "message"),
    [
        (one("FloatStorage", "0", 4, 0, (5,), (1,)), FOUR, r"size \(5,\).*does not hold"),
        (one("FloatStorage", "0", 4, 2, (3,), (1,)), FOUR, "offset 2.*does not hold"),
        (one("FloatStorage", "0", 4, -1, (2,), (1,)), FOUR, "offset -1.*does not hold"),
        (one("FloatStorage", "0", 4, 3, (2,), (-1,)), FOUR, r"stride \(-1,\).*does not hold"),
        (one("FloatStorage", "0", 4, 0, (2**30, 2**30), (0, 0)), FOUR, "does not hold.*contiguous"),
        (one("FloatStorage", "0", 4, 0, (2, 2), (1,)), FOUR, r"size \(2, 2\) and stride \(1,\), which"),
        (one("FloatStorage", "0", 5, 0, (5,), (1,)), FOUR, "has 16 bytes.*expected 5 x 4"),
        (one("FloatStorage", "1", 4, 0, (4,), (1,)), FOUR, "storage of tensor 'x' is missing"),
        (one("QInt8Storage", "0", 16, 0, (2,), (1,)), FOUR, r"'x' is quantized .*torch\.QInt8Storage"),
        (one("ostr", "0", 2, 0, (2,), (1,)), FOUR, "'x' is quantized or of an unknown kind"),
        (mapping({"x": number(1)}), {}, r"keys \['x'\]"),
        (mapping({}), {}, r"keys \[\]"),
        (b"]", {}, "got a list, which holds no dict of tensors"),
        (b"garbage", {}, "expected tensors by name"),
        (b"\x97", {}, "holds the opcode NEXT_BUFFER, which no checkpoint needs"),
        (b"a", {}, "damaged at the opcode APPEND"),
        (b"X\xff\xff\xff\xff", {}, "expected tensors by name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_checkpoints_of_anything_but_whole_tensors_are_refused(tmp_path, content, records, message):
    with pytest.raises(ValueError, match=message) as caught:
        tensors.read(write_torch(tmp_path / "x.pt", content, records))
    assert "x.pt" in str(caught.value)
    assert "torch.save" in str(caught.value)


def test_any_changed_byte_results_in_tensors_or_an_error(tmp_path):
    rng = np.random.default_rng(0)
    content = bytearray(mapping({"model": mapping({"x": GOOD, "y": GOOD})}))
    errors = 0
    for _ in range(60):
        changed = content.copy()
        changed[rng.integers(len(content))] = rng.integers(256)
        try:
            state_dict = tensors.read(write_torch(tmp_path / "x.pt", bytes(changed), FOUR))
        except ValueError:
            errors += 1
        else:
            assert all(isinstance(value, np.ndarray) for value in state_dict.values())
    assert 10 < errors < 60


def test_an_unknown_byte_order_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'middle' order"):
        tensors.read(write_torch(tmp_path / "x.pt", mapping({"x": GOOD}), FOUR, byteorder="middle"))


@pytest.mark.parametrize("suffix", ["pt", "npz", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "legacy", "changed"])
def test_damaged_files_are_refused(tmp_path, suffix, damage):
    path = tmp_path / f"x.{suffix}"
    state_dict = {"x": np.arange(1000, dtype=np.float32)}
    if suffix == "pt":
        write_torch(path, one("FloatStorage", "0", 1000, 0, (1000,), (1,)), {"0": state_dict["x"].tobytes()})
    elif suffix == "npz":
        np.savez(path, **state_dict)
    else:
        safetensors.numpy.save_file(state_dict, path)
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "foreign": b"hello, world",
        "legacy": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",  # how files of torch.save before 1.6 begin
        "changed": b"\xff" * 100 + content[100:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=rf"x\.{suffix}: expected tensors by name"):
        tensors.read(path)


def test_pickled_arrays_in_npz_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([None], object))
    with pytest.raises(ValueError, match=r"x\.npz.*member 'x\.npy'.*Python objects are refused"):
        tensors.read(tmp_path / "x.npz")


def test_absent_and_unknown_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.pt: there is no such file"):
        tensors.read(tmp_path / "x.pt")
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(30))
    with pytest.raises(ValueError, match=r"x\.h5: expected tensors by name.*an HDF5 file"):
        tensors.read(tmp_path / "x.h5")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match=r"x\.pkl: .*a pickle that torch.save did not write"):
        tensors.read(tmp_path / "x.pkl")
    os.mkfifo(tmp_path / "pipe.pt")
    for special in (tmp_path / "pipe.pt", tmp_path):
        with pytest.raises(ValueError, match="expected a regular file"):
            tensors.read(special)


# --- files of PyTorch 2.2.2 (fixtures/make_torch_files.py) -----------------------------------------------------------

TORCH = FIXTURES / "pytorch"
PLAIN = dict(np.load(TORCH / "plain.npz"))
BOTH = (".pt", ".legacy")  # since PyTorch 1.6, and before
# Name of the fixture -> the keys of the dict that holds the state_dict, and the prefix of its names.
CHECKPOINTS = {
    "plain": (None, ""),
    "module": (None, ""),
    "swa": (None, "module."),
    "training": ("net", ""),
    "lightning": ("state_dict", "model."),
}


ENDINGS = [".pth", ".bin", ".tar", ".checkpoint", ".x", ""]


@pytest.mark.parametrize(
    ("name", "kind", "ending"),
    [
        *((name, kind, ".ckpt") for name in CHECKPOINTS for kind in BOTH),
        *(("plain", kind, ending) for kind in BOTH for ending in ENDINGS),
    ],
)
def test_a_checkpoint_of_any_kind_and_name_is_read_written_and_read_back(tmp_path, name, kind, ending):
    """What is written was loaded by PyTorch 2.2.2 for each of these, by torch.load(weights_only=True) and
    load_state_dict(strict=True) into the module that was saved, and by torch.load(mmap=True)."""
    path = tmp_path / f"x{ending}"
    path.write_bytes((TORCH / f"{name}{kind}").read_bytes())
    file = tensors.read_wrapped(path)
    wrapper, prefix = CHECKPOINTS[name]
    expected = {f"{prefix}{key}": value for key, value in PLAIN.items()}
    if name == "swa":
        expected = {"n_averaged": np.array(0), **expected}
    assert (file.wrapper, file.kind, file.shared) == (wrapper, ".pth" if ending == ".pth" else ".pt", ())
    assert_same(file.tensors, expected)
    tensors.write(tmp_path / "y.ckpt", file.tensors, wrapper=file.wrapper)
    again = tensors.read_wrapped(tmp_path / "y.ckpt")
    assert again.wrapper == wrapper
    assert_same(again.tensors, expected)
    assert "torch" not in sys.modules


def test_a_pickled_wrapper_of_a_module_is_read_as_its_state_dict():
    assert list(tensors.read(TORCH / "swa_module.pt")) == ["n_averaged", *(f"module.{name}" for name in PLAIN)]


def test_formats_are_recognized_under_each_others_names(tmp_path):
    for name, kind in (("plain.pt", ".npz"), ("plain.npz", ".pt"), ("plain.legacy", ".safetensors")):
        (tmp_path / f"x{kind}").write_bytes((TORCH / name).read_bytes())
        assert_same(tensors.read(tmp_path / f"x{kind}"), PLAIN)
    safetensors.numpy.save_file(PLAIN, tmp_path / "x.bin")
    file = tensors.read_wrapped(tmp_path / "x.bin")
    assert file.kind == ".safetensors"
    assert file.tensors.keys() == PLAIN.keys()


def test_every_dtype_of_pytorch_is_read_and_written(tmp_path):
    read = tensors.read(TORCH / "dtypes.pt")
    assert {str(value.dtype) for value in read.values()} == set(read)
    assert len(read) == 14
    for value in read.values():
        assert value.astype(np.complex64).tolist() == [0, 1, 1]
    tensors.write(tmp_path / "y.pt", read)
    assert_same(tensors.read(tmp_path / "y.pt"), read)


@pytest.mark.parametrize("kind", BOTH)
def test_views_of_pytorch_are_read_and_what_they_share_is_told(kind):
    read = tensors.read(TORCH / f"views{kind}")
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "base": base,
        "transposed": base.T,
        "strided": base[1:3, ::2],
        "scalar": base[3, 5],
        "empty": base[:0],
        "parameter": np.ones((2, 2), np.float32),
        "low": np.arange(4, dtype=np.float32),
    }
    assert_same(read, expected)
    assert tensors.shared(TORCH / f"views{kind}") == (("base", "transposed", "strided", "scalar"),)
    assert tensors.shared(TORCH / f"tied{kind}") == (("a.weight", "b.weight"),)
    assert tensors.shared(TORCH / "tied_module.pt") == (("a.weight", "b.weight"),)
    assert tensors.shared(TORCH / "plain.npz") == ()


@pytest.mark.parametrize(
    ("views", "groups"),
    [
        ({"a": (0, (2, 2), (4, 1)), "b": (2, (2, 2), (4, 1))}, ()),  # columns of one matrix
        ({"a": (0, (4,), (2,)), "b": (1, (4,), (2,))}, ()),
        ({"a": (0, (4,), (2,)), "b": (4, (3,), (1,))}, (("a", "b"),)),
        ({"b": (0, (4,), (1,)), "c": (7, (1,), (1,)), "a": (3, (4,), (1,))}, (("b", "a"),)),
        ({"a": (0, (2,), (1,)), "b": (1, (2,), (1,)), "c": (2, (2,), (1,)), "d": (4, (), ())}, (("a", "b", "c"),)),
        ({"a": (0, (0,), (1,)), "b": (0, (0,), (1,))}, ()),
    ],
)
def test_only_tensors_with_common_entries_are_shared(tmp_path, views, groups):
    content = mapping({name: tensor("FloatStorage", "0", 8, *view) for name, view in views.items()})
    path = write_torch(tmp_path / "x.pt", content, {"0": np.arange(8, dtype="<f4").tobytes()})
    assert tensors.shared(path) == groups
    entries = {name: set(value.ravel().tolist()) for name, value in tensors.read(path).items()}
    for a in entries:
        for b in entries:
            if a != b and entries[a] & entries[b]:
                assert any(a in group and b in group for group in groups)


def test_several_dicts_of_tensors_are_listed_and_chosen(tmp_path):
    path = TORCH / "ema.pt"
    with pytest.raises(
        ValueError, match=r"ema\.pt: it holds several.*'state_dict' with 8 tensors \(body\.0\.weight, .*'ema"
    ):
        tensors.read(path)
    with pytest.raises(ValueError, match=r"no dict of tensors has the key 'ema'; the file holds 'state_dict' with 8"):
        tensors.read(path, key="ema")
    file = tensors.read_wrapped(path, key="ema.shadow")
    assert file.wrapper == ("ema", "shadow")
    assert_same(file.tensors, PLAIN)
    tensors.write(tmp_path / "y.pt", file.tensors, wrapper=file.wrapper)
    assert tensors.read_wrapped(tmp_path / "y.pt").wrapper == ("ema", "shadow")
    assert_same(tensors.read(TORCH / "plain.pt", key=""), PLAIN)
    with pytest.raises(ValueError, match=r"plain\.npz: .*key is 'net', but only a file of PyTorch"):
        tensors.read(TORCH / "plain.npz", key="net")


WEIGHT = tensor("FloatStorage", "0", 4, 0, (2, 2), (2, 1))
PAIR = mapping({"weight": WEIGHT})


@pytest.mark.parametrize(
    ("content", "key", "names"),
    [
        (mapping({"model": PAIR, "mean": mapping({"x": GOOD})}), "model", ["weight"]),  # no weight: not a network
        (mapping({"model": PAIR, "loss": GOOD}), "model", ["weight"]),
        (mapping({"a": mapping({"b": mapping({"c": PAIR})}), "note": text("x")}), ("a", "b", "c"), ["weight"]),
        (b"](" + number(1) + PAIR + b"e", None, ["weight"]),
        (
            mapping({"weight": WEIGHT, "args": ref("argparse", "Namespace") + b")\x81" + mapping({}) + b"b"}),
            None,
            ["weight"],
        ),
        (mapping({"m": PAIR + b"q\x05", "again": b"h\x05"}), "m", ["weight"]),  # one dict under two keys
        (
            mapping({"net": PAIR, "opt": mapping({"state": mapping({"p": PAIR}), "param_groups": b"]"})}),
            "net",
            ["weight"],
        ),
    ],
    ids=["statistics", "loss", "nested", "list", "mixed", "twice", "optimizer"],
)
def test_the_one_network_is_found_beside_other_tensors(tmp_path, content, key, names):
    file = tensors.read_wrapped(write_torch(tmp_path / "x.pt", content, FOUR))
    assert file.wrapper == key
    assert list(file.tensors) == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparse", r"'sparse' is sparse \(torch\._utils\._rebuild_sparse_tensor\)"),
        ("quantized", r"'quantized' is quantized \(torch\._utils\._rebuild_qtensor\)"),
        ("meta", "'meta' is on the meta device: it has no entries"),
    ],
)
def test_tensors_without_plain_entries_are_refused_by_name_where_they_are_needed(name, message):
    with pytest.raises(ValueError, match=r"odd\.pt: .*holds several.*dense.*sparse.*quantized.*meta"):
        tensors.read(TORCH / "odd.pt")
    assert list(tensors.read(TORCH / "odd.pt", key="dense")) == ["weight"]
    with pytest.raises(ValueError, match=message):
        tensors.read(TORCH / "odd.pt", key=name)


# --- files that were made to hang, or to fill the memory ------------------------------------------------------------

DEEP = b")" + b"2\x86" * 60  # t = (t, t), 60 times: 2**60 values to hash, compare or print


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"}(" + DEEP + number(1) + text("x") + GOOD + b"u", None),
        (mapping({"y": GOOD.replace(tup(number(4)), DEEP), "x": GOOD}), "'y' is damaged: its offset, size or stride"),
        (mapping({"y": text("a") + DEEP + b"R", "x": GOOD}), None),
        (mapping({"y": b"](" + DEEP + b"e", "x": GOOD}), None),
        (b"}q\x01(" + text("self") + b"h\x01" + text("x") + GOOD + b"u", None),  # a dict that holds itself
        (DEEP, "got a tuple, which holds no dict"),
        (text("a") + DEEP + b"R", "got an object of something"),
    ],
    ids=["key", "size", "call", "list", "itself", "all", "object"],
)
def test_pickles_of_many_values_and_of_themselves_end(tmp_path, content, message):
    path = write_torch(tmp_path / "x.pt", content, FOUR)
    if message is None:
        assert list(tensors.read(path)) == ["x"]
    else:
        with pytest.raises(ValueError, match=message) as caught:
            tensors.read(path)
        assert len(str(caught.value)) < 1000


def module_opcodes(inner: bytes) -> bytes:
    parts = {"_parameters": mapping({"weight": WEIGHT}), "_buffers": mapping({}), "_modules": inner}
    return ref("m", "Net") + b")\x81" + mapping(parts) + b"b"


def test_modules_in_themselves_and_doubled_modules_are_refused(tmp_path):
    itself = (
        ref("m", "Net")
        + b")\x81q\x01"
        + mapping({"_parameters": mapping({}), "_buffers": mapping({}), "_modules": mapping({"a": b"h\x01"})})
        + b"b"
    )
    doubled = module_opcodes(mapping({}))
    for place in range(30):  # 2**30 names
        doubled = module_opcodes(mapping({"a": doubled + b"q" + bytes([place]), "b": b"h" + bytes([place])}))
    for content in (itself, doubled):
        with io.limits(items=500), pytest.raises(ValueError, match=r"contains itself, or the .*is \d+ or more"):
            tensors.read(write_torch(tmp_path / "x.pt", content, FOUR))


def test_many_modules_around_one_are_refused_by_the_names_in_all(tmp_path):
    inner = module_opcodes(mapping({}))
    for _ in range(20):  # "aaa.aaa. ... .weight"
        inner = module_opcodes(mapping({"a" * 400: inner}))
    outer = b"](" + inner + b"q\x01" + module_opcodes(mapping({"x": b"h\x01"})) * 60 + b"e"
    path = write_torch(tmp_path / "x.pt", outer, FOUR)
    assert path.stat().st_size < 200_000
    with io.limits(metadata_bytes=2**18), pytest.raises(ValueError, match="names, in letters, is"):
        tensors.read(path)


@pytest.mark.parametrize(("many", "message"), [("dicts", "pickle's opcodes is"), ("bytes", "texts, in bytes, is")])
def test_pickles_that_copy_what_they_hold_again_and_again_are_refused(tmp_path, many, message):
    pairs = b"](" + b"(K\x01K\x02l" * 1000 + b"e"
    content = {
        "dicts": pairs + b"q\x010(" + (ref("collections", "OrderedDict") + b"h\x01\x85R") * 30 + b"t",
        "bytes": text("a" * 100_000) + b"q\x010(" + (ref("_codecs", "encode") + b"(h\x01U\x06latin1tR") * 30 + b"t",
    }[many]
    path = write_torch(tmp_path / "x.pt", content, FOUR)
    with io.limits(opcodes=30_000, metadata_bytes=2**20), pytest.raises(ValueError, match=rf"{message}.*or more"):
        tensors.read(path)


def test_many_dicts_of_tensors_take_linear_time(tmp_path):
    path = write_torch(tmp_path / "x.pt", b"](" + mapping({"x": GOOD}) * 1000 + b"e", FOUR)
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"several dicts of tensors: .* and 988 more"):
        tensors.read(path)
    assert time.process_time() - begin < 5


def test_compressed_storages_are_bounded_by_an_option_that_the_error_names(tmp_path):
    zeros = np.zeros(2**17, np.float32)
    path = tmp_path / "x.pt"

    def write(content):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + content + b".")
            archive.writestr("x/data/0", zeros.tobytes())

    whole = tensor("FloatStorage", "0", zeros.size, 0, zeros.shape, (1,))
    for content in (whole, tensor("FloatStorage", "0", zeros.size, 0, (2, 2), (2, 1))):  # the storage counts, too
        write(mapping({"x": content}))
        with io.limits(tensor_bytes=2**18):
            with pytest.raises(ValueError, match=r"tensors, in bytes, is 524288; .*io\.limits\(tensor_bytes=524288\)"):
                tensors.read(path)
            with io.limits(tensor_bytes=524288):
                assert list(tensors.read(path)) == ["x"]
    write(b"]0" * 2**15 + b"]")
    with io.limits(metadata_bytes=2**16), pytest.raises(ValueError, match=r"x/data\.pkl, in bytes, is 65540; .*65536"):
        tensors.read(path)
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(2**19, np.float32))
    with io.limits(tensor_bytes=2**20), pytest.raises(ValueError, match=r"its arrays, in bytes, is 2097280; .*1048576"):
        tensors.read(tmp_path / "x.npz")


def test_tensors_of_one_storage_share_memory_and_count_once(tmp_path):
    numbers = np.arange(2**17, dtype=np.float32)
    stored = {"0": numbers.tobytes()}
    whole = tensor("FloatStorage", "0", numbers.size, 0, numbers.shape, (1,))
    half = tensor("FloatStorage", "0", numbers.size, 2**16, (2**16,), (1,))
    turned = tensor("FloatStorage", "0", numbers.size, 0, (2**8, 2**9), (1, 2**8))
    path = write_torch(tmp_path / "x.pt", mapping({"a": whole, "b": whole, "half": half, "turned": turned}), stored)
    with io.limits(tensor_bytes=2**19 * 3, expansion=1):
        state = tensors.read(path)
    assert state["a"] is state["b"]
    assert np.shares_memory(state["a"], state["half"])
    assert state["a"].flags.writeable
    np.testing.assert_array_equal(state["half"], numbers[2**16 :])
    np.testing.assert_array_equal(state["turned"], numbers.reshape(2**9, 2**8).T)


def test_a_small_tensor_does_not_keep_its_large_storage(tmp_path):
    numbers = np.arange(2**12, dtype=np.float32)
    part = tensor("FloatStorage", "0", numbers.size, 2, (3,), (1,))
    (read,) = tensors.read(write_torch(tmp_path / "x.pt", mapping({"a": part}), {"0": numbers.tobytes()})).values()
    assert read.tolist() == [2, 3, 4]
    assert read.base is None or read.base.nbytes < 100


def test_too_many_opcodes_are_refused(tmp_path):
    path = write_torch(tmp_path / "x.pt", b"]0" * 500 + mapping({"x": GOOD}), FOUR)
    assert list(tensors.read(path)) == ["x"]
    with io.limits(opcodes=1000), pytest.raises(ValueError, match=r"opcodes is 1001 or more.*limits\(opcodes=2002\)"):
        tensors.read(path)


@pytest.mark.parametrize("name", ["training.legacy", "module.pt"])
def test_any_changed_byte_of_a_real_file_results_in_tensors_or_an_error(tmp_path, name):
    rng = np.random.default_rng(0)
    content, path, errors = (TORCH / name).read_bytes(), tmp_path / "x", 0
    for _ in range(20):
        changed = bytearray(content)
        changed[rng.integers(min(len(content), 3000))] = rng.integers(256)
        path.write_bytes(bytes(changed[: rng.integers(len(content) // 2, 2 * len(content))]))
        try:
            state_dict = tensors.read(path)
        except ValueError:
            errors += 1
        else:
            assert all(isinstance(value, np.ndarray) for value in state_dict.values())
    assert errors


# --- writing files --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
EVERY_KIND = {
    "seq.0.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "scalar": np.array(7),
    "empty": np.ones((2, 0, 3), np.float16),
    "transposed": RNG.normal(size=(5, 3)).T,
    "big endian": np.arange(3, dtype=">f4"),
    "bool": np.array([True, False]),
    **{str(np.dtype(dtype)): np.arange(3).astype(dtype) for dtype in (np.int8, np.uint8, np.int16, np.int32)},
    "größe": np.ones(1),
}
SUFFIXES = [".pt", ".ckpt", "", ".npz", ".safetensors"]


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype.newbyteorder("=")
        assert got[name].shape == value.shape
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_in_the_same_bits_and_order(tmp_path, suffix):
    state_dict = EVERY_KIND if suffix == ".npz" else EVERY_KIND | {"bf16": RNG.normal(size=3).astype(jnp.bfloat16)}
    tensors.write(tmp_path / f"x{suffix}", state_dict)
    read = tensors.read(tmp_path / f"x{suffix}")
    if suffix == ".safetensors":  # which keeps no order
        read, state_dict = (dict(sorted(names.items())) for names in (read, state_dict))
    assert_same(read, state_dict)
    tensors.write(tmp_path / f"y{suffix}", {"x": jnp.ones(3)})
    assert_same(tensors.read(tmp_path / f"y{suffix}"), {"x": np.ones(3, np.float32)})


def test_the_same_tensors_are_written_as_the_same_bytes(tmp_path):
    for suffix in SUFFIXES:
        path = tmp_path / f"x{suffix}"
        written = []
        for _ in range(2):
            tensors.write(path, EVERY_KIND, overwrite=True)
            written.append(path.read_bytes())
        assert written[0] == written[1]


def test_a_torch_file_holds_what_torch_save_writes_and_torch_load_lets_through(tmp_path):
    # What the restricted unpickler of torch.load(weights_only=True) knows, read off its source.
    path = tmp_path / "net.pt"
    tensors.write(path, EVERY_KIND, wrapper="state_dict")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(FIXTURES / "siren.pt") as reference:
        names = {"data.pkl", "byteorder", "version"}
        assert {f"net/{name}" for name in names} < set(archive.namelist())
        assert archive.read("net/version") == reference.read("siren/version")
        assert archive.testzip() is None
        codes = list(pickletools.genops(archive.read("net/data.pkl")))
        known = {code.name for code, _, _ in pickletools.genops(reference.read("siren/data.pkl"))}
        for record in archive.infolist():
            head = path.read_bytes()[record.header_offset :][26:30]
            assert (record.header_offset + 30 + sum(struct.unpack("<HH", head))) % 64 == 0
            assert record.compress_type == zipfile.ZIP_STORED
    assert {code.name for code, _, _ in codes} <= known | {"BININT"}
    globals_ = {arg for code, arg, _ in codes if code.name == "GLOBAL"}
    assert {name for name in globals_ if not name.startswith("torch ")} == {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
    }


@pytest.mark.parametrize("wrapper", ["state_dict", "net", "my.net", ("models", "ema"), None])
def test_the_wrapper_of_a_checkpoint_is_told_and_written(tmp_path, wrapper):
    tensors.write(tmp_path / "x.pt", {"x": np.ones(2)}, wrapper=wrapper)
    file = tensors.read_wrapped(tmp_path / "x.pt")
    assert (file.wrapper, file.kind, file.shared) == (wrapper, ".pt", ())
    assert_same(file.tensors, {"x": np.ones(2)})


def test_files_are_only_replaced_on_request(tmp_path):
    path = tmp_path / "x.pt"
    tensors.write(path, {"x": np.zeros(2)})
    with pytest.raises(FileExistsError, match=r"x\.pt: it exists already.*overwrite"):
        tensors.write(path, {"x": np.ones(2)})
    assert not tensors.read(path)["x"].any()
    tensors.write(path, {"x": np.ones(2)}, overwrite=True)
    assert tensors.read(path)["x"].all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"x{suffix}"
    tensors.write(path, {"x": np.zeros(2)})
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        tensors.write(path, {"x": np.ones(2)}, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "state_dict", "options", "message"),
    [
        ("x.h5", {"x": np.ones(1)}, {}, "got '.h5'"),
        ("x.pt", {}, {}, r"one tensor or more.*\[\]"),
        ("x.pt", {"": np.ones(1)}, {}, "by names"),
        ("x.pt", {"x": np.ones(1, "m8[s]")}, {}, "'x' is timedelta64"),
        ("x.safetensors", {"x": np.ones(1, complex)}, {}, "'x' is complex128"),
        ("x.npz", {"x": np.array([None])}, {}, "'x' is object"),
        ("x.npz", {"x": np.ones(1, jnp.bfloat16)}, {}, "'x' is bfloat16; a .npz file holds"),
        ("x.safetensors", {"x": np.array(["a"])}, {}, "'x' is <U1"),
        ("x.npz", {"x": np.ones(1)}, {"wrapper": "model"}, r"wrapper is \('model',\)"),
        ("x.pt", {"x": np.ones(1)}, {"wrapper": ("a", "")}, "expected None, or keys in a file of PyTorch"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, name, state_dict, options, message):
    with pytest.raises(ValueError, match=message):
        tensors.write(tmp_path / name, state_dict, **options)
    assert not list(tmp_path.iterdir())

"""The command line aligns and merges networks by the user's own function, which it is given the name of."""

import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from safetensors.numpy import save_file
from test_tensors import mapping, tensor, write_torch

import jax_scalegmn as sg
from jax_scalegmn import cli
from jax_scalegmn.cli import _headers
from jax_scalegmn.io import tensors

MODULE = """
import jax, jax.numpy as jnp, numpy as np

def pool(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

def apply(params, x):
    for i in "12":
        x = jax.lax.conv_general_dilated(x, params[f"conv{i}.weight"], (1, 1), "VALID")
        x = pool(jax.nn.relu(x + params[f"conv{i}.bias"][:, None, None]))
    return x.reshape(len(x), -1) @ params["fc.weight"].T + params["fc.bias"]

def impure(params, x):
    return apply(params, x) + np.random.normal()

def total(params, x):
    return apply(params, x).sum(0)

def training(params, x):
    out = apply(params, x)
    return out - out.mean(0)

def other(params, x):
    return x @ params["nothing"]

def linear(params, x):
    return x.reshape(len(x), -1)[:, :12] @ params["fc.weight"].T + params["fc.bias"]

number = 3
"""
SHAPES = {"conv1.weight": (4, 1, 3, 3), "conv1.bias": (4,), "conv2.weight": (3, 4, 3, 3), "conv2.bias": (3,)}
SHAPES |= {"fc.weight": (5, 12), "fc.bias": (5,)}


def network(seed):
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype("f") for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module, two networks in PyTorch's layout and labeled data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    (tmp_path / "own_model.py").write_text(MODULE)
    counted = {"bn.num_batches_tracked": np.array(7)}
    for seed, name in enumerate("ab"):
        tensors.write(tmp_path / f"{name}.pt", network(seed) | counted)
    x = np.random.default_rng(9).normal(size=(40, 1, 14, 14)).astype("f")
    np.savez(tmp_path / "data.npz", x=x, y=own_function()(network(0), x).argmax(-1))
    return tmp_path


def own_function():
    scope = {}
    exec(MODULE, scope)
    return scope["apply"]


def run(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


GIVEN = ("--module", "own_model:apply", "--data", "data.npz")


@pytest.mark.slow
def test_two_files_and_a_function_are_one_merged_network(folder, capsys):
    command = ("merge", "a.pt", "b.pt", *GIVEN, "--out", "c.pt", "--repair", "--json", "s.json")
    status, out, err = run(capsys, *command, "--method", "activations")
    assert (status, err) == (0, "")
    assert "of own_model:apply, preserved" in out
    assert "of the described network" not in out
    table = json.loads((folder / "s.json").read_text())["table"]
    assert [row["network"] for row in table] == ["a.pt", "b.pt", "naive", "merged", "repaired"]
    ends = [network(seed) for seed in (0, 1)]
    x, apply = np.load("data.npz")["x"], own_function()
    merged = tensors.read(folder / "c.pt")
    assert list(merged) == [*SHAPES, "bn.num_batches_tracked"]
    assert merged.pop("bn.num_batches_tracked") == 7
    first = np.asarray(apply(ends[0], x))
    naive = {key: (ends[0][key] + ends[1][key]) / 2 for key in SHAPES}
    for row, params in zip(table, [*ends, naive, None, merged], strict=True):
        if params is not None:
            out = np.asarray(apply(params, x))
            np.testing.assert_allclose(row["differs"], np.abs(out - first).max() / np.abs(first).max(), atol=1e-5)
            assert row["accuracy %"] == pytest.approx(100 * (out.argmax(-1) == first.argmax(-1)).mean())
    assert table[0]["accuracy %"] == 100
    assert table[0]["loss"] == pytest.approx(-np.log(np.asarray(jax.nn.softmax(first)).max(-1)).mean(), rel=1e-4)


@pytest.mark.slow
def test_a_planted_element_is_recovered_from_sorted_names(folder, capsys):
    apply, a = own_function(), network(0)
    arch = sg.infer(apply, a, jnp.zeros((2, 1, 14, 14))).arch
    assert [(n.name, n.scaling.value) for n in arch.hidden] == [
        ("conv1.weight", "positive"),
        ("conv2.weight", "positive"),
    ]
    moved = support.act(arch, support.rows(support.random_elements(arch, 1), 0), a)
    for name, params in (("a", a), ("moved", moved)):
        save_file({key: np.asarray(value) for key, value in params.items()}, folder / f"{name}.safetensors")
    status, out, err = run(capsys, "align", "moved.safetensors", "a.safetensors", *GIVEN, "--out", "back.safetensors")
    assert (status, err) == (0, "")
    back = tensors.read(folder / "back.safetensors")
    for key, value in a.items():
        np.testing.assert_allclose(back[key], value, rtol=1e-4, atol=1e-5)
    change = float(out.partition("changed by at most ")[2].split()[0])
    assert change < 1e-6
    np.savez(folder / "double.npz", **{key: value.astype("float64") for key, value in a.items()})
    assert run(capsys, "check", "double.npz", *GIVEN)[::2] == (0, "")


@pytest.mark.slow
def test_straight_through_lowers_the_loss_of_the_users_function(folder, capsys):
    arch = sg.infer(own_function(), network(0), jnp.zeros((2, 1, 14, 14))).arch
    moved = support.act(arch, support.rows(support.random_elements(arch, 1), 0), network(0))
    tensors.write("b.pt", moved | {"bn.num_batches_tracked": np.array(7)}, overwrite=True)
    command = ("merge", "a.pt", "b.pt", *GIVEN, "--json", "s.json", "--overwrite", "--out", "c.pt")
    losses = {}
    for method in ("none", "straight-through"):
        assert run(capsys, *command, "--method", method)[0] == 0
        losses[method] = json.loads((folder / "s.json").read_text())["table"][-1]["loss"]
    assert losses["straight-through"] < losses["none"]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("own_model", "expected module:function, like my_model:apply"),
        ("own_model.py:apply", "expected module:function"),
        ("no_such_model:apply", "'no_such_model' cannot be imported .*Run in its folder"),
        ("own_model:aply", "has no 'aply'; it has .*'apply'"),
        ("own_model:number", "is a int; expected a function"),
        ("own_model:impure", "is not pure: two calls differ"),
        ("own_model:total", r"returns \(5,\) for 2 examples and \(5,\) for 1; expected a leading batch axis"),
        ("own_model:training", "gives an example other outputs in a batch than alone"),
        ("own_model:other", r"failed on x \(2, 1, 14, 14\).*KeyError.*nothing.*like params\['conv1\."),
        ("own_model:linear", "has no neurons that could be aligned"),
    ],
)
def test_what_is_no_function_of_a_network_is_named_in_one_line(folder, capsys, module, message):
    status, out, err = run(capsys, "merge", "a.pt", "b.pt", "--module", module, "--data", "data.npz", "--out", "c.pt")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert re.search(message, err), err
    assert not (folder / "c.pt").exists()


def test_data_and_labels_that_do_not_fit_are_named(folder, capsys):
    x = np.load("data.npz")["x"]
    for arrays, message in (
        ({"x": x[:, :, :9]}, "failed on x (2, 1, 9, 14)"),
        ({"z": x}, "expected an .npz file with numbers x"),
        ({"x": x, "y": np.zeros(7, int)}, "expected one example or more, and one y for each"),
        ({"x": x, "y": np.zeros(40)}, "expected y as whole-number labels (40,) of two classes or more"),
        ({"x": x, "y": np.zeros((40, 5), int)}, "got int64 (40, 5)"),
        ({"x": x, "y": np.full(40, 5)}, "expected labels from 0 to 4"),
        ({"x": x * np.nan}, "or outputs that are not finite; expected a function in evaluation mode"),
    ):
        np.savez(folder / "data.npz", **arrays)
        status, out, err = run(capsys, "merge", "a.pt", "b.pt", *GIVEN, "--out", "c.pt")
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert message in err
    for more, message in (
        (("--module", "own_model:apply"), "pass --data"),
        ((*GIVEN, "--activation", "relu"), "leave out --activation"),
        ((*GIVEN, "--arch", "mlp:2-2,relu", "--order", "a"), "leave out --arch, --order"),
    ):
        status, _, err = run(capsys, "merge", "a.pt", "b.pt", *more, "--out", "c.pt")
        assert (status, message in err) == (2, True)


def test_headers_alone_refuse_a_wrong_pair(folder, capsys):
    good, wide = network(0), network(1) | {"fc.weight": np.zeros((5, 13), "f")}
    renamed = {key.replace("fc", "head"): value for key, value in network(1).items()}
    for write, ending in ((save_file, "safetensors"), (lambda some, path: np.savez(path, **some), "npz")):
        for name, params in (("a", good), ("wide", wide), ("renamed", renamed)):
            write(params, folder / f"{name}.{ending}")
        begin = time.perf_counter()
        with pytest.raises(ValueError, match=r"'fc.weight' has shape \(5, 13\), and \(5, 12\) in"):
            _headers.check([folder / f"a.{ending}", folder / f"wide.{ending}"], by_name=False)
        assert time.perf_counter() - begin < 0.5
        _headers.check([folder / f"a.{ending}", folder / f"renamed.{ending}"], by_name=False)
        status, _, err = run(capsys, "merge", f"a.{ending}", f"renamed.{ending}", *GIVEN, "--out", f"c.{ending}")
        assert status == 2
        assert "missing are ['fc.bias', 'fc.weight'], additional ['head.bias', 'head.weight']" in err
    tensors.write(folder / "wide.pt", wide)
    status, _, err = run(capsys, "merge", "a.pt", "wide.pt", *GIVEN, "--out", "c.pt")  # no header tells
    assert (status, "'fc.weight' has shape (5, 13)" in err) == (2, True)


def test_whole_numbers_that_differ_and_tensors_that_are_one_are_refused(folder, capsys):
    for seed, name in enumerate("ab"):
        tensors.write(folder / f"{name}.pt", network(seed) | {"mask": np.arange(3) + seed}, overwrite=True)
    status, _, err = run(capsys, "merge", "a.pt", "b.pt", *GIVEN, "--out", "c.pt")
    assert (status, "['mask'] is int64, and differs" in err) == (2, True)
    file = sg.io.read_arrays(folder / "a.pt")._replace(shared=(("conv1.weight", "conv2.weight"),))
    with pytest.raises(ValueError, match=r"a\.pt: 'conv1\.weight' and 'conv2\.weight' share memory"):
        sg.io.as_stored(file)


TIED = """
import jax.numpy as jnp

def apply(params, x):
    hidden = jnp.tanh(x @ params["enc.weight"].T + params["enc.bias"])
    return hidden @ params["dec.weight"].T + params["dec.bias"]
"""


def write_tied(path, seed, moved=None):
    """An autoencoder whose second weight is a transposed view of the first, as in a file of PyTorch."""
    rng = np.random.default_rng(seed)
    weight, hidden, bias = (rng.normal(size=shape).astype("f") for shape in ((6, 4), 6, 4))
    if moved is not None:
        order, signs = moved[0], moved[1].astype("f")
        weight, hidden = (weight * signs[:, None])[order], (hidden * signs)[order]
    storages = {str(key): value.tobytes() for key, value in enumerate((weight, hidden, bias))}
    views = {
        "enc.weight": tensor("FloatStorage", "0", 24, 0, (6, 4), (4, 1)),
        "enc.bias": tensor("FloatStorage", "1", 6, 0, (6,), (1,)),
        "dec.weight": tensor("FloatStorage", "0", 24, 0, (4, 6), (1, 4)),
        "dec.bias": tensor("FloatStorage", "2", 4, 0, (4,), (1,)),
    }
    write_torch(path, mapping(views), storages)
    return weight, hidden


@pytest.mark.slow
def test_tensors_that_are_one_stay_one_under_the_users_function(folder, capsys):
    (folder / "own_model.py").write_text(TIED)
    np.savez("data.npz", x=np.random.default_rng(1).normal(size=(50, 4)).astype("f"))
    weight, hidden = write_tied(folder / "a.pt", 0)
    write_tied(folder / "moved.pt", 0, (np.array([3, 0, 5, 1, 2, 4]), np.array([1, -1, -1, 1, -1, 1])))
    write_tied(folder / "b.pt", 1)
    status, out, err = run(capsys, "align", "moved.pt", "a.pt", *GIVEN, "--out", "back.pt", "--json", "s.json")
    assert (status, err) == (0, "")
    assert json.loads((folder / "s.json").read_text())["neuron_layers"][1]["group"] == "sign"
    back = tensors.read("back.pt")
    assert list(back) == ["enc.weight", "enc.bias", "dec.weight", "dec.bias"]
    np.testing.assert_array_equal(back["enc.weight"], weight)
    np.testing.assert_array_equal(back["dec.weight"], weight.T)
    np.testing.assert_array_equal(back["enc.bias"], hidden)
    status, out, err = run(capsys, "merge", "a.pt", "b.pt", *GIVEN, "--out", "c.pt", "--repair")
    assert (status, err) == (0, "")
    assert "not repaired  enc.weight: its mean and standard deviation: its parameters act in other places, too" in out
    merged = tensors.read("c.pt")
    np.testing.assert_array_equal(merged["dec.weight"], merged["enc.weight"].T)
    tensors.write("b.pt", tensors.read("b.pt"), overwrite=True)
    status, out, err = run(capsys, "merge", "a.pt", "b.pt", *GIVEN, "--out", "c.pt", "--overwrite")
    assert (status, "b.pt: the tensors that are one are []" in err) == (2, True)
    layers = "sequential([Dense(6, name='enc'), 'tanh', Dense(4, name='dec')], (4,))"
    status, out, err = run(capsys, "merge", "a.pt", "moved.pt", "--arch", layers, "--out", "c.pt", "--overwrite")
    assert (status, "a.pt: 'dec.weight' and 'enc.weight' are one tensor" in err) == (2, True)

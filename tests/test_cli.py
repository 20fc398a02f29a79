"""The command line aligns, merges and checks networks in files, and writes nothing on bad input."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import serialization
from test_networks import saved

import jax_scalegmn as sg
from jax_scalegmn import cli, io, matching, merge, symmetry
from jax_scalegmn.zoo import classifiers

RELU = ("--arch", "mlp:3-5-4-2,relu")
NETWORKS = {
    "relu mlp": (support.ARCHITECTURES["relu mlp"], RELU),
    "tanh cnn": (
        support.ARCHITECTURES["tanh cnn"],
        ("--arch", "cnn:2-3-4,3,tanh,kernel_size=3-2,padding=same,flatten=7-9"),
    ),
    "small resnet": (sg.resnet(4, widths=(2,), outputs=2), ("--arch", "resnet:4,2,2,norm=batch")),
    "resnet": (sg.resnet(6, widths=(2, 3), outputs=2), ("--arch", "resnet:6,2-3,2,norm=batch")),
}
MLP = NETWORKS["relu mlp"][0]
FIXTURES = Path(__file__).parent / "fixtures"
SHALLOW, SHALLOW_RELU = sg.mlp((3, 5, 2)), ("--arch", "mlp:3-5-2,relu")  # where one hidden layer shows as much


def random_params(arch, seed=0):
    """Random params, without negative variances."""
    params = support.random_params(arch, seed)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.abs(leaf) if "var" in str(path) else leaf, params)


def pair(folder, name, arch, extra=0):
    """The files of a network, of a member of its orbit and of `extra` others, and their params."""
    a = random_params(arch)
    others = [random_params(arch, seed) for seed in range(1, 1 + extra)]
    networks = [a, support.act(arch, support.rows(support.random_elements(arch, 1), 0), a), *others]
    paths = []
    for index, params in enumerate(networks):
        (folder / str(index)).mkdir()
        paths.append(saved(folder / str(index), name, arch, params))
    return paths, networks


def run(capsys, *argv):
    """Exit status, standard output and standard error of a command."""
    status = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def data(path, arch, count=32):
    x = support.example(arch, count)
    np.savez(path, x=np.asarray(x), y=np.arange(count) % arch.neuron_layers[-1].width)
    return x


# --- what is written ------------------------------------------------------------------------------------------------


FORMATS = ("torch.pt", "slashes.npz", "dots.safetensors", "variables.msgpack", "orbax")


@pytest.mark.parametrize(
    ("network", "name"),
    [
        *(("relu mlp", name) for name in FORMATS),
        ("tanh cnn", "torch.pt"),
        pytest.param("small resnet", "variables.msgpack", marks=pytest.mark.slow),
        *(pytest.param("tanh cnn", name, marks=pytest.mark.slow) for name in FORMATS[1:]),
        *(pytest.param("resnet", name, marks=pytest.mark.slow) for name in FORMATS),
    ],
)
def test_a_network_merged_with_a_moved_copy_computes_the_same(tmp_path, capsys, network, name):
    arch, flags = NETWORKS[network]
    (a, b), (params, moved) = pair(tmp_path, name, arch)
    out = tmp_path / f"merged{a.suffix}"
    if network == "tanh cnn":  # of no square images
        data(tmp_path / "x.npz", arch)
        flags = (*flags, "--data", tmp_path / "x.npz")
    assert run(capsys, "merge", a, b, "--out", out, *flags)[0] == 0
    before, after = (io.read_arrays(path) for path in (a, out))
    assert after.format == before.format
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after.arrays) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), before.arrays
    )
    x = support.example(arch) if "resnet" not in network else jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    merged = io.read_network(out, arch).params
    expected = support.outputs(arch, params, x)
    assert support.deviation(support.outputs(arch, merged, x), expected) < 1e-4
    # Without alignment it would be another function.
    naive = support.outputs(arch, merge.lerp(params, moved, 0.5), x)
    assert support.deviation(naive, expected) > 1e-2


@pytest.mark.parametrize(
    "method", ["weights", "activations", pytest.param("sinkhorn", marks=pytest.mark.slow), "canonical"]
)
def test_align_moves_the_first_next_to_the_second(tmp_path, capsys, method):
    (a, b), (_, target) = pair(tmp_path, "torch.pt", MLP)
    data(tmp_path / "x.npz", MLP, 64)
    summary = tmp_path / "s.json"
    options = (*RELU, "--method", method, "--json", summary, "--data", tmp_path / "x.npz")
    status, out, err = run(capsys, "align", a, b, "--out", tmp_path / "c.pt", *options)
    assert (status, err) == (0, "")
    aligned = io.read_network(tmp_path / "c.pt", MLP).params
    # Data say nothing of the scale of a neuron that is never active on them.
    assert support.deviation(*(symmetry.balanced(MLP, params) for params in (aligned, target))) < 1e-4
    if method != "activations":
        assert support.deviation(aligned, target) < 1e-4
    (row,) = json.loads(summary.read_text())["networks"]
    assert row["similarity_after"] > 0.9999
    assert row["similarity_before"] < 0.9
    assert row["function_change"] < 1e-5
    assert f"-> {row['similarity_after']:.4f}" in out
    assert str(tmp_path / "c.pt") in out


def test_the_numbers_of_the_summary_are_those_of_the_library(tmp_path, capsys):
    paths, networks = pair(tmp_path, "bare.msgpack", MLP, extra=1)
    a, _, c = networks
    summary = tmp_path / "s.json"
    out = tmp_path / "m.msgpack"
    weights = ("--weights", 3, 1)
    assert run(capsys, "merge", paths[0], paths[2], "--out", out, *RELU, *weights, "--json", summary)[0] == 0
    result = matching.weight_matching(MLP, c, a)
    moved = symmetry.act(MLP, result.element, c)
    stored = json.loads(summary.read_text())
    assert stored["weights"] == [0.75, 0.25]
    assert stored["architecture"] == MLP.name
    stays, row = stored["networks"]
    assert stays["layers"]["hidden_0"] == {"neurons": 5, "moved": 0, "flipped": 0, "scales": [1.0, 1.0]}
    np.testing.assert_allclose(row["similarity_before"], matching.similarity(MLP, c, a), rtol=1e-5)
    np.testing.assert_allclose(row["similarity_after"], result.similarity, rtol=1e-5)
    assert (row["sweeps"], row["converged"]) == (int(result.sweeps), bool(result.converged))
    for name, layer in row["layers"].items():
        order, scale = result.element.permutation[name], result.element.scale[name]
        assert layer["moved"] == (order != np.arange(len(order))).sum()
        np.testing.assert_allclose(layer["scales"], [scale.min(), scale.max()], rtol=1e-4)
    merged = io.read_network(out, MLP).params
    assert support.deviation(merged, merge.lerp(a, moved, 0.25)) < 1e-5


@pytest.mark.slow
def test_many_networks_meet_at_the_first_or_at_their_mean(tmp_path, capsys):
    paths, (a, *_) = pair(tmp_path, "torch.npz", SHALLOW)
    third = tmp_path / "third.npz"
    third.write_bytes(paths[1].read_bytes())
    x = support.example(SHALLOW)
    for frame in ("first", "mean"):
        out = tmp_path / f"{frame}.npz"
        assert run(capsys, "merge", *paths, third, "--out", out, *SHALLOW_RELU, "--frame", frame)[0] == 0
        merged = io.read_network(out, SHALLOW).params
        assert support.deviation(support.outputs(SHALLOW, merged, x), support.outputs(SHALLOW, a, x)) < 1e-4
        # The mean is of networks in their balanced gauge.
        expected = a if frame == "first" else symmetry.balanced(SHALLOW, a)
        assert support.deviation(merged, expected) < 1e-4


@pytest.mark.slow
def test_options_do_what_the_library_does(tmp_path, capsys):
    paths, (a, _, c) = pair(tmp_path, "bare.msgpack", MLP, extra=1)
    x = data(tmp_path / "x.npz", MLP)

    def merged(*options):
        out = tmp_path / "m.msgpack"
        command = ("merge", paths[0], paths[2], "--out", out, *RELU, "--overwrite", *options)
        assert run(capsys, *command, "--data", tmp_path / "x.npz")[0] == 0
        return io.read_network(out, MLP).params

    aligned = matching.align(MLP, c, a)
    by_activations = symmetry.act(MLP, matching.activation_matching(MLP, c, a, x).element, c)
    ends = jax.tree.map(lambda *leaves: jnp.stack(leaves), a, aligned)
    cases = [
        (("--method", "none"), merge.lerp(a, c, 0.5)),
        (("--no-scale",), merge.lerp(a, matching.align(MLP, c, a, scale=False), 0.5)),
        (("--method", "activations"), merge.lerp(a, by_activations, 0.5)),
        (("--t", "0.1"), merge.lerp(a, aligned, 0.1)),
        (("--interpolate", "slerp", "--t", "0.3"), merge.slerp(a, aligned, 0.3)),
        (("--repair",), merge.repair(MLP, merge.lerp(a, aligned, 0.5), ends, x)),
    ]
    got = [merged(*options) for options, _ in cases]
    for (options, expected), params in zip(cases, got, strict=True):
        assert support.deviation(params, expected) < 1e-5, options
    usual = merge.lerp(a, aligned, 0.5)
    assert all(support.deviation(params, usual) > 1e-3 for params in got)


@pytest.mark.slow
def test_straight_through_lowers_the_loss_of_the_merged_classifier(tmp_path, capsys):
    paths, (a, _, c) = pair(tmp_path, "bare.msgpack", MLP, extra=1)
    x = data(tmp_path / "x.npz", MLP)
    losses = {}
    for method in ("weights", "straight-through", "sinkhorn"):
        out = tmp_path / f"{method}.msgpack"
        command = ("merge", paths[0], paths[2], "--out", out, *RELU, "--method", method)
        assert run(capsys, *command, "--data", tmp_path / "x.npz")[0] == 0
        merged = io.read_network(out, MLP).params
        losses[method] = float(classifiers.score(MLP, merged, x, jnp.arange(len(x)) % 2).loss)
    assert losses["straight-through"] < losses["weights"] - 1e-3
    by_sinkhorn = matching.sinkhorn_matching(MLP, c, a)
    middle = merge.lerp(a, symmetry.act(MLP, by_sinkhorn.element, c), 0.5)
    assert support.deviation(io.read_network(tmp_path / "sinkhorn.msgpack", MLP).params, middle) < 1e-5


@pytest.mark.slow
def test_search_merges_networks_by_what_they_compute(tmp_path, capsys):
    paths, _ = pair(tmp_path, "bare.msgpack", MLP, extra=1)
    labels, inputs = tmp_path / "labels.npz", tmp_path / "x.npz"
    np.savez(inputs, x=np.asarray(data(labels, MLP)))
    command = ("merge", *paths, "--out", tmp_path / "m.msgpack", *RELU, "--method", "search", "--overwrite")
    command += ("--json", tmp_path / "m.json")
    for file, option, distance in (
        (inputs, (), "squared-error"),
        (labels, (), "cross-entropy"),  # the data of a classifier
        (labels, ("--distance", "squared-error"), "squared-error"),
        (labels, ("--gradient-steps", "3"), "cross-entropy"),
        (labels, ("--scale-steps", "20", "--kicks", "2"), "cross-entropy"),
    ):
        code, out, _ = run(capsys, *command, "--data", file, *option)
        summary = json.loads((tmp_path / "m.json").read_text())
        losses = summary["losses"]
        assert code == 0
        assert summary["distance"] == distance
        assert losses.keys() == {"first", "last", "naive", "merged"}
        assert losses["merged"] < losses["naive"]
        assert f"{distance}  first" in out
        assert f"merged {losses['merged']:.4g}" in out


@pytest.mark.slow
def test_half_and_double_precision_are_kept(tmp_path, capsys):
    params = random_params(SHALLOW)
    for dtype in ("float16", "bfloat16", "float64"):
        path, out = tmp_path / f"{dtype}.msgpack", tmp_path / f"{dtype}.out.msgpack"
        own = jax.tree.map(lambda leaf, dtype=dtype: np.asarray(leaf).astype(dtype) * 1.1, params)
        path.write_bytes(serialization.to_bytes(own))
        assert run(capsys, "merge", path, path, "--out", out, *SHALLOW_RELU)[0] == 0
        # The mean of a network and itself is itself, in float64 to its last bits.
        got = io.read_arrays(out).arrays
        limit = {"float16": 1e-3, "bfloat16": 1e-2, "float64": 1e-12}[dtype]
        assert support.deviation(jax.tree.map(np.float64, got), jax.tree.map(np.float64, own)) < limit
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {leaf.dtype for leaf in jax.tree.leaves(own)}
    assert not jax.config.jax_enable_x64


# --- the architecture -----------------------------------------------------------------------------------------------


def test_the_architecture_may_come_as_json_or_follow_from_the_file(tmp_path, capsys):
    (a, _), _ = pair(tmp_path, "wrapped.pth", MLP)
    described = tmp_path / "arch.json"
    described.write_text(json.dumps(MLP.as_json()))
    for flags in (("--arch", described), ("--activation", "relu"), ("--arch", "mlp:3-5-4-2", "--activation", "relu")):
        status, out, _ = run(capsys, "check", a, *flags)
        assert status == 0
        assert MLP.name in out
        assert "hidden_0    5 neurons, positive" in out


def test_networks_without_a_function_are_aligned_and_not_compared(tmp_path, capsys):
    arch, _ = support.HAND_WRITTEN["residual relu"]
    (a, b), (_, target) = pair(tmp_path, "bare.msgpack", arch)
    described = tmp_path / "arch.json"
    described.write_text(json.dumps(arch.as_json()))
    status, out, _ = run(capsys, "align", a, b, "--out", tmp_path / "c.msgpack", "--arch", described)
    assert status == 0
    assert "not compared" in out
    assert support.deviation(io.read_network(tmp_path / "c.msgpack", arch).params, target) < 1e-4


def test_a_wrong_description_is_refused_and_nothing_written(tmp_path, capsys):
    """A gelu network that is said to have the signs of tanh."""
    gelu = sg.mlp((3, 8, 2), "gelu")
    (a, b), _ = pair(tmp_path, "torch.pt", gelu)
    wrong = gelu.as_json() | {"neurons": sg.mlp((3, 8, 2), "tanh").as_json()["neurons"]}
    described = tmp_path / "arch.json"
    described.write_text(json.dumps(wrong))
    assert run(capsys, "check", a, "--arch", "mlp:3-8-2,gelu")[0] == 0
    status, _, err = run(capsys, "check", a, b, "--arch", described)
    assert status == 2
    assert "described wrongly" in err


# --- bad input ------------------------------------------------------------------------------------------------------


def assert_refused(capsys, folder, message, *argv):
    """Status 2, one line that says why, no traceback, and all files as they were."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert err.startswith("jax-scalegmn: ")
    assert err.count("\n") == 1
    assert message in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (a, _), _ = pair(tmp_path, "torch.pt", MLP)
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps({"x": Hostile()}, protocol=2))
    for first, second in ((a, "bad.pt"), ("bad.pt", a)):
        assert_refused(
            capsys,
            tmp_path,
            "got a dict with the keys ['x'], which holds no dict of tensors",
            "merge",
            first,
            second,
            "--out",
            "m.pt",
            *RELU,
        )
    assert_refused(capsys, tmp_path, "holds no dict of tensors", "check", "bad.pt", *RELU)
    assert not (tmp_path / "hacked").exists()


def test_existing_outputs_stay(tmp_path, capsys):
    (a, b), _ = pair(tmp_path, "torch.pt", MLP)
    out, summary = tmp_path / "m.pt", tmp_path / "s.json"
    command = ("merge", a, b, "--out", out, "--json", summary, *RELU)
    out.write_text("precious")
    assert_refused(capsys, tmp_path, "m.pt: it exists already", *command)
    out.unlink()
    summary.write_text("precious")
    assert_refused(capsys, tmp_path, "s.json: it exists already", *command)
    assert run(capsys, *command, "--overwrite")[0] == 0
    assert json.loads(summary.read_text())["out"] == str(out)


def test_a_write_that_fails_leaves_the_old_output(tmp_path, capsys, monkeypatch):
    (a, b), _ = pair(tmp_path, "torch.pt", MLP)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    command = ("align", a, b, "--out", b, "--overwrite", *RELU)
    assert_refused(capsys, tmp_path, "no space left on device", *command)


def test_networks_that_cannot_be_read_are_named(tmp_path, capsys):
    (a, _), _ = pair(tmp_path, "torch.pt", MLP)
    out = tmp_path / "m.pt"
    other = saved(tmp_path, "torch.pt", sg.mlp((3, 6, 4, 2)), random_params(sg.mlp((3, 6, 4, 2))))
    cases = {
        "truncated": a.read_bytes()[:-200],
        "foreign": b"hello",
        "other": other.read_bytes(),
        "nan": b"",
    }
    spoilt = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), random_params(MLP))
    messages = {"truncated": "tensors by name", "foreign": "truncated or foreign", "other": "has shape", "nan": "NaN"}
    for name, content in cases.items():
        bad = tmp_path / f"{name}.pt"
        bad.write_bytes(content)
        if name == "nan":
            bad = tmp_path / "nan.msgpack"
            bad.write_bytes(serialization.to_bytes(spoilt))
        assert_refused(capsys, tmp_path, messages[name], "merge", a, bad, "--out", out, *RELU)
        assert_refused(capsys, tmp_path, bad.name, "align", a, bad, "--out", out, *RELU)
    foreign = tmp_path / "names.msgpack"
    foreign.write_bytes(serialization.to_bytes({"layer": {"w": np.ones(3)}}))
    assert_refused(capsys, tmp_path, "missing are", "check", foreign, *RELU)
    assert_refused(capsys, tmp_path, "there is no such file", "merge", a, tmp_path / "absent.pt", "--out", out, *RELU)


def test_hostile_descriptions_end_in_one_short_line(tmp_path, capsys):
    (a, _), _ = pair(tmp_path, "torch.pt", MLP)
    good = MLP.as_json()
    wrong = [{**layer, "activation": {"name": "evil", "frequency": 1.0}} for layer in good["layers"]]
    path = tmp_path / "arch.json"
    for content, words in [
        (json.dumps(good | {"layers": wrong}), "layers[0].activation.name is 'evil'; expected one of abs, elu"),
        (json.dumps(good | {"name": "x" * 10**6}), "name is 'xxx"),
        ("[" * 100_000, "--limits nesting=100000"),
        ("{", "expected JSON"),
        ("[]", "does not describe an architecture"),
        ('{"input_shape": 5, "layers": []}', "describes no list of layers"),
    ]:
        path.write_text(content)
        status, _, err = run(capsys, "check", a, "--arch", path)
        assert status == 2
        assert words in err
        assert str(path) in err
        assert err.count("\n") == 1
        assert len(err) < 2100


def test_limits_are_raised_by_an_option(tmp_path, capsys):
    (a, _), _ = pair(tmp_path, "torch.pt", MLP)
    check = ("check", a, *RELU)
    assert run(capsys, *check, "--limits", "metadata_bytes=10")[0] == 2
    assert run(capsys, *check, "--limits", "metadata_bytes=10000,nesting=10")[0] == 0
    for wrong in ("depth=3", "nesting", "nesting=x", "nesting=0"):
        status, _, err = run(capsys, *check, "--limits", wrong)
        assert (status, "expected" in err) == (2, True)


def test_one_of_several_dicts_of_tensors_is_chosen_by_key(tmp_path, capsys):
    (a, _), (params, _) = pair(tmp_path, "torch.pt", SHALLOW)
    state = io.tensors.read(a)
    io.tensors.write(tmp_path / "a.ckpt", state, wrapper=("ema", "net"))
    out = tmp_path / "out.bin"
    command = ("align", tmp_path / "a.ckpt", tmp_path / "a.ckpt", "--out", out, *SHALLOW_RELU, "--method", "none")
    assert run(capsys, *command, "--key", "ema.net")[0] == 0
    file = io.read_arrays(out)
    assert file.format == io.FileFormat(".pt", ("ema", "net"))
    assert list(file.arrays) == list(state)
    support.assert_identical(io.as_network(file, SHALLOW).params, params)
    out.unlink()
    both = FIXTURES / "pytorch" / "ema.pt"
    assert_refused(capsys, tmp_path, "--key on the command line", *command[:1], both, both, *command[3:])
    assert_refused(capsys, tmp_path, "no dict of tensors has the key 'net'", *command, "--key", "net")


def test_options_that_exclude_or_miss_each_other_are_named(tmp_path, capsys):
    (a, b), _ = pair(tmp_path, "torch.pt", MLP)
    np.savez(tmp_path / "x.npz", x=np.ones((4, 7)))
    np.savez(tmp_path / "y.npz", y=np.ones((4, 3)))
    np.savez(tmp_path / "unlabeled.npz", x=np.ones((4, 3)))
    np.savez(tmp_path / "few.npz", x=np.ones((4, 3)), y=np.zeros(3, int))
    np.savez(tmp_path / "values.npz", x=np.ones((4, 3)), y=np.zeros(4))
    np.savez(tmp_path / "high.npz", x=np.ones((4, 3)), y=np.full(4, 2))
    np.savez(tmp_path / "nan.npz", x=np.full((4, 3), np.nan))
    np.savez(tmp_path / "none.npz", x=np.ones((0, 3)))
    (tmp_path / "arch.json").write_text("{}")
    out = ("--out", tmp_path / "m.pt")
    both = ("merge", a, b, *out)
    straight_through = ("--method", "straight-through", "--data")
    for message, argv in [
        ("pass --activation relu", both),
        ("names no activation", (*both, "--arch", "mlp:3-5-4-2")),
        ("does not describe an architecture", (*both, "--arch", tmp_path / "arch.json")),
        ("Leave --activation out", (*both, "--arch", tmp_path / "arch.json", "--activation", "relu")),
        ("expected one of mlp, siren", (*both, "--arch", "lstm:3")),
        ("frequency of sines", (*both, "--activation", "sine")),
        ("--method activations needs", (*both, *RELU, "--method", "activations")),
        ("--method straight-through needs examples", (*both, *RELU, "--method", "straight-through")),
        ("--distance goes with --method search", (*both, *RELU, "--distance", "cross-entropy")),
        ("--gradient-steps goes with --method search", (*both, *RELU, "--gradient-steps", "5")),
        ("--scale-steps goes with --method search", (*both, *RELU, "--scale-steps", "5")),
        ("--kicks goes with --method search", (*both, *RELU, "--kicks", "5")),
        ("--method search needs examples", (*both, *RELU, "--method", "search")),
        ("expected no --t", (*both, *RELU, "--method", "search", "--t", "0.3", "--data", tmp_path / "nan.npz")),
        ("--no-scale goes with", (*both, *RELU, "--method", "sinkhorn", "--no-scale")),
        ("--repair needs", (*both, *RELU, "--repair")),
        ("--no-scale goes with", (*both, *RELU, "--method", "canonical", "--no-scale")),
        ("--frame mean goes with", (*both, *RELU, "--method", "canonical", "--frame", "mean")),
        ("--t is 1.5", (*both, *RELU, "--t", 1.5)),
        ("--t is 0.5 for 2 networks", (*both, *RELU, "--t", 0.5, "--weights", 1, 1)),
        ("--t is 0.5 for 3 networks", ("merge", a, b, b, *out, *RELU, "--t", 0.5)),
        ("slerp is between two", ("merge", a, b, b, *out, *RELU, "--interpolate", "slerp")),
        ("expected 2 numbers >= 0", (*both, *RELU, "--weights", 1)),
        ("expected 2 numbers >= 0", (*both, *RELU, "--weights", 0, 0)),
        ("with a finite sum above 0", (*both, *RELU, "--weights", "1e308", "1e308")),
        ("--seed is -1; expected a whole number from 0 to 4294967295", (*both, *RELU, "--seed", -1)),
        ("--seed is 99999999999999999999", (*both, *RELU, "--seed", 99999999999999999999)),
        ("one example or more", (*both, *RELU, "--method", "activations", "--data", tmp_path / "none.npz")),
        ("one y for each", (*both, *RELU, "--method", "search", "--data", tmp_path / "few.npz")),
        ("expected two or more", ("merge", a, *out, *RELU)),
        ("no network to check", ("check", *RELU)),
        ("expected a name that ends in .pt", ("merge", a, b, "--out", tmp_path / "m.npz", *RELU)),
        ("Give each its own name", (*both, *RELU, "--json", tmp_path / "m.pt")),
        ("Make the folder first", (*both, *RELU, "--json", tmp_path / "absent" / "s.json")),
        ("x (4, 7) does not fit", (*both, *RELU, "--data", tmp_path / "x.npz")),
        ("expected an .npz file with numbers x", (*both, *RELU, "--data", tmp_path / "y.npz")),
        ("NaN", (*both, *RELU, "--data", tmp_path / "nan.npz")),
        ("y (4,); got none", (*both, *RELU, *straight_through, tmp_path / "unlabeled.npz")),
        ("y (4,); got float64 (4,)", (*both, *RELU, *straight_through, tmp_path / "values.npz")),
        ("Labels are from 2 to 2", (*both, *RELU, *straight_through, tmp_path / "high.npz")),
    ]:
        assert_refused(capsys, tmp_path, message, *argv)


def test_unknown_options_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["merge", "a.pt", "b.pt", "--out", "m.pt", "--frames", "mean"])
    assert caught.value.code == 2
    assert "--frames" in capsys.readouterr().err


def test_the_package_is_a_program_whose_help_does_not_import_jax():
    program = "import runpy, sys\nsys.argv = ['jax-scalegmn', '--help']\ntry:\n"
    program += "    runpy.run_module('jax_scalegmn', run_name='__main__')\n"
    program += "finally:\n    print('imported' if 'jax' in sys.modules else 'not imported')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("align", "merge", "check"))
    assert "not imported" in done.stdout


def test_without_tyro_one_line_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["--help"]) == 2
    assert capsys.readouterr() == ("", 'The command line needs tyro: pip install "jax-scalegmn[cli]"\n')


def test_without_orbax_a_checkpoint_ends_with_the_name_of_the_extra(tmp_path, capsys, monkeypatch):
    (a, _), _ = pair(tmp_path, "orbax", MLP)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert_refused(capsys, tmp_path, 'pip install "jax-scalegmn[checkpoint]"', "check", a, *RELU)


@pytest.mark.parametrize("command", ["align", "merge", "check"])
def test_an_input_is_never_an_output(tmp_path, capsys, monkeypatch, command):
    """By no spelling: nothing is replaced, and one line says which option is meant."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.npz", "b.npz", "x.npz", "arch.json", "mine.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("b.npz")
    (tmp_path / "hard").hardlink_to("x.npz")
    (tmp_path / "folder").symlink_to(".")
    (tmp_path / "ck").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    arch, data = ["--arch", "arch.json"], ["--data", "x.npz"]
    module = ["--module", "mine:apply", *data]
    out = [] if command == "check" else ["--out", "c.npz"]
    cases = [
        (["a.npz", "b.npz", *out, "--json", spelling], "--json .* is also the network b.npz")
        for spelling in ("b.npz", str(tmp_path / "b.npz"), "link", "folder/b.npz", "ck/../b.npz")
    ]
    cases += [(["a.npz", "b.npz", *out, *data, "--json", name], "of --data") for name in ("x.npz", "hard")]
    cases += [(["a.npz", "b.npz", *out, *arch, "--json", "./arch.json"], "of --arch")]
    cases += [(["a.npz", "b.npz", *out, *module, "--json", "mine.py"], "of --module")]
    cases += [(["ck", "b.npz", *out, "--json", "ck/s.json"], "is also the network ck")]
    if out:
        cases += [
            (["a.npz", "b.npz", "--out", "hard", *data], "--out hard is also the file of --data"),
            (["a.npz", "b.npz", "--out", "arch.json", *arch], "of --arch"),
            (["a.npz", "b.npz", "--out", "mine.py", *module], "of --module"),
            (["a.npz", "ck/n.npz", "--out", "ck"], "is also the network ck/n.npz"),
            (["a.npz", "b.npz", "--out", "c.npz", "--json", "folder/c.npz"], "--json and --out are both"),
        ]
    for words, message in cases:
        rest = [] if "--arch" in words or "--module" in words else ["--activation", "relu"]
        assert cli.main([command, *words, *rest, "--overwrite"]) == 2, words
        assert re.search(message, capsys.readouterr().err), words
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

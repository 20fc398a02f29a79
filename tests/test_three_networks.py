"""Three common PyTorch networks from their files to a merged one: by layers and inferred, in Python and by commands."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import cli, io, matching, merge, network, stacks, symmetry
from jax_scalegmn.io import tensors

MODULE = '''
"""The networks as their owners would write them in JAX, in PyTorch's layout, with maps [channels, h, w]."""

import jax
import jax.numpy as jnp


def conv(p, name, x, stride=1, padding=0):
    y = jax.lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
    return y + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else y


def pool(x, size, padding=0):
    margins = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, size, size), (1, 1, 2, 2), margins)


def norm(p, name, x):
    weight, bias, mean, var = (
        p[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / jnp.sqrt(var + 1e-5) * weight + bias


def mlp(p, x):
    x = jax.nn.relu(x @ p["fc1.weight"].T)
    return jax.nn.relu(x @ p["fc2.weight"].T) @ p["fc3.weight"].T


def cnn(p, x):
    for name in ("features.0", "features.3"):
        x = pool(jax.nn.relu(conv(p, name, x, padding=1)), 2)
    return x.reshape(len(x), -1) @ p["classifier.weight"].T + p["classifier.bias"]


def resnet(p, x):
    x = pool(jax.nn.relu(norm(p, "bn1", conv(p, "conv1", x, 2, 3))), 3, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = jax.nn.relu(norm(p, f"{name}.bn1", conv(p, f"{name}.conv1", x, stride, 1)))
            y = norm(p, f"{name}.bn2", conv(p, f"{name}.conv2", y, 1, 1))
            if f"{name}.downsample.0.weight" in p:
                x = norm(p, f"{name}.downsample.1", conv(p, f"{name}.downsample.0", x, stride))
            x = jax.nn.relu(x + y)
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
'''
HAND = {}
exec(MODULE, HAND)

LAYERS = {
    "mlp": "sequential([Dense(24, use_bias=False, name='fc1'), 'relu', Dense(16, use_bias=False, name='fc2'), 'relu', "
    "Dense(5, use_bias=False, name='fc3')], (12,))",
    "cnn": "sequential([Block([Conv(6, 3, padding=1), 'relu', MaxPool(2), Conv(8, 3, padding=1), 'relu', MaxPool(2)], "
    "name='features'), Flatten(), Dense(5, name='classifier')], (1, 12, 12))",
    "resnet": "sequential([ResNet(18, width=4, outputs=5)], (3, 32, 32))",
}
SHAPES = {"mlp": (12,), "cnn": (1, 12, 12), "resnet": (3, 32, 32)}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "resnet" else ()) for name in LAYERS]


def by_layers(name):
    return sg.layers.parse(LAYERS[name])


def state(name, seed):
    """A network as PyTorch would store it, with counters of batches where it is normalized."""
    rng = np.random.default_rng(seed)
    tensors_of = {}
    for (key,), shape in by_layers(name).array_shapes.items():
        value = rng.normal(size=shape) / max(1, np.sqrt(np.prod(shape[1:]) / 2))
        if key.endswith("running_var"):
            value = 0.5 + np.square(value)
        elif len(shape) == 1 and key.endswith("weight"):
            value = 1 + value / 8
        tensors_of[key] = value.astype("f")
        if key.endswith("running_var"):
            tensors_of[key.replace("running_var", "num_batches_tracked")] = np.array(seed + 7)
    return tensors_of


def weights(some):
    return {key: value for key, value in some.items() if not key.endswith("num_batches_tracked")}


def examples(name, count, seed=9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *SHAPES[name])), "float32")


def inferred(name):
    return sg.infer(HAND[name], weights(state(name, 0)), examples(name, 2)).arch


def largest_change(new, old):
    return float(np.abs(np.asarray(new) - np.asarray(old)).max() / np.abs(np.asarray(old)).max())


def planted(name, seed=1):
    """Network 0 with an element of the whole group, permutations and scales, applied to it."""
    arch, own = by_layers(name), weights(state(name, 0))
    element = support.rows(support.random_elements(arch, seed), 0)
    moved = {key: np.asarray(value, "f") for key, value in support.act(arch, element, own).items()}
    return state(name, 0) | moved


@pytest.mark.parametrize("name", NAMES)
def test_layers_and_the_hand_written_function_have_one_group_and_one_function(name):
    arch, other = by_layers(name), inferred(name)
    assert arch.neuron_layers == other.neuron_layers
    assert set(arch.parameters) == set(other.parameters)
    assert {layer.scaling.value for layer in arch.hidden} == {"positive"}
    assert len(arch.hidden) == {"mlp": 2, "cnn": 2, "resnet": 12}[name]
    own, x = weights(state(name, 0)), examples(name, 3)
    expected = jax.jit(HAND[name])(own, x)
    assert largest_change(jax.jit(lambda p, x: network.apply(arch, p, x))(own, x), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("described", [by_layers, inferred])
@pytest.mark.parametrize("name", NAMES)
def test_files_are_read_aligned_repaired_and_written_in_python(name, described, tmp_path):
    arch, apply, x = described(name), jax.jit(HAND[name]), examples(name, 48)
    for file, some in (("a", state(name, 0)), ("moved", planted(name)), ("b", state(name, 1))):
        tensors.write(tmp_path / f"{file}.pt", some)
    files = {file: io.read_network(tmp_path / f"{file}.pt", arch) for file in ("a", "moved", "b")}
    a, moved, b = (files[file].params for file in ("a", "moved", "b"))
    assert largest_change(apply(moved, x), apply(a, x)) < 1e-5
    assert max(largest_change(moved[key], a[key]) for key in a) > 0.1
    for found in (matching.weight_matching(arch, moved, a), matching.activation_matching(arch, moved, a, x)):
        back = symmetry.act(arch, found.element, moved)
        for key, value in a.items():
            np.testing.assert_allclose(back[key], value, rtol=1e-3, atol=1e-4, err_msg=key)
    aligned = symmetry.act(arch, matching.activation_matching(arch, b, a, x).element, b)
    assert largest_change(apply(aligned, x), apply(b, x)) < 1e-6
    mean = merge.lerp(a, aligned, 0.5)
    repaired = merge.repair(arch, mean, stacks.stack(a, aligned), x)
    assert_repaired(arch, mean, repaired, (a, aligned), x)
    io.write_network(tmp_path / "merged.pt", arch, repaired, files["a"])
    written = tensors.read(tmp_path / "merged.pt")
    assert list(written) == list(state(name, 0))
    assert {key: value.dtype for key, value in written.items()} == {k: v.dtype for k, v in state(name, 0).items()}
    np.testing.assert_allclose(apply(weights(written), x), apply(repaired, x), rtol=1e-5, atol=1e-5)


def assert_repaired(arch, mean, repaired, ends, x):
    """REPAIR restores the mean standard deviation, or the size where no bias stores the mean, before sums too."""

    @jax.jit
    def moments(params):
        values = jax.vmap(lambda one: network.at_places(arch, params, one))(x)
        own = {number: value.reshape(-1, value.shape[-1]) for number, value in values.items()}
        return {number: (value.mean(0), value.std(0)) for number, value in own.items()}

    left = merge.uncorrected(arch)
    first, second, before, after = (moments(params) for params in (*ends, mean, repaired))
    assert {arch.function.places[number].neurons for number in first} == {layer.name for layer in arch.hidden}
    for number in first:
        wanted = [(own + other) / 2 for own, other in zip(first[number], second[number], strict=True)]
        if arch.function.places[number].neurons in left:
            wanted, old, new = (np.hypot(*some) for some in (wanted, before[number], after[number]))
        else:
            wanted, old, new = wanted[1], before[number][1], after[number][1]
        np.testing.assert_allclose(new, wanted, rtol=1e-2, err_msg=str(number))
        assert np.abs(old / wanted - 1).max() > 0.02, number


@pytest.mark.slow
@pytest.mark.parametrize("described", ["--arch", "--module"])
@pytest.mark.parametrize("name", NAMES)
def test_files_are_merged_by_the_command_line(name, described, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    (tmp_path / "own_networks.py").write_text(MODULE)
    apply, x = jax.jit(HAND[name]), examples(name, 48)
    for file, some in (("a", state(name, 0)), ("moved", planted(name)), ("b", state(name, 1))):
        tensors.write(f"{file}.pt", some)
    np.savez("data.npz", x=x, y=np.asarray(apply(weights(state(name, 0)), x)).argmax(-1))
    given = [described, LAYERS[name] if described == "--arch" else f"own_networks:{name}", "--data", "data.npz"]
    assert cli.main(["align", "moved.pt", "a.pt", *given, "--out", "back.pt"]) == 0, capsys.readouterr().err
    assert ("of own_networks" if described == "--module" else "of the described network") in capsys.readouterr().out
    back = tensors.read("back.pt")
    for key, value in weights(state(name, 0)).items():
        np.testing.assert_allclose(back[key], value, rtol=1e-3, atol=1e-4, err_msg=key)
    command = ["merge", "a.pt", "b.pt", *given, "--method", "activations", "--repair", "--json", "s.json"]
    assert cli.main([*command, "--out", "c.pt"]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "s.json").read_text())
    assert [row["network"] for row in summary["table"]] == ["a.pt", "b.pt", "naive", "merged", "repaired"]
    assert all(row["function_change"] < 1e-6 for row in summary["networks"])
    merged = tensors.read("c.pt")
    assert list(merged) == list(state(name, 0))
    out = np.asarray(apply(weights(merged), x))
    labels = np.load("data.npz")["y"]
    assert summary["table"][-1]["accuracy %"] == pytest.approx(100 * (out.argmax(-1) == labels).mean())


# --- files that PyTorch wrote (fixtures/make_torch_files.py) ----------------------------------------------------------

TORCH = Path(__file__).parent / "fixtures" / "pytorch"
BODY = sg.sequential(
    [
        sg.layers.Block([sg.layers.Dense(4), sg.layers.BatchNorm(), "relu"], name="body"),
        sg.layers.Dense(2, use_bias=False, name="head"),
    ],
    (3,),
)
FILES = [f"{name}.{kind}" for name in ("plain", "module", "swa", "training", "lightning") for kind in ("pt", "legacy")]


@pytest.mark.parametrize(
    ("name", "key"), [*((name, None) for name in FILES), ("swa_module.pt", None), ("ema.pt", "ema.shadow")]
)
def test_files_of_pytorch_are_merged_and_written_back(name, key, tmp_path):
    file = io.read_network(TORCH / name, BODY, key=key)
    assert file.params.keys() == {path for (path,) in BODY.array_shapes}
    element = support.rows(support.random_elements(BODY, 1), 0)
    moved = support.act(BODY, element, file.params)
    merged = merge.lerp(file.params, matching.align(BODY, moved, file.params), 0.5)
    io.write_network(tmp_path / "x.pt", BODY, merged, file)
    before, after = (io.read_arrays(path, key=own) for path, own in ((TORCH / name, key), (tmp_path / "x.pt", None)))
    assert (list(after.arrays), after.format.wrapper) == (list(before.arrays), before.format.wrapper)
    for path, value in before.arrays.items():
        assert after.arrays[path].dtype == value.dtype
        np.testing.assert_allclose(after.arrays[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    assert "torch" not in sys.modules

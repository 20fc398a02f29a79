"""Lists of layers: they compute what PyTorch's modules do, and have the groups of the function that they are."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import cli, layers, matching, merge, network, stacks, testing
from jax_scalegmn.io import tensors
from jax_scalegmn.layers import (
    Activation,
    AvgPool,
    BasicBlock,
    BatchNorm,
    Block,
    Bottleneck,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    PReLU,
    Residual,
    ResNet,
)

LAYERS = [
    *(Conv(4, 3, padding=1, name="conv1"), "relu", MaxPool(2)),
    *(Conv(3, 3, use_bias=False, name="conv2"), Activation("leaky_relu", slope=0.2), AvgPool(2)),
    *(Flatten(), Dense(6, name="fc1"), "tanh", Dense(5, use_bias=False, name="fc2")),
]
SHAPE = (1, 10, 10)
TEXT = (
    "sg.sequential([Conv(4, 3, padding=1, name='conv1'), 'relu', MaxPool(2), layers.Conv(3, 3, use_bias=False, "
    "name='conv2'), Activation('leaky_relu', slope=0.2), AvgPool(2), Flatten(), Dense(6, name='fc1'), 'tanh', "
    "Dense(5, use_bias=False, name='fc2')], input_shape=(1, 10, 10))"
)


def random_params(arch, seed=0):
    rng = np.random.default_rng(seed)
    sizes = arch.array_shapes.items()
    params = {name: jnp.asarray(rng.normal(size=shape), "float32") / len(shape) for (name,), shape in sizes}
    return {name: jnp.abs(value) if name.endswith("var") else value for name, value in params.items()}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), "float32")


def by_hand(params, x):
    """The same network, written in JAX."""
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1))
    x = jax.nn.relu(conv(x, params["conv1.weight"], padding=[(1, 1)] * 2) + params["conv1.bias"][:, None, None])
    x = x.reshape(len(x), 4, 5, 2, 5, 2).max((3, 5))
    x = conv(x, params["conv2.weight"], padding="VALID")
    x = jnp.where(x > 0, x, 0.2 * x)[:, :, :2, :2].mean((2, 3))
    return jnp.tanh(x @ params["fc1.weight"].T + params["fc1.bias"]) @ params["fc2.weight"].T


def test_a_list_of_layers_is_the_function_written_by_hand():
    arch = sg.sequential(LAYERS, SHAPE)
    params, x = random_params(arch), normal(3, *SHAPE)
    np.testing.assert_allclose(network.apply(arch, params, x), by_hand(params, x), rtol=1e-4, atol=1e-5)
    inferred = sg.infer(by_hand, params, x).arch
    assert inferred.neuron_layers[1:] == arch.neuron_layers[1:]
    assert set(inferred.parameters) == set(arch.parameters)
    assert arch is sg.sequential(list(LAYERS), SHAPE)
    assert arch == layers.parse(TEXT) == layers.from_json(layers.as_json(LAYERS, SHAPE))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(" * 5000, "is no Python expression"),
        ("-" * 50_000 + "1", "is no Python expression"),
        ("sequential([Dense(1" + "+1" * 20_000 + ")], (2,))", "expression"),
        ("sequential(" + "a." * 20_000 + "b, (2,))", "expression"),
        ("sequential([" + "[" * 90 + "]" * 90 + "], (2,))", r"layers\[0\] is .*; expected one of Dense"),
        ("sequential([Dense(8)" + ", Dense(8)" * 2000 + "], (2,))", r"layers=2001"),
        ("sequential([Block([Dense(8)" + ", 'relu'" * 2000 + "])], (2,))", r"layers=2002"),
        ("sequential([Dense(8)], (2,))" + " " * 10**6, r"limits\(metadata_bytes="),
        ("sequential([Dense(" + "9" * 5000 + ")], (2,))", "expression"),
        ("sequential([Dense(8, name={[]: 1})], (2,))", "is no literal"),
        ("sequential([Dense(8.5)], (2,))", r"features is 8\.5; expected a whole number"),
        ("sequential([Dense(-1)], (2,))", "features is -1; expected 1 to"),
        ("sequential([Dense(10**9)], (2,))", "is no literal"),
        ("sequential([Dense(1000000000)], (2,))", r"weights is 1000000000; .*limits\(tensor_bytes=1000000000\)"),
        ("sequential([Conv(1, 3, stride=0)], (1, 8, 8))", "stride is 0; expected 1"),
        ("sequential([Conv(1, 3, padding=100000), Flatten(), Dense(2)], (1, 8, 8))", "number of its values"),
        ("sequential([Dense(8)], (2.5,))", r"input_shape\[0\] is 2\.5"),
        ("sequential([Dense(8)], (0,))", r"input_shape is \(0,\)"),
        ("sequential([Dense(8)])", "input_shape"),
        ("sequential([Dense(8, 1)], (2,))", r"use_bias is 1; expected true or false"),
        ("sequential([Activation('sine', w0=1e999), Dense(1)], (2,))", "w0 is inf; expected a finite number"),
        ("sequential([Dense(8, features=8)], (2,))", "unknown or twice"),
        ("sequential([Dense(8, True, 'a', 1)], (2,))", "takes 3 arguments, got 4"),
        ("seq\0uential([Dense(8)], (2,))", "expression|null"),
        ("x" * 10**5, "is not a call of sequential"),
    ],
)
def test_an_expression_that_is_no_list_of_layers_is_refused_briefly(text, words):
    begin = time.process_time()
    with pytest.raises(ValueError, match=words) as caught:
        layers.parse(text)
    assert len(str(caught.value)) < 2000
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": None}, "layers is None; expected a list"),
        ({"layers": [{"type": "Dense"}]}, r"layers\[0\] has no features"),
        ({"layers": [{"type": "Dense", "features": "8"}]}, r"layers\[0\]\.features is '8'"),
        ({"layers": [{"type": "Activation", "kind": "evil"}]}, r"layers\[0\]: The activation is 'evil'"),
        ({"input_shape": 3}, "input_shape is 3; expected a list"),
    ],
)
def test_a_wrong_field_of_json_is_named(change, words):
    with pytest.raises(ValueError, match=rf"describes no list of layers \({words}"):
        layers.from_json(layers.as_json([Dense(2)], (2,)) | change)


@pytest.mark.slow
def test_the_last_map_may_be_flattened_in_both_orders():
    arches = {order: sg.sequential([Conv(3, 1), "relu", Flatten(order), Dense(2)], (2, 2, 2)) for order in ORDERS}
    params = random_params(arches["channels_first"])
    x = normal(2, 2, 2, 2)
    maps = jax.nn.relu(jnp.einsum("oc,nchw->nohw", params["0.weight"][:, :, 0, 0], x) + params["0.bias"][:, None, None])
    for order, arch in arches.items():
        flat = (maps if order == "channels_first" else maps.transpose(0, 2, 3, 1)).reshape(2, -1)
        expected = flat @ params["3.weight"].T + params["3.bias"]
        np.testing.assert_allclose(network.apply(arch, params, x), expected, rtol=1e-4, atol=1e-5)
        assert arch.hidden[0].scaling.value == "positive"
        apply = jax.jit(functools.partial(network.apply, arch))
        testing.assert_function_preserved(arch, apply, params, x, samples=1)


ORDERS = ("channels_first", "channels_last")

# The layer, its input's shape, what it computes with these tensors by NumPy, and the group of the neurons before it.
V = np.array([[-7.0, -0.5, 0.0, 0.5, 7.0]], "f")
ACTIVATIONS = {
    "relu6": (Activation("relu6"), V.clip(0, 6), "permutation"),
    "elu": (Activation("elu"), np.where(V > 0, V, np.expm1(np.minimum(V, 0))), "permutation"),
    "leaky": (Activation("leaky_relu", slope=0.3), np.where(V > 0, V, 0.3 * V), "positive"),
    "sine": (Activation("sine", w0=30.0), np.sin(30 * V), "sign"),
    "hardtanh": (Activation("hardtanh"), V.clip(-1, 1), "sign"),
    "gelu_exact": (
        Activation("gelu_exact"),
        V * (1 + jax.scipy.special.erf(V / np.sqrt(2, dtype="f"))) / 2,
        "permutation",
    ),
    "gelu_tanh": (
        Activation("gelu_tanh"),
        0.5 * V * (1 + np.tanh(np.sqrt(2 / np.pi) * (V + 0.044715 * V**3))),
        "permutation",
    ),
    "prelu": (PReLU(), np.where(V > 0, V, 0.5 * V), "positive"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_pytorchs_and_have_their_groups(name):
    layer, expected, group = ACTIVATIONS[name]
    np.testing.assert_allclose(layer({"weight": jnp.full(1, 0.5)}, jnp.asarray(V)), expected, rtol=2e-4, atol=1e-5)
    assert sg.sequential([Dense(5), layer, Dense(2)], (3,)).hidden[0].scaling.value == group


def test_normalization_pooling_and_strides_are_pytorchs():
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype("f")
    t = {name: jnp.arange(1.0, 5) / 4 for name in ("weight", "bias", "running_mean", "running_var")}
    scaled = (x.transpose(0, 2, 3, 1) - t["running_mean"]) / np.sqrt(t["running_var"] + 1e-5)
    got = BatchNorm()(t, jnp.asarray(x))
    np.testing.assert_allclose(got, (scaled * t["weight"] + t["bias"]).transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(GlobalAvgPool()({}, jnp.asarray(x)), x.mean((2, 3)), rtol=1e-4, atol=1e-6)
    padded = {fill: np.pad(x, [(0, 0)] * 2 + [(1, 1)] * 2, constant_values=fill) for fill in (0, -np.inf)}
    first = {fill: values[:, :, :3, :3] for fill, values in padded.items()}
    pooled = MaxPool(3, stride=2, padding=1)({}, jnp.asarray(x))
    assert pooled.shape == (2, 4, 3, 3)
    np.testing.assert_allclose(pooled[:, :, 0, 0], first[-np.inf].max((2, 3)))
    averaged = AvgPool(3, stride=2, padding=1)({}, jnp.asarray(x))
    np.testing.assert_allclose(averaged[:, :, 0, 0], first[0].sum((2, 3)) / 9, rtol=1e-4, atol=1e-6)
    weight = normal(4, 2, 3, 3)
    out = Conv(4, 3, stride=(2, 1), padding=(1, 0), groups=2, use_bias=False)({"weight": weight}, jnp.asarray(x))
    assert out.shape == (2, 4, 3, 4)
    window = padded[0][:, :, :3, 1:4]  # padding on the first side alone
    np.testing.assert_allclose(out[:, 0, 0, 0], (window[:, :2] * weight[0]).sum((1, 2, 3)), rtol=1e-3, atol=1e-4)


def test_a_network_with_batch_normalization_keeps_its_function_and_is_merged():
    arch = sg.sequential([Conv(4, 3, use_bias=False), BatchNorm(), "relu", GlobalAvgPool(), Dense(2)], (1, 5, 5))
    assert arch.hidden[0].scaling.value == "positive"
    params, other = random_params(arch), random_params(arch, 1)
    x = normal(6, 1, 5, 5)
    moved = support.act(arch, support.rows(support.random_elements(arch, 1), 0), params)
    np.testing.assert_allclose(network.apply(arch, moved, x), network.apply(arch, params, x), rtol=1e-4, atol=1e-5)
    merged = merge.repair(arch, merge.lerp(params, other, 0.5), stacks.stack(params, other), x)
    ends = [np.asarray(network.activations(arch, p, x)["0.weight"][0]).std((0, 1, 2)) for p in (params, other, merged)]
    np.testing.assert_allclose(ends[2], (ends[0] + ends[1]) / 2, rtol=1e-3)


def test_a_file_and_a_list_of_layers_are_aligned_by_the_command_line(tmp_path, capsys):
    arch = sg.sequential(LAYERS, SHAPE)
    a = random_params(arch)
    moved = support.act(arch, support.rows(support.random_elements(arch, 1), 0), a)
    for name, params in (("a", a), ("b", moved)):
        tensors.write(tmp_path / f"{name}.pt", {key: np.asarray(value) for key, value in params.items()})
    paths = [str(tmp_path / f"{name}.pt") for name in "bac"]
    assert cli.main(["align", *paths[:2], "--arch", TEXT, "--out", paths[2]]) == 0
    assert "function    of the described network, preserved" in capsys.readouterr().out
    back = tensors.read(paths[2])
    assert list(back) == list(tensors.read(paths[0]))
    for key, value in a.items():
        np.testing.assert_allclose(back[key], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(sg.io.read_network(paths[1], arch).params["fc1.bias"], a["fc1.bias"])
    assert cli.main(["check", paths[1], "--arch", TEXT.replace("fc1", "fc9")]) == 2
    assert "missing are ['fc9.bias', 'fc9.weight']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sequential([Dense(3)", "no Python expression"),
        ("print('x')", "not a call of sequential"),
        ("sequential([__import__('os')], (2,))", "is no layer; expected one of Dense"),
        ("sequential([Dense(open('x'))], (2,))", "is no layer"),
        ("sequential([Dense(2 ** 9)], (2,))", "is no literal"),
        ("sequential([Dense(3, **{})], (2,))", "unpacks a mapping"),
        ("sequential([Dense(3, bias=False)], (2,))", "does not fit"),
        ("sequential([Dense(3)])", "expected a call like"),
        ("sequential(['gelu'], (2,))", r"Say gelu_exact \(PyTorch's default\)"),
        ("sequential([Dense(3), 'prelu', Dense(1)], (2,))", r"It has weights of its own: put PReLU\(\)"),
        ("sequential([Activation('relu', slope=0.1), Dense(2)], (2,))", "slope is 0.1, which relu does not have"),
        ("sequential([Dense(3)], (1, 4, 4))", "expected a vector .*put Flatten"),
        ("sequential([Dense(3), MaxPool(2)], (2,))", "expected a map"),
        ("sequential([MaxPool(9), Flatten(), Dense(2)], (1, 4, 4))", "too small"),
        ("sequential([Dense(3, name='a'), Dense(3, name='a')], (2,))", "Two modules are named 'a'"),
        ("sequential(['relu'], (2,))", "hold no tensors"),
        ("sequential([Flatten('rows'), Dense(2)], (2,))", "expected 'channels_first' or 'channels_last'"),
        ("sequential([Residual([Dense(3)])], (2,))", r"adds values of shapes \(3,\) and \(2,\).*Give the shortcut"),
        ("sequential([Residual([])], (2,))", r"Residual\(\[\]\)': layers holds \[\]"),
        ("sequential([Residual([3])], (2,))", r"branch\[0\] is 3; expected one of Dense"),
        ("sequential([Block('relu'), Dense(2)], (2,))", "layers is 'relu'; expected a list"),
        ("sequential([ResNet(19)], (3, 32, 32))", r"depth is 19; expected one of \[18, 34, 50"),
        ("sequential([BasicBlock(0), GlobalAvgPool()], (3, 8, 8))", "features is 0; expected 1"),
        ("sequential([BasicBlock(4), Dense(2)], (3,))", "Conv.*expected a map"),
        ("sequential([Block([Dense(2)], name='a'), Dense(3, name='a.0')], (4,))", "Two modules are named 'a.0'"),
        ("sequential([ResNet(18, width=10**9)], (3, 32, 32))", "is no literal"),
        ("sequential([ResNet(18, width=1000000000)], (3, 32, 32))", "features is 4000000000; expected 1 to 2147483647"),
        ("sequential([ResNet(18, width=100000000)], (3, 32, 32))", r"limits\(tensor_bytes="),
    ],
)
def test_what_is_no_list_of_layers_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        layers.parse(text)


@pytest.mark.parametrize("prefix", ["module.", "model.net."])
def test_a_prefix_of_all_names_is_left_out_and_written_back(prefix, tmp_path):
    arch = sg.sequential(LAYERS, SHAPE)
    own = {prefix + name: np.asarray(value) for name, value in random_params(arch).items()} | {
        "n_averaged": np.array(7)
    }
    tensors.write(tmp_path / "a.pt", own)
    file = sg.io.read_network(tmp_path / "a.pt", arch)
    assert file.params.keys() == {name for (name,) in arch.array_shapes}
    sg.io.write_network(tmp_path / "b.pt", arch, jax.tree.map(lambda leaf: 2 * leaf, file.params), file)
    written = tensors.read(tmp_path / "b.pt")
    assert list(written) == list(own)
    assert written["n_averaged"] == 7
    np.testing.assert_array_equal(written[f"{prefix}fc1.bias"], 2 * own[f"{prefix}fc1.bias"])
    tensors.write(tmp_path / "c.pt", own | {f"{prefix}more": np.ones(2, "f")})
    with pytest.raises(ValueError, match="Give the layers the file's names"):
        sg.io.read_network(tmp_path / "c.pt", arch)


# --- layers inside of layers ------------------------------------------------------------------------------------------

NESTED = [
    *(Block([Conv(4, 3, padding=1, use_bias=False), BatchNorm(), "relu", MaxPool(2)], name="features"), Dropout()),
    *(BasicBlock(4, name="layer1.0"), Bottleneck(2, stride=2, expansion=3, name="layer2.0")),
    *(Residual([Block([Conv(6, 3, padding=1), "relu"]), Conv(6, 1)], [Conv(6, 1, use_bias=False)]), "relu"),
    *(GlobalAvgPool(), Block([Dense(5), Residual([Dense(5, name="own")], name=""), "relu", Dense(2)], name="head")),
]
NESTED_TEXT = (
    "sequential([Block([Conv(4, 3, padding=1, use_bias=False), BatchNorm(), 'relu', MaxPool(2)], name='features'), "
    "Dropout(), BasicBlock(4, name='layer1.0'), layers.Bottleneck(2, stride=2, expansion=3, name='layer2.0'), "
    "Residual([Block([Conv(6, 3, padding=1), 'relu']), Conv(6, 1)], [Conv(6, 1, use_bias=False)]), 'relu', "
    "GlobalAvgPool(), Block([Dense(5), Residual([Dense(5, name='own')], name=''), 'relu', Dense(2)], name='head')], "
    "(1, 8, 8))"
)


def nested_by_hand(params, x):
    def conv(name, x, stride=1, padding=0):
        y = jax.lax.conv_general_dilated(x, params[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
        return y + params[f"{name}.bias"][:, None, None] if f"{name}.bias" in params else y

    def norm(name, x):
        w, b, m, v = (params[f"{name}.{k}"][:, None, None] for k in ("weight", "bias", "running_mean", "running_var"))
        return (x - m) / jnp.sqrt(v + 1e-5) * w + b

    def dense(name, x):
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    x = jax.nn.relu(norm("features.1", conv("features.0", x, padding=1)))
    x = x.reshape(len(x), 4, 4, 2, 4, 2).max((3, 5))
    y = jax.nn.relu(norm("layer1.0.bn1", conv("layer1.0.conv1", x, padding=1)))
    x = jax.nn.relu(x + norm("layer1.0.bn2", conv("layer1.0.conv2", y, padding=1)))
    y = jax.nn.relu(norm("layer2.0.bn1", conv("layer2.0.conv1", x)))
    y = jax.nn.relu(norm("layer2.0.bn2", conv("layer2.0.conv2", y, 2, 1)))
    y = norm("layer2.0.bn3", conv("layer2.0.conv3", y))
    x = jax.nn.relu(y + norm("layer2.0.downsample.1", conv("layer2.0.downsample.0", x, 2)))
    x = jax.nn.relu(conv("4.1", jax.nn.relu(conv("4.0.0", x, padding=1))) + conv("4.downsample.0", x))
    x = dense("head.0", x.mean((2, 3)))
    return dense("head.3", jax.nn.relu(x + dense("head.own", x)))


def test_layers_inside_of_layers_are_the_function_written_by_hand():
    arch = sg.sequential(NESTED, (1, 8, 8))
    params, x = random_params(arch), normal(3, 1, 8, 8)
    own, expected = (jax.jit(f)(params, x) for f in (functools.partial(network.apply, arch), nested_by_hand))
    np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
    inferred = sg.infer(nested_by_hand, params, x).arch
    assert inferred.neuron_layers == arch.neuron_layers
    assert set(inferred.parameters) == set(arch.parameters)
    assert (
        arch == layers.parse(NESTED_TEXT) == layers.from_json(json.loads(json.dumps(layers.as_json(NESTED, (1, 8, 8)))))
    )


@pytest.mark.parametrize(("depth", "tensors"), [(18, 102), (50, 267)])
def test_resnets_have_the_tensors_of_torchvisions(depth, tensors):
    # Of torchvision's state_dicts without num_batches_tracked: 122 - 20, and 320 - 53.
    arch = sg.sequential([ResNet(depth, width=2, outputs=3)], (3, 32, 32))
    shapes = {name: shape for (name,), shape in arch.array_shapes.items()}
    assert len(shapes) == tensors
    assert shapes["conv1.weight"] == (2, 3, 7, 7)
    wide = 4 if depth == 50 else 1
    assert shapes["layer4.0.downsample.0.weight"] == (16 * wide, 8 * wide, 1, 1)
    assert ("layer1.0.downsample.0.weight" in shapes) is (depth == 50)
    assert shapes["layer3.1.conv2.weight"] == (8, 8, 3, 3)
    assert shapes["fc.weight"] == (3, 16 * wide)


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_models_follow_scales_after_pytorchs_batch_normalization(bidirectional):
    layers_ = [Conv(3, 3, use_bias=False), BatchNorm(), "relu", Conv(4, 3), BatchNorm(), "relu", Flatten(), Dense(2)]
    arch = sg.sequential(layers_, (1, 6, 6))
    scale, kernel = (next(p for p in arch.parameters if p.path == (f"{n}.weight",)) for n in (1, 3))
    assert (scale.axes[0].power, kernel.axes[0].power, kernel.axes[1].power) == (-1, 0, 1)
    params, key = random_params(arch), jax.random.key(3)
    gmn = sg.ScaleGMN(arch, features=4, num_layers=2, bidirectional=bidirectional)
    for model, check in ((sg.Encoder(gmn), testing.assert_invariant), (sg.Editor(gmn), testing.assert_equivariant)):
        variables = model.init(jax.random.key(0), params)
        variables = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), variables)
        check(arch, jax.jit(functools.partial(model.apply, variables)), params, key)
    graph = sg.models.graph.from_params(arch, params)
    support.assert_identical(sg.models.graph.to_params(arch, graph), params)


@pytest.mark.slow
def test_a_planted_element_is_recovered_from_activations():
    arch = sg.sequential(LAYERS, SHAPE)
    params, x = random_params(arch), normal(8, *SHAPE)
    element = support.rows(support.random_elements(arch, 1), 0)
    moved = support.act(arch, element, params)
    found = matching.activation_matching(arch, moved, params, x)
    assert found.similarity > 0.999

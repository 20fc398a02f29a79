"""Descriptions that are inferred from functions: those of the builders, right on every network, and never too large."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax import lax

import jax_scalegmn as sg
from jax_scalegmn import architecture, inference, matching, network, symmetry, testing
from jax_scalegmn.architecture import Architecture, Axis, Scaling
from jax_scalegmn.models import graph

FIXED, PERMUTATION, SIGN, POSITIVE, NONZERO = Scaling


def generic(tree, seed: int = 0, dtype="float32"):
    """Params without a special value; variances and gains are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        positive = str(path[-1].key) in ("var", "scale", "gain")
        return jnp.asarray(np.abs(value) + 0.3 if positive else value, dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def inputs(*shape, seed: int = 1, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), dtype)


def linen(module: nn.Module, x):
    """A Flax network as a function of its merged params, with params."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return (
        lambda params, x: module.apply(network.split_variables(params), x),
        generic(network.merge_variables(shapes)),
        x,
    )


def arrays(**shapes):
    return generic({name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()})


@functools.partial(jax.jit, static_argnums=1)
def moved_outputs(arch: Architecture, apply, params, x, elements):
    """The outputs of the network moved by each of a stack of elements, in one program."""
    return jax.lax.map(lambda element: apply(symmetry.act(arch, element, params), x), elements)


def change(arch: Architecture, apply, params, x, samples: int = 3) -> float:
    """The largest relative change of the outputs under random elements of the described group."""
    elements = support.random_elements(arch, samples)
    # The identity comes first.
    elements = jax.tree.map(lambda one, more: np.concatenate([one[None], more]), symmetry.identity(arch), elements)
    outputs = np.asarray(moved_outputs(arch, apply, params, x, elements))
    return max(support.deviation(output, outputs[0]) for output in outputs[1:])


@jax.jit
def graph_round_trip(arch: Architecture, params):
    return graph.to_params(arch, graph.from_params(arch, params))


def scalings(arch: Architecture) -> dict[str, Scaling]:
    return {neurons.name: neurons.scaling for neurons in arch.hidden}


def assert_same_description(inferred: Architecture, expected: Architecture) -> None:
    """The same arrays, groups and axes up to names of layers on which a group acts; powers where a scale acts."""
    assert {p.path for p in inferred.parameters} == {p.path for p in expected.parameters}
    names = {}
    for parameter in expected.parameters:
        (twin,) = [other for other in inferred.parameters if other.path == parameter.path]
        assert inferred.shape(twin) == expected.shape(parameter)
        for axis, other in zip(parameter.axes, twin.axes, strict=True):
            assert isinstance(axis, Axis) == isinstance(other, Axis), (parameter, twin)
            if isinstance(axis, Axis):
                scaling = expected.neuron_layer(axis.neurons).scaling
                assert scaling is FIXED or names.setdefault(axis.neurons, other.neurons) == other.neurons
                assert (inferred.neuron_layer(other.neurons).scaling, other.repeat) == (scaling, axis.repeat)
                assert scaling not in (SIGN, POSITIVE) or other.power == axis.power, (parameter, twin)
    assert len(set(names.values())) == len(names) == len(inferred.hidden)


# --- the builders' networks -----------------------------------------------------------------------------------------

WIDTHS = {"widths": (4, 6), "outputs": 3, "input_channels": 2}
BUILT = {
    **support.ARCHITECTURES,
    "width 1": sg.mlp((2, 1, 3, 1), ("relu", "tanh")),
    **{
        f"vgg {activation} {norm} {pooling}": sg.vgg(
            ((4, 6), (4,)), 3, input_channels=2, activation=activation, norm=norm, groups=groups, pooling=pooling
        )
        for activation, norm, groups, pooling in [
            ("tanh", "batch", None, "max"),
            ("tanh", "layer", None, "mean"),
            ("relu", None, None, "max"),
            ("relu", "group", 2, "mean"),
        ]
    },
    **{
        f"resnet {activation} {norm} {groups}": sg.resnet(6, activation=activation, norm=norm, groups=groups, **WIDTHS)
        for activation, norm, groups in [
            ("relu", "batch", None),
            ("tanh", None, None),
            ("gelu", "layer", None),
            ("relu", "group", 1),
            ("relu", "group", 2),
        ]
    },
}


@pytest.mark.parametrize("arch", BUILT.values(), ids=BUILT)
def test_the_builders_descriptions_are_found(arch):
    x = support.example(arch) if arch.neuron_layers[0].name == "input" and len(arch.name.split()[0]) < 6 else None
    x = inputs(2, 6, 8, arch.neuron_layers[0].width) if arch.name.startswith(("vgg", "resnet")) else x

    def apply(params, x):
        return jax.vmap(lambda one: network.apply(arch, params, one))(x)

    inferred = inference.infer(apply, jax.eval_shape(lambda: support.random_params(arch)), x)
    assert_same_description(inferred.arch, arch)
    assert inferred.arch.name == "inferred from apply"
    assert inferred.arch.layers == ()
    assert (inferred.arch.neuron_layers[0].name, inferred.arch.neuron_layers[-1].name) == ("input", "output")
    fixed = any(n.scaling is FIXED for n in arch.neuron_layers[1:-1])
    assert any("`reshape` splits its axis" in note for note in inferred.notes) == fixed


def test_a_builders_description_with_another_group_is_not_what_is_found():
    arch = BUILT["mixed mlp"]
    other = architecture.restrict(arch, SIGN)
    inferred = inference.infer(
        lambda p, x: network.apply(arch, p, x), support.random_params(arch), support.example(arch)[0]
    )
    with pytest.raises(AssertionError):
        assert_same_description(inferred.arch, other)


@pytest.mark.parametrize("name", support.HAND_WRITTEN)
def test_hand_written_descriptions_are_found_or_surpassed(name):
    arch, apply = support.HAND_WRITTEN[name]
    params, x = support.random_params(arch), inputs(4, 3)
    inferred = inference.infer(apply, params, x).arch
    if name == "layer norm":  # by hand only permutations, but what the normalizations put on the head can take off
        assert scalings(inferred) == {"embed": NONZERO, "up": POSITIVE}
    else:
        assert sorted(s.value for s in scalings(inferred).values()) == sorted(s.value for s in scalings(arch).values())
    assert change(inferred, apply, params, x) < 1e-5


# --- other networks -------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Stem, normalization, pooling and a head, in the usual forms."""

    norm: object
    pool: object
    flatten: bool = False

    @nn.compact
    def __call__(self, x):
        x = self.pool(nn.relu(self.norm()(nn.Conv(4, (3, 3))(x))), (2, 2), (2, 2))
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(2)(x.reshape(len(x), -1) if self.flatten else x.mean((1, 2)))


class Dense(nn.Module):
    """Every layer reads all before it (DenseNet)."""

    @nn.compact
    def __call__(self, x):
        for width in (4, 3, 3):
            maps = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = jnp.concatenate([x, nn.Conv(width, (3, 3))(maps)], -1)
        return nn.Dense(2)(nn.relu(x).mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        fine = nn.relu(nn.Conv(4, (3, 3))(x))
        coarse = nn.relu(nn.Conv(5, (3, 3))(nn.avg_pool(fine, (2, 2), (2, 2))))
        coarse = jax.image.resize(coarse, (*fine.shape[:-1], 5), "nearest")
        return nn.Conv(1, (1, 1))(nn.tanh(nn.Conv(3, (3, 3))(jnp.concatenate([fine, coarse], -1))))[..., 0]


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (1, 1))(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4)(x))
        return nn.Dense(2)(nn.relu(nn.Conv(5, (1, 1))(x)).max((1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x) + self.param("places", nn.initializers.normal(), (1, x.shape[1], 6))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(2)((x + nn.Dense(6)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))).mean(1))


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, words):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(nn.Embed(7, 3)(words))).mean(1))


def gated(params, x):
    value, gate = jnp.split(x @ params["in"] + params["bias"], 2, -1)
    return (value * jax.nn.sigmoid(gate)) @ params["out"]


def nerf(params, x):
    h = jax.nn.relu(x @ params["in"])
    return jax.nn.relu(jnp.concatenate([x, h], -1) @ params["again"]) @ params["out"]


def tied(params, x):
    """One kernel reads and, transposed, writes: a scale would count twice, a sign not at all."""
    return jax.nn.relu(x @ params["in"]) @ params["kernel"] @ params["kernel"].T @ params["out"]


def doubled(params, x):
    """Positive and negative parts of the same units (CReLU)."""
    h = x @ params["in"] + params["bias"]
    return jax.nn.relu(jnp.concatenate([h, -h], -1)) @ params["out"]


def root_mean_square(params, x):
    """Even in every unit: signs pass the normalization."""
    h = x @ params["in"]
    return jnp.tanh(h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-3)) @ params["out"]


def powers(params, x):
    """A layer and its square are read: no power of either would fit both."""
    h = jax.nn.relu(x @ params["in"])
    return h @ params["out"] + jnp.square(h) @ params["other"]


def transposed(params, x):
    """Kernels that are [out, in]: described against their direction, with the inverse of every scale."""
    return jax.nn.relu(x @ params["in"].T) @ params["out"].T


def normalized(params, x):
    """The same with a batch normalization, after which the scale is: the kernel before it is left alone."""
    centered = (x @ params["in"].T - params["mean"]) * lax.rsqrt(params["var"] + 1e-5)
    return jax.nn.relu(centered * params["scale"] + params["bias"]) @ params["out"].T


def stacked(params, x):
    """The units and their negative parts along a new axis, which the next kernel has, too."""
    h = x @ params["in"] + params["bias"]
    return jnp.einsum("nsu,suo->no", jax.nn.relu(jnp.stack([h, -h], 1)), params["out"])


def twice(params, x):
    """The units between two kernels that are each used in two places."""
    return jnp.tanh(jnp.tanh(x @ params["in"]) @ params["out"] @ params["in"]) @ params["out"]


IMAGES, VECTORS, ROWS = inputs(2, 6, 8, 2), inputs(4, 3), inputs(2, 4, 3)


def batch_norm():
    return nn.BatchNorm(use_running_average=True)


# name -> (a module, or a function and its params; inputs; the groups of the hidden layers)
NETWORKS = {
    "max pool": (Convolutions(batch_norm, nn.max_pool), None, IMAGES, {"Conv_0": POSITIVE, "Conv_1": SIGN}),
    "flatten": (Convolutions(nn.LayerNorm, nn.avg_pool, True), None, IMAGES, {"Conv_0": POSITIVE, "Conv_1": SIGN}),
    "one group": (
        Convolutions(lambda: nn.GroupNorm(1), nn.max_pool),
        None,
        IMAGES,
        {"Conv_0": POSITIVE, "Conv_1": SIGN},
    ),
    "two groups": (Convolutions(lambda: nn.GroupNorm(2), nn.max_pool), None, IMAGES, {"Conv_1": SIGN}),
    "DenseNet": (Dense(), None, IMAGES, dict.fromkeys(("Conv_0", "Conv_1", "Conv_2"), POSITIVE)),
    "U-Net": (UNet(), None, IMAGES, {"Conv_0": POSITIVE, "Conv_1": POSITIVE, "Conv_3": SIGN}),
    "depthwise": (Depthwise(), None, IMAGES, {"Conv_0": POSITIVE, "Conv_2": POSITIVE}),
    "transformer": (
        Transformer(),
        None,
        ROWS,
        {
            "Dense_0": PERMUTATION,
            "MultiHeadDotProductAttention_0/query": SIGN,
            "MultiHeadDotProductAttention_0/value": NONZERO,
            "Dense_3": PERMUTATION,
        },
    ),
    "embedding": (Embedded(), None, jnp.array([[0, 2, 5]]), {"Embed_0": NONZERO, "Dense_1": POSITIVE}),
    "gated": (gated, arrays(**{"in": (3, 8), "bias": (8,), "out": (4, 2)}), VECTORS, {"in": NONZERO}),
    "NeRF": (
        nerf,
        arrays(**{"in": (3, 5), "again": (8, 4), "out": (4, 2)}),
        VECTORS,
        {"in": POSITIVE, "again": POSITIVE},
    ),
    "tied": (
        tied,
        arrays(**{"in": (3, 5), "kernel": (5, 4), "out": (5, 2)}),
        VECTORS,
        {"in": PERMUTATION, "kernel": SIGN},
    ),
    "doubled": (doubled, arrays(**{"in": (3, 4), "bias": (4,), "out": (8, 2)}), VECTORS, {"in": POSITIVE}),
    "root mean square": (root_mean_square, arrays(**{"in": (3, 4), "out": (4, 2)}), VECTORS, {"in": SIGN}),
    "powers": (powers, arrays(**{"in": (3, 4), "out": (4, 2), "other": (4, 2)}), VECTORS, {"in": PERMUTATION}),
    "transposed": (transposed, arrays(**{"in": (4, 3), "out": (2, 4)}), VECTORS, {"in": POSITIVE}),
    "normalized": (
        normalized,
        arrays(**{"in": (4, 3), "out": (2, 4), "mean": (4,), "scale": (4,), "bias": (4,)}) | {"var": jnp.ones(4)},
        VECTORS,
        {"in": POSITIVE},
    ),
    "stacked": (stacked, arrays(**{"in": (3, 4), "bias": (4,), "out": (2, 4, 2)}), VECTORS, {"in": POSITIVE}),
    "twice": (twice, arrays(**{"in": (3, 4), "out": (4, 3)}), VECTORS, {"in": SIGN}),
}


def network_of(name: str):
    function, params, x, _ = NETWORKS[name]
    return linen(function, x) if params is None else (function, params, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_group_is_found_and_keeps_the_function(name):
    (apply, params, x), expected = network_of(name), NETWORKS[name][-1]
    inferred = inference.infer(apply, params, x)
    assert scalings(inferred.arch) == expected, inferred.notes
    assert change(inferred.arch, apply, params, x) < 1e-5
    support.assert_identical(graph_round_trip(inferred.arch, params), params)
    plain = dataclasses.replace(inferred.arch, function=None)
    assert architecture.from_json(json.loads(json.dumps(inferred.arch.as_json()))) == plain
    # Every layer that has less than a scale, and is no input or output, has a note for each of its axes.
    for neurons in inferred.arch.neuron_layers:
        if neurons.scaling in (FIXED, PERMUTATION) and neurons.name.split("_")[0] not in ("input", "output"):
            for parameter in inferred.arch.parameters:
                for axis, which in enumerate(parameter.axes):
                    if isinstance(which, Axis) and which.neurons == neurons.name:
                        where = f"params{architecture.describe(parameter.path)} axis {axis} ({neurons.name!r}): "
                        assert any(note.startswith(where) for note in inferred.notes)


@pytest.mark.parametrize("name", [pytest.param("DenseNet", marks=pytest.mark.slow), "NeRF", "root mean square"])
def test_a_larger_group_or_another_power_breaks_the_function(name):
    apply, params, x = network_of(name)
    arch = inference.infer(apply, params, x).arch
    other = {POSITIVE: SIGN, SIGN: POSITIVE}
    for layer in arch.hidden:
        neurons = tuple(
            dataclasses.replace(n, scaling=other[n.scaling]) if n == layer else n for n in arch.neuron_layers
        )
        assert change(dataclasses.replace(arch, neuron_layers=neurons), apply, params, x) > 1e-3
    first = next(
        p
        for p in arch.parameters
        if any(a.power and arch.neuron_layer(a.neurons) in arch.hidden for a in p.neuron_axes)
    )
    axes = tuple(dataclasses.replace(a, power=0) if isinstance(a, Axis) else a for a in first.axes)
    wrong = tuple(dataclasses.replace(p, axes=axes) if p == first else p for p in arch.parameters)
    assert change(dataclasses.replace(arch, parameters=wrong), apply, params, x) > 1e-3


def test_the_check_for_users_accepts_what_is_inferred():
    apply, params, x = network_of("NeRF")
    testing.assert_function_preserved(inference.infer(apply, params, x).arch, jax.jit(apply), params, x, samples=2)


def test_matching_recovers_an_element_of_a_network_with_concatenations():
    apply, params, x = network_of("NeRF")
    arch = inference.infer(apply, params, x).arch
    element = support.rows(support.random_elements(arch, 1, scale=False), 0)
    moved = support.act(arch, element, params)
    aligned = jax.jit(lambda p, t: matching.align(arch, p, t, scale=False))(moved, params)
    assert support.deviation(aligned, params) < 1e-6
    assert support.deviation(moved, params) > 0.1


def test_what_happens_before_a_normalization_is_noted():
    apply, params, x = network_of("max pool")
    notes = [note for note in inference.infer(apply, params, x).notes if "left alone" in note]
    assert [note.split(" (")[0] for note in notes] == [
        "params['Conv_0']['kernel'] axis 3",
        "params['Conv_0']['bias'] axis 0",
        "params['BatchNorm_0']['mean'] axis 0",
    ]


def test_kernels_that_are_out_in_have_the_scale_of_those_that_are_in_out():
    apply, params, x = network_of("normalized")
    turned = {name: value.T for name, value in params.items()}
    pair = (apply, params), (lambda p, x: apply({name: value.T for name, value in p.items()}, x), turned)
    (arch, notes), (other, other_notes) = (inference.infer(fn, some, x) for fn, some in pair)
    powers = {p.path[0]: [axis.power for axis in p.neuron_axes if axis.neurons == "in"] for p in arch.parameters}
    assert powers == {"in": [0], "mean": [0], "var": [0], "scale": [-1], "bias": [-1], "out": [1]}
    there = {p.path[0]: [axis.power for axis in p.neuron_axes if axis.neurons == "in"] for p in other.parameters}
    assert there == {name: [-power for power in some] for name, some in powers.items()}
    assert [note.split(": ")[1] for note in notes] == [note.split(": ")[1] for note in other_notes]


# --- what cannot be proved ------------------------------------------------------------------------------------------

ROW = np.array([1.0, 2.0, 3.0, 4.0], "float32")


def on_units(function, width: int = 4):
    """Units between two kernels, with something done to them."""
    return lambda params, x: function(jnp.tanh(x @ params["in"])) @ params["out"], (3, 4), (width, 2), VECTORS


def recurrent(params, x):
    carry, _ = lax.scan(lambda h, u: (jnp.tanh(u @ params["in"] + h), None), jnp.zeros((2, 4)), x.swapaxes(0, 1))
    return carry @ params["out"]


def called_back(h):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h)


def self_fed(params, x):
    h = jnp.tanh(x @ params["in"])
    return (h + jnp.tanh(h @ params["kernel"])) @ params["out"]


FORCED = {
    "constants": (on_units(lambda h: h * ROW), "`mul` meets it with numbers that differ from neuron to neuron"),
    "places": (on_units(lambda h: h + lax.iota("float32", 4)), "`add` meets it with numbers"),
    "constant kernel": (on_units(lambda h: h @ np.diag(ROW)), "`dot_general` sums it with numbers"),
    "sort": (on_units(jnp.sort), "`sort` reads it, an operation whose symmetry is not known"),
    "fft": (on_units(lambda h: jnp.fft.fft(h).real), "`fft` reads it"),
    "reversed": (on_units(lambda h: h[:, ::-1]), "`rev` turns"),
    "every other": (on_units(lambda h: h[:, ::2], 2), "`slice` takes every n-th neuron"),
    "chosen": (on_units(lambda h: h[:, np.array([0, 2])], 2), "`gather` takes some of its neurons"),
    "largest": (on_units(lambda h: jax.nn.one_hot(h.argmax(-1), 4)), "`argmax` tells the place"),
    "running sum": (on_units(lambda h: h.cumsum(-1)), "`cumsum` goes through its neurons in order"),
    "window": (on_units(lambda h: nn.avg_pool(h[..., None], (2,), (2,))[..., 0], 2), "a window covers several"),
    "dilated": (on_units(lambda h: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 1))), 7), "`pad` takes its neurons apart"),
    "loop": ((recurrent, (3, 4), (4, 2), ROWS), "`scan` reads it"),
    "callback": (on_units(called_back), "`pure_callback` reads it"),
}


@pytest.mark.parametrize("name", FORCED)
def test_what_cannot_be_proved_is_fixed_and_noted(name):
    (apply, first, second, x), reason = FORCED[name]
    params = arrays(**{"in": first, "out": second})
    inferred = inference.infer(apply, params, x)
    assert inferred.arch.hidden == ()
    assert any(f"params['in'] axis {len(first) - 1}" in note and reason in note for note in inferred.notes), (
        inferred.notes
    )


def test_one_neuron_that_is_looked_at_is_fixed_alone():
    apply, first, second, x = on_units(lambda h: h + h[:, 1:2])
    params = arrays(**{"in": first, "out": second})
    inferred = inference.infer(apply, params, x)
    assert [(n.width, n.scaling) for n in inferred.arch.hidden] == [(1, PERMUTATION), (2, PERMUTATION)]
    assert any(
        "`add` repeats its one neuron" in note or "`broadcast_in_dim` repeats" in note for note in inferred.notes
    )
    assert change(inferred.arch, apply, params, x) < 1e-5


def test_a_kernel_inside_one_layer_and_a_parameter_that_is_not_read_are_fixed():
    params = arrays(**{"in": (3, 4), "kernel": (4, 4), "out": (4, 2), "unread": (5,)})
    inferred = inference.infer(self_fed, params, VECTORS)
    assert inferred.arch.hidden == ()
    assert any("the kernel params['kernel'] leads from it to itself" in note for note in inferred.notes)
    assert any(note.startswith("params['unread']") and "does not read it" in note for note in inferred.notes)
    support.assert_identical(graph_round_trip(inferred.arch, params), params)


def test_a_scalar_belongs_to_no_layer_and_has_no_place_in_a_graph():
    apply, params, x = network_of("NeRF")
    params = params | {"scale": jnp.float32(2)}

    def scaled(params, x):
        return params["scale"] * apply(params, x)

    arch = inference.infer(scaled, params, x).arch
    assert scalings(arch) == {"in": POSITIVE, "again": POSITIVE}
    assert change(arch, scaled, params, x) < 1e-5
    with pytest.raises(ValueError, match=r"\['scale'\] has no neuron axis"):
        graph.from_params(arch, params)


# --- at the door ----------------------------------------------------------------------------------------------------


def test_other_mappings_shapes_alone_and_several_inputs_are_read_alike():
    apply, params, x = network_of("NeRF")
    expected = inference.infer(apply, params, x).arch
    for given in (freeze(params), jax.eval_shape(lambda: params)):
        arch = inference.infer(apply, given, x).arch
        assert (arch.neuron_layers, arch.parameters) == (expected.neuron_layers, expected.parameters)
    assert jax.jit(lambda p: inference.infer(apply, p, x).arch)(params) == expected
    nested = inference.infer(lambda p, x: apply(p["net"], x), {"net": params}, x).arch
    assert [p.path for p in nested.parameters] == [("net", *p.path) for p in expected.parameters]
    pair = inference.infer(lambda p, xs: apply(p, xs["left"] - xs["right"]), params, {"left": x, "right": x}).arch
    assert pair.parameters == expected.parameters


def test_a_state_of_nnx_is_read_as_a_pure_mapping():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graphdef, state = nnx.split(model)

    def apply(params, x):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graphdef, filled)(x)

    params = nnx.to_pure_dict(state)
    inferred = inference.infer(apply, params, VECTORS)
    assert scalings(inferred.arch) == {"layers/0": SIGN}
    assert change(inferred.arch, apply, params, VECTORS) < 1e-5


@pytest.mark.parametrize(
    ("apply", "params", "message"),
    [
        (nerf, {}, r"params holds no array; expected nested mappings"),
        (
            nerf,
            {"in": (np.ones(3),)},
            r"params\['in'\]\[0\] is in a tuple; expected a module, or mappings and lists of arrays",
        ),
        (nerf, {"in": "x"}, r"params\['in'\] is a str; expected an array of numbers"),
        (nerf, {"in": None}, r"params\['in'\] is a NoneType; expected an array"),
        (nerf, {"in": jax.random.key(0)}, r"params\['in'\] is a .*; expected an array of numbers"),
        (
            nerf,
            {"in": np.ones((3, 2))},
            r"nerf\(params, example_input\) failed with KeyError.*\(3, 2\).*inputs \(4, 3\)",
        ),
        (lambda params, x: x.sum(), {"in": np.ones(3)}, r"No output of <lambda> depends on the params .*closed over"),
    ],
)
def test_what_is_not_a_network_is_refused(apply, params, message):
    with pytest.raises(ValueError, match=message):
        inference.infer(apply, params, VECTORS)

"""Networks with normalizations and residual streams: Flax's functions, and the groups that really act on them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from jax_scalegmn import architecture, io, matching, models, network, symmetry, testing
from jax_scalegmn.architecture import Architecture, BatchNorm, Dense, Residual, Scaling
from jax_scalegmn.models import graph

STAGES, WIDTHS = ((4, 6), (4,)), (4, 6, 4)
NORMS = {"none": {"norm": None}, "batch": {"norm": "batch"}, "layer": {"norm": "layer"}} | {
    f"{groups} groups": {"norm": "group", "groups": groups} for groups in (1, 2)
}
ACTIVATIONS = ("relu", "tanh", "gelu")
BUILDERS = {
    "vgg max": lambda **options: sg.vgg(STAGES, 3, input_channels=2, **options),
    "vgg mean": lambda **options: sg.vgg(STAGES, 3, input_channels=2, pooling="mean", **options),
    "resnet": lambda **options: sg.resnet(8, widths=WIDTHS, outputs=3, input_channels=2, **options),
}
NETWORKS = {
    f"{name}, {norm}, {activation}": build(activation=activation, **options)
    for name, build in BUILDERS.items()
    for norm, options in NORMS.items()
    for activation in ACTIVATIONS
}
# Every builder with every norm, every builder with every activation, and every norm with every activation.
REPRESENTATIVE = [
    f"{name}, {norm}, {ACTIVATIONS[(i + j) % len(ACTIVATIONS)]}"
    for i, name in enumerate(BUILDERS)
    for j, norm in enumerate(NORMS)
]
RESNET, VGG = NETWORKS["resnet, batch, relu"], NETWORKS["vgg max, batch, relu"]
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def generic_params(arch: Architecture, seed: int = 0, dtype="float32"):
    """Params without an entry at a special value; variances are positive."""
    rng = np.random.default_rng(seed)
    values = []
    for parameter in arch.parameters:
        shape = arch.shape(parameter)
        value = rng.normal(size=shape) * (1 / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.5)
        starts = {"var": np.abs(value) + 0.3, "scale": np.sign(value) * (np.abs(value) + 0.3)}
        values.append(jnp.asarray(starts.get(parameter.path[-1], value), dtype))
    return architecture.pack(arch, values)


def images(arch: Architecture, count: int = 3, dtype="float32"):
    shape = (count, 5, 6, arch.neuron_layers[0].width)
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 1, shape), dtype)


def scalings(arch: Architecture) -> dict[str, Scaling]:
    return {neurons.name: neurons.scaling for neurons in arch.neuron_layers[1:-1]}


def moved(arch: Architecture, layer: str, scaling: Scaling, params):
    """The params moved by one element of that group on one layer: a cyclic permutation, or scales alone."""
    neurons = tuple(
        dataclasses.replace(n, scaling=scaling if n.name == layer else Scaling.FIXED) for n in arch.neuron_layers
    )
    index = np.arange(arch.neuron_layer(layer).width)
    scale = {Scaling.SIGN: 1.0 - 2 * (index % 2), Scaling.POSITIVE: 2.0**index}.get(scaling, index**0.0)
    order = np.roll(index, 1) if scaling is Scaling.PERMUTATION else index
    element = symmetry.Element({layer: jnp.asarray(order)}, {layer: jnp.asarray(scale, "float32")})
    return symmetry.act(dataclasses.replace(arch, neuron_layers=neurons), element, params)


# --- the groups -----------------------------------------------------------------------------------------------------


LARGER = {
    Scaling.FIXED: (Scaling.PERMUTATION,),
    Scaling.PERMUTATION: (Scaling.SIGN, Scaling.POSITIVE),
    Scaling.SIGN: (Scaling.POSITIVE,),
    Scaling.POSITIVE: (Scaling.SIGN,),
}


def assert_function_preserved(arch: Architecture, dtype: str) -> None:
    """Also under positive scales from 1e-6 to 1e6."""
    with support.precision(dtype):
        params, x = generic_params(arch, dtype=dtype), images(arch, dtype=dtype)
        for spread, samples in ((1.0, 2), (4.6, 1)):
            testing.assert_function_preserved(
                arch,
                lambda p, x: support.outputs(arch, p, x),
                params,
                x,
                tolerance=TOLERANCE[dtype],
                samples=samples,
                log_scale_std=spread,
            )


def assert_group_is_the_largest(arch: Architecture) -> None:
    params, x = generic_params(arch), images(arch)
    expected = support.outputs(arch, params, x)
    for layer, scaling in scalings(arch).items():
        for wrong in LARGER[scaling]:
            changed = support.outputs(arch, moved(arch, layer, wrong, params), x)
            assert support.deviation(changed, expected) > 1e-4, f"{wrong} acts on {layer!r} as well"


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_the_function_is_preserved_and_the_group_is_the_largest(name):
    assert_function_preserved(NETWORKS[name], "float32")
    assert_group_is_the_largest(NETWORKS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet, batch, relu", "vgg max, none, tanh"])
def test_the_function_is_preserved_in_double_precision(name):
    assert_function_preserved(NETWORKS[name], "float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_keeps_its_function_and_has_the_largest_group(name):
    for dtype in ("float32", "float64"):
        assert_function_preserved(NETWORKS[name], dtype)
    assert_group_is_the_largest(NETWORKS[name])


def test_each_layer_has_the_group_that_its_activation_norm_and_pooling_leave():
    p, s, pos, fixed = Scaling.PERMUTATION, Scaling.SIGN, Scaling.POSITIVE, Scaling.FIXED
    hidden = ("hidden_0", "hidden_1", "hidden_2")
    stream = ("stream_0", "inner_0_0", "stream_1", "inner_1_0", "stream_2", "inner_2_0")
    for norm in ("none", "batch", "layer", "1 groups"):
        for name in ("vgg max", "vgg mean"):
            assert scalings(NETWORKS[f"{name}, {norm}, relu"]) == dict.fromkeys(hidden, pos)
            assert scalings(NETWORKS[f"{name}, {norm}, gelu"]) == dict.fromkeys(hidden, p)
        assert scalings(NETWORKS[f"vgg mean, {norm}, tanh"]) == dict.fromkeys(hidden, s)
        assert scalings(NETWORKS[f"vgg max, {norm}, tanh"]) == dict(zip(hidden, (s, p, p), strict=True))
        for activation, scaling in (("relu", pos), ("tanh", s), ("gelu", p)):
            assert scalings(NETWORKS[f"resnet, {norm}, {activation}"]) == dict.fromkeys(stream, scaling)
    assert scalings(NETWORKS["resnet, 2 groups, relu"]) == dict.fromkeys(stream, fixed)
    # A group for each channel: instance normalization.
    assert scalings(sg.vgg(((2, 4),), 3, norm="group", groups=2)) == {"hidden_0": pos, "hidden_1": fixed}


@pytest.mark.parametrize(
    ("path", "position", "power"),
    [
        (("ResNetBlock_1", "Conv_0", "kernel"), 3, 1),  # before a normalization, which cancels the scale
        (("ResNetBlock_1", "Conv_1", "kernel"), 2, 0),
        (("ResNetBlock_1", "BatchNorm_1", "scale"), 0, 0),
        (("ResNetBlock_1", "BatchNorm_2", "bias"), 0, 0),  # of the shortcut
        (("ResNetBlock_0", "BatchNorm_0", "mean"), 0, 1),
        (("BatchNorm_0", "var"), 0, -1),
        (("Dense_0", "kernel"), 0, 0),
    ],
)
def test_a_wrong_power_is_found(path, position, power):
    parameters = []
    for parameter in RESNET.parameters:
        axes = list(parameter.axes)
        if parameter.path == path:
            right, axes[position] = axes[position].power, dataclasses.replace(axes[position], power=power)
        parameters.append(dataclasses.replace(parameter, axes=tuple(axes)))
    wrong = dataclasses.replace(RESNET, parameters=tuple(parameters))
    with pytest.raises(AssertionError) as caught:
        testing.assert_function_preserved(
            wrong, lambda p, x: support.outputs(RESNET, p, x), generic_params(RESNET), images(RESNET), samples=1
        )
    assert f"params{architecture.describe(path)} axis {position}" in str(caught.value)
    assert f"should have power {right}, not {power}" in str(caught.value)


def test_group_normalization_keeps_what_permutes_channels_of_one_group():
    """What FIXED leaves out: here the channels 0 and 1, 2 and 3 share statistics."""
    arch = NETWORKS["vgg mean, 2 groups, relu"]
    params, x = generic_params(arch), images(arch)
    expected = support.outputs(arch, params, x)
    free = dataclasses.replace(
        arch,
        neuron_layers=tuple(
            dataclasses.replace(n, scaling=Scaling.POSITIVE if n.name == "hidden_0" else n.scaling)
            for n in arch.neuron_layers
        ),
    )
    for order, holds in (((1, 0, 3, 2), True), ((2, 3, 1, 0), True), ((0, 2, 1, 3), False)):
        element = symmetry.Element({"hidden_0": jnp.array(order)}, {"hidden_0": jnp.array([0.1, 3.0, 1.0, 7.0])})
        changed = support.outputs(arch, symmetry.act(free, element, params), x)
        assert (support.deviation(changed, expected) < 1e-5) == holds


def test_what_happens_before_a_batch_normalization_is_not_described():
    params, x = generic_params(VGG), images(VGG)
    expected = support.outputs(VGG, params, x)
    norm, factor = dict(params["BatchNorm_0"]), jnp.array([-1.0, 2.0, -0.5, 1.0])
    norm["mean"], norm["scale"] = norm["mean"] * factor, norm["scale"] * jnp.sign(factor)
    norm["var"] = jnp.square(factor) * (norm["var"] + 1e-5) - 1e-5
    conv = {"kernel": params["Conv_0"]["kernel"] * factor}
    changed = support.outputs(VGG, params | {"Conv_0": conv, "BatchNorm_0": norm}, x)
    assert support.deviation(changed, expected) < 1e-5


def test_networks_of_several_depths_fit_into_one_bucket():
    members = [sg.resnet(depth, widths=WIDTHS) for depth in (8, 14)]
    topology = graph.topology(graph.Bucket(tuple(members)))
    assert topology.num_nodes == graph.topology(members[1]).num_nodes


# --- Flax's functions -------------------------------------------------------------------------------------------------

LINEN_NORMS = {
    "none": None,
    "batch": lambda: nn.BatchNorm(use_running_average=True),
    "layer": nn.LayerNorm,
    "1 groups": lambda: nn.GroupNorm(1),
    "2 groups": lambda: nn.GroupNorm(2),
}
LINEN_ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh, "gelu": nn.gelu}


class FlaxVGG(nn.Module):
    norm: object
    activation: object
    pool: object

    @nn.compact
    def __call__(self, x):
        for channels in STAGES:
            for width in channels:
                x = nn.Conv(width, (3, 3), use_bias=self.norm is None)(x)
                x = self.activation(x if self.norm is None else self.norm()(x))
            x = self.pool(x, (2, 2), (2, 2))
        return nn.Dense(3)(x.mean((1, 2)))


class ResNetBlock(nn.Module):
    width: int
    strides: int
    norm: object
    activation: object
    padding: object

    @nn.compact
    def __call__(self, x):
        def conv(x, size, strides):
            padding = self.padding if size == 3 else "SAME"
            x = nn.Conv(self.width, (size, size), strides, padding, use_bias=self.norm is None)(x)
            return x if self.norm is None else self.norm()(x)

        y = conv(self.activation(conv(x, 3, self.strides)), 3, 1)
        if x.shape != y.shape:
            x = conv(x, 1, self.strides)
        return self.activation(x + y)


class FlaxResNet(nn.Module):
    norm: object
    activation: object
    padding: object = "SAME"
    blocks: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTHS[0], (3, 3), use_bias=self.norm is None)(x)
        x = self.activation(x if self.norm is None else self.norm()(x))
        for stage, width in enumerate(WIDTHS):
            for block in range(self.blocks):
                strides = 2 if stage and not block else 1
                x = ResNetBlock(width, strides, self.norm, self.activation, self.padding)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def assert_is_vanilla_flax(arch: Architecture, module: nn.Module) -> None:
    params, x = generic_params(arch), images(arch)
    variables = network.split_variables(params)
    theirs = jax.eval_shape(module.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, dict(theirs))
    expected = jax.jit(module.apply)(variables, x)
    assert support.deviation(support.outputs(arch, params, x), expected) < 1e-5
    support.assert_identical(network.merge_variables(variables), params)


def linen_twin(name: str) -> nn.Module:
    builder, norm, activation = name.split(", ")
    options = LINEN_NORMS[norm], LINEN_ACTIVATIONS[activation]
    pool = nn.avg_pool if builder == "vgg mean" else nn.max_pool
    return FlaxResNet(*options) if builder == "resnet" else FlaxVGG(*options, pool)


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVE if "vgg mean" not in name] + REPRESENTATIVE[6:7])
def test_variables_and_function_are_those_of_vanilla_flax(name):
    assert_is_vanilla_flax(NETWORKS[name], linen_twin(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_variables_and_function_of_every_network_are_those_of_vanilla_flax(name):
    assert_is_vanilla_flax(NETWORKS[name], linen_twin(name))


def test_deeper_networks_and_pytorchs_padding_are_those_of_vanilla_flax():
    arch = sg.resnet(14, widths=WIDTHS, outputs=3, input_channels=2, padding=1)
    assert_is_vanilla_flax(arch, FlaxResNet(*(LINEN_NORMS["batch"], nn.relu), padding=1, blocks=2))
    params, x = generic_params(arch), images(arch)
    same = sg.resnet(14, widths=WIDTHS, outputs=3, input_channels=2)
    assert support.deviation(support.outputs(same, params, x), support.outputs(arch, params, x)) > 1e-2


def test_the_networks_of_the_paper_have_its_size():
    """He et al. 2016, table 6: 0.27 to 1.7 million; ours have 1x1 shortcuts, and statistics are counted too."""
    assert sg.resnet(20).num_parameters == pytest.approx(0.27e6, rel=0.03)
    assert sg.resnet(110).num_parameters == pytest.approx(1.7e6, rel=0.03)


# --- all that is derived --------------------------------------------------------------------------------------------


def test_json_round_trip():
    for arch in NETWORKS.values():
        assert architecture.from_json(json.loads(json.dumps(arch.as_json()))) == arch


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVE if "relu" in name])
def test_graph_round_trip(name):
    arch = NETWORKS[name]
    params = generic_params(arch)
    round_trip = jax.jit(lambda arch, params: graph.to_params(arch, graph.from_params(arch, params)))
    support.assert_identical(round_trip(arch, params), params)


def test_initial_networks_have_normalizations_that_change_nothing(key):
    params = jax.jit(network.init)(RESNET, key)
    for name, start in {"scale": 1, "bias": 0, "mean": 0, "var": 1}.items():
        np.testing.assert_array_equal(params["ResNetBlock_1"]["BatchNorm_2"][name], np.full(6, start))
    # The activation after the normalization counts: U(sqrt(6 / fan-in)) before relu, U(sqrt(3 / fan-in)) otherwise.
    for conv, bound in (("Conv_0", 6 / 36), ("Conv_1", 3 / 54), ("Conv_2", 3 / 4)):
        kernel = params["ResNetBlock_1"][conv]["kernel"]
        assert 0.8 * np.sqrt(bound) < np.abs(kernel).max() <= np.sqrt(bound)
    assert np.isfinite(support.outputs(RESNET, params, images(RESNET))).all()
    sines = sg.vgg(STAGES, 3, input_channels=2, norm="batch", activation="sine")
    params = network.init(sines, key, initialization=network.near_zero)
    assert 2 < np.abs(params["Conv_0"]["kernel"]).max() <= 3
    assert np.abs(params["Conv_1"]["kernel"]).max() <= np.sqrt(6 / 36)


def test_a_parameter_of_no_layer_has_no_start(key):
    layers = [layer for layer in VGG.layers if not isinstance(layer, BatchNorm)]
    arch = dataclasses.replace(VGG, layers=tuple(layers))
    with pytest.raises(ValueError, match=r"belong to none of its layers: .*\['BatchNorm_0'\]\['scale'\]"):
        network.init(arch, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet, batch, tanh", "resnet, layer, gelu", "resnet, 2 groups, relu"])
def test_matching_recovers_permutations_and_signs(name):
    arch = NETWORKS[name]
    params = generic_params(arch)
    element = support.rows(support.random_elements(arch, 1, seed=2), 0)
    target = support.act(arch, element, params)
    support.assert_identical(jax.jit(matching.align)(arch, params, target), target)


@pytest.mark.slow
def test_matching_recovers_permutations_and_rescales_of_positive_layers():
    for arch in (VGG, RESNET):
        params = generic_params(arch)
        target = support.act(arch, support.rows(support.random_elements(arch, 1, seed=2), 0), params)
        assert support.deviation(matching.align(arch, params, target), target) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [
        sg.resnet(8, widths=(2, 3, 4), outputs=2, input_channels=1),
        sg.vgg(((2,), (3,)), 2, input_channels=1, norm="batch"),
    ],
    ids=str,
)
def test_a_scalegmn_reads_them_and_is_invariant(arch):
    params = generic_params(arch)
    encoder = models.Encoder(models.ScaleGMN(arch, 4, num_layers=1))
    variables = support.random_variables(encoder, params)
    read = jax.jit(lambda p: encoder.apply(variables, p))
    testing.assert_invariant(arch, read, params, samples=3)
    assert support.deviation(read(generic_params(arch, seed=1)), read(params)) > 1e-2


def test_modules_of_pytorch_are_read_in_their_order():
    """conv, norm, conv, norm, then the shortcut's: as torchvision's BasicBlock registers them."""
    arch = sg.resnet(8, widths=WIDTHS, outputs=3, input_channels=2, padding=1)
    params = generic_params(arch)
    block = ("conv1", "bn1", "conv2", "bn2")
    shortcut = ("downsample.0", "downsample.1")
    names = ["conv1", "bn1"]
    for stage in range(3):
        names += [f"layer{stage + 1}.0.{name}" for name in block + (shortcut if stage else ())]
    kinds = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    owners = list(dict.fromkeys(parameter.path[:-1] for parameter in arch.parameters))
    modules = dict(zip(owners, [*names, "fc"], strict=True))
    tensors = {"bn1.num_batches_tracked": np.array(3)}
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
        tensors[f"{modules[parameter.path[:-1]]}.{kinds[parameter.path[-1]]}"] = np.transpose(value, order)
    support.assert_identical(io.from_torch(arch, tensors), params)
    with pytest.raises(ValueError, match=r"has \['fc.running_mean'\], for which 'resnet .* no parameters"):
        io.from_torch(arch, tensors | {"fc.running_mean": np.zeros(3)})
    with pytest.raises(ValueError, match=r"'layer2.0.bn2.running_var'\] is missing"):
        io.from_torch(arch, {key: value for key, value in tensors.items() if key != "layer2.0.bn2.running_var"})
    with pytest.raises(ValueError, match=r"\['step'\] is not a weight or running_var or running_mean or bias"):
        io.from_torch(arch, tensors | {"step": np.zeros(())})


# --- what does not fit ----------------------------------------------------------------------------------------------

SINES = {"activation": "sine", "input_channels": 2}


def test_phases_are_wrapped_through_mean_pooling_alone():
    arch = sg.vgg(STAGES, 3, pooling="mean", **SINES)
    params, x = generic_params(arch), images(arch)
    params["Conv_0"]["bias"] += jnp.array([0, np.pi, -3 * np.pi, 2 * np.pi])
    wrapped = symmetry.wrap_phase(arch, params)
    assert np.abs(wrapped["Conv_0"]["bias"]).max() < 1.6
    assert support.deviation(support.outputs(arch, wrapped, x), support.outputs(arch, params, x)) < 1e-5
    for refused, kind in (
        (sg.vgg(STAGES, 3, **SINES), "MaxPool"),
        (sg.vgg(STAGES, 3, norm="layer", pooling="mean", **SINES), "LayerNorm"),
        (sg.resnet(8, **SINES), "Residual"),
    ):
        with pytest.raises(ValueError, match=rf"has sines and the layers \[.*'{kind}'.*; expected dense"):
            symmetry.wrap_phase(refused, generic_params(refused))
    with pytest.raises(ValueError, match=r"has no sine layer: .* got \['relu'"):
        symmetry.wrap_phase(RESNET, generic_params(RESNET))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sg.vgg((), 2), r"channels_per_stage is \(\); expected stages"),
        (lambda: sg.vgg(((4,), ()), 2), "expected stages of one or more widths"),
        (lambda: sg.vgg(((4, 0),), 2), "expected stages of one or more widths >= 1"),
        (lambda: sg.vgg(((4,),), 0), r"outputs are \(3, 4, 0\); expected numbers >= 1"),
        (lambda: sg.vgg(((4,),), 2, pooling="sum"), "pooling is 'sum'; expected one of .'max', 'mean'"),
        (lambda: sg.vgg(((4,),), 2, norm="weight"), "norm is 'weight'; expected None or one of"),
        (lambda: sg.vgg(((4,),), 2, norm="group"), "groups is None with norm='group'.*weights do not tell"),
        (lambda: sg.vgg(((4,),), 2, norm="batch", groups=2), "groups is 2 with norm='batch'"),
        (lambda: sg.vgg(((4, 6),), 2, norm="group", groups=4), r"groups is 4; .* divisor of .* \(4, 6\)"),
        (lambda: sg.vgg(((4,),), 2, norm="batch", epsilon=0.0), "epsilon is 0.0; expected a small positive"),
        (lambda: sg.vgg(((4,),), 2, activation="swish"), "activation is 'swish', whose symmetry"),
        (lambda: sg.resnet(18), r"depth is 18 for 3 stages \(16, 32, 64\); expected .* like 8, 14 or 20"),
        (lambda: sg.resnet(2), "depth is 2 for 3 stages"),
        (lambda: sg.resnet(8, widths=()), r"depth is 8 for 0 stages \(\)"),
        (lambda: sg.resnet(8, padding=2), "padding is 2; expected 'SAME', or 1"),
    ],
)
def test_networks_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_variables_images_and_variances_that_do_not_fit_are_refused():
    params = generic_params(RESNET)
    variables = network.split_variables(params)
    x = images(RESNET)[0]
    with pytest.raises(ValueError, match=r"Pass network.merge_variables\(params\)"):
        network.apply(RESNET, variables, x)
    with pytest.raises(ValueError, match=r"has the collections \['batch_stats', 'cache', 'params'\]; expected"):
        network.merge_variables(variables | {"cache": {}})
    with pytest.raises(ValueError, match=r"has the collections \['BatchNorm_0'"):
        network.merge_variables(params)
    twice = variables | {"batch_stats": {"BatchNorm_0": {"scale": jnp.ones(4)}}}
    with pytest.raises(ValueError, match=r"both have \['BatchNorm_0'\]\['scale'\]"):
        network.merge_variables(twice)
    plain = {"Dense_0": {"kernel": jnp.ones((2, 2))}}
    assert network.split_variables(plain) == {"params": plain}
    params["BatchNorm_0"]["var"] = -params["BatchNorm_0"]["var"]
    with pytest.raises(ValueError, match=r"The var of 'BatchNorm_0' has the entry -.*; expected variances, >= 0"):
        network.apply(RESNET, params, x)
    with pytest.raises(ValueError, match=r"shape \(3, 3, 2\), too small for 'vgg .* map of \(1, 1\) is left for pool"):
        network.apply(VGG, generic_params(VGG), jnp.zeros((3, 3, 2)))


def test_a_branch_that_does_not_meet_its_shortcut_is_refused():
    arch = sg.mlp((2, 3, 1))
    residual = Residual(None, arch.layers[:1], (), None)
    torn = dataclasses.replace(arch, layers=(residual, arch.layers[1]))
    with pytest.raises(ValueError, match=r"branch of Residual None outputs \(3,\), its shortcut \(2,\); expected one"):
        network.apply(torn, network.init(torn, jax.random.key(0)), jnp.zeros(2))


def test_dense_layers_are_normalized_too():
    """A normalization next to a residual whose layers are in no submodule of their own."""
    relu = architecture.Activation("relu")
    layers = (
        BatchNorm("norm", 1e-3, None),
        Residual(None, (Dense("up", relu), Dense("down", None)), (), None),
    )
    own = architecture.Axis("stream", 1), architecture.Axis("units", 1)
    neurons = (
        architecture.NeuronLayer("stream", 3, Scaling.FIXED),
        architecture.NeuronLayer("units", 4, Scaling.POSITIVE),
    )
    reads = [dataclasses.replace(axis, power=-1) for axis in own]
    parameters = tuple(
        architecture.Parameter(path, axes)
        for path, axes in {
            **{("norm", name): (own[0],) for name in ("scale", "bias", "mean", "var")},
            ("up", "kernel"): (reads[0], own[1]),
            ("up", "bias"): (own[1],),
            ("down", "kernel"): (reads[1], own[0]),
        }.items()
    )
    arch = Architecture("stream", neurons, parameters, layers)
    params, x = generic_params(arch), np.random.default_rng(0).normal(size=(4, 3))
    norm = {name: np.asarray(value) for name, value in params["norm"].items()}
    h = (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-3) * norm["scale"] + norm["bias"]
    expected = h + np.maximum(h @ params["up"]["kernel"] + params["up"]["bias"], 0) @ params["down"]["kernel"]
    assert support.deviation(support.outputs(arch, params, jnp.float32(x)), expected) < 1e-5
    testing.assert_function_preserved(arch, lambda p, x: support.outputs(arch, p, x), params, jnp.float32(x))
    assert symmetry.identity(arch).scale.keys() == {"units"}

"""The functions and the initial weights of the described networks, and what they compute inside."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from jax_scalegmn import network, symmetry
from jax_scalegmn.architecture import (
    Activation,
    Architecture,
    Axis,
    Conv,
    Dense,
    NeuronLayer,
    Parameter,
    Residual,
    Scaling,
)

SIREN = support.ARCHITECTURES["siren"]
NORMALIZED = {
    "vgg": sg.vgg(((3, 4), (3,)), 2, input_channels=1, norm="batch"),
    "vgg tanh": sg.vgg(((3,), (4,)), 2, input_channels=1, norm="layer", activation="tanh", pooling="mean"),
    "resnet": sg.resnet(6, widths=(3, 4), outputs=2, input_channels=1),
    "resnet tanh": sg.resnet(4, widths=(3,), outputs=2, input_channels=1, activation="tanh"),
}


def test_first_coordinate_is_the_column_and_columns_run_fastest():
    expected = [(-1, -1), (0, -1), (1, -1), (-1, 1), (0, 1), (1, 1)]
    np.testing.assert_array_equal(network.coordinates(2, 3), np.float32(expected))


def test_an_inr_of_its_first_input_draws_a_ramp_along_the_columns():
    arch = sg.siren((2, 1))
    params = {"Dense_0": {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.zeros(1)}}
    expected = np.tile(np.linspace(-1, 1, 4) + 0.5, (3, 1))
    np.testing.assert_allclose(network.render(arch, params, (3, 4)), expected, atol=1e-6)


def test_siren_is_its_formula():
    """h' = sin(w0 (h W + b)), output h W + b + 0.5, in plain NumPy."""
    params = support.random_params(SIREN)
    layers = [[np.float64(params[f"Dense_{i}"][name]) for name in ("kernel", "bias")] for i in range(3)]
    h = np.float64(network.coordinates(6, 5))
    for kernel, bias in layers[:-1]:
        h = np.sin(30 * (h @ kernel + bias))
    expected = (h @ layers[-1][0] + layers[-1][1] + 0.5).reshape(6, 5)
    image = network.render(SIREN, params, (6, 5))
    assert image.std() > 0.1
    np.testing.assert_allclose(image, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "initialization", "bounds"),
    [
        (
            sg.siren((2, 200, 200, 50)),
            network.standard,
            [(1 / 2, 1 / math.sqrt(2)), (math.sqrt(6 / 200) / 30, 1 / math.sqrt(200)), (math.sqrt(3 / 200), 0)],
        ),
        (
            sg.siren((2, 200, 200, 50)),
            network.near_zero,
            [(0.1, 0), (math.sqrt(6 / 200) / 30, 0), (1 / math.sqrt(200), 0)],
        ),
        (sg.mlp((20, 100, 20)), network.standard, [(math.sqrt(6 / 20), 0), (math.sqrt(3 / 100), 0)]),
        (sg.cnn((3, 50), 20), network.standard, [(math.sqrt(6 / 27), 0), (math.sqrt(3 / 50), 0)]),
        (sg.mlp((20, 100, 20), "tanh"), network.standard, [(math.sqrt(3 / 20), 0), (math.sqrt(3 / 100), 0)]),
    ],
)
def test_initial_weights_are_uniform_within_their_bounds(arch, initialization, bounds, key):
    params = network.init(arch, key, initialization=initialization)
    for layer, expected in zip(params.values(), bounds, strict=True):
        for value, bound in zip((layer["kernel"], layer["bias"]), expected, strict=True):
            assert 0.9 * bound <= jnp.abs(value).max() <= bound * (1 + 1e-6)
        assert layer["kernel"].std() == pytest.approx(expected[0] / math.sqrt(3), rel=0.1)
        assert abs(layer["kernel"].mean()) < 0.1 * expected[0]


def test_different_keys_and_layers_start_differently(key):
    arch = sg.mlp((4, 4, 4, 4), "tanh")  # three kernels of one distribution
    stack = jax.jit(jax.vmap(lambda k: network.init(arch, k)))(jax.random.split(key, 2))
    assert len(np.unique([layer["kernel"] for layer in stack.values()])) == 3 * 2 * 16


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("siren", (3,), r"x has shape \(3,\); 'siren .*\[inputs\] with 2 in the last axis"),
        ("siren", (7, 2), r"x has shape \(7, 2\).*Use jax.vmap"),
        ("relu cnn", (7, 9, 2), r"x has shape \(7, 9, 2\).*\[height, width, channels\] with 1 in"),
        ("relu cnn", (2, 7, 9, 1), "Use jax.vmap"),
        ("relu cnn", (6, 9, 1), r"x has shape \(6, 9, 1\), too small for .*'Conv_1'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, shape, expected):
    arch = support.ARCHITECTURES[name]
    with pytest.raises(ValueError, match=expected):
        network.apply(arch, support.random_params(arch), jnp.zeros(shape))


def test_an_inr_with_three_outputs_draws_three_channels():
    """Each is the image of the network with that output alone; stacks and gradients pass."""
    arch, gray = sg.siren((2, 5, 4, 3)), sg.siren((2, 5, 4, 1))
    params = support.random_params(arch)
    image = jax.jit(lambda params: network.render(arch, params, (3, 4)))(params)
    assert image.shape == (3, 4, 3)
    for channel in range(3):
        head = {name: value[..., channel : channel + 1] for name, value in params["Dense_2"].items()}
        alone = network.render(gray, params | {"Dense_2": head}, (3, 4))
        np.testing.assert_allclose(image[..., channel], alone, atol=1e-6)
    assert (image.std((0, 1)) > 0.03).all()
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    many = jax.jit(jax.vmap(lambda params: network.render(arch, params, (3, 4))))(stack)
    np.testing.assert_allclose(many[0], image, atol=1e-6)
    slope = jax.jit(jax.grad(lambda params: network.render(arch, params, (3, 4)).sum()))(params)
    np.testing.assert_allclose(slope["Dense_2"]["bias"], 12, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tanh mlp", "maps 3 inputs to 2 outputs; an INR of an image maps 2 coordinates"),
        ("tanh cnn", "maps 2 inputs to 3"),
    ],
)
def test_only_an_inr_renders(name, expected):
    arch = support.ARCHITECTURES[name]
    with pytest.raises(ValueError, match=expected):
        network.render(arch, support.random_params(arch), (4, 4))


def test_the_regime_of_the_published_inrs_is_refused_for_other_networks():
    with pytest.raises(ValueError, match=r"near_zero is for SIRENs.*'tanh'. Use standard"):
        network.init(support.ARCHITECTURES["tanh mlp"], jax.random.key(0), initialization=network.near_zero)


# --- what is inside ---------------------------------------------------------------------------------------------------


def generic_params(arch, seed=0):
    """Random params whose stored variances are positive."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.abs(leaf) + 0.3 if path[-1].key == "var" else leaf, support.random_params(arch, seed)
    )


def batch(arch, count=4, seed=0):
    """A batch of inputs; of images where the architecture has convolutions."""
    images = arch.name.startswith(("cnn", "vgg", "resnet"))
    shape = (7, 9, arch.neuron_layers[0].width) if images else (arch.neuron_layers[0].width,)
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, *shape)), "float32")


@jax.jit
def activations(arch, params, x):
    return jax.vmap(lambda one: network.activations(arch, params, one))(x)


def moved(element, values):
    """The group on activations: neuron i is neuron permutation[i], times scale[i]."""
    return {
        name: tuple(place[..., element.permutation[name]] * element.scale[name] for place in places)
        for name, places in values.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("relu mlp", "tanh cnn", "vgg") else ())
        for name in [*support.ARCHITECTURES, *NORMALIZED]
    ],
)
def test_the_group_acts_on_activations_as_on_neurons(name):
    arch = (support.ARCHITECTURES | NORMALIZED)[name]
    params, x = generic_params(arch, seed=6), batch(arch)
    element = support.rows(support.random_elements(arch, 1), 0)
    before, after = activations(arch, params, x), activations(arch, support.act(arch, element, params), x)
    assert before.keys() == {neurons.name for neurons in arch.hidden}
    assert all(places and all(place.any() for place in places) for places in before.values())
    assert support.deviation(after, moved(element, before)) < 1e-5
    for wrong in (symmetry.identity(arch), symmetry.inverse(arch, element)):
        assert support.deviation(after, moved(wrong, before)) > 1e-2


def test_activations_are_those_of_the_formula():
    """sin(w0 (h W + b)) of each hidden layer, in plain NumPy."""
    params, x = support.random_params(SIREN), batch(SIREN)
    h, expected = np.float64(x), {}
    for i in range(2):
        layer = params[f"Dense_{i}"]
        h = np.sin(30 * (h @ np.float64(layer["kernel"]) + np.float64(layer["bias"])))
        expected[f"hidden_{i}"] = (h,)
    assert support.deviation(activations(SIREN, params, x), expected) < 1e-5


def test_a_stream_has_activations_after_its_stem_and_every_sum():
    arch = sg.resnet(10, widths=(3, 4), outputs=2, input_channels=1)
    values = activations(arch, generic_params(arch), batch(arch))
    shapes = {name: [place.shape for place in places] for name, places in values.items()}
    wide, narrow = (4, 7, 9, 3), (4, 4, 5, 4)
    assert shapes == {
        "stream_0": [wide] * 3,
        "inner_0_0": [wide],
        "inner_0_1": [wide],
        "stream_1": [narrow] * 2,
        "inner_1_0": [narrow],
        "inner_1_1": [narrow],
    }
    last = values["stream_1"][-1]
    params = generic_params(arch)
    expected = last.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    assert support.deviation(support.outputs(arch, params, batch(arch)), expected) < 1e-5


def test_layers_that_nothing_moves_have_no_activations():
    arch = sg.vgg(((4,), (4,)), 2, input_channels=1, norm="group", groups=2)
    assert activations(arch, generic_params(arch), batch(arch)) == {}
    restricted = dataclasses.replace(
        SIREN, neuron_layers=tuple(dataclasses.replace(n, scaling=Scaling.FIXED) for n in SIREN.neuron_layers)
    )
    assert activations(restricted, support.random_params(restricted), batch(restricted)) == {}


def test_a_kernel_that_feeds_two_neuron_layers_shows_both():
    """Two blocks of one kernel, side by side, of a network whose stream has no submodule."""
    names = {"input": 2, "left": 3, "right": 4, "output": 1}
    fixed = {"input", "output"}
    neurons = tuple(NeuronLayer(n, width, Scaling.FIXED if n in fixed else Scaling.SIGN) for n, width in names.items())
    parameters = (
        Parameter(("up", "kernel"), (Axis("input", -1), Axis("left", 1)), (0, 0)),
        Parameter(("up", "kernel"), (Axis("input", -1), Axis("right", 1)), (0, 3)),
        Parameter(("head", "kernel"), (Axis("left", -1), Axis("output", 1)), (0, 0)),
        Parameter(("head", "kernel"), (Axis("right", -1), Axis("output", 1)), (3, 0)),
    )
    arch = Architecture("two", neurons, parameters, (Dense("up", Activation("tanh")), Dense("head", None)))
    params, x = network.init(arch, jax.random.key(0)), batch(arch)
    assert params["up"]["kernel"].shape == (2, 7)
    element = support.rows(support.random_elements(arch, 1, seed=2), 0)
    values = activations(arch, params, x)
    assert [values[name][0].shape for name in ("left", "right")] == [(4, 3), (4, 4)]
    after = activations(arch, support.act(arch, element, params), x)
    assert support.deviation(after, moved(element, values)) < 1e-5
    assert support.deviation(after, values) > 1e-2


# --- as in training -------------------------------------------------------------------------------------------------


class FlaxResNet(nn.Module):
    """`architecture.resnet(4, widths=(3,))`, in training."""

    momentum: float

    @nn.compact
    def __call__(self, x):
        def normed(x):
            return nn.BatchNorm(use_running_average=False, momentum=self.momentum)(x)

        class ResNetBlock(nn.Module):
            @nn.compact
            def __call__(self, x):
                y = nn.relu(normed(nn.Conv(3, (3, 3), use_bias=False)(x)))
                return nn.relu(x + normed(nn.Conv(3, (3, 3), use_bias=False)(y)))

        x = nn.relu(normed(nn.Conv(3, (3, 3), use_bias=False)(x)))
        return nn.Dense(2)(ResNetBlock()(x).mean((1, 2)))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_training_mode_is_that_of_flax(momentum):
    arch = sg.resnet(4, widths=(3,), outputs=2, input_channels=1)
    params, x = generic_params(arch), batch(arch, 6) + 1
    expected, updated = FlaxResNet(momentum).apply(network.split_variables(params), x, mutable=["batch_stats"])
    outputs, changed = jax.jit(lambda p, x: network.train_apply(arch, p, x, momentum=momentum))(params, x)
    assert support.deviation(outputs, expected) < 1e-5
    variables = network.split_variables(changed)
    support.assert_identical(variables["params"], network.split_variables(params)["params"])
    assert support.deviation(variables["batch_stats"], dict(updated["batch_stats"])) < 1e-5
    assert support.deviation(support.outputs(arch, params, x), expected) > 1e-2
    if momentum == 0:  # The batch's own statistics are stored now.
        assert support.deviation(support.outputs(arch, changed, x), expected) < 1e-5


def test_without_batch_normalization_training_mode_is_the_function(arch, params):
    x = support.example(arch)
    outputs, changed = network.train_apply(arch, params, x)
    assert support.deviation(outputs, support.outputs(arch, params, x)) < 1e-6
    support.assert_identical(changed, params)


@pytest.mark.slow
def test_training_mode_has_gradients_and_a_batch_of_networks():
    arch = NORMALIZED["resnet tanh"]
    x = batch(arch)
    loss = jax.jit(lambda params: jnp.square(network.train_apply(arch, params, x)[0]).sum())
    params = generic_params(arch)
    gradient = jax.jit(jax.grad(loss))(params)
    step = jax.tree.map(lambda leaf: 1e-2 * leaf / 2, support.random_params(arch, 1))
    slope = (loss(jax.tree.map(jnp.add, params, step)) - loss(jax.tree.map(jnp.subtract, params, step))) / 2
    expected = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
    assert float(slope) == pytest.approx(float(expected), rel=2e-2)
    # Before a normalization by the batch's statistics the size of a kernel does not count.
    kernel = params["Conv_0"]["kernel"]
    assert abs(jnp.vdot(kernel, gradient["Conv_0"]["kernel"])) < 1e-3 * jnp.linalg.norm(gradient["Conv_0"]["kernel"])
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, generic_params(arch, 1))
    many, _ = jax.jit(jax.vmap(lambda one: network.train_apply(arch, one, x)))(stack)
    assert support.deviation(many[1], network.train_apply(arch, generic_params(arch, 1), x)[0]) < 1e-5


def test_a_visitor_is_called_at_every_layer_and_decides_its_output():
    """Every path once, in order, residual sums after their sides; the sum replaced by 2 is what the head reads."""
    arch = sg.resnet(4, widths=(3,), outputs=2, input_channels=1)

    def visit(path, layer, params, x, paths):
        y = network.layer_output(layer, params, x)
        return jnp.full_like(y, 2.0) if isinstance(layer, Residual) else y, (*paths, path)

    params = generic_params(arch)
    outputs, paths = network.forward(arch, params, batch(arch)[0], visit, ())
    block = [("ResNetBlock_0", name) for name in ("Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_1")]
    assert paths == (("Conv_0",), ("BatchNorm_0",), *block, ("ResNetBlock_0",), ("Dense_0",))
    head = params["Dense_0"]
    np.testing.assert_allclose(outputs, 2 * head["kernel"].sum(0) + head["bias"], rtol=1e-5)


def test_the_state_of_a_visitor_is_traced_like_all_else():
    """It comes out of jit and vmap and has gradients: here the sum of all squared pre-activations of one example."""
    arch, params = SIREN, support.random_params(SIREN)

    def visit(path, layer, params, x, total):
        h = network.preactivation(layer, params, x)
        return network.activate(layer.activation, h), total + jnp.square(h).sum()

    def total(params, x):
        return network.forward(arch, params, x, visit, 0.0)[1]

    x = batch(arch)
    totals, gradients = jax.jit(jax.vmap(jax.value_and_grad(total), (None, 0)))(params, x)
    h, expected = np.float64(x), 0.0
    for index in range(3):
        layer = params[f"Dense_{index}"]
        h = h @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
        expected = expected + np.square(h).sum(1)
        last, h = h, np.sin(30 * h)
    np.testing.assert_allclose(totals, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients["Dense_2"]["bias"], 2 * last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "entry", "expected"),
    [
        ((7, 9, 1), 0.0, r"x has shape \(7, 9, 1\); 'vgg .*\[examples, height, width, channels\] .* Pass x\[None\]"),
        ((0, 7, 9, 1), 0.0, "expects one example or more"),
        ((2, 7, 9, 2), 0.0, "with 1 in the last axis"),
        ((2, 7, 9, 1), np.nan, r"x\[0\] holds a NaN or an infinity; .* Leave such examples out"),
        ((2, 3, 3, 1), 0.0, r"too small for 'vgg"),
    ],
)
def test_batches_that_do_not_fit_are_refused(shape, entry, expected):
    with pytest.raises(ValueError, match=expected):
        network.train_apply(NORMALIZED["vgg"], generic_params(NORMALIZED["vgg"]), jnp.full(shape, entry))


def test_momentum_is_a_share_and_functions_of_ones_own_have_no_inside():
    arch = NORMALIZED["vgg"]
    with pytest.raises(ValueError, match=r"momentum is 1.1; expected a number in \[0, 1\]"):
        network.train_apply(arch, generic_params(arch), batch(arch), momentum=1.1)
    own, _ = support.HAND_WRITTEN["batch norm"]
    for call in (network.train_apply, network.activations):
        with pytest.raises(ValueError, match="does not say how to compute its function"):
            call(own, support.random_params(own), jnp.zeros((1, 3)))


def test_convolutions_by_patches_are_convolutions():
    """On maps of odd and even sides, for all kernels, strides and paddings, with their gradients; in one program."""
    steps = [((1, 1), "SAME"), ((2, 2), "SAME"), ((2, 2), "VALID"), ((3, 3), "VALID"), ((1, 2), 1)]
    cases = [(size, Conv("Conv_0", None, *step)) for size in ((1, 1), (2, 3), (5, 5)) for step in steps]
    keys = jax.random.split(jax.random.key(0), 3)
    largest, bias = jax.random.normal(keys[0], (5, 5, 3, 4)), jax.random.normal(keys[1], (4,))
    x = jax.random.normal(keys[2], (8, 7, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(convolve, largest, bias, x):
        def total(params, layer):
            y = convolve(layer, params, params["x"])
            return jnp.sin(y).sum(), y

        def of_case(size, layer):
            kernel = largest[: size[0], : size[1]]
            return jax.grad(total, has_aux=True)({"kernel": kernel, "bias": bias, "x": x}, layer)

        return [of_case(*case) for case in cases]

    ours, theirs = (both_ways(f, largest, bias, x) for f in (network.convolve_by_patches, network.convolve))
    for (size, layer), (gradients, y), (expected_gradients, expected) in zip(cases, ours, theirs, strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5, err_msg=f"{size} {layer}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, expected_gradients)


def test_a_network_by_patches_is_the_network_and_refuses_small_images():
    arch = sg.cnn((1, 2, 3), 4, kernel_size=(5, 3), strides=1)
    params, x = generic_params(arch), batch(arch)[0]
    by_patches = network.apply(arch, params, x, convolve=network.convolve_by_patches)
    np.testing.assert_allclose(by_patches, network.apply(arch, params, x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="too small for the kernels"):
        network.apply(arch, params, x[:4], convolve=network.convolve_by_patches)


def test_frequencies_by_layer_and_zeros_on_every_side_are_computed():
    arch = sg.siren((2, 3, 4, 1), w0=(30.0, 1.5), offset=0.0)
    params, x = generic_params(arch), jnp.asarray(np.random.default_rng(0).normal(size=2), "float32")
    h = np.asarray(x)
    for i, w0 in enumerate((30.0, 1.5)):
        h = np.sin(w0 * (h @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]))
    expected = h @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    np.testing.assert_allclose(network.apply(arch, params, x), expected, rtol=1e-3, atol=1e-4)
    padded, plain = (
        sg.cnn((1, 3), 2, padding=p, strides=1, flatten=side) for p, side in ((2, (5, 4)), ("VALID", (9, 8)))
    )
    params, x = generic_params(padded), jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 1)), "float32")
    expected = network.apply(plain, params, jnp.pad(x, [(2, 2), (2, 2), (0, 0)]))
    np.testing.assert_allclose(network.apply(padded, params, x), expected, rtol=1e-5, atol=1e-6)


def own_convolutions(params, x):
    """In two layouts, with strides and uneven padding, inside a called function, grouped, and along one axis."""
    conv = jax.lax.conv_general_dilated
    x = jax.nn.relu(conv(x, params["first"], (2, 1), [(1, 0), (2, 1)]))
    x = jax.jit(lambda x: conv(x, params["second"], (1, 1), "SAME", feature_group_count=2))(x).transpose(0, 2, 3, 1)
    x = jax.jit(lambda x: conv(x, params["third"], (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))(x)
    x = conv(x.mean(1), params["line"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    return x.reshape(len(x), -1) @ params["out"]


@pytest.mark.slow
def test_a_function_of_ones_own_by_patches_is_the_function():
    shapes = {"first": (4, 2, 3, 2), "second": (4, 2, 3, 3), "third": (2, 3, 4, 3), "line": (2, 3, 5), "out": (15, 3)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), "float32") for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(3, 2, 9, 6)), "float32")
    arch = sg.infer(own_convolutions, params, x).arch

    def both(params, x, convolve):
        return network.apply(arch, params, x, convolve=convolve)

    compiled = jax.jit(both, static_argnums=2)
    for some in (x, x[0]):
        ours, theirs = (compiled(params, some, how) for how in (network.convolve_by_patches, network.convolve))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    convolutions = {
        how: str(jax.make_jaxpr(both, static_argnums=2)(params, x, how)).count("conv_general_dilated[")
        for how in (network.convolve_by_patches, network.convolve)
    }
    assert convolutions == {network.convolve_by_patches: 1, network.convolve: 4}  # the grouped one stays
    ours, theirs = (
        jax.jit(jax.grad(lambda p, how=how: jnp.square(both(p, x, how)).mean()))(params)
        for how in (network.convolve_by_patches, network.convolve)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, theirs)
    with pytest.raises(ValueError, match=r"expected network\.convolve or network\.convolve_by_patches"):
        both(params, x, lambda layer, params, x: x)

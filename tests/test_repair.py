"""REPAIR gives merged networks the statistics of their end points, as NumPy and Flax see them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from jax_scalegmn import merge, network, symmetry
from jax_scalegmn.architecture import (
    Activation,
    Architecture,
    Axis,
    BatchNorm,
    Dense,
    NeuronLayer,
    Parameter,
    Residual,
    Scaling,
)
from jax_scalegmn.matching import activation_matching, assignment
from jax_scalegmn.network import moments

RELU, SIREN = support.ARCHITECTURES["relu mlp"], support.ARCHITECTURES["siren"]
DEEP = sg.mlp((4, 32, 32, 32, 32, 3))
RESNETS = {
    norm: sg.resnet(6, widths=(4, 6), outputs=2, input_channels=1, norm=norm, groups=groups)
    for norm, groups in ((None, None), ("batch", None), ("layer", None), ("group", 2))
}
BATCH = RESNETS["batch"]
NORMS = {
    None: None,
    "batch": lambda: nn.BatchNorm(use_running_average=True),
    "layer": nn.LayerNorm,
    "group": lambda: nn.GroupNorm(2),
}
VECTORS = ("scale", "bias", "mean", "var")
FAST = ("relu mlp", "siren", "deep")  # of the others each compiles for some seconds
WEIGHTS = jnp.array([0.2, 0.5, 0.3])


def stack_of(arch, models=3, seed=0):
    """Random networks; variances are positive, no scale is near 0."""
    starts = {"var": lambda leaf: jnp.abs(leaf) + 0.3, "scale": lambda leaf: jnp.sign(leaf) * (jnp.abs(leaf) + 0.3)}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: starts.get(path[-1].key, lambda leaf: leaf)(leaf),
        support.random_params(arch, seed, models=(models,)),
    )


def data(arch, count=17, seed=1):
    shape = (7, 9, 1) if "resnet" in arch.name else (arch.neuron_layers[0].width,)
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, *shape)), "float32")


mend = jax.jit(merge.repair, static_argnames="batch_size")
reset = jax.jit(merge.reset_batch_norm, static_argnames="batch_size")


class FlaxResNet(nn.Module):
    """`architecture.resnet(6, widths=(4, 6), outputs=2)`."""

    norm: object

    @nn.compact
    def __call__(self, x):
        norm = self.norm

        class ResNetBlock(nn.Module):
            width: int
            strides: int

            @nn.compact
            def __call__(self, x):
                def unit(x, size, strides):
                    x = nn.Conv(self.width, (size, size), strides, use_bias=norm is None)(x)
                    return x if norm is None else norm()(x)

                y = unit(nn.relu(unit(x, 3, self.strides)), 3, 1)
                return nn.relu(y + (unit(x, 1, self.strides) if x.shape != y.shape else x))

        x = nn.Conv(4, (3, 3), use_bias=norm is None)(x)
        x = nn.relu(x if norm is None else norm()(x))
        x = ResNetBlock(4, 1)(x)
        x = ResNetBlock(6, 2)(x)
        return nn.Dense(2)(x.mean((1, 2)))


def values_by_flax(norm, params, x):
    """What every norm gives, or every Conv of a network without norms, by path."""
    module = FlaxResNet(NORMS[norm])
    variables = network.split_variables(params)
    _, state = jax.jit(functools.partial(module.apply, capture_intermediates=True))(variables, x)
    kind = "Conv" if norm is None else "Norm"
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["intermediates"]):
        *modules, _, _ = (getattr(key, "key", None) for key in path)
        if modules and kind in modules[-1]:
            found[tuple(modules)] = np.float64(leaf)
    return found


def values_by_numpy(activation, params, x):
    """What every hidden Dense gives, by path."""
    h, found = np.float64(x), {}
    for name in sorted(params)[:-1]:
        found[name,] = h @ np.float64(params[name]["kernel"]) + np.float64(params[name].get("bias", 0))
        h = activation(found[name,])
    return found


def statistics(values):
    return {path: (v.mean(tuple(range(v.ndim - 1))), v.std(tuple(range(v.ndim - 1)))) for path, v in values.items()}


def mean_statistics(values_of, stack, weights):
    each = [statistics(values_of(support.rows(stack, i))) for i in range(len(weights))]
    weights = np.float64(weights) / np.float64(weights).sum()
    return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *each)


def gap(got, expected):
    """The largest deviation of a mean or standard deviation, relative to the channel's goal."""
    assert got.keys() == expected.keys()
    gaps = [
        np.abs(np.stack(got[path]) - np.stack(expected[path])) / (expected[path][1] + np.abs(expected[path][0]))
        for path in got
    ]
    return max(one.max() for one in gaps)


ROUTES = {
    "relu mlp": (RELU, functools.partial(values_by_numpy, lambda h: np.maximum(h, 0)), 2),
    "siren": (SIREN, functools.partial(values_by_numpy, lambda h: np.sin(30 * h)), 2),
    "deep": (DEEP, functools.partial(values_by_numpy, lambda h: np.maximum(h, 0)), 4),
} | {f"resnet {norm}": (arch, functools.partial(values_by_flax, norm), 6) for norm, arch in RESNETS.items()}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROUTES]
)
def test_every_hidden_channel_has_the_mean_statistics_of_the_end_points(name):
    arch, values_of, layers = ROUTES[name]
    stack, x = stack_of(arch), data(arch)
    if name == "relu mlp":
        stack["Dense_0"]["bias"] += 0.5  # none of its few neurons is dead
    merged = merge.average(stack, WEIGHTS)
    goal = mean_statistics(lambda one: values_of(one, x), stack, WEIGHTS)
    assert len(goal) == layers
    repaired = mend(arch, merged, stack, x, weights=WEIGHTS)
    assert gap(statistics(values_of(repaired, x)), goal) < 1e-4
    assert gap(statistics(values_of(merged, x)), goal) > 1e-2
    equally = mend(arch, merged, stack, x)
    assert gap(statistics(values_of(equally, x)), goal) > 1e-3
    head = "Dense_0" if "resnet" in name else max(merged)
    support.assert_identical(repaired[head], merged[head])


@pytest.mark.parametrize(
    "name",
    [
        "relu mlp",
        pytest.param("siren", marks=pytest.mark.slow),
        pytest.param("resnet batch", marks=pytest.mark.slow),
        pytest.param("resnet layer", marks=pytest.mark.slow),
    ],
)
def test_batches_change_nothing(name):
    """Layers one by one over batches that leave a rest: the same network, and the same statistics stored."""
    arch, _, _ = ROUTES[name]
    stack, x = stack_of(arch), data(arch)
    merged = merge.average(stack)
    expected = mend(arch, merged, stack, x)
    for size in (5, 17):
        assert support.deviation(mend(arch, merged, stack, x, batch_size=size), expected) < 1e-4
    few = mend(arch, merged, stack, x[:5])
    assert support.deviation(few, expected) > 1e-2


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROUTES]
)
def test_copies_of_a_network_repair_it_to_itself(name):
    arch, _, _ = ROUTES[name]
    stack, x = stack_of(arch), data(arch)
    one = support.rows(stack, 0)
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    repaired = mend(arch, one, copies, x)
    before = support.outputs(arch, one, x)
    assert support.deviation(support.outputs(arch, repaired, x), before) < 1e-5
    if name != "resnet batch":
        assert support.deviation(repaired, one) < 1e-5
    others = mend(arch, one, stack, x)
    assert support.deviation(support.outputs(arch, others, x), before) > 1e-2


def test_a_collapsed_merge_varies_again():
    """The mean of independent networks: the deeper, the flatter (arXiv 2211.08403); mended in every layer."""
    stack, x = stack_of(DEEP, 2), data(DEEP, 200)
    merged = merge.average(stack)

    def ratios(params):
        values = [jax.vmap(lambda x, p=p: network.apply(DEEP, p, x))(x).std(0) for p in (params, *ends)]
        hidden = [statistics(values_by_numpy(lambda h: np.maximum(h, 0), p, x)) for p in (params, *ends)]
        own, *theirs = [[std.mean() for _, std in one.values()] for one in hidden]
        return np.array(own) / np.mean(theirs, 0), float(values[0].mean() / np.mean([v.mean() for v in values[1:]]))

    ends = [support.rows(stack, i) for i in range(2)]
    hidden, output = ratios(merged)
    assert (np.diff(hidden) < 0).all()
    assert hidden[-1] < 0.5
    assert output < 0.5
    hidden, output = ratios(mend(DEEP, merged, stack, x))
    np.testing.assert_allclose(hidden, 1, atol=1e-4)
    assert 0.6 < output < 1.5


@pytest.mark.slow
def test_repair_lowers_the_loss_between_two_aligned_fits():
    """Two networks fitted to one function from different starts, one moved next to the other and merged."""
    arch = sg.mlp((2, 48, 48, 48, 1), "tanh")
    x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-2, maxval=2)
    y = jnp.sin(2 * x[:, :1]) + 0.5 * x[:, 1:]

    @jax.jit
    def loss(params):
        return jnp.square(jax.vmap(lambda one: network.apply(arch, params, one))(x) - y).mean()

    def step(state, _):
        params, velocity = state
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, jax.grad(loss)(params))
        return (jax.tree.map(lambda p, v: p - 0.02 * v, params, velocity), velocity), None

    def fit(key):
        params = network.init(arch, key)
        return jax.lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), length=400)[0][0]

    @jax.jit
    def midpoints(key):
        a, b = (fit(one) for one in jax.random.split(key))
        found = activation_matching(arch, b, a, x, assign=assignment.scipy)
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), a, symmetry.act(arch, found.element, b))
        merged = merge.average(stack)
        return jnp.stack([loss(a), loss(b), loss(merged), loss(merge.repair(arch, merged, stack, x))])

    losses = np.array([midpoints(jax.random.key(seed)) for seed in range(4)])
    assert losses[:, :2].max() < 0.05
    assert (losses[:, 2] > 2 * losses[:, :2].max(1)).all()
    assert losses[:, 3].mean() < 0.85 * losses[:, 2].mean()


@pytest.mark.slow
def test_channels_that_do_not_vary_keep_their_size():
    """No entry is NaN or infinite; where a constant can be shifted, it is."""
    stack, x = stack_of(RELU), data(RELU)
    merged = merge.average(stack)
    merged["Dense_0"]["kernel"] = merged["Dense_0"]["kernel"].at[:, 2].set(0)
    merged["Dense_0"]["bias"] = merged["Dense_0"]["bias"].at[2].set(0.1)
    for size in (None, 5):
        repaired = mend(RELU, merged, stack, x, batch_size=size)
        goal = mean_statistics(lambda one: values_by_numpy(lambda h: np.maximum(h, 0), one, x), stack, np.ones(3))
        np.testing.assert_array_equal(repaired["Dense_0"]["kernel"][:, 2], np.zeros(3))
        assert float(repaired["Dense_0"]["bias"][2]) == pytest.approx(goal["Dense_0",][0][2], rel=1e-4)
        got = statistics(values_by_numpy(lambda h: np.maximum(h, 0), repaired, x))
        live = [0, 1, 3, 4]
        np.testing.assert_allclose(got["Dense_0",][1][live], goal["Dense_0",][1][live], rtol=1e-4)
    for arch in (RELU, BATCH, RESNETS["layer"]):
        stack, nothing = stack_of(arch), jax.tree.map(jnp.zeros_like, merge.average(stack_of(arch)))
        for networks in (stack, jax.tree.map(jnp.zeros_like, stack)):
            repaired = mend(arch, nothing, networks, data(arch))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(repaired))


def normed_mlp(epsilon):
    neurons = (NeuronLayer("input", 3, Scaling.FIXED), NeuronLayer("units", 4, Scaling.POSITIVE))
    neurons += (NeuronLayer("output", 2, Scaling.FIXED),)
    powers = zip(VECTORS, (1, 1, 0, 0), strict=True)
    parameters = (
        Parameter(("up", "kernel"), (Axis("input", -1), Axis("units", 0))),
        *(Parameter(("norm", name), (Axis("units", power),)) for name, power in powers),
        Parameter(("head", "kernel"), (Axis("units", -1), Axis("output", 1))),
    )
    layers = (Dense("up", None), BatchNorm("norm", epsilon, Activation("relu")), Dense("head", None))
    return Architecture("normed mlp", neurons, parameters, layers)


def test_a_constant_channel_before_a_batch_norm_is_not_blown_up():
    """The roundings of a constant are no variance."""
    arch = normed_mlp(1e-5)
    stack, x = stack_of(arch), data(arch).at[:, 0].set(0.37)
    merged = merge.average(stack)
    merged["up"]["kernel"] = merged["up"]["kernel"].at[1:, 2].set(0)
    values = x @ merged["up"]["kernel"]
    assert jnp.square(values - values.mean(0)).mean(0)[2] > 0
    for size in (None, 5):
        repaired = mend(arch, merged, stack, x, batch_size=size)
        assert repaired["norm"]["scale"][2] == merged["norm"]["scale"][2]
        assert (repaired["norm"]["scale"] != merged["norm"]["scale"]).sum() == 3
        assert np.abs(support.outputs(arch, repaired, x)).max() < 100


def test_batch_norms_of_large_epsilon_and_without_scale():
    """Large epsilons shrink what a norm gives; where its scale is 0 there is no channel to rescale."""
    arch = normed_mlp(0.5)
    stack, x = stack_of(arch), data(arch)
    merged = merge.average(stack)
    merged["norm"]["scale"] = merged["norm"]["scale"].at[1].set(0)

    def given(params):
        norm = {name: np.float64(value) for name, value in params["norm"].items()}
        values = np.float64(x) @ np.float64(params["up"]["kernel"])
        return {("norm",): (values - norm["mean"]) / np.sqrt(norm["var"] + 0.5) * norm["scale"] + norm["bias"]}

    goal = mean_statistics(given, stack, np.ones(3))["norm",]
    for size in (None, 5):
        repaired = mend(arch, merged, stack, x, batch_size=size)
        mean, std = statistics(given(repaired))["norm",]
        np.testing.assert_allclose(mean, goal[0], atol=1e-5)
        np.testing.assert_allclose(std, np.where(np.arange(4) == 1, 0, goal[1]), rtol=1e-4)


def test_without_a_bias_channels_are_rescaled_alone_to_the_second_moment():
    parameters = tuple(p for p in RELU.parameters if p.path[-1] != "bias")
    arch = dataclasses.replace(RELU, parameters=parameters)
    stack, x = stack_of(arch), data(arch) + 0.5
    merged = merge.average(stack)
    goal = mean_statistics(lambda one: values_by_numpy(lambda h: np.maximum(h, 0), one, x), stack, np.ones(3))
    repaired = mend(arch, merged, stack, x)
    got = statistics(values_by_numpy(lambda h: np.maximum(h, 0), repaired, x))
    gain = repaired["Dense_0"]["kernel"] / merged["Dense_0"]["kernel"]
    for path, (mean, std) in got.items():
        live = goal[path][1] > 1e-6
        second, wanted = (m[live] ** 2 + s[live] ** 2 for m, s in ((mean, std), goal[path]))
        np.testing.assert_allclose(second, wanted, rtol=1e-4)
        assert np.abs(mean[live] - goal[path][0][live]).max() > 1e-2
    np.testing.assert_allclose(gain, np.broadcast_to(gain[0], gain.shape), rtol=1e-5)


def test_the_last_sum_of_a_network_is_its_output():
    """A residual at the end: its branch ends with outputs, which are not corrected; what is inside is."""
    neurons = (NeuronLayer("stream", 3, Scaling.FIXED), NeuronLayer("units", 8, Scaling.POSITIVE))
    parameters = (
        Parameter(("up", "kernel"), (Axis("stream", -1), Axis("units", 1))),
        Parameter(("up", "bias"), (Axis("units", 1),)),
        Parameter(("down", "kernel"), (Axis("units", -1), Axis("stream", 1))),
    )
    layers = (Residual(None, (Dense("up", Activation("relu")), Dense("down", None)), (), None),)
    arch = Architecture("stream", neurons, parameters, layers)
    stack, x = stack_of(arch), data(arch)
    merged = merge.average(stack)
    repaired = mend(arch, merged, stack, x)
    support.assert_identical(repaired["down"], merged["down"])
    assert support.deviation(repaired["up"], merged["up"]) > 1e-2
    linear = sg.mlp((3, 2))
    stack = stack_of(linear)
    support.assert_identical(mend(linear, support.rows(stack, 0), stack, data(linear)), support.rows(stack, 0))


# --- batch normalization ----------------------------------------------------------------------------------------------


def test_reset_statistics_are_those_of_the_data():
    """In order, each after those before it were reset: as training mode stores them with momentum 0."""
    params, x = support.rows(stack_of(BATCH), 0), data(BATCH)
    outputs, expected = jax.jit(lambda p, x: network.train_apply(BATCH, p, x, momentum=0.0))(params, x)
    found = reset(BATCH, params, x)
    assert support.deviation(found, expected) < 1e-6
    assert support.deviation(support.outputs(BATCH, found, x), outputs) < 1e-5
    for size in (5, 17):
        assert support.deviation(reset(BATCH, params, x, batch_size=size), expected) < 1e-5
    # Statistics of each batch by itself would differ.
    assert support.deviation(reset(BATCH, params, x[:5]), expected) > 1e-2
    weights = network.split_variables(params)["params"]
    support.assert_identical(network.split_variables(found)["params"], weights)
    other = support.rows(stack_of(RESNETS["layer"]), 0)
    for size in (None, 5):
        support.assert_identical(reset(RESNETS["layer"], other, x, batch_size=size), other)


def test_a_batch_norm_that_computes_the_outputs_is_reset_and_not_repaired():
    layers = (Dense("up", None), BatchNorm("norm", 1e-5, None))
    neurons = (NeuronLayer("input", 3, Scaling.FIXED), NeuronLayer("output", 4, Scaling.FIXED))
    own = (Axis("output", 1),)
    parameters = (
        Parameter(("up", "kernel"), (Axis("input", -1), Axis("output", 0))),
        *(Parameter(("norm", name), own) for name in VECTORS),
    )
    arch = Architecture("normed", neurons, parameters, layers)
    stack, x = stack_of(arch), data(arch)
    merged = merge.average(stack)
    for size in (None, 5):
        repaired = mend(arch, merged, stack, x, batch_size=size)
        values = np.float64(x) @ np.float64(merged["up"]["kernel"])
        np.testing.assert_allclose(repaired["norm"]["mean"], values.mean(0), atol=1e-6)
        np.testing.assert_allclose(repaired["norm"]["var"], values.var(0), rtol=1e-5)
        for path in (("up", "kernel"), ("norm", "scale"), ("norm", "bias")):
            np.testing.assert_array_equal(repaired[path[0]][path[1]], merged[path[0]][path[1]])


def test_moments_keep_their_digits_far_from_zero():
    """Mean 1e4, standard deviation 1: in float32 the mean of the squares would leave nothing of the variance."""
    x = jnp.asarray(np.random.default_rng(0).normal(1e4, 1, (50, 6, 3)), "float32")
    expected = np.float64(x).mean((0, 1)), np.float64(x).var((0, 1))
    of_batch = jax.vmap(moments.over_examples, axis_name=moments.EXAMPLES, out_axes=None)
    stacks = moments.batches(x, 16)
    assert [stack.shape[:2] for stack in stacks] == [(3, 16), (1, 2)]
    parts = [jax.vmap(of_batch)(stack) for stack in stacks]
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    for found in (of_batch(x), moments.pooled(whole, jnp.array([16.0, 16.0, 16.0, 2.0]))):
        np.testing.assert_allclose(found.mean, expected[0], rtol=1e-6)
        np.testing.assert_allclose(found.var, expected[1], rtol=1e-2)
    assert (np.abs(jnp.square(x).mean((0, 1)) - jnp.square(x.mean((0, 1))) - expected[1]) > 0.1).any()


# --- transformations and errors -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_runs_without_jit_and_over_stacks_of_merged_networks():
    stack, x = stack_of(RELU), data(RELU)
    merged = jax.tree.map(lambda *leaves: jnp.stack(leaves), merge.average(stack), support.rows(stack, 1))
    many = jax.jit(jax.vmap(lambda one: merge.repair(RELU, one, stack, x)))(merged)
    assert support.deviation(support.rows(many, 1), merge.repair(RELU, support.rows(merged, 1), stack, x)) < 1e-5
    ours = jax.tree.map(np.asarray, support.rows(merged, 0))
    assert support.deviation(merge.repair(RELU, ours, stack, x, batch_size=9), support.rows(many, 0)) < 1e-5


def test_what_does_not_fit_is_refused():
    stack, x = stack_of(RELU), data(RELU)
    one = support.rows(stack, 0)
    own, _ = support.HAND_WRITTEN["batch norm"]
    theirs = support.random_params(own)
    lone = jax.tree.map(lambda leaf: leaf, stack) | {"Dense_0": support.rows(stack["Dense_0"], slice(0, 2))}
    for call, message in (
        (lambda: merge.repair(RELU, one, stack, x[0]), r"x has shape \(3,\); .* \[examples, inputs\]"),
        (lambda: merge.repair(RELU, one, stack, x[:0]), r"x has shape \(0, 3\); .* one example or more"),
        (lambda: merge.repair(RELU, one, stack, x.at[4].set(np.inf)), r"x\[4\] holds a NaN or an infinity"),
        (lambda: merge.repair(RELU, stack, stack, x), r"merged\['Dense_0'\]\['kernel'\] has shape \(3, 3, 5\)"),
        (lambda: merge.repair(RELU, one, one, x), "leading sizes"),
        (lambda: merge.repair(RELU, one, lone, x), "leading sizes"),
        (lambda: merge.repair(RELU, one, stack, x, weights=jnp.ones(2)), r"weights have shape \(2,\)"),
        (lambda: merge.repair(RELU, one, stack, x, weights=jnp.array([1.0, -1, 0])), "with sum 0.0; expected finite"),
        (lambda: merge.repair(RELU, one, stack, x, weights=jnp.array([np.nan, 1, 1])), "with sum nan; expected finite"),
        (lambda: merge.repair(RELU, one, stack, x, batch_size=0), "batch_size is 0; expected a number >= 1"),
        (lambda: merge.repair(own, theirs, theirs, x), "does not say how to compute its function"),
        (lambda: merge.reset_batch_norm(own, theirs, x), "does not say how to compute its function"),
        (lambda: merge.reset_batch_norm(RELU, stack, x), r"params\['Dense_0'\]\['kernel'\] has shape \(3, 3, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

"""Activation matching finds the neurons that compute alike, by correlations that NumPy finds too."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import matching, network, symmetry
from jax_scalegmn.architecture import Axis, Scaling
from jax_scalegmn.matching import activation_matching, assignment

NETWORKS = support.ARCHITECTURES | {
    "vgg": sg.vgg(((4,), (6,)), 2, input_channels=1, norm="batch"),
    "resnet": sg.resnet(6, widths=(4, 6), outputs=2, input_channels=1),
    "tanh resnet": sg.resnet(4, widths=(5,), outputs=2, input_channels=1, activation="tanh"),
    "resnet without norms": sg.resnet(4, widths=(5,), outputs=2, input_channels=1, norm=None),
}
MODELS, EXAMPLES = 20, 48
FAST = ("mixed mlp",)  # of the others each compiles for some seconds
TANH, RELU = NETWORKS["tanh mlp"], NETWORKS["relu mlp"]
act = jax.jit(jax.vmap(support.act, (None, 0, 0)))


def params_of(arch, models=(), seed=0):
    """Random params whose stored variances are positive."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.abs(leaf) + 0.3 if path[-1].key == "var" else leaf,
        support.random_params(arch, seed, models=models),
    )


def data(arch, count=EXAMPLES, seed=1):
    images = arch.name.startswith(("cnn", "vgg", "resnet"))
    shape = (7, 9, arch.neuron_layers[0].width) if images else (arch.neuron_layers[0].width,)
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, *shape)), "float32")


@functools.partial(jax.jit, static_argnames=("permute", "scale", "assign", "batch_size"))
def match_one(arch, params, target, x, **options):
    return activation_matching(arch, params, target, x, **options)


@functools.partial(jax.jit, static_argnames=("permute", "scale"))
def match(arch, params, target, x, **options):
    """Matchings of a stack of pairs, from two batches."""
    options = {"batch_size": EXAMPLES // 2, "assign": assignment.scipy, **options}
    one = functools.partial(activation_matching, arch, **options)
    return jax.vmap(one, (0, 0, None))(params, target, x)


@jax.jit
def values_of(arch, params, x):
    """Every layer's activations, [values, width]."""
    found = jax.vmap(lambda one: network.activations(arch, params, one))(x)
    return {name: jnp.concatenate([p.reshape(-1, p.shape[-1]) for p in places]) for name, places in found.items()}


def alive(arch, params, planted, x):
    """Which neurons of the moved networks the data show: neither saturated nor off in nine of ten values."""

    def shown(v):
        return ((v != 0).mean(0) > 0.1) & (v.std(0) > 0.01 * jnp.abs(v).mean(0))

    on = jax.jit(jax.vmap(lambda one: jax.tree.map(shown, values_of(arch, one, x))))(params)
    masks = {n: np.take_along_axis(np.asarray(mask), planted.permutation[n], 1) for n, mask in on.items()}
    assert np.mean(np.concatenate([mask.ravel() for mask in masks.values()])) > 0.6
    return masks


def missed(found, planted, masks, tolerance=1e-4):
    """How many of those neurons are not matched as planted."""
    count = 0
    for name, order in planted.permutation.items():
        ratio = np.asarray(found.element.scale[name]) / planted.scale[name]
        right = (np.asarray(found.element.permutation[name]) == order) & (np.abs(ratio - 1) < tolerance)
        count += (masks[name] & ~right).sum()
    return count


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_the_planted_element_is_recovered_in_20_of_20(name):
    """Every neuron that the data show: its place and sign exactly, its scale to 1e-4."""
    arch = NETWORKS[name]
    params, x = params_of(arch, (MODELS,)), data(arch)
    planted = support.random_elements(arch, MODELS)
    target = act(arch, planted, params)
    found = match(arch, params, target, x)
    masks = alive(arch, params, planted, x)
    assert missed(found, planted, masks) == 0
    assert missed(found, support.random_elements(arch, MODELS, seed=1), masks) > 0
    assert found.converged.all()
    assert (found.sweeps == 1).all()
    moved = act(arch, found.element, params)
    if arch is TANH:
        expected = jax.vmap(functools.partial(matching.similarity, arch))(moved, target)
        np.testing.assert_allclose(found.similarity, expected, atol=1e-5)
    before, after = (support.outputs(arch, support.rows(p, 0), x) for p in (params, moved))
    assert support.deviation(after, before) < 1e-4


@pytest.mark.parametrize("name", ["tanh mlp", pytest.param("tanh cnn", marks=pytest.mark.slow), "relu mlp"])
def test_a_noisy_copy_is_recovered_too(name):
    """One part in a hundred of noise on the weights: places and signs exactly, scales to a quarter."""
    arch = NETWORKS[name]
    params, x = params_of(arch, (MODELS,)), data(arch)
    planted = support.random_elements(arch, MODELS)
    noisy = jax.tree.map(lambda a, b: a + 0.01 * b, params, params_of(arch, (MODELS,), seed=3))
    found = match(arch, noisy, act(arch, planted, params), x)
    assert missed(found, planted, alive(arch, params, planted, x), tolerance=0.25) == 0


def test_positive_scales_of_twelve_orders_are_recovered():
    params, x = params_of(RELU, (MODELS,)), data(RELU)
    planted = support.random_elements(RELU, MODELS)
    planted = planted._replace(scale={n: np.clip(s**5, 1e-6, 1e6) for n, s in planted.scale.items()})
    found = match(RELU, params, act(RELU, planted, params), x)
    assert max(scale.max() for scale in planted.scale.values()) > 1e4
    assert missed(found, planted, alive(RELU, params, planted, x)) == 0


def scores(arch, params, target, x, signed):
    """Correlations of the target's neurons (rows) with params', or cosines, in float64."""
    ours, theirs = (jax.tree.map(np.float64, values_of(arch, p, x)) for p in (params, target))
    found = {}
    for neurons in arch.hidden:
        a, b = theirs[neurons.name], ours[neurons.name]
        if not (signed and neurons.scaling is Scaling.SIGN):
            a, b = a - a.mean(0), b - b.mean(0)
        found[neurons.name] = a.T @ b / np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        pytest.param("tanh mlp", True, marks=pytest.mark.slow),
        pytest.param("tanh mlp", False, marks=pytest.mark.slow),
        ("mixed mlp", True),
        pytest.param("tanh resnet", True, marks=pytest.mark.slow),
        ("softplus", False),
    ],
)
def test_different_networks_get_the_best_of_all_assignments(name, scale):
    """By brute force over all permutations of NumPy's correlations; softplus far off the origin, where sums cancel."""
    arch = NETWORKS.get(name) or sg.mlp((3, 5, 4, 2), "softplus")
    params, target, x = params_of(arch, seed=4), params_of(arch, seed=5), data(arch)
    if name == "softplus":
        for one in (params, target):
            one["Dense_0"]["bias"] += 300.0
            one["Dense_1"]["kernel"] -= one["Dense_1"]["kernel"].mean(0)
    found = match_one(arch, params, target, x, scale=scale, batch_size=20)  # leaves 8 for a third batch
    for layer, score in scores(arch, params, target, x, scale).items():
        signed = scale and arch.neuron_layer(layer).scaling is Scaling.SIGN
        n = len(score)
        value = np.abs(score) if signed else score
        best = max(itertools.permutations(range(n)), key=lambda order: value[np.arange(n), list(order)].sum())
        np.testing.assert_array_equal(found.element.permutation[layer], best)
        expected = np.sign(score[np.arange(n), list(best)]) if signed else np.ones(n)
        if arch.neuron_layer(layer).scaling is not Scaling.POSITIVE or not scale:
            np.testing.assert_array_equal(found.element.scale[layer], expected)


def test_moved_networks_are_in_the_targets_gauge():
    params, target, x = params_of(RELU, seed=4), params_of(RELU, seed=5), data(RELU)
    found = match_one(RELU, params, target, x)
    moved = support.act(RELU, found.element, params)
    own, theirs, ours = (symmetry.balance(RELU, one).scale for one in (moved, target, params))
    assert support.deviation(own, theirs) < 1e-4
    assert support.deviation(ours, theirs) > 0.1


def test_dead_and_constant_neurons_take_what_is_left_over():
    """Two of five dead, in one or both networks: the others find their own, scales stay finite, the function too."""
    params, x = params_of(RELU, seed=6), data(RELU)
    params["Dense_0"]["bias"] += 0.7
    planted = support.rows(support.random_elements(RELU, 1), 0)
    dead = jax.tree.map(jnp.copy, params)
    dead["Dense_0"]["bias"] = dead["Dense_0"]["bias"].at[jnp.array([1, 3])].set(-100.0)
    for ours, theirs in ((dead, dead), (dead, params), (params, dead)):
        found = match_one(RELU, ours, support.act(RELU, planted, theirs), x)
        order, scale = found.element.permutation["hidden_0"], found.element.scale["hidden_0"]
        np.testing.assert_array_equal(np.sort(order), np.arange(5))
        live = ~np.isin(planted.permutation["hidden_0"], [1, 3])
        np.testing.assert_array_equal(order[live], planted.permutation["hidden_0"][live])
        assert (scale > 0).all()
        if ours is theirs:
            np.testing.assert_allclose(scale[live], planted.scale["hidden_0"][live], rtol=1e-4)
        moved = support.act(RELU, found.element, ours)
        assert support.deviation(support.outputs(RELU, moved, x), support.outputs(RELU, ours, x)) < 1e-5
    nothing = jax.tree.map(jnp.zeros_like, params)
    found = match_one(RELU, nothing, nothing, x)
    for name, scale in found.element.scale.items():
        np.testing.assert_array_equal(scale, np.ones_like(scale))
        np.testing.assert_array_equal(np.sort(found.element.permutation[name]), np.arange(len(scale)))
    assert found.similarity == 0


@pytest.mark.slow
def test_parts_of_the_group_are_used_where_they_are_allowed():
    params, x = params_of(TANH, (MODELS,)), data(TANH)
    for options in support.GROUPS.values():
        planted = support.random_elements(TANH, MODELS, **options)
        found = match(TANH, params, act(TANH, planted, params), x, **options)
        assert missed(found, planted, alive(TANH, params, planted, x)) == 0
    both = support.random_elements(TANH, MODELS)
    target = act(TANH, both, params)
    unscaled, unmoved = (match(TANH, params, target, x, **support.GROUPS[group]) for group in "PD")
    for name, scale in unscaled.element.scale.items():
        np.testing.assert_array_equal(scale, np.ones_like(scale))
        order = unmoved.element.permutation[name]
        np.testing.assert_array_equal(order, np.broadcast_to(np.arange(order.shape[1]), order.shape))


@pytest.mark.slow
def test_batches_and_solvers_change_nothing():
    params, target, x = params_of(TANH, seed=4), params_of(TANH, seed=5), data(TANH)
    expected = match_one(TANH, params, target, x, assign=assignment.scipy)
    sizes = []

    def assign(score):
        sizes.append(len(score))
        return assignment.hungarian(score)

    for options in ({"batch_size": 1}, {"assign": assign, "batch_size": 31}, {"batch_size": EXAMPLES}):
        support.assert_identical(match_one(TANH, params, target, x, **options), expected)
    assert sizes == [5, 4]


def test_x_that_does_not_fit_is_refused():
    params, x = params_of(TANH), data(TANH)
    for wrong, message in (
        (x[0], r"x has shape \(3,\); .* expects one example or more, \[examples, inputs\]"),
        (x[:, :2], r"x has shape \(48, 2\).* with 3 in the last axis"),
        (x[:0], r"x has shape \(0, 3\)"),
        (x.at[7, 1].set(jnp.nan), r"x\[7\] holds a NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            activation_matching(TANH, params, params, wrong)
    with pytest.raises(ValueError, match="batch_size is 0; expected a number >= 1"):
        activation_matching(TANH, params, params, x, batch_size=0)


def test_networks_that_do_not_fit_are_refused():
    params, x = params_of(TANH), data(TANH)
    with pytest.raises(ValueError, match=r"target\['Dense_0'\]\['kernel'\] has shape \(4, 5\)"):
        activation_matching(TANH, params, params | {"Dense_0": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}}, x)
    own, _ = support.HAND_WRITTEN["residual relu"]
    with pytest.raises(ValueError, match=r"does not say how to compute its function .layers is empty"):
        activation_matching(own, support.random_params(own), support.random_params(own), x)

    def unscaled(axis):
        return Axis(axis.neurons, 0) if axis.neurons == "hidden_1" else axis

    parameters = (dataclasses.replace(p, axes=tuple(unscaled(axis) for axis in p.axes)) for p in TANH.parameters)
    hidden = dataclasses.replace(TANH, parameters=tuple(parameters))
    with pytest.raises(ValueError, match=r"'hidden_1' has no value after an activation. Use matching.weight_matching"):
        activation_matching(hidden, params, params, x)

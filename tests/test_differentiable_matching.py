"""Gradient steps find what was planted, end no worse than they began, and lower losses that the weights do not tell."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import matching, merge, network, symmetry
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.matching import assignment, sinkhorn_matching, straight_through_matching
from jax_scalegmn.matching._differentiable import TIMES

PAIRS = 20
NETWORKS = {
    "siren": sg.siren((2, 5, 5, 1)),
    "relu mlp": sg.mlp((3, 5, 5, 2)),
    "tanh cnn": sg.cnn((2, 4, 4), 2, activation="tanh", padding="SAME", flatten=(7, 9)),
    "residual tanh": support.HAND_WRITTEN["residual tanh"][0],
}
OPTIONS = {"num_steps": 60, "learning_rate": 0.2, "assign": assignment.scipy}
TANH = sg.mlp((2, 6, 6, 1), "tanh")
act = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))
similarity = jax.jit(jax.vmap(matching.similarity, (None, 0, 0)))


@functools.cache
def by_sinkhorn(name):
    """(params, target, start) -> matchings of a stack of pairs; compiled once."""

    def one(params, target, start):
        return sinkhorn_matching(NETWORKS[name], params, target, start=start, **OPTIONS)

    return jax.jit(jax.vmap(one))


@functools.cache
def unrelated(name):
    """Pairs of different networks, random starts, the similarities there, and the matchings."""
    arch = NETWORKS[name]
    params, target = (support.random_params(arch, seed, models=(PAIRS,)) for seed in (1, 2))
    start = support.random_elements(arch, PAIRS, seed=3)
    found = by_sinkhorn(name)(params, target, start)
    unscaled = start._replace(scale={k: jnp.sign(s) for k, s in start.scale.items()})
    return params, target, start, similarity(arch, act(arch, unscaled, balanced(arch, params)), target), found


def balanced(arch, params):
    return jax.jit(jax.vmap(functools.partial(symmetry.balanced, arch)))(params)


def identities(arch):
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (PAIRS, 1)), symmetry.identity(arch))


@functools.cache
def regression():
    """Eight pairs of small networks trained apart on one regression: params, target, the loss and its data."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-1, 1, (48, 2)), "float32")
    data = x, jnp.sin(3 * x[:, :1]) * jnp.cos(2 * x[:, 1:])

    def loss_fn(params, batch):
        outputs = jax.vmap(lambda one: network.apply(TANH, params, one))(batch[0])
        return jnp.square(outputs - batch[1]).mean()

    @jax.jit
    @jax.vmap
    def fit(params):
        def step(state, _):
            params, opt_state = state
            updates, opt_state = tx.update(jax.grad(loss_fn)(params, data), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=300)[0][0]

    tx = optax.adam(0.02)
    stack = fit(support.random_params(TANH, models=(16,)))
    assert (jax.jit(jax.vmap(lambda one: loss_fn(one, data)))(stack) < 0.05).all()
    return support.rows(stack, slice(0, 8)), support.rows(stack, slice(8, 16)), loss_fn, data


def losses(elements, times):
    """The mean loss at these points between the target and the moved params, for every pair."""
    params, target, loss_fn, data = regression()

    def one(element, params, target):
        moved = symmetry.act(TANH, element, params)
        return jnp.stack([loss_fn(merge.lerp(target, moved, t), data) for t in times]).mean()

    return jax.jit(jax.vmap(one))(elements, params, target)


@functools.cache
def by_weights():
    params, target, *_ = regression()
    return jax.jit(jax.vmap(functools.partial(matching.weight_matching, TANH)))(params, target).element


# --- Sinkhorn ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "siren" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_sinkhorn_recovers_the_planted_element_in_20_of_20(name):
    """From the identity, which itself is right in none; rescales of exp(2 x normal) come out to 1e-4."""
    arch = NETWORKS[name]
    params, start = support.random_params(arch, models=(PAIRS,)), identities(arch)
    planted = support.random_elements(arch, PAIRS)
    planted = planted._replace(scale={k: np.sign(s) * np.abs(s) ** 2 for k, s in planted.scale.items()})
    found = by_sinkhorn(name)(params, act(arch, planted, params), start)
    assert support.recovered(found, planted).all()
    assert not support.recovered(found._replace(element=start), planted).any()
    np.testing.assert_allclose(found.similarity, 1, atol=1e-5)
    assert (found.sweeps == 60).all()
    assert found.converged.all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siren", "relu mlp", "tanh cnn"])
def test_sinkhorn_never_ends_below_its_start(name):
    """Of unrelated networks, too; its similarity is that of the network it returns, whose function is the given one."""
    arch = NETWORKS[name]
    params, target, _, before, found = unrelated(name)
    moved = act(arch, found.element, params)
    assert (found.similarity >= before - 1e-6).all()
    assert (found.similarity > before + 0.1).mean() > 0.8
    np.testing.assert_allclose(found.similarity, similarity(arch, moved, target), atol=1e-5)
    x = jnp.stack([support.example(arch)] * PAIRS)
    function = jax.jit(jax.vmap(support.outputs, (None, 0, 0)))
    assert support.deviation(function(arch, moved, x), function(arch, params, x)) < 1e-5


@pytest.mark.slow
def test_sinkhorn_starts_at_weight_matching_by_default_and_one_by_one_is_a_stack():
    """Pair by pair without a start, and the stack from weight matching's elements: one and the same."""
    arch = NETWORKS["siren"]
    params, target, *_ = unrelated("siren")
    start = jax.jit(jax.vmap(functools.partial(matching.weight_matching, arch)))(params, target)
    stack = by_sinkhorn("siren")(params, target, start.element)
    assert (stack.similarity >= start.similarity - 1e-6).all()
    alone = jax.jit(functools.partial(sinkhorn_matching, arch, **OPTIONS))
    for index in range(2):
        one = alone(support.rows(params, index), support.rows(target, index))
        for got, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(support.rows(stack, index)), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("zero", ["params", "target", "both"])
def test_sinkhorn_of_zeros_loses_no_neuron(zero):
    arch = NETWORKS["siren"]
    some = support.random_params(arch, models=(PAIRS,))
    none = jax.tree.map(jnp.zeros_like, some)
    pair = [none if zero in (name, "both") else some for name in ("params", "target")]
    found = by_sinkhorn("siren")(*pair, identities(arch))
    for order, scale in zip(found.element.permutation.values(), found.element.scale.values(), strict=True):
        np.testing.assert_array_equal(np.sort(order), np.arange(5) + np.zeros((PAIRS, 1)))
        np.testing.assert_array_equal(np.abs(scale), 1)
    np.testing.assert_array_equal(found.similarity, 0)


@pytest.mark.slow
def test_sinkhorn_lowers_the_loss_along_the_segment_where_weights_do_not_tell():
    """On networks trained apart: never above weight matching's element, below it on the mean by a tenth."""
    params, target, loss_fn, data = regression()

    @jax.jit
    @jax.vmap
    def match(params, target, key, start):
        return sinkhorn_matching(
            TANH, params, target, key, loss_fn=lambda p: loss_fn(p, data), start=start, confidence=1.0, **OPTIONS
        )

    found = match(params, target, jax.random.split(jax.random.key(0), 8), by_weights())
    before, after = losses(by_weights(), TIMES), losses(found.element, TIMES)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.mean() < 0.9 * before.mean()


@pytest.mark.slow
def test_a_loss_at_the_midpoint_falls_and_layers_that_it_does_not_touch_keep_the_start():
    """A loss of the first kernel alone: it moves the first layer's element, and no other's."""
    arch = NETWORKS["siren"]
    params, target, start, *_ = unrelated("siren")

    def loss_fn(params):
        return -jnp.square(params["Dense_0"]["kernel"]).sum()

    @jax.jit
    @jax.vmap
    def match(params, target, start):
        found = sinkhorn_matching(arch, params, target, loss_fn=loss_fn, start=start, **OPTIONS).element
        moved = [symmetry.act(arch, element, params) for element in (start, found)]
        return found, [loss_fn(merge.lerp(target, one, 0.5)) for one in moved]

    found, (before, after) = match(params, target, start)
    assert (after <= before + 1e-6).all()
    assert after.mean() < 1.2 * before.mean() < 0
    for got, begun in zip(found, start, strict=True):
        np.testing.assert_array_equal(got["hidden_1"], begun["hidden_1"])
    assert (np.asarray(found.permutation["hidden_0"]) != start.permutation["hidden_0"]).any(-1).mean() > 0.8


# --- straight-through -------------------------------------------------------------------------------------------------


@functools.cache
def straight_through():
    """On the regression: the matchings from weight matching's elements, by 60 steps on all data."""
    params, target, loss_fn, data = regression()
    batches = jax.tree.map(lambda leaf: jnp.tile(leaf, (60, 1, 1)), data)

    @jax.jit
    @jax.vmap
    def match(params, target):
        return straight_through_matching(
            TANH, params, target, loss_fn, batches, tx=optax.adam(0.03), assign=assignment.scipy
        )

    return match, match(params, target)


@pytest.mark.slow
def test_straight_through_lowers_the_midpoint_loss_where_weights_do_not_tell():
    """On networks trained apart: never above weight matching's element, below it on the mean by a tenth."""
    params, target, *_ = regression()
    _, found = straight_through()
    before, after = losses(by_weights(), (0.5,)), losses(found.element, (0.5,))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.mean() < 0.9 * before.mean()
    moved = act(TANH, found.element, params)
    np.testing.assert_allclose(found.similarity, similarity(TANH, moved, target), atol=1e-5)
    x = jnp.stack([support.example(TANH)] * 8)
    function = jax.jit(jax.vmap(support.outputs, (None, 0, 0)))
    assert support.deviation(function(TANH, moved, x), function(TANH, params, x)) < 1e-5
    assert (found.sweeps == 60).all()
    assert found.converged.any()


@pytest.mark.slow
def test_straight_through_keeps_planted_elements():
    """8 of 8: weight matching's start is the planted element, whose midpoint no step can beat."""
    params, *_ = regression()
    planted = support.random_elements(TANH, 8)
    match, _ = straight_through()
    found = match(params, act(TANH, planted, params))
    assert support.recovered(found, planted).all()
    np.testing.assert_allclose(found.similarity, 1, atol=1e-5)


# --- both -------------------------------------------------------------------------------------------------------------


def fixed_network():
    """A kernel from inputs to outputs, without a hidden layer."""
    neurons = (NeuronLayer("in", 2, Scaling.FIXED), NeuronLayer("out", 1, Scaling.FIXED))
    return Architecture("linear", neurons, (Parameter(("dense", "kernel"), (Axis("in", -1), Axis("out", 1))),))


def by_both(arch, params, target, start, loss_fn):
    """The matchings of both by a loss."""
    batches = jnp.zeros((5, 1))
    return (
        sinkhorn_matching(arch, params, target, loss_fn=loss_fn, start=start, num_steps=5),
        straight_through_matching(arch, params, target, lambda p, _: loss_fn(p), batches, start=start),
    )


@pytest.mark.slow
def test_a_loss_without_numbers_returns_the_start():
    """Where the loss is NaN, or its gradient alone: no crash in the assignment, and no element of chance."""
    params, target = support.random_params(TANH), support.random_params(TANH, 1)
    start = support.rows(support.random_elements(TANH, 1), 0)

    def loss_fn(params, undefined):
        kernel = params["Dense_0"]["kernel"]
        return jnp.where(undefined, jnp.nan * kernel, jnp.sqrt(0 * jnp.abs(kernel))).sum()

    @jax.jit
    def match(undefined):
        slope = jax.grad(loss_fn)(params, undefined)["Dense_0"]["kernel"]
        return slope, by_both(TANH, params, target, start, lambda p: loss_fn(p, undefined))

    for undefined in (True, False):
        assert np.isnan(loss_fn(params, undefined)) == undefined
        slope, matchings = match(undefined)
        assert not np.isfinite(slope).any()
        for found in matchings:
            for got, wanted in zip(jax.tree.leaves(found.element), jax.tree.leaves(start), strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_networks_without_hidden_layers_have_nothing_to_match():
    arch = fixed_network()
    params, target = support.random_params(arch), support.random_params(arch, 1)
    for found in by_both(arch, params, target, None, lambda p: jnp.square(p["dense"]["kernel"]).sum()):
        assert not jax.tree.leaves(found.element)
        assert found.converged
        assert found.similarity == pytest.approx(float(matching.similarity(arch, params, target)))


def test_without_ott_sinkhorn_says_what_to_install(monkeypatch):
    """Other matchers do not need it: it is imported where Sinkhorn's iteration begins."""
    for name in ("ott", "ott.geometry", "ott.problems.linear", "ott.solvers.linear"):
        monkeypatch.setitem(sys.modules, name, None)
    params = support.random_params(TANH)
    with pytest.raises(ImportError, match=r'needs ott-jax: pip install "jax-scalegmn\[sinkhorn\]"'):
        sinkhorn_matching(TANH, params, params)


def test_importing_the_matchers_does_not_import_ott():
    program = "import sys, jax_scalegmn as sg; sg.matching; assert 'ott' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


# --- errors -----------------------------------------------------------------------------------------------------------


def zero_loss(params, *batch):
    return jnp.zeros(())


@pytest.mark.parametrize("name", ["num_steps", "num_iterations"])
def test_sinkhorn_refuses_counts_below_1(name):
    params = support.random_params(TANH)
    with pytest.raises(ValueError, match=f"^{name} is 0; expected a number >= 1"):
        sinkhorn_matching(TANH, params, params, **{name: 0})


@pytest.mark.parametrize("name", ["learning_rate", "epsilon", "confidence"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_sinkhorn_refuses_knobs_that_are_not_positive(name, value):
    params = support.random_params(TANH)
    with pytest.raises(ValueError, match=f"^{name} is {value}; expected a finite number > 0"):
        sinkhorn_matching(TANH, params, params, **{name: value})


def test_sinkhorn_refuses_a_key_that_nothing_would_use():
    params = support.random_params(TANH)
    with pytest.raises(ValueError, match="expected loss_fn or x with it"):
        sinkhorn_matching(TANH, params, params, jax.random.key(0))


def test_objectives_that_miss_or_exclude_each_other_are_named():
    params, x, key = support.random_params(TANH), jnp.zeros((3, 2)), jax.random.key(0)
    with pytest.raises(ValueError, match="Got x without a key"):
        sinkhorn_matching(TANH, params, params, x=x)
    with pytest.raises(ValueError, match="Got both loss_fn and x"):
        sinkhorn_matching(TANH, params, params, key, x=x, loss_fn=zero_loss)
    through = functools.partial(straight_through_matching, TANH, params, params)
    with pytest.raises(ValueError, match="Got x without a key"):
        through(x=x)
    with pytest.raises(ValueError, match=r"x has shape \(3, 1\).*expects one example or more"):
        through(x=x[:, :1], key=key)
    for mixture in (
        {},
        {"loss_fn": zero_loss},
        {"batches": x, "x": x, "key": key},
        {"loss_fn": zero_loss, "batches": x, "key": key},
        {"loss_fn": zero_loss, "batches": x, "num_steps": 3},
    ):
        with pytest.raises(ValueError, match="Got a mixture of loss_fn and batches with x"):
            through(**mixture)


@pytest.mark.parametrize("name", [pytest.param("sinkhorn", marks=pytest.mark.slow), "straight-through"])
def test_without_labels_the_merged_function_comes_close_to_both(name):
    params, target, _, (x, _) = regression()
    match = {
        "sinkhorn": functools.partial(sinkhorn_matching, learning_rate=0.2),
        "straight-through": functools.partial(straight_through_matching, tx=optax.adam(0.05)),
    }[name]
    options = {"num_steps": 60, "assign": assignment.scipy}
    run = jax.vmap(functools.partial(network.apply, TANH), (None, 0))

    @jax.jit
    @jax.vmap
    def gaps(params, target, key):
        """The mean error to the interpolated outputs, aligned by the weights and from there by the function."""
        start = matching.weight_matching(TANH, params, target, assign=assignment.scipy).element
        found = match(TANH, params, target, x=x, key=key, start=start, **options)
        ends = run(target, x), run(params, x)

        def gap(element, t):
            merged = merge.lerp(target, symmetry.act(TANH, element, params), t)
            return jnp.square(run(merged, x) - (1 - t) * ends[0] - t * ends[1]).mean()

        return jnp.stack([jnp.mean(jnp.stack([gap(e, t) for t in TIMES])) for e in (start, found.element)])

    before, after = gaps(params, target, jax.random.split(jax.random.key(0), 8)).T
    assert (after <= before * (1 + 1e-4) + 1e-9).all()
    assert after.mean() < 0.9 * before.mean()


@pytest.mark.parametrize(
    "batches", [(), jnp.zeros(()), jnp.zeros((0, 3)), (jnp.zeros((2, 3)), jnp.zeros((3, 3)))], ids=repr
)
def test_straight_through_refuses_batches_without_one_number_of_steps(batches):
    params = support.random_params(TANH)
    with pytest.raises(ValueError, match=r"^The arrays of batches have leading axes .*Stack the batches"):
        straight_through_matching(TANH, params, params, zero_loss, batches)


def test_straight_through_refuses_no_sweeps():
    params = support.random_params(TANH)
    with pytest.raises(ValueError, match=r"^max_sweeps is 0; expected a number >= 1"):
        straight_through_matching(TANH, params, params, zero_loss, jnp.zeros((1, 1)), max_sweeps=0)


@pytest.mark.parametrize(
    "match",
    [
        functools.partial(sinkhorn_matching, TANH),
        lambda *pair, **start: straight_through_matching(TANH, *pair, zero_loss, jnp.zeros((1, 1)), **start),
    ],
    ids=["sinkhorn", "straight-through"],
)
def test_networks_and_starts_that_do_not_fit_are_named(match):
    params, other = support.random_params(TANH), support.random_params(sg.mlp((2, 5, 6, 1)))
    for pair, name in (((other, params), "params"), ((params, other), "target")):
        with pytest.raises(ValueError, match=rf"^{name}\['Dense_0'\].* has shape .*expects"):
            match(*pair)
        broken = [params if one is params else jax.tree.map(lambda leaf: leaf * jnp.nan, params) for one in pair]
        with pytest.raises(ValueError, match=rf"^{name}\['Dense_0'\].* NaN or infinite"):
            match(*broken)
    with pytest.raises(ValueError, match=r"^element\.permutation has layers .* expects"):
        match(params, params, start=support.random_elements(TANH, 2))

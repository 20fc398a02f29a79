"""Positive scales fitted to functions: never above their start, exact at both ends, planted ones found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import matching, merge, network, stacks, symmetry
from jax_scalegmn.symmetry import Element

RELU = sg.mlp((3, 6, 5, 2), "relu")
X = jax.random.normal(jax.random.key(9), (40, 3))


def pairs(arch, count=3, dtype="float32"):
    """Independent random networks: params and targets."""
    return [support.random_params(arch, seed, dtype, models=(count,)) for seed in (0, 1)]


def objective(arch, element, params, target, times, x=X):
    """The mean squared distance to the interpolated outputs, written anew."""
    moved = symmetry.act(arch, element, params)
    first, last = support.outputs(arch, target, x), support.outputs(arch, params, x)
    gaps = [support.outputs(arch, merge.lerp(target, moved, t), x) - ((1 - t) * first + t * last) for t in times]
    return np.mean([np.square(gap).mean() for gap in gaps])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_the_result_is_below_its_start_and_keeps_both_functions(dtype):
    with support.precision(dtype):
        params, target = pairs(RELU, dtype=dtype)
        x = jnp.asarray(X, dtype)
        start = jax.vmap(functools.partial(matching.weight_matching, RELU))(params, target)
        fit = jax.jit(
            jax.vmap(
                lambda a, b, start: matching.fit_scales(RELU, a, b, x, start=start, times=(0.3, 0.6), num_steps=60)
            )
        )
        found = fit(params, target, start.element)
        assert (found.loss < 0.9 * found.start_loss).all()
        assert (found.evaluations == 62).all()
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        for row in range(3):
            a, b, one, begin = (support.rows(stack, row) for stack in (params, target, found, start))
            moved = symmetry.act(RELU, one.element, a)
            assert support.deviation(support.outputs(RELU, moved, x), support.outputs(RELU, a, x)) < tolerance
            for element, loss in ((one.element, one.loss), (begin.element, one.start_loss)):
                np.testing.assert_allclose(objective(RELU, element, a, b, (0.3, 0.6), x), loss, rtol=1e-4)
            jax.tree.map(np.testing.assert_array_equal, one.element.permutation, begin.element.permutation)
            # The gauge does not see positive scales.
            np.testing.assert_allclose(one.similarity, begin.similarity, rtol=1e-5)


def test_planted_scales_are_found():
    params = support.rows(pairs(RELU, 1)[0], 0)
    planted = symmetry.random(RELU, jax.random.key(3), permute=False, log_scale_std=1.5)
    target = symmetry.act(RELU, planted, params)
    start = symmetry.identity(RELU)
    found = matching.fit_scales(RELU, params, target, X, start=start, num_steps=600)
    assert found.loss < 1e-3 * found.start_loss
    merged = merge.lerp(target, symmetry.act(RELU, found.element, params), 0.5)
    expected = support.outputs(RELU, params, X)
    assert support.deviation(support.outputs(RELU, merged, X), expected) < 0.03
    before = support.outputs(RELU, merge.lerp(target, params, 0.5), X)
    assert support.deviation(before, expected) > 0.1  # or there was nothing to find


@pytest.mark.slow
def test_own_losses_and_functions_are_those_of_the_architecture():
    params, target = (support.rows(stack, 0) for stack in pairs(RELU, 1))
    fit = functools.partial(matching.fit_scales, RELU, params, target, times=(0.5,), num_steps=20)
    expected = fit(X)
    ends = [support.outputs(RELU, one, X) for one in (params, target)]

    def apply(params, x):
        return jax.vmap(functools.partial(network.apply, RELU, params))(x)

    def loss(params):
        return jnp.square(apply(params, X) - (ends[0] + ends[1]) / 2).mean()

    for found in (fit(X, apply_fn=apply), fit(None, loss_fn=loss)):
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-3)
        np.testing.assert_allclose(found.start_loss, expected.start_loss, rtol=1e-4)


@pytest.mark.slow
def test_inputs_that_every_step_draws_do_what_all_of_them_do():
    params, target = (support.rows(stack, 0) for stack in pairs(RELU, 1))
    x = jax.random.normal(jax.random.key(4), (1003, 3))
    fit = functools.partial(matching.fit_scales, RELU, params, target=target, x=x, num_steps=200)
    whole, drawn = fit(), fit(examples_per_step=20, key=jax.random.key(5))
    # Batches of 20 cover the first 1000.
    times = (0.25, 0.5, 0.75)
    for element, loss in (
        (drawn.element, drawn.loss),
        (matching.weight_matching(RELU, params, target).element, drawn.start_loss),
    ):
        np.testing.assert_allclose(objective(RELU, element, params, target, times, x[:1000]), loss, rtol=1e-4)
    np.testing.assert_allclose(drawn.start_loss, whole.start_loss, rtol=0.05)
    won, most = (found.start_loss - found.loss for found in (drawn, whole))
    assert won > 0.9 * most
    few = matching.fit_scales(RELU, params, target, x[:20], num_steps=200)
    assert objective(RELU, few.element, params, target, times, x) > 1.01 * drawn.loss  # which fits those 20 alone
    again = fit(examples_per_step=20, key=jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, again.element, drawn.element)
    large = jax.tree.map(lambda leaf: 1e3 * leaf, target)
    with pytest.raises(ValueError, match="output of target is"):  # on one of all inputs
        fit(target=large, x=x.at[700].set(3e38), examples_per_step=20, key=jax.random.key(5))


@pytest.mark.slow
def test_what_draws_lead_to_is_never_above_the_start():
    params, target = (support.rows(stack, 0) for stack in pairs(RELU, 1))
    best = matching.fit_scales(RELU, params, target, X, num_steps=600)
    fit = functools.partial(matching.fit_scales, RELU, params, target, X, start=best, examples_per_step=1)
    astray = fit(num_steps=3, learning_rate=3.0, key=jax.random.key(0))
    assert astray.loss == astray.start_loss
    assert support.deviation(astray.element.scale, best.element.scale) < 1e-5


def test_signs_stay_where_a_group_has_both():
    arch = sg.mlp((3, 6, 2), "abs")
    params, target = (support.rows(stack, 0) for stack in pairs(arch, 1))
    start = matching.weight_matching(arch, params, target)
    found = matching.fit_scales(arch, params, target, X, start=start, num_steps=30)
    assert found.loss < found.start_loss
    signs, before = (np.sign(one.element.scale["hidden_0"]) for one in (found, start))
    np.testing.assert_array_equal(signs, before)
    assert (before < 0).any()


def test_converged_says_that_steps_no_longer_help():
    params, target = (support.rows(stack, 0) for stack in pairs(RELU, 1))
    fit = functools.partial(matching.fit_scales, RELU, params, x=X, num_steps=10)
    assert not fit(target).converged
    aligned = fit(params)  # there is nothing to find
    assert aligned.converged
    assert aligned.loss < 1e-9


@pytest.mark.slow
def test_a_search_ends_with_scales_and_begins_in_those_of_its_start():
    params, target = (support.rows(stack, 0) for stack in pairs(RELU, 1))
    begin = matching.weight_matching(RELU, params, target)

    def search(start, scale_steps):
        key = jax.random.key(0)
        return matching.search_matching(
            RELU, params, target, X, key, start=start, max_sweeps=1, scale_steps=scale_steps
        )

    plain, scaled = search(begin, 0), search(begin, 60)
    jax.tree.map(np.testing.assert_array_equal, scaled.element.permutation, plain.element.permutation)
    np.testing.assert_allclose(scaled.start_loss, plain.start_loss, rtol=1e-5)
    assert scaled.loss < 0.95 * plain.loss
    assert scaled.evaluations == plain.evaluations + 60
    times = (0.25, 0.5, 0.75)
    np.testing.assert_allclose(objective(RELU, scaled.element, params, target, times), scaled.loss, rtol=1e-4)

    again = search(scaled, 60)
    np.testing.assert_allclose(again.start_loss, scaled.loss, rtol=1e-4)
    assert again.loss <= again.start_loss
    assert search(scaled, 0).start_loss > 1.01 * scaled.loss  # in the balanced gauge
    # Scales that are worse than the gauge's are left.
    far = Element(plain.element.permutation, jax.tree.map(lambda s: 100 * s, plain.element.scale))
    np.testing.assert_allclose(search(far, 60).start_loss, search(far, 0).start_loss, rtol=1e-4)


@pytest.mark.slow
def test_many_networks_merge_with_fitted_scales():
    stack = support.random_params(RELU, 0, models=(4,))
    functions = jax.vmap(lambda params: support.outputs(RELU, params, X))(stack)

    def merged(**options):
        many = merge.merge_many(RELU, stack, X, jax.random.key(0), max_sweeps=1, **options)
        moved = jax.vmap(functools.partial(symmetry.act, RELU))(many.elements, stack)
        for row in range(4):
            own = support.outputs(RELU, stacks.member(moved, row), X)
            assert support.deviation(own, functions[row]) < 1e-5
        assert support.deviation(many.params, merge.average(moved)) < 1e-5
        return many

    plain, scaled, again = merged(), merged(scale_steps=60), merged(scale_steps=60, last_round=True)
    assert scaled.losses[1] < 0.95 * plain.losses[1]  # of the first two networks
    # The last round begins in the scales that were found before.
    assert (again.losses <= again.start_losses).all()


@pytest.mark.slow
def test_scales_of_own_functions_and_of_residual_streams_are_fitted():
    arch, function = support.residual_mlp("relu")
    params, target = (support.rows(stack, 0) for stack in pairs(arch, 1))
    x = support.example(arch, 16)
    found = matching.fit_scales(arch, params, target, x, apply_fn=function, num_steps=30)
    assert found.loss < found.start_loss
    moved = symmetry.act(arch, found.element, params)
    assert support.deviation(function(moved, x), function(params, x)) < 1e-5


def test_bad_input_is_refused():
    params, target = (support.rows(stack, 0) for stack in pairs(RELU, 1))
    fit = functools.partial(matching.fit_scales, RELU, params, target)
    siren = sg.siren((2, 3, 1))
    theirs = support.random_params(siren)
    search = functools.partial(matching.search_matching, RELU, params, target, X, jax.random.key(0))
    nan = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), target)
    infinite = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e30), target)
    for message, call in [
        ("no hidden layer with them", lambda: matching.fit_scales(siren, theirs, theirs, X[:, :2])),
        (
            "scale_steps fits positive scales",
            lambda: matching.search_matching(siren, theirs, theirs, X[:, :2], jax.random.key(0), scale_steps=1),
        ),
        ("scale_steps is -1", lambda: search(scale_steps=-1)),
        ("num_steps is 0", lambda: fit(X, num_steps=0)),
        ("learning_rate is -1", lambda: fit(X, learning_rate=-1.0)),
        ("times are", lambda: fit(X, times=(1.5,))),
        ("times are", lambda: fit(X, times=())),
        ("x is None", lambda: fit(None)),
        ("both loss_fn and apply_fn", lambda: fit(X, loss_fn=lambda p: 0.0, apply_fn=lambda p, x: x)),
        ("x has", lambda: fit(X[:, :2])),
        ("NaN", lambda: matching.fit_scales(RELU, params, nan, X)),
        ("output of target is", lambda: matching.fit_scales(RELU, params, infinite, X)),
        ("permutation", lambda: fit(X, start=symmetry.identity(siren))),
        ("expected 1 to 40, the inputs given", lambda: fit(X, examples_per_step=41, key=jax.random.key(0))),
        ("expected 1 to 40, the inputs given", lambda: fit(X, examples_per_step=0, key=jax.random.key(0))),
        ("key is None", lambda: fit(X, examples_per_step=4)),
        ("key without examples_per_step", lambda: fit(X, key=jax.random.key(0))),
        (
            "both loss_fn and examples_per_step",
            lambda: fit(None, loss_fn=lambda p: 0.0, examples_per_step=4, key=jax.random.key(0)),
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()

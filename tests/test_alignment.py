"""Learned matchers and frames: exact equivariance, exact end points, a loss that training lowers, clear errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_scalegmn as sg
from jax_scalegmn import matching, models, stacks, symmetry, training
from jax_scalegmn.architecture import Scaling, restrict
from jax_scalegmn.training import losses
from tests import support

SIREN = sg.siren((2, 5, 4, 1))
MIXED = sg.mlp((2, 5, 4, 1), ("tanh", "relu"))
TINY = sg.siren((2, 4, 1))
PLAIN = restrict(SIREN, Scaling.PERMUTATION)
NORMED = sg.resnet(4, widths=(5,), outputs=2, input_channels=1, activation="tanh")
ARCHITECTURES = {
    "signs": SIREN,
    "signs and positive scales": MIXED,
    "either": sg.mlp((2, 5, 4, 1), "abs"),
    "permutations": PLAIN,
    "batch normalization": NORMED,
}
FAST = ("signs and positive scales",)
COUNT = 3


def small(kind, arch, size=8, **options):
    return kind(arch, models.alignment_encoder(arch, size, num_layers=1), outputs=size, **options)


@functools.cache
def made(kind, name):
    """(architecture, model, generic variables)"""
    arch = ARCHITECTURES[name]
    model = small(kind, arch)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(max(leaf.shape[:1], default=1)), jnp.float32)

    return arch, model, jax.tree.map(draw, models.abstract_variables(model))


def assert_same_elements(arch, found, expected):
    for neurons in arch.hidden:
        assert jnp.array_equal(found.permutation[neurons.name], expected.permutation[neurons.name])
        assert jnp.allclose(found.scale[neurons.name], expected.scale[neurons.name], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in ARCHITECTURES],
)
def test_a_matcher_follows_both_networks(name):
    arch, model, variables = made(models.Matcher, name)
    params, target = support.random_params(arch, 1, models=(COUNT,)), support.random_params(arch, 2, models=(COUNT,))
    h, g = support.random_elements(arch, COUNT, seed=3), support.random_elements(arch, COUNT, seed=4)
    move = jax.vmap(functools.partial(symmetry.act, arch))
    match = jax.jit(jax.vmap(lambda p, t: model.apply(variables, p, t)))
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), (params, target), (move(h, params), move(g, target)))
    element = match(*both).element
    first, moved = (jax.tree.map(lambda leaf, at=at: leaf[at], element) for at in (slice(COUNT), slice(COUNT, None)))
    compose = jax.vmap(functools.partial(symmetry.compose, arch))
    expected = compose(g, compose(first, jax.vmap(functools.partial(symmetry.inverse, arch))(h)))
    assert_same_elements(arch, moved, expected)
    # The control: a network that is not moved has another element.
    assert any(not jnp.array_equal(moved.permutation[n.name], first.permutation[n.name]) for n in arch.hidden)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["signs and positive scales"])
def test_a_frame_maps_an_orbit_to_one_network_and_keeps_functions(name):
    arch, model, variables = made(models.Frame, name)
    params = support.random_params(arch, 1, models=(COUNT,))
    g = support.random_elements(arch, COUNT, seed=3)
    move = jax.vmap(functools.partial(symmetry.act, arch))
    stack = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), params, move(g, params))
    frame = matching.framed(arch, stack, jax.jit(jax.vmap(lambda p: model.apply(variables, p)))(stack))
    for leaf in jax.tree.leaves(frame.aligned):
        assert jnp.allclose(leaf[:COUNT], leaf[COUNT:], rtol=1e-4, atol=1e-5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)), jnp.float32)
    compute = jax.vmap(lambda p: jax.vmap(lambda one: sg.network.apply(arch, p, one))(x))
    assert jnp.allclose(compute(frame.aligned), compute(stack), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="leading sizes"):
        matching.framed(arch, params, frame.elements)


@pytest.mark.slow
def test_a_frame_starts_as_that_of_its_first_network():
    model = small(models.Frame, TINY, 4)
    params = support.random_params(TINY, 1)
    element, _ = jax.jit(model.init_with_output)(jax.random.key(0), params)
    assert_same_elements(TINY, element, symmetry.identity(TINY))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["signs and positive scales", "signs"])
def test_a_matcher_becomes_the_frame_of_a_network(name):
    arch, model, variables = made(models.Matcher, name)
    params, target = support.random_params(arch, 1), support.random_params(arch, 2)
    frame, learned = model.as_frame(variables, target)

    @jax.jit
    def both(params, target):
        matched = symmetry.act(arch, model.apply(variables, params, target).element, params)
        return symmetry.balanced(arch, matched), symmetry.act(arch, frame.apply(learned, params), params)

    expected, found = both(params, target)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    state = training.init(frame, optax.sgd(0.1), target, jax.random.key(0), variables=learned)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.variables, learned))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [models.Matcher, models.Frame])
def test_training_lowers_the_loss(kind):
    arch, x = TINY, jnp.asarray(sg.network.coordinates(3, 3)).reshape(-1, 2)
    model = small(kind, arch, 4, num_iterations=3)
    pairs = support.random_params(arch, 1, models=(4,)), support.random_params(arch, 2, models=(4,))
    start = stacks.member(pairs[1], 0)
    tx = optax.adam(2e-2)
    state = training.init(model, tx, start, jax.random.key(0), method="embed" if kind is models.Matcher else None)
    loss_fn = losses.alignment(model, x)
    step = training.make_step(loss_fn, tx)

    # Always the same points t, so that losses compare.
    def again(state, _):
        state, metrics = step(state, pairs)
        return state._replace(step=jnp.zeros_like(state.step)), metrics

    _, metrics = jax.jit(lambda state: jax.lax.scan(again, state, None, 60))(state)
    assert all(bool(jnp.isfinite(values).all()) for values in metrics.values())
    assert metrics["loss"][-1] < 0.8 * metrics["loss"][0]


@pytest.mark.slow
def test_examples_are_drawn_anew_for_every_key_and_all_of_them_in_the_mean():
    arch, x = TINY, jnp.asarray(sg.network.coordinates(2, 2)).reshape(-1, 2)
    model = small(models.Matcher, arch, 4, num_iterations=3)
    row = support.random_params(arch, 1), support.random_params(arch, 2)
    variables = model.init(jax.random.key(0), *row)

    @jax.jit
    def ends(keys):
        """The second term does not depend on t: it is a mean over the examples."""
        drawn = losses.alignment(model, x, examples_per_step=1)
        whole = losses.alignment(model, x)(variables, row, keys[0])[1]["ends"]
        return jax.vmap(lambda key: drawn(variables, row, key)[1]["ends"])(keys), whole

    several, whole = ends(jax.random.split(jax.random.key(3), 400))
    values = np.unique(np.asarray(several).round(5))
    assert len(values) == len(x)
    np.testing.assert_allclose(values.mean(), whole, rtol=1e-3)


@pytest.mark.slow
def test_a_matching_starts_a_search():
    arch, model, variables = made(models.Matcher, "signs")
    params, target = (support.random_params(arch, seed) for seed in (1, 2))
    x = jnp.asarray(sg.network.coordinates(3, 3)).reshape(-1, 2)
    found = jax.jit(model.apply)(variables, params, target)
    searched = matching.search_matching(arch, params, target, x, jax.random.key(0), start=found, max_sweeps=1)
    assert searched.loss <= searched.start_loss


@pytest.mark.parametrize("kind", [models.Matcher, models.Frame])
def test_a_model_is_described_by_json(kind):
    model = made(kind, "signs")[1]
    assert models.from_json(models.as_json(model)) == model


def test_errors_say_what_was_expected():
    arch, model, variables = made(models.Matcher, "signs")
    params = support.random_params(arch, 1)
    with pytest.raises(ValueError, match="target"):
        model.apply(variables, params, support.random_params(sg.siren((2, 6, 4, 1))))
    other = small(models.Matcher, PLAIN)
    with pytest.raises(ValueError, match="other groups"):
        other.apply(variables, params, params)
    with pytest.raises(ValueError, match="balanced gauge"):
        models.Matcher(MIXED, models.LeanGMN(SIREN, 8)).init(jax.random.key(0), params, params)
    with pytest.raises(ValueError, match="without positive scales"):
        models.LeanGMN(MIXED, 8).init(jax.random.key(0), models.graph.from_params(MIXED, params))
    wide = small(models.Frame, sg.siren((2, 6, 4, 1)))
    with pytest.raises(ValueError, match="slots of shape"):
        wide.apply(made(models.Frame, "signs")[2], support.random_params(wide.arch))
    with pytest.raises(ValueError, match="dropout"):
        models.Matcher(SIREN, sg.ScaleGMN(SIREN, 8, dropout=0.5)).init(jax.random.key(0), params, params)
    for x in (jnp.ones((3, 3)), jnp.ones(2), jnp.ones((0, 2))):
        with pytest.raises(ValueError, match="x"):
            losses.alignment(model, x)
    with pytest.raises(ValueError, match="end_weight"):
        losses.alignment(model, jnp.ones((3, 2)), end_weight=-1.0)
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"examples_per_step is {number}; expected 1 to 3, the inputs given"):
            losses.alignment(model, jnp.ones((3, 2)), examples_per_step=number)


@pytest.mark.slow
def test_a_resized_matcher_takes_the_variables_of_other_widths_and_follows_both_networks():
    arch, model, variables = made(models.Matcher, "signs")
    wide = sg.siren((2, 7, 6, 1))
    resized = model.resized(wide)
    params, target = (support.rows(support.random_params(wide, seed, models=(1,)), 0) for seed in (1, 2))
    match = jax.jit(functools.partial(resized.apply, variables))
    g, h = (symmetry.random(wide, jax.random.key(seed)) for seed in (3, 4))
    found = match(params, target).element
    moved = match(symmetry.act(wide, h, params), symmetry.act(wide, g, target)).element
    inverse = symmetry.inverse(wide, h)
    expected = symmetry.compose(wide, g, symmetry.compose(wide, found, inverse))
    assert_same_elements(wide, moved, expected)
    own = support.rows(support.random_params(arch, 1, models=(1,)), 0)
    with pytest.raises(ValueError, match=r"expects \(2, 7\)"):
        resized.apply(variables, own, own)  # networks of the width that it was trained on


def test_a_matcher_is_not_resized_to_other_layers_or_groups():
    _, model, _ = made(models.Matcher, "signs")
    for other in (sg.siren((2, 5, 1)), sg.siren((3, 5, 4, 1)), sg.mlp((2, 5, 4, 1), "relu"), PLAIN):
        with pytest.raises(ValueError, match="Widths alone may differ"):
            model.resized(other)

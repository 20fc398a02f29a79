"""Copies of one network become one network again; different ones come closer, round by round, and agree in cycles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from jax_scalegmn import assignment, common_frame, gauge, matching, merge, symmetry
from jax_scalegmn.architecture import Architecture, Axis, Neurons, Parameter, Scaling
from jax_scalegmn.common_frame import Reference

# All but "layer norm", whose units a normalisation's statistics of few neurons make large.
NETWORKS = {name: (arch, functools.partial(support.outputs, arch)) for name, arch in support.ARCHITECTURES.items()}
NETWORKS |= {name: (arch, jax.vmap(apply, (None, 0))) for name, (arch, apply) in support.HAND_WRITTEN.items()}
TANH, RELU = support.ARCHITECTURES["tanh mlp"], support.ARCHITECTURES["relu mlp"]
act = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))


@functools.cache
def aligned(arch, **options):
    """`align_all` compiled, with the solver that compiles fast."""
    return jax.jit(functools.partial(common_frame.align_all, arch, assign=assignment.scipy, **options))


def copies(arch, params, count, seed=0, noise=0.0):
    """Members of one orbit, perturbed in the balanced gauge, and the elements that moved them."""
    elements = support.random_elements(arch, count, seed=seed)
    noises = support.random_params(arch, seed + 100, models=(count,))
    balanced = gauge.balanced(arch, params)
    stack = jax.tree.map(lambda p, e: p + noise * e, balanced, noises)
    return act(arch, elements, stack), elements


def objective(frame):
    """The sum of squared distances to the mean."""
    pairs = zip(jax.tree.leaves(frame.aligned), jax.tree.leaves(frame.mean), strict=True)
    return sum(float(np.square(np.asarray(a, float) - np.asarray(m, float)).sum()) for a, m in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_of_one_network_become_one_network(name):
    """Four members of one orbit: the mean has the function of all; the mean of the copies as they come has not."""
    arch, apply = NETWORKS[name]
    params = support.random_params(arch, 3)
    stack, _ = copies(arch, params, 4)
    frame = aligned(arch, max_rounds=3)(stack)
    x = support.example(arch)
    expected = apply(params, x)
    assert support.deviation(apply(frame.mean, x), expected) < 1e-4
    assert support.deviation(apply(merge.average(stack), x), expected) > 0.02
    np.testing.assert_allclose(frame.similarity, 1, atol=1e-5)
    assert frame.converged
    assert frame.rounds == 1
    support.assert_identical(act(arch, frame.elements, stack), frame.aligned)
    pairs = common_frame.cycle_consistency(arch, common_frame.relative(arch, frame.elements))
    assert pairs.fraction == 1
    assert pairs.log_ratio < 1e-5


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("arch", [TANH, RELU], ids=str)
def test_the_elements_that_were_planted_are_found(arch, count):
    """Of noisy copies: what moves i next to j is planted_j planted_i^-1, in permutations and signs."""
    stack, planted = copies(arch, support.random_params(arch, 7), count, seed=count, noise=0.02)
    frame = aligned(arch, max_rounds=3)(stack)
    found = common_frame.relative(arch, frame.elements)
    back = jax.vmap(lambda e: symmetry.inverse(arch, e))(planted)
    expected = common_frame.relative(arch, back)
    support.assert_identical(
        jax.tree.map(jnp.asarray, found.permutation), jax.tree.map(jnp.asarray, expected.permutation)
    )
    for got, wanted in zip(found.scale.values(), expected.scale.values(), strict=True):
        np.testing.assert_array_equal(np.sign(got), np.sign(wanted))
        np.testing.assert_allclose(np.log(np.abs(got)), np.log(np.abs(wanted)), atol=0.3)
    assert (frame.similarity > 0.99).all()
    assert 0 < objective(frame) < 0.02


@pytest.mark.parametrize("arch", [TANH, RELU], ids=str)
@pytest.mark.parametrize("frame", Reference)
def test_the_distance_to_the_mean_never_goes_up(arch, frame):
    """Of five different networks, round by round; it goes down at first, and stays when a round moves none."""
    stack = support.random_params(arch, 11, models=(5,))
    unmatched = common_frame.Frame(None, jax.vmap(lambda p: gauge.balanced(arch, p))(stack), None, None, None, None)
    unmatched = unmatched._replace(mean=merge.average(unmatched.aligned))
    results = [aligned(arch, max_rounds=rounds, frame=frame)(stack) for rounds in (0, 1, 20)]
    steps = [objective(one) for one in (unmatched, *results)]
    assert all(after <= before * (1 + 1e-6) for before, after in zip(steps[:-1], steps[1:], strict=True))
    assert steps[0] > 1.1 * steps[1] > 1.1 * steps[3]
    assert results[0].rounds == 0
    assert not results[0].converged
    assert results[2].converged
    assert results[2].rounds < 20
    # Restarted from its own result, with the reference in its place, it stays there.
    again = aligned(arch, max_rounds=20, frame=frame)(results[2].aligned)
    assert objective(again) <= steps[3] * (1 + 1e-5)


def test_permutations_and_signs_keep_norms_and_the_mean_is_of_balanced_networks():
    """In the gauge that the docstring names: each aligned network is balanced."""
    stack = support.random_params(RELU, 11, models=(5,))
    frame = aligned(RELU, max_rounds=1)(stack)
    for element in jax.tree.leaves(jax.vmap(lambda p: gauge.balance(RELU, p))(frame.aligned).scale):
        np.testing.assert_allclose(element, 1, atol=1e-4)
    before = jax.vmap(lambda p: gauge.balance(RELU, p))(stack).scale
    assert max(float(jnp.abs(scale - 1).max()) for scale in before.values()) > 0.1
    x = support.example(RELU)
    for i in range(5):
        one = support.outputs(RELU, support.rows(frame.aligned, i), x)
        assert support.deviation(one, support.outputs(RELU, support.rows(stack, i), x)) < 1e-4


def test_the_reference_keeps_its_neurons():
    """The first: identity, its scales those of the balanced gauge. The central one is the one that pairs prefer."""
    stack = support.random_params(RELU, 11, models=(5,))
    whole = aligned(RELU, max_rounds=20)(stack).elements
    own = gauge.balance(RELU, support.rows(stack, 0))
    for name in whole.permutation:
        np.testing.assert_array_equal(whole.permutation[name][0], np.arange(len(own.scale[name])))
        np.testing.assert_allclose(whole.scale[name][0], own.scale[name], rtol=1e-5)
    pairs = jax.jit(functools.partial(common_frame.pairwise, RELU, assign=assignment.scipy))(stack)
    central = int(pairs.similarity.sum(0).argmax())
    permutation = aligned(RELU, max_rounds=20, frame=Reference.CENTRAL)(stack).elements.permutation
    still = [all((order[i] == np.arange(order.shape[1])).all() for order in permutation.values()) for i in range(5)]
    assert still == [i == central for i in range(5)]
    assert central != 0


def test_without_scales_networks_stay_in_their_gauge():
    stack = support.random_params(RELU, 11, models=(3,))
    frame = aligned(RELU, max_rounds=2, scale=False)(stack)
    for scale in frame.elements.scale.values():
        np.testing.assert_array_equal(scale, 1)
    flat = [np.sort(np.abs(np.reshape(tree["Dense_1"]["kernel"], (3, -1)))) for tree in (stack, frame.aligned)]
    np.testing.assert_array_equal(*flat)


def test_many_stacks_at_once_are_the_stacks_one_by_one():
    stacks = support.random_params(TANH, 5, models=(2, 3))
    run = functools.partial(common_frame.align_all, TANH, max_rounds=2, assign=assignment.scipy)
    both = jax.jit(jax.vmap(run))(stacks)
    for i in range(2):
        alone = aligned(TANH, max_rounds=2)(support.rows(stacks, i))
        assert support.deviation(support.rows(both.mean, i), alone.mean) < 1e-5
        assert both.rounds[i] == alone.rounds


def test_zeros_and_equal_networks_come_to_rest():
    """Every matching is a tie: nothing moves, nothing is NaN."""
    zeros = jax.tree.map(jnp.zeros_like, support.random_params(RELU, models=(3,)))
    frame = aligned(RELU, max_rounds=20)(zeros)
    assert frame.converged
    assert frame.rounds == 1
    np.testing.assert_array_equal(frame.similarity, 0)
    constant = jax.tree.map(lambda leaf: jnp.ones_like(leaf), zeros)
    frame = aligned(RELU, max_rounds=20)(constant)
    assert frame.converged
    np.testing.assert_allclose(frame.similarity, 1, atol=1e-5)


def test_networks_come_next_to_targets_of_their_own():
    """Planted: every network next to another copy of itself; the function stays."""
    stack = support.random_params(RELU, 3, models=(4,))
    targets = act(RELU, support.random_elements(RELU, 4), stack)
    frame = jax.jit(functools.partial(common_frame.align_to, RELU, assign=assignment.scipy))(stack, targets)
    assert support.deviation(frame.aligned, targets) < 1e-4
    assert support.deviation(frame.mean, merge.average(targets)) < 1e-4
    assert support.deviation(stack, targets) > 0.1
    assert frame.converged
    assert frame.rounds == 1
    one = matching.align(RELU, support.rows(stack, 2), support.rows(targets, 2), assign=assignment.scipy)
    assert support.deviation(support.rows(frame.aligned, 2), one) < 1e-6


def test_targets_in_one_frame_bring_noisy_copies_into_it():
    """The canonical route: N copies, each with the clean network as its decoded one, merge to it."""
    params = support.random_params(TANH, 7)
    stack, _ = copies(TANH, params, 4, noise=0.02)
    targets = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), params)
    frame = jax.jit(functools.partial(common_frame.align_to, TANH, assign=assignment.scipy))(stack, targets)
    assert support.deviation(frame.mean, params) < 0.05
    assert common_frame.cycle_consistency(TANH, common_frame.relative(TANH, frame.elements)).fraction == 1


def test_pairs_are_matched_like_each_pair_alone():
    """Also: independent matchings of different networks contradict each other, those through a frame cannot."""
    stack = support.random_params(TANH, 11, models=(5,))
    pairs = jax.jit(functools.partial(common_frame.pairwise, TANH, assign=assignment.scipy))(stack)
    match = jax.jit(functools.partial(matching.weight_matching, TANH, assign=assignment.scipy))
    for i, j in ((0, 1), (1, 0), (4, 2)):
        alone = match(support.rows(stack, i), support.rows(stack, j))
        support.assert_identical(support.rows(pairs.element, (i, j)), alone.element)
        assert pairs.similarity[i, j] == pytest.approx(float(alone.similarity), abs=1e-6)
    for i in range(5):
        support.assert_identical(support.rows(pairs.element, (i, i)), symmetry.identity(TANH))
    assert pairs.converged.all()
    assert 0.2 < common_frame.cycle_consistency(TANH, pairs.element).fraction < 0.9
    frame = aligned(TANH, max_rounds=1)(stack)
    assert common_frame.cycle_consistency(TANH, common_frame.relative(TANH, frame.elements)).fraction == 1
    # And of copies of one network all pairs agree.
    same, _ = copies(TANH, support.rows(stack, 0), 5)
    pairs = jax.jit(functools.partial(common_frame.pairwise, TANH, assign=assignment.scipy))(same)
    assert common_frame.cycle_consistency(TANH, pairs.element).fraction == 1


def test_consistency_counts_what_disagrees():
    """Three networks, 12 triples with 0 != 1 != 2. One sign of [0, 1] is wrong: in 5 triples, for one of 9 neurons."""
    planted = support.random_elements(TANH, 3)
    pairs = common_frame.relative(TANH, planted)
    count = jax.jit(functools.partial(common_frame.cycle_consistency, TANH))
    assert count(pairs).fraction == 1
    flipped = {**pairs.scale, "hidden_0": pairs.scale["hidden_0"].at[0, 1, 2].multiply(-1)}
    assert count(pairs._replace(scale=flipped)).fraction == pytest.approx(1 - 5 / (12 * 9))
    order = pairs.permutation["hidden_1"]
    swapped = {**pairs.permutation, "hidden_1": order.at[0, 1].set(order[0, 1][jnp.array([1, 0, 2, 3])])}
    assert count(pairs._replace(permutation=swapped)).fraction <= 1 - 2 * 5 / (12 * 9) + 1e-6
    # Twice as large a scale: log 2 where [0, 1] is used once. There and back it is used once too.
    scaled = {**pairs.scale, "hidden_0": pairs.scale["hidden_0"].at[0, 1, 2].multiply(2)}
    found = count(pairs._replace(scale=scaled))
    assert found.fraction == 1
    assert found.log_ratio == pytest.approx(np.log(2), rel=1e-5)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), pairs)
    np.testing.assert_array_equal(jax.vmap(count)(batch).fraction, 1)


def damaged(stack):
    return {**stack, "Dense_0": {**stack["Dense_0"], "bias": stack["Dense_0"]["bias"].at[1, 0].set(jnp.nan)}}


STACK = support.random_params(TANH, models=(3,))
FLAT = Architecture(
    "linear",
    (Neurons("in", 2, Scaling.FIXED), Neurons("out", 1, Scaling.FIXED)),
    (Parameter(("w",), (Axis("in", -1), Axis("out", 1))),),
)


@pytest.mark.parametrize(
    ("arch", "stack", "options", "message"),
    [
        (TANH, support.rows(STACK, slice(1)), {}, r"leading sizes \[1\]; expected .* 2 or more"),
        (TANH, support.rows(STACK, 0), {}, "leading sizes"),
        (TANH, damaged(STACK), {}, r"stack\['Dense_0'\]\['bias'\] holds 1 NaN"),
        (RELU, support.random_params(support.ARCHITECTURES["siren"], models=(3,)), {}, "expects"),
        (TANH, STACK, {"max_rounds": -1}, "max_rounds is -1"),
        (TANH, STACK, {"start": matching.Start.IDENTITY}, r"\['start'\]; expected .* no 'start'"),
        (FLAT, {"w": jnp.zeros((3, 2, 1))}, {}, "'linear' has no hidden neurons"),
    ],
)
def test_a_frame_needs_networks_of_one_kind(arch, stack, options, message):
    with pytest.raises(ValueError, match=message):
        common_frame.align_all(arch, stack, **options)


def test_pairs_and_targets_are_checked_too():
    with pytest.raises(ValueError, match=r"leading sizes \[1\]"):
        common_frame.pairwise(TANH, support.rows(STACK, slice(1)))
    with pytest.raises(ValueError, match="targets hold 2 networks; expected 3"):
        common_frame.align_to(TANH, STACK, support.rows(STACK, slice(2)))
    with pytest.raises(ValueError, match=r"targets\['Dense_0'\]\['bias'\] holds 1 NaN"):
        common_frame.align_to(TANH, STACK, damaged(STACK))


@pytest.mark.parametrize("sizes", [(3,), (1, 1), (2, 3)])
def test_consistency_is_of_square_stacks(sizes):
    elements = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*sizes, *leaf.shape)), symmetry.identity(TANH))
    with pytest.raises(ValueError, match=r"leading sizes .*; expected \[models, models\]"):
        common_frame.cycle_consistency(TANH, elements)

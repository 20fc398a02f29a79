"""Copies of one network become one network again; different ones come closer, round by round, and agree in cycles."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.flatten_util import ravel_pytree

import jax_scalegmn as sg
from jax_scalegmn import matching, merge, symmetry
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.matching import Reference, assignment

MIXED = support.ARCHITECTURES["mixed mlp"]  # signs, positive scales and permutations alone
NETWORKS = {name: (arch, functools.partial(support.outputs, arch)) for name, arch in support.ARCHITECTURES.items()}
NETWORKS |= {name: (arch, jax.vmap(apply, (None, 0))) for name, (arch, apply) in support.HAND_WRITTEN.items()}
SMALL = sg.mlp((3, 5, 2), "relu")
COUNTS = {"mixed mlp": 5, "relu cnn": 2, "residual relu": 3}
TANH, RELU = support.ARCHITECTURES["tanh mlp"], support.ARCHITECTURES["relu mlp"]
act = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))


@functools.cache  # each program takes some seconds to compile
def aligned(arch, **options):
    """`align_all` compiled, with the solver that compiles fast."""
    return jax.jit(functools.partial(matching.align_all, arch, assign=assignment.scipy, **options))


@functools.cache
def pairwise(arch):
    return jax.jit(functools.partial(matching.pairwise, arch, assign=assignment.scipy))


relative, consistency = jax.jit(matching.relative), jax.jit(matching.cycle_consistency)
align_to = jax.jit(functools.partial(matching.align_to, RELU, assign=assignment.scipy))
balance = jax.jit(jax.vmap(functools.partial(symmetry.balance, MIXED)))
FIVE = support.random_params(MIXED, 0, models=(5,))


def copies(arch, params, count, seed=0, noise=0.0):
    """Members of one orbit, perturbed in the balanced gauge, and the elements that moved them."""
    elements = support.random_elements(arch, count, seed=seed)
    noises = support.random_params(arch, seed + 100, models=(count,))
    balanced = symmetry.balanced(arch, params)
    stack = jax.tree.map(lambda p, e: p + noise * e, balanced, noises)
    return act(arch, elements, stack), elements


def cosine(a, b):
    left, right = (ravel_pytree(tree)[0] for tree in (a, b))
    return float(left @ right / (jnp.linalg.norm(left) * jnp.linalg.norm(right)))


def objective(frame):
    """The sum of squared distances to the mean."""
    pairs = zip(jax.tree.leaves(frame.aligned), jax.tree.leaves(frame.mean), strict=True)
    return sum(float(np.square(np.asarray(a, float) - np.asarray(m, float)).sum()) for a, m in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_copies_of_one_network_become_one_network(name):
    """Two to five members of one orbit: their mean has their function; the mean of the unaligned ones does not."""
    arch, apply = NETWORKS[name]
    params = support.random_params(arch, 3)
    stack, _ = copies(arch, params, COUNTS.get(name, 4))
    frame = aligned(arch)(stack)
    x = support.example(arch)
    expected = apply(params, x)
    assert support.deviation(apply(frame.mean, x), expected) < 1e-4
    assert support.deviation(apply(merge.average(stack), x), expected) > 0.02
    np.testing.assert_allclose(frame.similarity, 1, atol=1e-5)
    assert frame.converged
    assert frame.rounds == 1
    support.assert_identical(act(arch, frame.elements, stack), frame.aligned)
    cycles = consistency(arch, relative(arch, frame.elements))
    assert cycles.fraction == 1
    assert cycles.log_ratio < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_elements_that_were_planted_are_found(name):
    """Of noisy copies: what moves i next to j is planted_j planted_i^-1, in permutations and signs."""
    arch, _ = NETWORKS[name]
    stack, planted = copies(arch, support.random_params(arch, 7), COUNTS[name], noise=0.02)
    frame = aligned(arch)(stack)
    found = relative(arch, frame.elements)
    expected = relative(arch, jax.vmap(lambda e: symmetry.inverse(arch, e))(planted))
    for layer, order in found.permutation.items():
        np.testing.assert_array_equal(order, expected.permutation[layer])
        scales = found.scale[layer], expected.scale[layer]
        np.testing.assert_array_equal(*map(np.sign, scales))
        np.testing.assert_allclose(*(np.log(np.abs(scale)) for scale in scales), atol=0.3)
    assert (frame.similarity > 0.99).all()
    assert 0 < objective(frame) < 0.1


@pytest.mark.slow
def test_the_distance_to_the_mean_never_goes_up():
    """Of five different networks, round by round, until a round moves none."""
    run = jax.jit(lambda stack, rounds: matching.align_all(MIXED, stack, max_rounds=rounds, assign=assignment.scipy))
    end = aligned(MIXED)(FIVE)
    assert 2 < end.rounds < 20
    assert end.converged
    frames = [run(FIVE, jnp.asarray(rounds)) for rounds in range(int(end.rounds) + 1)]
    steps = [objective(frame) for frame in frames]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(steps))
    assert steps[0] > 1.01 * steps[1] > 1.01 * steps[-1]
    assert [int(frame.rounds) for frame in frames] == list(range(len(steps)))
    assert [bool(frame.converged) for frame in frames] == [False] * (len(steps) - 1) + [True]
    support.assert_identical(frames[-1].elements.permutation, end.elements.permutation)
    balanced = jax.vmap(lambda p: symmetry.balanced(MIXED, p))(FIVE)
    assert objective(end._replace(aligned=balanced, mean=merge.average(balanced))) > 1.1 * steps[0]


def test_aligned_networks_are_balanced_and_keep_their_functions():
    """In the gauge that the docstring names; the similarity is that of the networks in it."""
    frame = aligned(MIXED)(FIVE)
    after, before = (balance(networks).scale["hidden_1"] for networks in (frame.aligned, FIVE))
    np.testing.assert_allclose(after, 1, atol=1e-4)
    assert np.abs(before - 1).max() > 0.1
    x = support.example(MIXED)
    functions = [jax.vmap(lambda p: support.outputs(MIXED, p, x))(networks) for networks in (frame.aligned, FIVE)]
    assert support.deviation(*functions) < 1e-4
    flat = [support.rows(frame.aligned, i) for i in range(5)]
    cosines = [cosine(one, frame.mean) for one in flat]
    np.testing.assert_allclose(frame.similarity, cosines, atol=1e-6)


@pytest.mark.slow
def test_the_reference_keeps_its_neurons():
    """Its element is that of the balanced gauge. The central one is the one that all others come closest to."""
    stack = support.random_params(SMALL, 2, models=(4,))
    balanced = jax.vmap(lambda p: symmetry.balanced(SMALL, p))(stack)
    at = int(pairwise(SMALL)(balanced).similarity.sum(0).argmax())
    assert at != 0
    own = jax.vmap(lambda p: symmetry.balance(SMALL, p))(stack).scale["hidden_0"]
    for frame, reference in ((Reference.FIRST, 0), (Reference.CENTRAL, at)):
        elements = aligned(SMALL, frame=frame)(stack).elements
        still = (elements.permutation["hidden_0"] == np.arange(5)).all(1)
        np.testing.assert_array_equal(still, np.arange(4) == reference)
        np.testing.assert_allclose(elements.scale["hidden_0"][reference], own[reference], rtol=1e-5)


def test_without_scales_networks_stay_in_their_gauge():
    """Permutations only: every number of every network stays, and they come closer as they are."""
    stack = support.random_params(SMALL, 1, models=(4,))
    frame = aligned(SMALL, scale=False)(stack)
    np.testing.assert_array_equal(frame.elements.scale["hidden_0"], 1)
    kernels = (np.sort(np.reshape(tree["Dense_0"]["kernel"], (4, -1))) for tree in (stack, frame.aligned))
    np.testing.assert_array_equal(*kernels)
    apart = end = 0.0
    for i in range(4):
        apart += cosine(support.rows(stack, i), merge.average(stack))
        end += cosine(support.rows(frame.aligned, i), frame.mean)
    assert end > apart + 0.1
    np.testing.assert_allclose(frame.similarity.sum(), end, rtol=1e-5)


@pytest.mark.slow
def test_many_stacks_at_once_are_the_stacks_one_by_one():
    stacks = support.random_params(SMALL, 1, models=(8, 4))
    both = jax.jit(jax.vmap(functools.partial(matching.align_all, SMALL, assign=assignment.scipy)))(stacks)
    for i in range(8):
        alone = aligned(SMALL)(support.rows(stacks, i))
        assert support.deviation(support.rows(both.mean, i), alone.mean) < 1e-5
        assert both.rounds[i] == alone.rounds
    assert len(set(both.rounds.tolist())) > 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_networks_without_differences_come_to_rest(value):
    """Zeros, or one number everywhere: every matching is a tie, nothing moves, nothing is NaN."""
    frame = aligned(MIXED)(jax.tree.map(lambda leaf: jnp.full_like(leaf, value), FIVE))
    assert frame.converged
    assert frame.rounds == 1
    np.testing.assert_allclose(frame.similarity, value, atol=1e-5)


@pytest.mark.slow
def test_networks_come_next_to_targets_of_their_own():
    """Planted: every network next to another copy of itself; the function stays."""
    stack = support.random_params(RELU, 3, models=(4,))
    targets = act(RELU, support.random_elements(RELU, 4), stack)
    frame = align_to(stack, targets)
    assert support.deviation(frame.aligned, targets) < 1e-4
    assert support.deviation(frame.mean, merge.average(targets)) < 1e-4
    assert support.deviation(stack, targets) > 0.1
    assert frame.converged
    assert frame.rounds == 1
    one = matching.align(RELU, support.rows(stack, 2), support.rows(targets, 2), assign=assignment.scipy)
    assert support.deviation(support.rows(frame.aligned, 2), one) < 1e-6


@pytest.mark.slow
def test_targets_in_one_frame_bring_noisy_copies_into_it():
    """The canonical route: N copies, each with the clean network as its decoded one, merge to it."""
    params = support.random_params(RELU, 7)
    stack, _ = copies(RELU, params, 4, noise=0.02)
    frame = align_to(stack, jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), params))
    assert support.deviation(frame.mean, params) < 0.1
    assert support.deviation(merge.average(stack), params) > 0.5
    assert consistency(RELU, relative(RELU, frame.elements)).fraction == 1


@pytest.mark.slow
def test_pairs_are_matched_like_each_pair_alone():
    pairs = pairwise(MIXED)(FIVE)
    match = jax.jit(functools.partial(matching.weight_matching, MIXED, assign=assignment.scipy))
    for i, j in ((0, 1), (1, 0), (4, 2)):
        alone = match(support.rows(FIVE, i), support.rows(FIVE, j))
        support.assert_identical(support.rows(pairs.element, (i, j)).permutation, alone.element.permutation)
        assert support.deviation(support.rows(pairs.element, (i, j)).scale, alone.element.scale) < 1e-5
        assert pairs.similarity[i, j] == pytest.approx(float(alone.similarity), abs=1e-6)
    for i in range(5):
        support.assert_identical(support.rows(pairs.element, (i, i)), symmetry.identity(MIXED))
    assert pairs.converged.all()


def test_pairs_contradict_each_other_and_frames_cannot():
    """Different networks: matched pair by pair, and through a frame. Copies of one network agree both ways."""
    cycles = consistency(MIXED, pairwise(MIXED)(FIVE).element)
    assert 0.2 < cycles.fraction < 0.9
    assert consistency(MIXED, relative(MIXED, aligned(MIXED)(FIVE).elements)).fraction == 1
    same, _ = copies(MIXED, support.rows(FIVE, 0), 5)
    cycles = consistency(MIXED, pairwise(MIXED)(same).element)
    assert cycles.fraction == 1
    assert cycles.log_ratio < 1e-4


def test_consistency_counts_what_disagrees():
    """Three networks, 12 triples with 0 != 1 != 2. One sign of [0, 1] is wrong: in 5 triples, for one of 9 neurons."""
    planted = support.random_elements(TANH, 3)
    pairs = relative(TANH, planted)
    count = functools.partial(consistency, TANH)
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
    (NeuronLayer("in", 2, Scaling.FIXED), NeuronLayer("out", 1, Scaling.FIXED)),
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
        matching.align_all(arch, stack, **options)


def test_a_name_is_no_reference():
    with pytest.raises(ValueError, match=r"frame is 'central'; expected Reference.FIRST or Reference.CENTRAL"):
        inspect.unwrap(matching.align_all)(TANH, STACK, frame="central")  # without the tests' checks of types


def test_pairs_and_targets_are_checked_too():
    with pytest.raises(ValueError, match=r"leading sizes \[1\]"):
        matching.pairwise(TANH, support.rows(STACK, slice(1)))
    with pytest.raises(ValueError, match="targets hold 2 networks; expected 3"):
        matching.align_to(TANH, STACK, support.rows(STACK, slice(2)))
    with pytest.raises(ValueError, match=r"targets\['Dense_0'\]\['bias'\] holds 1 NaN"):
        matching.align_to(TANH, STACK, damaged(STACK))


@pytest.mark.parametrize("sizes", [(3,), (1, 1), (2, 3)])
def test_consistency_is_of_square_stacks(sizes):
    elements = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*sizes, *leaf.shape)), symmetry.identity(TANH))
    with pytest.raises(ValueError, match=r"leading sizes .*; expected \[networks, networks\]"):
        matching.cycle_consistency(TANH, elements)

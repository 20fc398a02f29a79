"""Weight matching finds what was planted, never makes it worse, and says how it went."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from jax_scalegmn import architecture, builders, matching, symmetry
from jax_scalegmn.matching import Start

SIREN = support.ARCHITECTURES["siren"]
OPTIONS = {
    "P": {"permute": True, "flip": False},
    "D": {"permute": False, "flip": True},
    "PD": {"permute": True, "flip": True},
}
act = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))


def match(arch, params, target, **options):
    """Matchings of a stack of pairs."""
    return jax.jit(jax.vmap(functools.partial(matching.weight_matching, arch, **options)))(params, target)


@pytest.mark.parametrize("group", OPTIONS)
@pytest.mark.parametrize("assign", [matching.hungarian, matching.scipy_assignment])
def test_the_planted_element_is_recovered_in_200_of_200(group, assign):
    """Noiseless pairs of SIRENs 2-16-16-1, from the forward start: the very element, similarity 1, converged."""
    arch = builders.siren((2, 16, 16, 1))
    params = support.random_params(arch, models=(200,))
    planted = support.random_elements(arch, 200, **support.GROUPS[group])
    found = match(arch, params, act(arch, planted, params), assign=assign, **OPTIONS[group])
    for got, expected in zip(jax.tree.leaves(found.element), jax.tree.leaves(planted), strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(found.similarity, 1, atol=1e-6)
    assert found.converged.all()
    assert (found.sweeps == 1).all()


@pytest.mark.parametrize("name", ["tanh mlp", "tanh cnn", "relu cnn", "mixed mlp", "flat relu cnn"])
def test_permutations_and_signs_of_every_network_are_recovered(name):
    """Align brings a moved copy back bit for bit; positive scales are left at 1."""
    flat = builders.cnn((1, 3, 4), 2, padding="SAME", flatten=(7, 9))
    arch = support.ARCHITECTURES.get(name, flat)
    params = support.random_params(arch)
    planted = support.rows(support.random_elements(arch, 1), 0)
    for neurons in arch.hidden:
        if neurons.scaling is not architecture.Scaling.SIGN:
            planted.scale[neurons.name][:] = 1
    target = support.act(arch, planted, params)
    support.assert_identical(jax.jit(matching.align)(arch, params, target), target)


@functools.cache
def noisy():
    """Fifty pairs of different networks, and how they match: unmatched, from the identity, from the forward start."""
    params, target = support.random_params(SIREN, 1, models=(50,)), support.random_params(SIREN, 2, models=(50,))
    unmatched = match(SIREN, params, target, start=Start.IDENTITY, max_sweeps=0)
    ascended = match(SIREN, params, target, start=Start.IDENTITY, assign=matching.scipy_assignment)
    return params, target, unmatched, ascended, match(SIREN, params, target)


def test_matching_never_lowers_the_similarity():
    """Sweep by sweep; from the forward start it ends above the unmatched pair, too."""
    params, target, unmatched, ascended, forward = noisy()
    once = match(SIREN, params, target, start=Start.IDENTITY, max_sweeps=1, assign=matching.scipy_assignment)
    steps = [result.similarity for result in (unmatched, once, ascended)]
    for before, after in itertools.pairwise(steps):
        assert (after >= before - 1e-6).all()
        assert after.mean() > before.mean()
    assert (forward.similarity > unmatched.similarity).all()
    assert (once.sweeps == 1).all()
    assert ascended.converged.all()
    assert forward.converged.all()


def test_similarity_is_that_of_the_matched_network():
    params, target, *_, result = noisy()
    moved = act(SIREN, result.element, params)
    flat = [np.concatenate([leaf.reshape(50, -1) for leaf in jax.tree.leaves(tree)], 1) for tree in (moved, target)]
    cosine = np.einsum("mi,mi->m", *flat) / np.prod([np.linalg.norm(part, axis=1) for part in flat], axis=0)
    np.testing.assert_allclose(result.similarity, cosine, atol=1e-5)


def test_one_layer_is_matched_optimally():
    """No permutation and signs of 4 neurons, tried one and all, comes closer."""
    arch = builders.mlp((2, 4, 2), "tanh")
    params, target = support.random_params(arch, 1), support.random_params(arch, 2)
    result = jax.jit(functools.partial(matching.weight_matching, arch))(params, target)
    orders = np.array(list(itertools.permutations(range(4))), np.int32).repeat(16, 0)
    scales = np.tile(np.array(list(itertools.product([-1, 1], repeat=4)), np.float32), (24, 1))
    elements = symmetry.Element({"hidden_0": orders}, {"hidden_0": scales})
    stack = jax.jit(jax.vmap(lambda e: symmetry.act(arch, e, params)))(elements)
    pairs = zip(*map(jax.tree.leaves, (stack, target)), strict=True)
    inner = sum(np.reshape(copies, (len(orders), -1)) @ np.ravel(leaf) for copies, leaf in pairs)
    norms = [np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree))) for tree in (params, target)]
    assert result.similarity == pytest.approx(float(inner.max() / np.prod(norms)), abs=1e-5)


def test_both_solvers_find_the_optimal_value():
    score = jnp.asarray(np.random.default_rng(0).normal(size=(20, 7, 7)), jnp.float32)
    totals = []
    for assign in (matching.hungarian, matching.scipy_assignment):
        columns = jax.jit(jax.vmap(assign))(score)
        np.testing.assert_array_equal(np.sort(columns), np.tile(np.arange(7), (20, 1)))
        totals.append(np.take_along_axis(np.asarray(score), np.asarray(columns)[..., None], 2).sum((1, 2)))
    np.testing.assert_allclose(*totals, rtol=1e-6)
    assert (totals[0] > np.trace(score, axis1=1, axis2=2)).all()


def test_networks_of_zeros_lose_no_neuron():
    """Where the score is 0 the sign is +1, and the similarity is 0, not NaN."""
    zeros = jax.tree.map(jnp.zeros_like, support.random_params(SIREN, models=(1,)))
    result = match(SIREN, zeros, zeros)
    for order, scale in zip(result.element.permutation.values(), result.element.scale.values(), strict=True):
        np.testing.assert_array_equal(np.sort(order[0]), np.arange(order.shape[1]))
        np.testing.assert_array_equal(scale, 1)
    assert result.similarity == 0
    assert result.converged


def test_a_layer_in_front_of_a_normalisation_is_matched():
    """What no sign touches (power 0) does not vote on signs."""
    arch, _ = support.batch_norm_mlp()
    params = support.random_params(arch, models=(50,))
    planted = support.random_elements(arch, 50)
    found = match(arch, params, act(arch, planted, params))
    np.testing.assert_array_equal(found.element.permutation["units"], planted.permutation["units"])
    np.testing.assert_array_equal(found.element.scale["units"], planted.scale["units"])


def test_align_preserves_the_function(arch):
    params, target, x = support.random_params(arch), support.random_params(arch, 1), support.example(arch)
    aligned = jax.jit(matching.align)(arch, params, target)
    assert support.deviation(support.outputs(arch, aligned, x), support.outputs(arch, params, x)) < 1e-5
    assert support.deviation(aligned, params) > 0.1


def test_orbit_distance_is_0_for_members_alone_and_pulls_on_the_target_alone():
    """Its gradient is 2 (target - nearest) / |params|^2, and 0 in the params; networks of zeros give no NaN."""
    params, other = support.random_params(SIREN), support.random_params(SIREN, 1)
    member = support.act(SIREN, support.rows(support.random_elements(SIREN, 1), 0), params)
    measure = jax.jit(jax.value_and_grad(functools.partial(matching.orbit_distance, SIREN), argnums=(0, 1)))
    distance, _ = measure(params, member)
    assert distance == 0
    distance, (on_params, on_target) = measure(params, other)
    nearest = jax.jit(matching.align)(SIREN, params, other)
    gaps = jax.tree.map(jnp.subtract, other, nearest)
    size, gap = (sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree)) for tree in (params, gaps))
    assert distance == pytest.approx(float(gap / size), rel=1e-5)
    assert distance > 0.1
    assert support.deviation(on_target, jax.tree.map(lambda leaf: 2 * leaf / size, gaps)) < 1e-5
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(on_params))
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves([measure(zeros, zeros), measure(zeros, other)]))


def test_no_sweeps_give_the_start_itself():
    _, _, identity, *_ = noisy()
    for order, scale in zip(identity.element.permutation.values(), identity.element.scale.values(), strict=True):
        np.testing.assert_array_equal(order, np.tile(np.arange(order.shape[1]), (50, 1)))
        np.testing.assert_array_equal(scale, 1)
    assert (identity.sweeps == 0).all()
    assert not identity.converged.any()


def test_the_network_that_does_not_fit_is_named():
    params = support.random_params(SIREN)
    with pytest.raises(
        ValueError, match=r"^params\['Dense_0'\].* is no parameter of 'relu|^params\['Dense_0'\]\['kernel'\]"
    ):
        matching.weight_matching(SIREN, support.random_params(support.ARCHITECTURES["relu mlp"]), params)
    with pytest.raises(ValueError, match=r"^target\['Dense_0'\]\['kernel'\] has shape \(3, 5\)"):
        matching.weight_matching(SIREN, params, support.random_params(support.ARCHITECTURES["relu mlp"]))

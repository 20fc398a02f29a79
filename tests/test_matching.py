"""Weight matching finds what was planted, never makes it worse, and says how it went."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import matching, symmetry
from jax_scalegmn.matching import Start, assignment

SIREN = support.ARCHITECTURES["siren"]
PLANTED = {
    "siren": sg.siren((2, 16, 16, 1)),
    "relu mlp": sg.mlp((10, 32, 32, 4)),
    "mixed mlp": support.ARCHITECTURES["mixed mlp"],
    "relu cnn": sg.cnn((1, 8, 16), 10, flatten=(16, 16)),
    "tanh cnn": support.ARCHITECTURES["tanh cnn"],
    "vgg": sg.vgg(((8,), (8, 16)), 10, input_channels=1, norm="batch"),
    "small resnet": sg.resnet(4, widths=(5,), outputs=2, input_channels=1),
    "resnet": sg.resnet(8, widths=(8, 8, 16), input_channels=1),
    "resnet without norms": sg.resnet(8, widths=(8, 8, 16), input_channels=1, norm=None),
    "tanh resnet": sg.resnet(8, widths=(8, 8, 16), input_channels=1, norm="layer", activation="tanh"),
}
FAST = ("mixed mlp",)  # of the others some compile for 10 s and more
act = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))


@functools.cache
def matcher(arch, **options):
    """(params, target) -> matchings of a stack of pairs; compiled once."""
    return jax.jit(jax.vmap(functools.partial(matching.weight_matching, arch, **options)))


def match(arch, params, target, **options):
    return matcher(arch, **options)(params, target)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PLANTED]
)
def test_the_planted_element_is_recovered_in_100_of_100(name):
    """Noiseless pairs, by the default matcher: permutations and signs exactly, rescales of exp(3 x normal) to 1e-4."""
    arch = PLANTED[name]
    params = support.random_params(arch, models=(100,))
    planted = support.random_elements(arch, 100)
    planted = planted._replace(scale={name: np.sign(s) * np.abs(s) ** 3 for name, s in planted.scale.items()})
    found = match(arch, params, act(arch, planted, params))
    assert support.recovered(found, planted).all()
    np.testing.assert_allclose(found.similarity, 1, atol=1e-5)
    assert found.converged.all()
    assert (found.sweeps == 1).all()


@pytest.mark.parametrize(
    ("group", "assign"),
    [
        pytest.param(group, assign, marks=() if (group == "P") == (assign is assignment.scipy) else pytest.mark.slow)
        for group in support.GROUPS
        for assign in (assignment.hungarian, assignment.scipy)
    ],
)
def test_each_part_of_the_group_is_recovered_alone(group, assign):
    arch = PLANTED["siren"]
    params = support.random_params(arch, models=(100,))
    planted = support.random_elements(arch, 100, **support.GROUPS[group])
    found = match(arch, params, act(arch, planted, params), assign=assign, **support.GROUPS[group])
    for got, expected in zip(jax.tree.leaves(found.element), jax.tree.leaves(planted), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_rescaled_relu_networks_are_lost_unbalanced_and_found_in_the_balanced_gauge():
    """The control of the default: without scales hardly any of 100 pairs is matched as planted.

    The matched network is in the target's gauge: it is the target.
    """
    arch = PLANTED["relu mlp"]
    params = support.random_params(arch, models=(100,))
    planted = support.random_elements(arch, 100)
    planted = planted._replace(scale={name: s**4 for name, s in planted.scale.items()})
    target = act(arch, planted, params)
    found, lost = match(arch, params, target), match(arch, params, target, scale=False)
    assert support.recovered(found, planted).all()
    orders = [(np.asarray(lost.element.permutation[k]) == planted.permutation[k]).all(-1) for k in planted.scale]
    assert np.logical_and(*orders).mean() < 0.2
    assert (lost.similarity < 0.95).mean() > 0.8
    assert support.deviation(act(arch, found.element, params), target) < 1e-4


def test_align_brings_a_moved_copy_back_bit_for_bit():
    arch = PLANTED["tanh cnn"]
    params = support.random_params(arch)
    target = support.act(arch, support.rows(support.random_elements(arch, 1), 0), params)
    support.assert_identical(matching.align(arch, params, target), target)


@pytest.mark.slow
def test_restarts_never_end_below_the_first_start_and_leave_local_optima():
    """From the identity, where ascents end in local optima; the same key gives the same matching."""
    arch = support.ARCHITECTURES["mixed mlp"]
    params = support.random_params(arch, models=(30,))
    target = act(arch, support.random_elements(arch, 30), params)
    keys = jax.random.split(jax.random.key(0), 30)
    once = match(arch, params, target, start=Start.IDENTITY)
    restarted = jax.jit(jax.vmap(functools.partial(matching.weight_matching, arch, start=Start.IDENTITY, restarts=4)))(
        params, target, keys
    )
    assert (restarted.similarity >= once.similarity - 1e-6).all()
    lost = once.similarity < 0.99
    assert lost.any()
    assert (restarted.similarity[lost] > 0.99).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siren", "mixed mlp"])
def test_scales_that_are_chosen_when_the_program_runs_are_those_chosen_before(name):
    """One vmapped program for pairs with and without; the two differ on these pairs."""
    arch = support.ARCHITECTURES[name]
    params, target = (support.random_params(arch, seed, models=(6,)) for seed in (0, 1))
    chosen = np.arange(6) % 2 == 0

    def match_one(params, target, scale):
        return matching.weight_matching(arch, params, target, scale=scale)

    found = jax.jit(jax.vmap(match_one))(params, target, chosen)
    expected = {scale: match(arch, params, target, scale=scale) for scale in (True, False)}
    for row, scale in enumerate(chosen.tolist()):
        support.assert_identical(support.rows(found.element, row), support.rows(expected[scale].element, row))
    assert not np.allclose(expected[True].similarity, expected[False].similarity)


def test_an_element_as_start_is_improved():
    """The ascent goes on from it: the planted one stays, another's similarity does not fall."""
    arch = PLANTED["relu mlp"]
    params = support.random_params(arch)
    planted, other = (support.rows(support.random_elements(arch, 2), i) for i in (0, 1))
    target = support.act(arch, planted, params)
    for start, sweeps in ((planted, 1), (other, 2)):
        found = matching.weight_matching(arch, params, target, start=start)
        assert found.sweeps >= sweeps
        assert support.recovered(found, planted).all()
    begun = matching.weight_matching(arch, params, target, start=other, max_sweeps=0)
    np.testing.assert_array_equal(begun.element.permutation["hidden_0"], other.permutation["hidden_0"])
    assert begun.similarity < 0.5
    support.assert_identical(matching.weight_matching(arch, params, target, start=begun, max_sweeps=0), begun)
    for none in ("forward", 3.7):
        with pytest.raises(ValueError, match=f"start is {none!r}; expected Start.FORWARD, .* or a matching"):
            inspect.unwrap(matching.weight_matching)(arch, params, target, start=none)  # types are not checked
    with pytest.raises(ValueError, match=r"element\.permutation has layers .* expects"):
        matching.weight_matching(arch, params, target, start=support.random_elements(arch, 2))


@pytest.mark.parametrize("name", ["siren", "relu mlp", pytest.param("tanh cnn", marks=pytest.mark.slow)])
def test_canonical_matching_recovers_planted_elements(name):
    """N canonical forms in place of N^2 matchings: exact on one orbit."""
    arch = PLANTED[name]
    params = support.random_params(arch, models=(20,))
    planted = support.random_elements(arch, 20)
    found = jax.jit(jax.vmap(functools.partial(matching.canonical_matching, arch)))(params, act(arch, planted, params))
    assert support.recovered(found, planted).mean() > 0.9  # two keys closer than float32 tells apart are possible
    np.testing.assert_allclose(np.median(found.similarity), 1, atol=1e-5)


def test_half_precision_is_matched_in_float32():
    arch = PLANTED["relu mlp"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), support.random_params(arch))
    planted = support.rows(support.random_elements(arch, 1, scale=False), 0)
    found = matching.weight_matching(arch, params, symmetry.act(arch, planted, params))
    np.testing.assert_array_equal(found.element.permutation["hidden_1"], planted.permutation["hidden_1"])
    np.testing.assert_allclose(found.element.scale["hidden_1"], 1, rtol=1e-5)


@pytest.mark.parametrize("options", [{"restarts": 2}, {"restarts": -1}, {"max_sweeps": -1}])
def test_options_that_make_no_sense_are_refused(options):
    params = support.random_params(SIREN)
    with pytest.raises(ValueError, match="expected numbers >= 0, and a key"):
        matching.weight_matching(SIREN, params, params, **options)


@functools.cache
def noisy():
    """Fifty pairs of different networks, and how they match: unmatched, from the identity, from the forward start."""
    params, target = support.random_params(SIREN, 1, models=(50,)), support.random_params(SIREN, 2, models=(50,))
    unmatched = match(SIREN, params, target, start=Start.IDENTITY, max_sweeps=0)
    ascended = match(SIREN, params, target, start=Start.IDENTITY, assign=assignment.scipy)
    return params, target, unmatched, ascended, match(SIREN, params, target)


@pytest.mark.slow
def test_matching_never_lowers_the_similarity():
    """Sweep by sweep; from the forward start it ends above the unmatched pair, too."""
    params, target, unmatched, ascended, forward = noisy()
    once = match(SIREN, params, target, start=Start.IDENTITY, max_sweeps=1, assign=assignment.scipy)
    steps = [result.similarity for result in (unmatched, once, ascended)]
    for before, after in itertools.pairwise(steps):
        assert (after >= before - 1e-6).all()
        assert after.mean() > before.mean()
    assert (forward.similarity > unmatched.similarity).all()
    assert (once.sweeps == 1).all()
    assert ascended.converged.all()
    assert forward.converged.all()


def test_similarity_is_the_cosine_to_the_matched_network():
    params, target, *_, result = noisy()
    moved = act(SIREN, result.element, params)
    flat = [np.concatenate([leaf.reshape(50, -1) for leaf in jax.tree.leaves(tree)], 1) for tree in (moved, target)]
    cosine = np.einsum("mi,mi->m", *flat) / np.prod([np.linalg.norm(part, axis=1) for part in flat], axis=0)
    np.testing.assert_allclose(result.similarity, cosine, atol=1e-5)


def test_similarity_does_not_depend_on_positive_scales():
    """By its definition: the cosine in the balanced gauges; networks before balancing have another one."""
    arch = PLANTED["relu mlp"]
    params, target = support.random_params(arch), support.random_params(arch, 1)
    moved = support.act(arch, support.rows(support.random_elements(arch, 1, permute=False), 0), params)
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (symmetry.balanced(arch, params), symmetry.balanced(arch, target), moved, target)
    ]
    cosine, other = (a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in (flat[:2], flat[2:]))
    for one in (params, moved):
        assert matching.similarity(arch, one, target) == pytest.approx(cosine, abs=1e-6)
    assert abs(cosine - other) > 1e-3
    assert matching.similarity(arch, params, params) == pytest.approx(1)


def test_one_layer_is_matched_optimally():
    """No permutation and signs of 4 neurons, tried one and all, comes closer."""
    arch = sg.mlp((2, 4, 2), "tanh")
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


def test_networks_of_zeros_lose_no_neuron():
    """Where the score is 0 the sign is +1, and the similarity is 0, not NaN."""
    zeros = jax.tree.map(jnp.zeros_like, support.random_params(SIREN, models=(50,)))
    result = match(SIREN, zeros, zeros)
    for order, scale in zip(result.element.permutation.values(), result.element.scale.values(), strict=True):
        np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(order.shape[1]), (50, 1)))
        np.testing.assert_array_equal(scale, 1)
    assert (result.similarity == 0).all()
    assert result.converged.all()


def test_a_layer_before_a_normalization_is_matched():
    """What no sign touches (power 0) does not vote on signs."""
    arch, _ = support.batch_norm_mlp()
    params = support.random_params(arch, models=(50,))
    planted = support.random_elements(arch, 50)
    found = match(arch, params, act(arch, planted, params))
    np.testing.assert_array_equal(found.element.permutation["units"], planted.permutation["units"])
    np.testing.assert_array_equal(found.element.scale["units"], planted.scale["units"])


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("mixed mlp", "tanh cnn") else pytest.param(name, marks=pytest.mark.slow)
        for name in support.ARCHITECTURES
    ],
)
def test_align_preserves_the_function(name):
    arch = support.ARCHITECTURES[name]
    params, target, x = support.random_params(arch), support.random_params(arch, 1), support.example(arch)
    aligned = jax.jit(matching.align)(arch, params, target)
    assert support.deviation(support.outputs(arch, aligned, x), support.outputs(arch, params, x)) < 1e-5
    assert support.deviation(aligned, params) > 0.1


@pytest.mark.slow
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


@pytest.mark.slow
def test_under_vmap_the_host_solves_unfinished_pairs_alone(monkeypatch):
    """Pairs that take different numbers of sweeps: as many assignments as one pair after the other, the same result."""
    arch = sg.siren((2, 9, 10, 1))
    solved = []
    solve = assignment.linear_sum_assignment
    monkeypatch.setattr(assignment, "linear_sum_assignment", lambda *a, **k: solved.append(1) or solve(*a, **k))
    keys = jax.random.split(jax.random.key(0), 4)
    target = jax.vmap(lambda key: sg.network.init(arch, key))(keys)
    params = jax.vmap(lambda key: sg.network.init(arch, key))(keys[::-1])
    params = jax.tree.map(lambda leaf, goal: leaf.at[0].set(goal[0]), params, target)  # one pair is there already

    def match(params, target, assign=assignment.scipy):
        return matching.weight_matching(arch, params, target, start=Start.IDENTITY, max_sweeps=3, assign=assign)

    results = {}
    for assign in (assignment.scipy, lambda score: assignment.scipy(score)):  # the second is not known to skip
        solved.clear()
        result = jax.block_until_ready(jax.vmap(functools.partial(match, assign=assign))(params, target))
        results[assign is assignment.scipy] = result, len(solved)
    (result, count), (plain, all_of_them) = results[True], results[False]
    jax.tree.map(np.testing.assert_array_equal, result, plain)
    sweeps = np.asarray(result.sweeps)
    assert len({*sweeps.tolist()}) > 1
    assert all_of_them == 2 * sweeps.max() * len(sweeps)
    solved.clear()
    alone = [match(*sg.stacks.member((params, target), index)) for index in range(4)]
    jax.tree.map(np.testing.assert_array_equal, result.element, sg.stacks.stack(*(one.element for one in alone)))
    assert sweeps.tolist() == [int(one.sweeps) for one in alone]
    assert count == len(solved)
    assert count < 2 * sweeps.sum()  # a layer whose neighbors have not moved is not matched again


@pytest.mark.slow
def test_more_pairs_than_are_searched_at_once_end_as_in_small_groups():
    """A finished pair makes room for the next one: with one target for all, and with a target for each."""
    arch = sg.mlp((2, 5, 6, 1), "tanh")
    count, group = 150, 50
    keys = jax.random.split(jax.random.key(0), 2 * count)
    params, target = (jax.vmap(lambda key: sg.network.init(arch, key))(some) for some in (keys[:count], keys[count:]))
    for axes in ((0, 0), (0, None)):
        goal = target if axes[1] == 0 else sg.stacks.member(target, 0)
        match = jax.jit(jax.vmap(functools.partial(matching.weight_matching, arch), axes))
        together = match(params, goal)
        parts = []
        for first in range(0, count, group):
            some = slice(first, first + group)
            part = params, goal if axes[1] is None else jax.tree.map(lambda leaf, some=some: leaf[some], goal)
            parts.append(match(jax.tree.map(lambda leaf, some=some: leaf[some], part[0]), part[1]))
        apart = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        jax.tree.map(np.testing.assert_array_equal, together.element, apart.element)
        np.testing.assert_array_equal(together.sweeps, apart.sweeps)
        assert together.converged.all()
        assert len({*together.sweeps.tolist()}) > 2


@pytest.mark.slow
def test_a_matching_under_vmap_has_no_gradient_but_of_its_similarity():
    arch = sg.mlp((2, 3, 1), "tanh")
    params, target = (support.random_params(arch, seed) for seed in (0, 1))

    def loss(params):
        return jax.vmap(lambda one: matching.weight_matching(arch, one, target).similarity)(params).sum()

    stack = jax.tree.map(lambda leaf: leaf[None], params)
    gradient = jax.jit(jax.grad(loss))(stack)

    def fixed(params):
        element = matching.weight_matching(arch, sg.stacks.member(stack, 0), target).element
        return matching.similarity(arch, symmetry.act(arch, element, sg.stacks.member(params, 0)), target)

    expected = jax.jit(jax.grad(fixed))(stack)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected)
    assert any(jnp.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(gradient))

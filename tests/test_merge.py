"""Points between networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from jax_scalegmn import merge

A, B = (support.random_params(support.ARCHITECTURES["siren"], seed) for seed in (0, 1))


@pytest.mark.parametrize("interpolate", [merge.lerp, merge.slerp])
def test_interpolation_starts_at_a_and_ends_at_b(interpolate):
    assert support.deviation(interpolate(A, B, 0.0), A) < 1e-6
    assert support.deviation(interpolate(A, B, 1.0), B) < 1e-6


def test_lerp_halfway_is_the_average_of_two():
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), A, B)
    assert support.deviation(merge.lerp(A, B, 0.5), merge.average(stack)) < 1e-6
    assert support.deviation(merge.lerp(A, B, 0.25), merge.average(stack, jnp.array([6.0, 2.0]))) < 1e-6


def test_slerp_keeps_the_norm_and_turns_evenly():
    """On the unit circle: the point at angle t w, with all leaves one vector."""
    a = {"x": jnp.array([1.0]), "y": jnp.array([0.0])}
    b = {"x": jnp.array([np.cos(2.0)], np.float32), "y": jnp.array([np.sin(2.0)], np.float32)}
    points = jax.vmap(lambda t: merge.slerp(a, b, t))(jnp.linspace(0, 1, 9))
    np.testing.assert_allclose(points["x"][:, 0], np.cos(np.linspace(0, 2, 9)), atol=1e-6)
    np.testing.assert_allclose(points["y"][:, 0], np.sin(np.linspace(0, 2, 9)), atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 1.0, 3.0, -1.0])
def test_slerp_of_parallel_vectors_is_lerp(factor):
    """Zeros, equal, opposite: finite, with a finite gradient."""
    a = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(merge.slerp(a, factor * a, 0.3), (0.7 + 0.3 * factor) * a, rtol=1e-5, atol=1e-6)
    assert np.isfinite(jax.grad(lambda a: merge.slerp(a, factor * a, 0.3).sum())(a)).all()


@pytest.mark.parametrize("interpolate", [merge.lerp, merge.slerp])
@pytest.mark.parametrize("other", [{"x": jnp.zeros(2)}, {"y": jnp.zeros(3)}, jnp.zeros(3)])
def test_networks_of_two_kinds_do_not_merge(interpolate, other):
    with pytest.raises(ValueError, match="a and b differ in structure or shapes"):
        interpolate({"x": jnp.zeros(3)}, other, 0.5)


def test_average_needs_a_weight_for_each_network():
    with pytest.raises(ValueError, match=r"weights have shape \(3,\); expected \(2,\)"):
        merge.average({"x": jnp.zeros((2, 3))}, jnp.ones(3))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.1, -0.1], [np.nan, 1.0], [np.inf, 1.0]])
def test_average_refuses_weights_without_a_sum(weights):
    with pytest.raises(ValueError, match="expected finite ones whose sum is not 0"):
        merge.average({"x": jnp.zeros((2, 3))}, jnp.asarray(weights))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_average_has_the_dtype_of_the_networks(dtype):
    """Half precision is summed in float32: 256 ones and a 2 would stop at 256 otherwise."""
    stack = jnp.ones((400, 1), dtype).at[0].set(3)
    mean = merge.average(stack)
    assert mean.dtype == dtype
    np.testing.assert_allclose(mean.astype(float), 402 / 400, rtol=4e-3)
    # A counter has no mean: it stays the first network's.
    np.testing.assert_array_equal(merge.average(jnp.array([[1], [2]])), [1])


THREE = {"x": jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 4.0]])}


@pytest.mark.parametrize(
    ("t", "point"),
    [(0.0, [0, 0]), (0.25, [0.5, 0]), (0.5, [1, 0]), (0.75, [1, 2]), (1.0, [1, 4]), (1.25, [1, 6]), (-0.5, [-1, 0])],
)
def test_a_path_runs_through_its_networks_in_equal_times(t, point):
    np.testing.assert_allclose(merge.piecewise(THREE, t)["x"], point, atol=1e-6)
    np.testing.assert_allclose(jax.jit(merge.piecewise)(THREE, t)["x"], point, atol=1e-6)


@pytest.mark.parametrize("interpolate", [merge.lerp, merge.slerp])
def test_the_path_of_two_networks_is_their_interpolation(interpolate):
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), A, B)
    for t in (0.0, 0.3, 1.0):
        got = merge.piecewise(stack, t, interpolate=interpolate)
        assert support.deviation(got, interpolate(A, B, t)) < 1e-5


def test_a_path_has_a_gradient_everywhere():
    """Along time: the velocity of each piece, twice the difference of its ends."""
    velocity = jax.vmap(jax.jacfwd(lambda t: merge.piecewise(THREE, t)["x"]))(jnp.array([0.2, 0.7]))
    np.testing.assert_allclose(velocity, [[2, 0], [0, 8]], atol=1e-5)


def test_a_soup_is_the_mean_of_points_of_the_path():
    ts = jnp.array([0.0, 0.25, 0.75])
    np.testing.assert_allclose(merge.soup(THREE, ts)["x"], [1.5 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(merge.soup(THREE, ts, jnp.array([1.0, 0.0, 3.0]))["x"], [0.75, 1.5], rtol=1e-6)
    # On a circle the soup is inside: of both ends and the middle of a right angle at (1 + sqrt 2) / 3 of the radius.
    quarter = merge.soup(jnp.eye(2), jnp.linspace(0, 1, 3), interpolate=merge.slerp)
    np.testing.assert_allclose(jnp.linalg.norm(quarter), (1 + np.sqrt(2)) / 3, rtol=1e-6)
    soups = jax.jit(jax.vmap(lambda x: merge.soup(x, ts)))(jnp.stack([THREE["x"], 2 * THREE["x"]]))
    np.testing.assert_allclose(soups[1], 2 * soups[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("stack", "ts", "message"),
    [
        ({"x": jnp.zeros((1, 2))}, jnp.zeros(3), r"leading sizes \[1\]; expected one size .* 2 or more"),
        ({"x": jnp.zeros((2, 2)), "y": jnp.zeros((3, 2))}, jnp.zeros(3), r"leading sizes \[2, 3\]"),
        ({"x": jnp.zeros((2, 2))}, jnp.zeros(0), r"ts have shape \(0,\); expected \[points\]"),
    ],
)
def test_soups_are_made_of_several_points_of_several_networks(stack, ts, message):
    with pytest.raises(ValueError, match=message):
        merge.soup(stack, ts)


def score(params):
    """The best place is (1, 1)."""
    return -jnp.square(params["x"] - 1).sum()


STACK = {"x": jnp.array([[5.0, 1.0], [1.0, 2.0], [1.0, 0.5], [2.0, 1.0]])}


def greedy_by_hand(networks):
    """The same in NumPy, with the mean taken anew each time."""
    scores = [-np.square(x - 1).sum() for x in networks]
    order = sorted(range(len(networks)), key=lambda i: -scores[i])
    taken, best = order[:1], scores[order[0]]
    for index in order[1:]:
        new = -np.square(networks[[*taken, index]].mean(0) - 1).sum()
        if new >= best:
            taken, best = [*taken, index], new
    return sorted(taken), networks[taken].mean(0), best


def test_a_greedy_soup_takes_what_does_not_lower_its_score():
    """Twenty stacks of seven networks: some soups are one network, some are several."""
    stacks = np.random.default_rng(0).normal(1, 1, (20, 7, 2)).astype("float32")
    found = jax.jit(jax.vmap(lambda x: merge.greedy_soup(score, {"x": x})))(jnp.asarray(stacks))
    for index, networks in enumerate(stacks):
        got = support.rows(found, index)
        taken, mean, best = greedy_by_hand(networks)
        np.testing.assert_array_equal(np.flatnonzero(got.taken), taken)
        np.testing.assert_allclose(got.params["x"], mean, rtol=1e-5, atol=1e-6)
        assert got.score == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert got.score >= got.scores.max()
    assert len(set(found.taken.sum(1).tolist())) > 2


def test_a_greedy_soup_of_four_by_hand():
    """0.5 and 2 around 1 make 1.25, the far network stays out, and of a constant score all are taken."""
    got = merge.greedy_soup(score, STACK)
    np.testing.assert_array_equal(got.taken, [False, True, True, False])
    np.testing.assert_allclose(got.params["x"], [1, 1.25])
    np.testing.assert_allclose(got.scores, [-16, -1, -0.25, -1])
    assert got.score == -0.0625
    assert merge.greedy_soup(lambda params: jnp.zeros(()), STACK).taken.all()


def test_a_diverged_network_stays_out_of_the_soup():
    poisoned = {"x": STACK["x"].at[0].set(jnp.nan)}
    got = merge.greedy_soup(score, poisoned)
    np.testing.assert_array_equal(got.taken, [False, True, True, False])
    assert np.isfinite(got.params["x"]).all()
    with pytest.raises(ValueError, match="All scores are NaN"):
        merge.greedy_soup(score, {"x": jnp.full((2, 2), jnp.nan)})


def test_a_score_is_a_number():
    with pytest.raises(ValueError, match=r"score_fn returns shape \(2,\); expected a scalar"):
        merge.greedy_soup(lambda params: params["x"], STACK)


def test_greedy_soups_of_many_stacks_at_once():
    stacks = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), STACK)
    both = jax.vmap(lambda stack: merge.greedy_soup(score, stack))(stacks)
    np.testing.assert_array_equal(both.taken[0], both.taken[1][::-1])
    np.testing.assert_allclose(both.params["x"][0], both.params["x"][1])

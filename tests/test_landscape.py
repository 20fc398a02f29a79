"""Loss barriers of losses that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.flatten_util import ravel_pytree

from jax_scalegmn import landscape, merge

A, B = {"x": jnp.array([1.0, 0.0])}, {"x": jnp.array([-1.0, 2.0])}


def test_the_height_of_a_parabola_is_the_closed_form():
    """-|x - c|^2 along a chord of length d rises d^2 / 4 above it."""
    barrier = landscape.barrier(lambda p: -jnp.square(p["x"]).sum() + p["x"][1], A, B, num_points=5)
    np.testing.assert_allclose(barrier.ts, [0, 0.25, 0.5, 0.75, 1])
    assert barrier.height == pytest.approx(8 / 4, rel=1e-6)
    np.testing.assert_allclose(barrier.losses[0], -1)
    np.testing.assert_allclose(barrier.losses[-1], -3)


@pytest.mark.parametrize("seed", range(5))
def test_convex_losses_have_no_barrier_and_none_is_negative(seed):
    matrix, a, b = (jnp.asarray(np.random.default_rng(seed + i).normal(size=(3, 3)), jnp.float32) for i in (0, 10, 20))
    barrier = landscape.barrier(lambda p: jnp.square(matrix @ p).sum() + 1e3, a, b)
    assert 0 <= barrier.height <= 1e-3


def test_the_path_may_run_through_embeddings():
    """A latent pytree of any form, any interpolation, stacks by vmap: slerp stays on the circle, lerp does not."""
    a, b = (jnp.array([1.0, 0.0]),), (jnp.array([0.0, 1.0]),)

    def loss_fn(z):
        return 1 - jnp.square(z[0]).sum()

    assert landscape.barrier(loss_fn, a, b, interpolate=merge.slerp).height == pytest.approx(0, abs=1e-6)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), a, (2 * a[0],))
    heights = jax.vmap(lambda a: landscape.barrier(loss_fn, a, b).height)(stack)
    np.testing.assert_allclose(heights[0], 0.5, rtol=1e-5)
    assert heights.shape == (2,)
    assert heights[1] > heights[0]


def test_a_path_has_two_ends():
    with pytest.raises(ValueError, match="num_points is 1; a path has at least its 2 end points"):
        landscape.barrier(lambda p: p["x"].sum(), A, B, num_points=1)


@pytest.mark.slow
def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say():
    """An 80 % interval covers the true mean in about 80 % of 300 normal samples; its width is 2 * 1.28 / sqrt(40)."""
    sample_keys, keys = jax.random.split(jax.random.key(0), (2, 300))
    samples = jax.vmap(lambda k: 3 + jax.random.normal(k, (40,)))(sample_keys)
    low, high = jax.vmap(lambda v, k: landscape.bootstrap(v, k, level=0.8, resamples=500))(samples, keys)
    assert 0.7 < ((low < 3) & (high > 3)).mean() < 0.87
    assert (high - low).mean() == pytest.approx(2 * 1.2816 / np.sqrt(40), rel=0.1)


def test_bootstrap_of_one_value_is_that_value(key):
    low, high = landscape.bootstrap(jnp.full(7, 2.5), key)
    assert low == high == 2.5


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (jnp.ones(3), {"level": 1.0}, "level is 1.0; expected a number inside"),
        (jnp.ones(3), {"level": 0.0}, "level is 0.0"),
        (jnp.ones(3), {"resamples": 0}, "resamples is 0; expected 1 or more"),
        (jnp.ones(0), {}, r"values have shape \(0,\); expected \[samples\] with at least one"),
    ],
)
def test_bootstrap_refuses_what_has_no_interval(values, options, message, key):
    with pytest.raises(ValueError, match=message):
        landscape.bootstrap(values, key, **options)


def metrics(params):
    """Loss, and a vector."""
    return {"loss": jnp.square(params["x"]).sum(), "place": params["x"]}


def test_a_path_carries_any_metrics():
    ts, along = landscape.path(metrics, A, B, num_points=5)
    places = np.outer(1 - ts, A["x"]) + np.outer(ts, B["x"])
    np.testing.assert_allclose(along["place"], places, atol=1e-6)
    np.testing.assert_allclose(along["loss"], np.square(places).sum(1), atol=1e-6)
    barrier = landscape.barrier(lambda p: metrics(p)["loss"], A, B, num_points=5)
    np.testing.assert_array_equal(barrier.losses, along["loss"])
    assert landscape.height(along["loss"]) == barrier.height


@pytest.mark.parametrize("batch_size", [1, 2, 5, 99])
def test_points_in_batches_are_the_points_at_once(batch_size):
    """Ragged ones too; and that it counts the points at once is seen in the shape that a callback gets."""
    sizes = []

    def spied(params):
        def spy(x):
            sizes.append(x.shape[:-1])
            return np.float32(np.square(x).sum(-1))

        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(spy, shape, params["x"], vmap_method="expand_dims")

    whole = landscape.path(lambda p: metrics(p)["loss"], A, B, num_points=5)
    parts = landscape.path(spied, A, B, num_points=5, batch_size=batch_size)
    np.testing.assert_allclose(parts.metrics, whole.metrics, rtol=1e-6)
    assert max(size[0] for size in sizes) == min(batch_size, 5)
    jitted = jax.jit(lambda a, b: landscape.barrier(lambda p: metrics(p)["loss"], a, b, num_points=5, batch_size=2))
    np.testing.assert_allclose(jitted(A, B).losses, whole.metrics, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_points": 1}, "num_points is 1"), ({"batch_size": 0}, "batch_size is 0; expected 1 or more points")],
)
@pytest.mark.parametrize("walk", [landscape.path, landscape.barrier])
def test_paths_refuse_knobs_that_mean_nothing(walk, options, message):
    with pytest.raises(ValueError, match=message):
        walk(lambda p: p["x"].sum(), A, B, **options)


def test_a_barrier_is_differentiable():
    """Of the bump above: its height is |b - a|^2 / 4, whose gradient along a is (a - b) / 2."""
    slope = jax.grad(lambda a: landscape.barrier(lambda p: -jnp.square(p["x"]).sum(), a, B, num_points=5).height)(A)
    np.testing.assert_allclose(slope["x"], (A["x"] - B["x"]) / 2, atol=1e-5)


def test_a_height_has_two_ends():
    with pytest.raises(ValueError, match=r"losses have shape \(1,\); expected \[points\]"):
        landscape.height(jnp.ones(1))
    with pytest.raises(ValueError, match=r"losses of the ends are inf and 1.0; expected finite numbers"):
        landscape.height(jnp.array([jnp.inf, 1.0, 1.0]))
    assert landscape.height(jnp.array([1.0, jnp.inf, 1.0])) == jnp.inf


def bumps(key, examples):
    """Losses of examples whose bump is 1 with deviation 0.5, above a chord that all share."""
    ts = jnp.linspace(0, 1, 9)
    return (2 + ts)[:, None] + (4 * ts * (1 - ts))[:, None] * (1 + 0.5 * jax.random.normal(key, (examples,)))


@pytest.mark.slow
def test_intervals_of_a_barrier_cover_it_as_often_as_they_say():
    """An 80 % interval covers the true height 1 in about 80 % of 200 data sets, and shrinks like 1 / sqrt(examples)."""
    keys = jax.random.split(jax.random.key(1), (200, 2))
    run = jax.jit(jax.vmap(lambda k: landscape.interval(bumps(k[0], 40), k[1], level=0.8, resamples=300)))
    intervals = run(keys)
    assert 0.7 < ((intervals.low < 1) & (intervals.high > 1)).mean() < 0.87
    assert (intervals.high - intervals.low).mean() == pytest.approx(2 * 1.2816 * 0.5 / np.sqrt(40), rel=0.1)
    assert ((intervals.low < intervals.height) & (intervals.height < intervals.high)).mean() > 0.95


def test_the_interval_of_examples_that_agree_is_a_point(key):
    losses = jnp.array([0.0, 3.0, 2.0])[:, None] + jnp.arange(5.0)
    np.testing.assert_allclose(landscape.interval(losses, key, resamples=50), 2, atol=1e-5)


def test_an_interval_follows_the_barrier_of_means(key):
    losses = bumps(key, 30)
    expected = landscape.height(losses.mean(1))
    np.testing.assert_allclose(landscape.interval(losses, key, resamples=10).height, expected, rtol=1e-6)
    negative = landscape.interval(-losses, key, resamples=10)
    assert negative.height == pytest.approx(0, abs=1e-5)
    assert negative.low >= 0


@pytest.mark.parametrize(
    ("losses", "level", "message"),
    [
        (jnp.ones((3, 4)), 1.0, "level is 1.0"),
        (jnp.ones((1, 4)), 0.9, r"losses have shape \(1, 4\); expected \[points, examples\]"),
        (jnp.ones((3, 0)), 0.9, r"losses have shape \(3, 0\)"),
    ],
)
def test_an_interval_needs_points_and_examples(losses, level, message, key):
    with pytest.raises(ValueError, match=message):
        landscape.interval(losses, key, level=level)


THREE = [{"w": jnp.array(w), "b": jnp.array([b])} for w, b in (([1.0, 1.0], 0.0), ([3.0, 1.0], 0.0), ([2.0, 1.0], 4.0))]


def bowl(params):
    return jnp.square(params["w"]).sum() + 3 * params["b"][0]


def test_a_plane_by_hand():
    """u lies along the first weight, v along the bias: the loss in coordinates is (1 + x)^2 + 1 + 3 y."""
    plane = jax.jit(lambda a, b, c: landscape.plane(bowl, a, b, c, num_points=5, margin=0.5))(*THREE)
    np.testing.assert_allclose(plane.corners, [[0, 0], [2, 0], [1, 4]], atol=1e-6)
    np.testing.assert_allclose(plane.xs, np.linspace(-1, 3, 5), atol=1e-6)
    np.testing.assert_allclose(plane.ys, np.linspace(-2, 6, 5), atol=1e-6)
    expected = (1 + np.linspace(-1, 3, 5))[None] ** 2 + 1 + 3 * np.linspace(-2, 6, 5)[:, None]
    np.testing.assert_allclose(plane.losses, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_the_plane_passes_through_its_three_networks(seed):
    """Distances between corners are those of the networks, and at the corners the grid has the networks' losses."""
    networks = [support.random_params(support.ARCHITECTURES["relu mlp"], 3 * seed + i) for i in range(3)]
    flat = [ravel_pytree(one)[0] for one in networks]

    def loss(params):
        return jnp.sin(ravel_pytree(params)[0]).sum()

    plane = landscape.plane(loss, *networks, num_points=3, margin=0.0, batch_size=2)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        np.testing.assert_allclose(
            jnp.linalg.norm(plane.corners[i] - plane.corners[j]), jnp.linalg.norm(flat[i] - flat[j]), rtol=1e-5
        )
    # In general position the grid without a margin begins at a (and at b or c, or to the left of it) and ends at c.
    row = {0: 0, 1: 0, 2: -1}
    seen = 0
    for i, (x, _) in enumerate(plane.corners):
        for column in (0, -1):
            if abs(plane.xs[column] - x) < 1e-5:
                np.testing.assert_allclose(plane.losses[row[i], column], loss(networks[i]), rtol=1e-4, atol=1e-4)
                seen += 1
    assert seen >= 2


@pytest.mark.parametrize("third", [lambda a, b: a, lambda a, b: b, lambda a, b: merge.lerp(a, b, 3.0)])
def test_three_networks_on_a_line_have_no_plane(third):
    networks = [support.random_params(support.ARCHITECTURES["relu mlp"], i) for i in range(2)]
    networks.append(third(*networks))
    with pytest.raises(ValueError, match="a, b and c lie on one line"):
        landscape.plane(lambda p: jnp.zeros(()), *networks)
    with pytest.raises(ValueError, match="a, b and c lie on one line"):
        landscape.plane(lambda p: jnp.zeros(()), networks[0], networks[0], networks[1])
    # Where the values are not at hand: numbers all the same, not NaN.
    plane = jax.jit(lambda a, b, c: landscape.plane(lambda p: p["Dense_0"]["bias"].sum(), a, b, c, num_points=2))
    assert np.isfinite(plane(networks[0], networks[0], networks[1]).losses).all()


@pytest.mark.parametrize(
    ("c", "options", "message"),
    [
        ({"w": jnp.zeros(2)}, {}, "a and c differ in structure"),
        (THREE[2], {"num_points": 1}, "num_points is 1 and margin 0.2"),
        (THREE[2], {"margin": -0.1}, "margin -0.1"),
        (THREE[2], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_plane_refuses_other_networks_and_empty_grids(c, options, message):
    with pytest.raises(ValueError, match=message):
        landscape.plane(bowl, *THREE[:2], c, **options)


def test_a_barrier_refuses_losses_that_are_nan_and_says_where():
    def loss(x):
        return jnp.where(x > 0.6, jnp.nan, x)

    a, b = jnp.zeros(()), jnp.ones(())
    with pytest.raises(ValueError, match=r"NaN at 2 of 5 points, the first at t = 0\.75"):
        landscape.barrier(loss, a, b, num_points=5)
    heights = jax.vmap(lambda end: landscape.barrier(loss, a, end, num_points=5).height)(jnp.array([1.0, 0.5]))
    assert jnp.isnan(heights[0])
    assert heights[1] == 0


def test_heights_intervals_and_means_refuse_nan_and_of_a_stack_lose_one_row_alone():
    losses = jnp.array([[0.0, 2.0, 0.0], [0.0, jnp.nan, 0.0]])
    with pytest.raises(ValueError, match=r"NaN at 1 of 3 points, the first at t = 0\.5"):
        landscape.height(losses[1])
    np.testing.assert_array_equal(jax.vmap(landscape.height)(losses), [2.0, np.nan])
    examples = jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"NaN at 1 of 3 points, the first at t = 0\.5"):
        landscape.interval(examples, jax.random.key(0), resamples=2)
    with pytest.raises(ValueError, match="2 of 5 values are NaN, the first at 1; expected numbers"):
        landscape.bootstrap(jnp.array([0.0, jnp.nan, 1.0, 2.0, jnp.nan]), jax.random.key(0), resamples=2)
    low, high = jax.vmap(lambda values: landscape.bootstrap(values, jax.random.key(0), resamples=2))(losses)
    assert np.isfinite([low[0], high[0]]).all()


def test_a_plane_is_nan_where_the_loss_is_and_nowhere_else():
    corners = [{"w": jnp.array(w)} for w in ([0.0, 0.0], [2.0, 0.0], [0.0, 2.0])]
    plane = landscape.plane(lambda p: jnp.log(p["w"].sum()), *corners, num_points=3, margin=0.5)  # from -1 to 3
    sums = np.add.outer(np.linspace(-1, 3, 3), np.linspace(-1, 3, 3))
    np.testing.assert_array_equal(np.isnan(plane.losses), sums < 0)

"""Loss barriers of losses that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_scalegmn import landscape, merge

A, B = {"x": jnp.array([1.0, 0.0])}, {"x": jnp.array([-1.0, 2.0])}


def test_a_hump_has_the_height_that_it_has():
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
    ("values", "level", "message"),
    [
        (jnp.ones(3), 1.0, "level is 1.0; expected a number inside"),
        (jnp.ones(3), 0.0, "level is 0.0"),
        (jnp.ones(0), 0.9, r"values have shape \(0,\); expected \[samples\] with at least one"),
    ],
)
def test_bootstrap_refuses_what_has_no_interval(values, level, message, key):
    with pytest.raises(ValueError, match=message):
        landscape.bootstrap(values, key, level=level)

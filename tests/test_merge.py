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

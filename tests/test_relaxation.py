"""Soft matrices are doubly stochastic, act as group elements do in their limit, and pass gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.test_util import check_grads

import jax_scalegmn as sg
from jax_scalegmn import symmetry
from jax_scalegmn.architecture import Scaling
from jax_scalegmn.matching import relaxation

NETWORKS = support.ARCHITECTURES | {name: arch for name, (arch, _) in support.HAND_WRITTEN.items()}
FAST = ("mixed mlp", "tanh cnn", "residual tanh")  # every group and power; each network runs hundreds of small programs
MIXED = sg.mlp((3, 4, 4, 2), ("tanh", "relu"))
soften = jax.jit(relaxation.soften, static_argnames="num_iterations")


def random_logits(arch, seed=0, size=1.0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {n.name: jnp.asarray(size * rng.normal(size=(n.width, n.width)), dtype) for n in arch.hidden}


def hard(arch, element):
    """The soft element that is that group element."""
    signed = relaxation.logits_of(arch, element)
    return relaxation.Soft({name: jnp.abs(matrix) for name, matrix in signed.items()}, signed)


def test_matrices_are_doubly_stochastic_and_signs_lie_within_them():
    """Rows at once, columns in the limit, which one iteration does not reach."""
    logits = random_logits(MIXED, size=2.0)
    soft, early = soften(MIXED, logits, num_iterations=200), soften(MIXED, logits, num_iterations=1)
    for name, matrix in soft.permutation.items():
        assert (matrix > 0).all()
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-4)
        np.testing.assert_allclose(early.permutation[name].sum(1), 1, atol=1e-6)
        assert np.abs(early.permutation[name].sum(0) - 1).max() > 1e-2
        assert (jnp.abs(soft.signed[name]) <= matrix).all()
    assert (soft.signed["hidden_0"] < 0).any()
    np.testing.assert_array_equal(soft.signed["hidden_1"], soft.permutation["hidden_1"])


def test_signs_are_the_second_half_of_a_larger_transport_problem():
    """Two routes: the same marginals laid on P+ and P- by multiplicative scaling, in NumPy."""
    x = np.asarray(random_logits(MIXED)["hidden_0"], float)
    plus, minus = np.exp(x), np.exp(-x)
    for _ in range(500):
        for axis in (0, 1):
            total = (plus + minus).sum(axis, keepdims=True)
            plus, minus = plus / total, minus / total
    soft = soften(MIXED, random_logits(MIXED), num_iterations=200)
    np.testing.assert_allclose(soft.permutation["hidden_0"], plus + minus, atol=1e-5)
    np.testing.assert_allclose(soft.signed["hidden_0"], plus - minus, atol=1e-5)
    assert np.abs(soft.permutation["hidden_0"] - minus).max() > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_large_logits_soften_to_what_they_harden_to(seed):
    """Where one assignment is by far the best; nearly hard columns come to 1 as slowly as one over the iterations."""
    planted = support.rows(support.random_elements(MIXED, 5, seed=1), seed)
    noise = random_logits(MIXED, seed, size=0.2)
    logits = jax.tree.map(jnp.add, relaxation.logits_of(MIXED, planted), noise)
    element = relaxation.harden(MIXED, logits)
    large = soften(MIXED, jax.tree.map(lambda x: 60 * x, logits), num_iterations=200)
    small = soften(MIXED, logits, num_iterations=200)
    for name, matrix in relaxation.logits_of(MIXED, element).items():
        np.testing.assert_allclose(large.signed[name], matrix, atol=5e-3)
        assert np.abs(small.signed[name] - matrix).max() > 0.1


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_hard_matrices_act_as_the_element_does(name):
    """Bit for bit; transposed matrices are another element."""
    arch = NETWORKS[name]
    params = support.random_params(arch)
    scale = {k: jnp.sign(s) for k, s in support.rows(support.random_elements(arch, 1), 0).scale.items()}
    # No permutation of at least three neurons that is its own inverse.
    element = symmetry.Element({n.name: jnp.roll(jnp.arange(n.width), 1) for n in arch.hidden}, scale)
    soft = hard(arch, element)
    expected = support.act(arch, element, params)
    support.assert_identical(relaxation.soft_act(arch, soft, params), expected)
    transposed = jax.tree.map(jnp.transpose, soft)
    assert support.deviation(relaxation.soft_act(arch, transposed, params), expected) > 0.1


@pytest.mark.parametrize("name", ["mixed mlp", "residual tanh"])
def test_hardening_undoes_logits_of_up_to_positive_scales(name):
    arch = NETWORKS[name]
    element = support.rows(support.random_elements(arch, 1), 0)
    found = relaxation.harden(arch, relaxation.logits_of(arch, element))
    for neurons in arch.hidden:
        np.testing.assert_array_equal(found.permutation[neurons.name], element.permutation[neurons.name])
        sign = element.scale[neurons.name] if neurons.scaling is Scaling.SIGN else 1
        np.testing.assert_array_equal(found.scale[neurons.name], sign)


def test_zeros_harden_to_an_element_that_loses_no_neuron():
    zeros = jax.tree.map(jnp.zeros_like, random_logits(MIXED))
    element = relaxation.harden(MIXED, zeros)
    for order, scale in zip(element.permutation.values(), element.scale.values(), strict=True):
        np.testing.assert_array_equal(np.sort(order), np.arange(4))
        np.testing.assert_array_equal(scale, 1)
    np.testing.assert_allclose(soften(MIXED, zeros).permutation["hidden_0"], 0.25, atol=1e-6)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences():
    """In float64, through five iterations, and finite at logits of 0, where signs are undecided."""
    with jax.enable_x64(True):
        params, goal = (support.random_params(MIXED, seed, "float64") for seed in (0, 1))

        @jax.jit
        def inner(logits):
            moved = relaxation.soft_act(MIXED, relaxation.soften(MIXED, logits, num_iterations=5), params)
            return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(goal), strict=True))

        logits = random_logits(MIXED, dtype="float64")
        check_grads(inner, (logits,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)
        with pytest.raises(AssertionError):
            check_grads(lambda x: inner(jax.lax.stop_gradient(x)), (logits,), order=1, modes=["rev"])
        slope = jax.jit(jax.grad(inner))(jax.tree.map(jnp.zeros_like, logits))
        assert all(np.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("function", [relaxation.soften, relaxation.harden])
def test_logits_of_another_network_are_refused(function):
    with pytest.raises(ValueError, match=r"The matrices have layers .*expects .*'hidden_0': \(4, 4\)"):
        function(MIXED, random_logits(sg.mlp((3, 5, 4, 2))))


def test_what_does_not_fit_is_refused_by_the_action():
    params = support.random_params(MIXED)
    soft = hard(MIXED, symmetry.identity(MIXED))
    with pytest.raises(ValueError, match=r"expects \(4, 4\)"):
        relaxation.soft_act(MIXED, soft, support.random_params(sg.mlp((3, 4, 5, 2))))
    with pytest.raises(ValueError, match=r"Use jax\.vmap for a batch"):
        relaxation.soft_act(MIXED, jax.tree.map(lambda x: x[None], soft), params)
    with pytest.raises(ValueError, match=r"Use jax\.vmap for a batch"):
        relaxation.logits_of(MIXED, support.random_elements(MIXED, 2))


def test_a_batch_by_vmap_is_one_by_one():
    logits = jax.tree.map(lambda *x: jnp.stack(x), *(random_logits(MIXED, seed) for seed in range(3)))
    together = jax.jit(jax.vmap(functools.partial(relaxation.soften, MIXED)))(logits)
    for index in range(3):
        alone = soften(MIXED, support.rows(logits, index))
        assert support.deviation(support.rows(together, index), alone) < 1e-5

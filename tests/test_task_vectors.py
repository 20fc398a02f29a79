"""Task vectors against the rules written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from jax_scalegmn import merge, symmetry
from jax_scalegmn.architecture import Scaling

SIREN = support.ARCHITECTURES["siren"]
BASE = support.random_params(SIREN, 0)
STACK = support.random_params(SIREN, 1, models=(3,))
ties = jax.jit(merge.ties, static_argnames="density")
act = jax.jit(jax.vmap(symmetry.act, (None, None, 0)))


def flat(stack):
    """A stack, or one network as a stack of one, as rows in the order of its leaves."""
    return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(stack)], 1)


def one(params):
    return flat(jax.tree.map(lambda leaf: leaf[None], params))[0]


def ties_by_hand(base, stack, density):
    """Entry by entry, in plain loops."""
    vectors = stack - base
    kept = max(1, round(density * len(base)))
    trimmed = np.zeros_like(vectors)
    for vector, out in zip(vectors, trimmed, strict=True):
        for place in sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))[:kept]:
            out[place] = vector[place]
    merged = np.zeros_like(base)
    for place, column in enumerate(trimmed.T):
        sign = np.sign(column.sum())
        agreeing = [value for value in column if sign and np.sign(value) == sign]
        merged[place] = np.mean(agreeing) if agreeing else 0
    return base + merged


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ties_trims_elects_and_merges_as_written(density, seed):
    stack = support.random_params(SIREN, seed + 2, models=(4,))
    merged = ties(BASE, stack, density=density)
    expected = ties_by_hand(one(BASE), flat(stack), density)
    np.testing.assert_allclose(one(merged), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - one(BASE)).max() > 0.01
    mean = one(BASE) + (flat(stack) - one(BASE)).mean(0)
    assert np.abs(expected - mean).max() > 0.01


def test_ties_of_small_vectors():
    """The majority's mass wins, a tie of the masses elects nobody, and what nobody changed stays."""
    base = {"x": jnp.array([10.0, 10.0, 10.0, 10.0])}
    stack = {"x": base["x"] + jnp.array([[3.0, 1.0, 2.0, 0.0], [1.0, -1.0, -3.0, 0.0], [-2.0, 0.0, -5.0, 0.0]])}
    merged = merge.ties(base, stack, density=1.0)
    np.testing.assert_allclose(merged["x"], [12, 10, 6, 10])
    half = merge.ties(base, stack, density=1.0, weight=0.5)
    np.testing.assert_allclose(half["x"], [11, 10, 8, 10])


def test_trimming_keeps_exactly_so_many_and_of_equal_ones_the_first():
    base = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    stack = {"a": jnp.array([[1.0, -1.0, 1.0]]), "b": jnp.array([[1.0, 1.0, -2.0]])}
    merged = merge.ties(base, stack, density=0.5)
    np.testing.assert_allclose(one(merged), [1, -1, 0, 0, 0, -2])


@pytest.mark.parametrize("group", support.GROUPS)
def test_ties_commutes_with_permutations_and_signs(group):
    """Base and fine-tuned networks moved by one element: the merged network moves along."""
    element = support.rows(support.random_elements(SIREN, 1, **support.GROUPS[group]), 0)
    merged = ties(BASE, STACK)
    moved = ties(support.act(SIREN, element, BASE), act(SIREN, element, STACK))
    assert support.deviation(moved, support.act(SIREN, element, merged)) < 1e-5


def test_ties_does_not_commute_with_positive_scales():
    """Magnitudes of different neurons are compared, which is what they change; the docstring says so."""
    arch = support.ARCHITECTURES["relu mlp"]
    assert {n.scaling for n in arch.hidden} == {Scaling.POSITIVE}
    element = support.rows(support.random_elements(arch, 1, permute=False), 0)
    base, stack = support.random_params(arch, 0), support.random_params(arch, 1, models=(3,))
    moved = ties(support.act(arch, element, base), act(arch, element, stack))
    assert support.deviation(moved, support.act(arch, element, ties(base, stack))) > 0.1


def test_one_network_at_full_density_is_itself():
    stack = jax.tree.map(lambda leaf: leaf[:1], STACK)
    assert support.deviation(ties(BASE, stack, density=1.0), support.rows(STACK, 0)) < 1e-6
    assert support.deviation(ties(BASE, stack, density=0.9), support.rows(STACK, 0)) > 1e-3


def test_arithmetic_adds_what_tuning_changed():
    vectors = jax.vmap(functools.partial(merge.task_vector, BASE))(STACK)
    np.testing.assert_allclose(flat(vectors), flat(STACK) - one(BASE), atol=1e-6)
    weights = jnp.array([0.5, -1.0, 2.0])
    got = jax.jit(merge.task_arithmetic)(BASE, vectors, weights)
    expected = one(BASE) + np.asarray(weights) @ (flat(STACK) - one(BASE))
    np.testing.assert_allclose(one(got), expected, rtol=1e-4, atol=1e-5)
    same = [merge.task_arithmetic(BASE, vectors, w) for w in (0.3, jnp.full(3, 0.3))]
    support.assert_identical(*same)
    back = merge.task_arithmetic(support.rows(STACK, 1), jax.tree.map(lambda leaf: leaf[1:2], vectors), -1.0)
    assert support.deviation(back, BASE) < 1e-5


def test_the_base_keeps_its_dtype():
    base, stack = (jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tree) for tree in (BASE, STACK))
    vectors = jax.vmap(functools.partial(merge.task_vector, base))(stack)
    for merged in (ties(base, stack), merge.task_arithmetic(base, vectors, 0.3)):
        assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_many_bases_at_once_and_gradients_to_weights():
    bases = support.random_params(SIREN, 5, models=(2,))
    both = jax.vmap(lambda base: ties(base, STACK))(bases)
    alone = ties(support.rows(bases, 1), STACK)
    assert support.deviation(support.rows(both, 1), alone) < 1e-6

    def size(weight):
        merged = ties(BASE, STACK, weight=weight)
        return sum(jnp.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (merged, BASE)), strict=True))

    assert jax.grad(size)(1.0) == pytest.approx(2 * float(size(1.0)), rel=1e-4)


def damaged(stack):
    first, *rest = jax.tree.leaves(stack)
    return jax.tree.unflatten(jax.tree.structure(stack), [first.at[0, 0].set(jnp.nan), *rest])


@pytest.mark.parametrize(
    ("base", "stack", "options", "message"),
    [
        (BASE, STACK, {"density": 0.0}, r"density is 0.0; expected a share inside \(0, 1\]"),
        (BASE, STACK, {"density": 1.1}, "density is 1.1"),
        (BASE, damaged(STACK), {}, r"stack\['Dense_0'\]\['bias'\] holds 1 NaN"),
        (BASE, support.random_params(support.ARCHITECTURES["tanh mlp"], models=(3,)), {}, "differ in structure"),
        (BASE, BASE, {}, "leading sizes"),
        ({"x": jnp.zeros(2)}, {"x": jnp.zeros((0, 2))}, {}, r"leading sizes \[0\]"),
    ],
)
def test_ties_refuses_what_has_no_common_base(base, stack, options, message):
    with pytest.raises(ValueError, match=message):
        merge.ties(base, stack, **options)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (jnp.ones(2), r"weights have shape \(2,\); expected \(3,\)"),
        (jnp.array([1.0, jnp.nan, 1.0]), "weights holds 1 NaN"),
    ],
)
def test_arithmetic_needs_a_finite_weight_for_each_vector(weights, message):
    with pytest.raises(ValueError, match=message):
        merge.task_arithmetic(BASE, STACK, weights)


def test_a_task_vector_has_one_base():
    with pytest.raises(ValueError, match="tuned and base differ in structure or shapes"):
        merge.task_vector(BASE, STACK)

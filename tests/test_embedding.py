"""`models.embed`: what a model makes of many networks, in micro-batches and part by part."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from jax_scalegmn.models import _embedding

ARCH = sg.siren((2, 4, 3, 1))
TRACED: list[None] = []


class Perceptron(nn.Module):
    """A model that compiles fast: it knows nothing of symmetries."""

    @nn.compact
    def __call__(self, params):
        TRACED.append(None)
        entries = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])
        return nn.tanh(nn.Dense(3)(entries))

    def with_sum(self, params):
        z = self(params)
        return {"z": z, "sum": z.sum()}


MODEL = Perceptron()


@pytest.fixture(scope="module")
def networks():
    """Eleven networks, the variables of MODEL, and what one vmap makes of them."""
    stack = jax.tree.map(np.asarray, support.random_params(ARCH, models=(11,)))
    variables = support.random_variables(MODEL, jax.tree.map(lambda leaf: leaf[0], stack))
    return stack, variables, np.asarray(jax.jit(jax.vmap(lambda params: MODEL.apply(variables, params)))(stack))


def test_an_encoder_embeds_as_one_vmap_does(networks):
    stack, _, _ = networks
    encoder = sg.Encoder(sg.ScaleGMN(ARCH, features=4, num_layers=1), latent=3)
    variables = support.random_variables(encoder, jax.tree.map(lambda leaf: leaf[0], stack))
    expected = jax.jit(jax.vmap(lambda params: encoder.apply(variables, params)))(stack)
    np.testing.assert_allclose(
        sg.models.embed(encoder, variables, stack, micro_batch=4), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 4, 11, 50])
def test_every_micro_batch_gives_the_results_of_one_vmap(networks, micro_batch, monkeypatch):
    monkeypatch.setattr(_embedding, "_MICRO_BATCHES", 2)  # several calls, the last of them filled up
    stack, variables, expected = networks
    ready = []
    made = sg.models.embed(MODEL, variables, stack, micro_batch=micro_batch, progress=ready.append)
    assert isinstance(made, np.ndarray)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)
    assert sum(ready) == 11
    if micro_batch in (3, 4):
        assert ready == [2 * micro_batch] * (11 // (2 * micro_batch)) + [11 % (2 * micro_batch)]


class Counted(Perceptron):
    """A model that no other test has traced."""


def test_parts_of_any_size_are_joined_and_compile_one_program(networks):
    stack, variables, expected = networks
    TRACED.clear()
    cuts = [(0, 4), (4, 4), (4, 5), (5, 11)]  # one part is empty, the last larger than the first
    parts = (jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], stack) for a, b in cuts)
    made = sg.models.embed(Counted(), variables, parts, micro_batch=2)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)
    once = len(TRACED)
    again = jax.tree.map(lambda leaf: leaf[4:8], stack)
    np.testing.assert_array_equal(sg.models.embed(Counted(), variables, again, micro_batch=2), made[4:8])
    assert len(TRACED) == once == 1


def test_a_method_and_results_with_several_arrays_and_any_container(networks):
    stack, variables, expected = networks

    made = sg.models.embed(MODEL, variables, collections.OrderedDict(stack), method="with_sum")
    np.testing.assert_allclose(made["z"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made["sum"], expected.sum(1), rtol=1e-4, atol=1e-5)


class Wide(nn.Module):
    """A model whose largest array, in a loop, has `size` x `size` entries."""

    size: int

    @nn.compact
    def __call__(self, params):
        big = lambda total, _: (total + jnp.full((self.size, self.size), total).sum(), None)  # noqa: E731
        return jax.lax.scan(big, params["bias"].sum(), length=3)[0]


@pytest.mark.parametrize(("size", "expected"), [(64, 256), (50, 256), (1024, 1)])
def test_the_chosen_micro_batch_follows_the_largest_array_those_in_loops_included(size, expected):
    stack = {"bias": np.zeros((5, 2), np.float32)}
    assert _embedding._micro_batch(Wide(size), None, {}, stack) == expected


def test_bad_stacks_are_refused(networks):
    stack, variables, _ = networks
    with pytest.raises(ValueError, match="micro_batch is 0; expected 1 or more"):
        sg.models.embed(MODEL, variables, stack, micro_batch=0)
    with pytest.raises(ValueError, match="There are no networks"):
        sg.models.embed(MODEL, variables, iter(()))
    with pytest.raises(ValueError, match="There are no networks"):
        sg.models.embed(MODEL, variables, jax.tree.map(lambda leaf: leaf[:0], stack))
    one = jax.tree.map(lambda leaf: leaf[0], stack)
    with pytest.raises(ValueError, match="one network alone needs no embed"):
        sg.models.embed(MODEL, variables, one)
    uneven = stack | {"Dense_0": jax.tree.map(lambda leaf: leaf[:3], stack["Dense_0"])}
    with pytest.raises(ValueError, match=r"leading axes \[\(3,\), \(11,\)\]"):
        sg.models.embed(MODEL, variables, uneven)

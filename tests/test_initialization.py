"""The first variables of a model: those of `model.init`, and nothing of the model is compiled for them."""

import jax
import jax.numpy as jnp
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from jax_scalegmn import models

SIREN = support.ARCHITECTURES["siren"]
PARAMS = support.random_params(SIREN)
KEY = jax.random.key(3)


class Several(nn.Module):
    """Variables of every kind: drawn, of another collection, constant, made of the example, of both."""

    @nn.compact
    def __call__(self, x):
        drawn = self.param("drawn", nn.initializers.lecun_normal(), (3, 2))
        self.variable("statistics", "mean", jnp.zeros, (2,))
        twice = self.param("constant", lambda _: jnp.full((2,), 2.0))
        shift = self.param("shift", lambda _: x.mean(0))
        noisy = self.param("noisy", lambda key: x[0] + jax.random.normal(key, x[0].shape))
        scaled = self.param("scaled", lambda _: (x @ drawn).std(0))
        return jnp.linalg.inv((x - shift + noisy) @ drawn * scaled * twice)


def assert_like_flax(model, example, key=KEY, method=None):
    ours, flax = models.init(model, key, example, method=method), model.init(key, example, method=method)
    assert jax.tree.structure(ours) == jax.tree.structure(flax)
    return ours, flax


@pytest.mark.slow
@pytest.mark.parametrize("seed", [KEY, jax.random.PRNGKey(3)], ids=["typed key", "raw key"])
def test_drawn_variables_are_those_of_flax_bit_for_bit(seed):
    model = models.autoencoder(SIREN, 4, num_layers=1)
    support.assert_identical(*assert_like_flax(model, PARAMS, seed))


def test_variables_that_depend_on_the_example_are_those_of_flax_to_rounding():
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    ours, flax = assert_like_flax(Several(), x)
    assert support.deviation(ours, flax) < 1e-6
    for name in ("drawn", "constant"):
        support.assert_identical(ours["params"][name], flax["params"][name])
    other = models.init(Several(), KEY, x + 1)
    assert float(abs(other["params"]["shift"] - ours["params"]["shift"] - 1).max()) < 1e-6


@pytest.mark.slow
def test_the_slots_of_a_frame_are_the_embedding_of_the_example():
    model = models.Frame(SIREN, models.LeanGMN(SIREN, 4, num_layers=1))
    ours, flax = assert_like_flax(model, PARAMS)
    assert support.deviation(ours, flax) < 1e-5


def test_a_method_may_read_the_example():
    x = jnp.ones((2, 3))
    ours, flax = assert_like_flax(nn.Dense(2), x, method="__call__")
    support.assert_identical(ours, flax)
    matcher = models.Matcher(SIREN, models.LeanGMN(SIREN, 4, num_layers=1))
    support.assert_identical(*assert_like_flax(matcher, PARAMS, method="embed"))


def test_nothing_of_what_the_model_computes_is_compiled():
    x = jnp.ones((5, 7))
    model = nn.Sequential([nn.Dense(11), nn.softplus, nn.Dense(13)])
    support.COMPILED.clear()
    models.init(model, KEY, x)
    ours = list(support.COMPILED)
    support.COMPILED.clear()
    model.init(KEY, x)
    assert any("dot_general" in name for name in support.COMPILED), "the listener hears of programs by name"
    assert ours
    assert not any("dot_general" in name or "softplus" in name for name in ours)


def test_it_can_be_traced_and_vectorized():
    keys = jax.random.split(KEY, 3)
    model = models.Encoder(sg.ScaleGMN(SIREN, 4, num_layers=1))
    stack = jax.vmap(lambda key: models.init(model, key, PARAMS))(keys)
    shapes = jax.eval_shape(lambda params: models.init(model, keys[1], params), PARAMS)
    one = models.init(model, keys[1], PARAMS)
    assert support.deviation(support.rows(stack, 1), one) < 1e-6
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, one)

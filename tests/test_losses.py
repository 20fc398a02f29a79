"""Losses are the formulas that they name, by a second route in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from jax_scalegmn import models, network
from jax_scalegmn.models import graph
from jax_scalegmn.training import losses

SIREN = support.ARCHITECTURES["siren"]
RELU = support.ARCHITECTURES["relu mlp"]
KEY = jax.random.key(0)


class Noisy(models.Autoencoder):
    """Decodes every network to itself and noise from the dropout key."""

    def __call__(self, params, *, train=False):
        noise = jax.random.normal(self.make_rng("dropout")) if train else 0.0
        return jax.tree.map(lambda leaf: (1 + 0.1 * noise) * leaf, params)


def noisy(arch):
    whole = models.autoencoder(arch, 3)
    return Noisy(whole.encoder, whole.decoder)


def test_inr_reconstruction_is_the_distance_of_images_and_of_the_orbit():
    """With dropout from the key; the orbit distance of scaled weights is the scale squared."""
    model, params = noisy(SIREN), support.random_params(SIREN)
    loss, metrics = jax.jit(losses.inr_reconstruction(model, size=(3, 2), orbit_weight=0.5))({}, params, KEY)
    decoded = model.apply({}, params, train=True, rngs={"dropout": KEY})
    images = [network.render(SIREN, one, (3, 2)) for one in (decoded, params)]
    scale = float(decoded["Dense_0"]["bias"][0] / params["Dense_0"]["bias"][0])
    assert metrics["reconstruction"] == pytest.approx(float(np.square(np.subtract(*images)).mean()), rel=1e-4)
    assert metrics["orbit_distance"] == pytest.approx((scale - 1) ** 2, rel=1e-4)
    assert loss == pytest.approx(float(metrics["reconstruction"] + 0.5 * metrics["orbit_distance"]), rel=1e-5)
    plain = jax.jit(losses.inr_reconstruction(model, size=(3, 2)))
    assert plain({}, params, KEY)[0] == pytest.approx(float(metrics["reconstruction"]), rel=1e-5)
    assert set(plain({}, params, KEY)[1]) == {"reconstruction"}
    assert plain({}, params, jax.random.key(1))[0] != plain({}, params, KEY)[0]


def test_inr_reconstruction_of_images_with_channels_is_the_mean_over_pixels_and_channels():
    arch = sg.siren((2, 4, 3))
    params = support.random_params(arch)
    model = Half(*(getattr(models.autoencoder(arch, 3), part) for part in ("encoder", "decoder")))
    loss, _ = losses.inr_reconstruction(model, size=(3, 2))({}, params, KEY)
    x = network.coordinates(3, 2)
    halved = jax.tree.map(lambda leaf: leaf / 2, params)
    images = [np.asarray(support.outputs(arch, shown, jnp.asarray(x))) for shown in (params, halved)]
    assert images[0].shape == (6, 3)
    assert float(loss) == pytest.approx(float(np.square(images[0] - images[1]).mean()), rel=1e-4)


def softmax(logits):
    weights = np.exp(np.float64(logits))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(("temperature", "at_once"), [(0.6, 250), (2.0, 3)])
def test_distillation_loss_is_the_scaled_divergence_of_the_logits(temperature, at_once, monkeypatch):
    """T^2 KL(teacher || student), the mean over inputs, in one batch or several; 0 for the network itself."""
    monkeypatch.setattr(losses, "_IMAGES_AT_ONCE", at_once)
    with support.precision("float64"):
        model, x = noisy(RELU), support.example(RELU, dtype="float64")
        params = support.random_params(RELU, dtype="float64")
        loss, metrics = losses.distillation(model, x, temperature=temperature)({}, params, KEY)
        decoded = model.apply({}, params, train=True, rngs={"dropout": KEY})
        teacher, student = (softmax(support.outputs(RELU, one, x) / temperature) for one in (params, decoded))
        still = losses.distillation(model, x, temperature=temperature, train=False)({}, params, KEY)[0]
        logits = losses.teacher_logits(RELU, jax.tree.map(lambda leaf: leaf[None], params), x)[0]
        cached = losses.distillation(model, x, temperature=temperature)({}, (params, logits), KEY)[0]
    assert float(cached) == pytest.approx(float(loss), rel=1e-12)
    assert float(metrics["agreement"]) == (teacher.argmax(-1) == student.argmax(-1)).mean()
    expected = temperature**2 * (teacher * np.log(teacher / student)).sum(-1).mean()
    assert expected > 1e-5
    assert loss == metrics["distillation"] == pytest.approx(expected, rel=1e-9)
    assert still == pytest.approx(0, abs=1e-15)


def test_distillation_on_a_few_images_a_step_has_the_same_mean():
    """Over many keys it is the loss on all; with cached logits each draw is the same."""
    model, x, params = noisy(RELU), support.example(RELU), support.random_params(RELU)
    keys = jax.random.split(KEY, 400)
    logits = losses.teacher_logits(RELU, jax.tree.map(lambda leaf: leaf[None], params), x)[0]
    some = losses.distillation(Half(model.encoder, model.decoder), x, images_per_step=2)
    draws = jax.jit(jax.vmap(lambda key: (some({}, params, key)[0], some({}, (params, logits), key)[0])))
    values, known = draws(keys)
    whole = losses.distillation(Half(model.encoder, model.decoder), x)({}, params, KEY)[0]
    np.testing.assert_allclose(values, known, rtol=1e-4, atol=1e-7)
    assert values.std() > 0
    assert values.mean() == pytest.approx(float(whole), abs=4 * float(values.std()) / 20)
    for count in (0, len(x) + 1):
        with pytest.raises(ValueError, match=f"images_per_step is {count}; expected 1 to {len(x)}"):
            losses.distillation(model, x, images_per_step=count)


class Half(models.Autoencoder):
    """Decodes every network to half of itself."""

    def __call__(self, params, *, train=False):
        return jax.tree.map(lambda leaf: leaf / 2, params)


class Reads(nn.Module):
    """The first hidden biases over a learned temperature, with noise in training: a model of params and of graphs."""

    count: int

    def __call__(self, params, *, train=False):
        return self.of(params["Dense_0"]["bias"], train)

    def read(self, built, *, train=False):
        return self.of(built.nodes[graph.topology(RELU).nodes["hidden_0"], 0], train)

    @nn.compact
    def of(self, x, train):
        noise = jax.random.normal(self.make_rng("dropout"), x.shape) if train else 0.0
        return ((x + noise) * self.param("inverse", nn.initializers.ones, ()))[: self.count]


def test_classification_loss_is_the_cross_entropy_of_the_label():
    params, variables = support.random_params(RELU), {"params": {"inverse": jnp.asarray(2.0)}}
    loss_fn = losses.classification(Reads(4), train=False)
    logits = 2 * params["Dense_0"]["bias"][:4]
    expected = -np.log(softmax(logits))
    for label in range(4):
        loss, metrics = loss_fn(variables, (params, jnp.asarray(label)), KEY)
        assert loss == pytest.approx(expected[label], rel=1e-5)
        assert metrics == {"accuracy": float(label == np.argmax(logits))}


def test_regression_loss_is_the_squared_error():
    params, variables = support.random_params(RELU), {"params": {"inverse": jnp.asarray(2.0)}}
    gap = float(2 * params["Dense_0"]["bias"][0] - 0.7)
    loss, metrics = losses.regression(Reads(1), train=False)(variables, (params, jnp.asarray(0.7)), KEY)
    assert loss == pytest.approx(gap**2, rel=1e-5)
    assert metrics == {"absolute_error": pytest.approx(abs(gap), rel=1e-5)}


@pytest.mark.parametrize(("make", "count", "target"), [(losses.classification, 4, 2), (losses.regression, 1, 0.7)])
def test_losses_of_models_read_graphs_too_and_drop_out_by_the_key(make, count, target):
    params, variables = support.random_params(RELU), {"params": {"inverse": jnp.asarray(2.0)}}
    compute = functools.partial(make(Reads(count)), variables)
    row, built = (params, jnp.asarray(target)), (graph.from_params(RELU, params), jnp.asarray(target))
    support.assert_identical(compute(built, KEY), compute(row, KEY))
    assert compute(row, jax.random.key(1))[0] != compute(row, KEY)[0]
    still = functools.partial(make(Reads(count), train=False), variables)
    assert still(row, jax.random.key(1))[0] == still(row, KEY)[0]


@pytest.mark.slow
def test_an_encoder_is_a_classifier():
    """Of params and of their graph, single and in a batch under jit; its loss has a gradient everywhere."""
    model = models.Encoder(models.ScaleGMN(RELU, 4, num_layers=1), latent=3)
    stack = support.random_params(RELU, models=(2,))
    variables = support.random_variables(model, support.rows(stack, 0))
    loss_fn, labels = losses.classification(model), jnp.asarray([0, 2])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def compute(variables):
        def mean(read):
            return jax.vmap(lambda one, label: loss_fn(variables, (read(one), label), KEY)[0])(stack, labels).mean()

        return mean(lambda one: one), mean(functools.partial(graph.from_params, RELU))

    (loss, read), grad = compute(variables)
    assert read == pytest.approx(float(loss), rel=1e-5)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grad))

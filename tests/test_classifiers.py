"""Classifiers learn, trained alone or at once alike, and are scored as by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import network
from jax_scalegmn.zoo import classifiers

ARCHITECTURES = {
    "mlp": sg.mlp((3, 8, 2), "tanh"),
    "cnn": sg.cnn((1, 3, 4), 2),
    "batch norm": sg.vgg(((3,),), 2, input_channels=1, norm="batch"),
}


def data(name, count=96, seed=0):
    """Inputs whose label is the sign of their sum."""
    shape = (3,) if name == "mlp" else (8, 8, 1)
    x = np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)
    y = (x.reshape(count, -1).sum(1) > 0).astype(np.int32)
    x += (0.3 * (2 * y - 1)).reshape(-1, *(1,) * len(shape)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y)


TX = optax.adamw(1e-2)


def fitted(name, *, epochs=1, seeds=(0, 1, 2), **options):
    """The params and losses of every epoch."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return list(
        classifiers.fit(ARCHITECTURES[name], *data(name), keys, tx=TX, num_epochs=epochs, batch_size=16, **options)
    )


@functools.cache
def six_epochs(name):
    return fitted(name, epochs=6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "batch norm" else ()) for name in ARCHITECTURES]
)
def test_networks_learn(name):
    """Each from its own start, to unseen examples."""
    arch = ARCHITECTURES[name]
    params, losses = six_epochs(name)[-1]
    assert losses.shape == (3,)
    score = jax.jit(jax.vmap(lambda p: classifiers.score(arch, p, *data(name, seed=1))))
    scores = score(params)
    assert (scores.accuracy > 0.75).all()
    assert (scores.loss < 0.55).all()
    fresh = jax.jit(jax.vmap(functools.partial(network.init, arch)))(jax.random.split(jax.random.key(5), 3))
    assert (score(fresh).loss > scores.loss).all()
    assert support.deviation(support.rows(params, 0), support.rows(params, 1)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "networks_at_once"), [("mlp", 2), ("mlp", 1), ("batch norm", 1)])
def test_networks_trained_at_once_are_those_trained_one_after_the_other(name, networks_at_once):
    """Three networks in groups of one or two are those trained as one group, and each is the one trained alone."""
    together, losses = six_epochs(name)[0]
    ((grouped, same_losses),) = fitted(name, networks_at_once=networks_at_once)
    ((alone, _),) = fitted(name, seeds=(2,))
    assert support.deviation(grouped, together) < 2e-3
    assert support.deviation(same_losses, losses) < 1e-4
    assert support.deviation(support.rows(alone, 0), support.rows(together, 2)) < 2e-3


@pytest.mark.slow
def test_weight_decay_does_not_touch_statistics():
    """With a learning rate of 0 the weights stay; the statistics move to those of the data, decay or not."""
    arch = ARCHITECTURES["batch norm"]
    keys = jax.random.split(jax.random.key(0), 1)
    runs = []
    for decay in (0.0, 0.5):
        tx = optax.chain(optax.add_decayed_weights(decay), optax.scale(0.0))
        *_, (params, _) = classifiers.fit(arch, *data("batch norm"), keys, tx=tx, num_epochs=2, batch_size=32)
        runs.append(params)
    support.assert_identical(*runs)
    before = network.init(arch, keys[0])
    assert support.deviation(support.rows(runs[0], 0)["Conv_0"], before["Conv_0"]) == 0
    assert support.deviation(support.rows(runs[0], 0)["BatchNorm_0"]["mean"], jnp.ones(3)) > 0.5
    assert not np.allclose(runs[0]["BatchNorm_0"]["var"], 1, atol=1e-3)


def test_score_is_the_mean_over_examples():
    arch = ARCHITECTURES["mlp"]
    params, (x, y) = support.random_params(arch), data("mlp", 10)
    logits = np.asarray(support.outputs(arch, params, x), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for batch_size in (3, 10, 1000):
        scores = classifiers.score(arch, params, x, y, batch_size=batch_size)
        assert scores.loss == pytest.approx(-np.log(chances[np.arange(10), y]).mean(), rel=1e-5)
        assert scores.accuracy == pytest.approx((logits.argmax(1) == np.asarray(y)).mean())


@pytest.mark.parametrize(("labels", "batch_size"), [(9, 2), (10, 11), (10, 0)])
def test_data_that_cannot_be_trained_on_are_refused(labels, batch_size):
    x, y = data("mlp", 10)
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="expected as many labels as"):
        next(
            classifiers.fit(
                ARCHITECTURES["mlp"], x, y[:labels], keys, tx=optax.adam(1e-3), num_epochs=1, batch_size=batch_size
            )
        )


def test_labels_without_an_output_are_refused():
    x, y = data("mlp", 10)
    arch = ARCHITECTURES["mlp"]
    for wrong in (y + 1, y - 1):
        with pytest.raises(ValueError, match=r"has outputs 0 to 1"):
            classifiers.score(arch, support.random_params(arch), x, wrong)

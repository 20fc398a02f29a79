"""Training is a pure function of its state, on one device or several."""

import gc
import math
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import support
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_scalegmn import distributed, models, symmetry, training
from jax_scalegmn.training import losses

SIREN = support.ARCHITECTURES["siren"]
RNG = np.random.default_rng(0)
DATA = {name: jnp.asarray(RNG.normal(size=(18, 5, size)), jnp.float32) for name, size in (("x", 3), ("y", 2))}
TX = training.make_optimizer(learning_rate=0.1, warmup_steps=3)


def loss_fn(variables, row, key):
    """Of a linear map with noisy inputs, the noise from the key."""
    x = row["x"] + 0.3 * jax.random.normal(key, row["x"].shape)
    gap = x @ variables["kernel"] + variables["bias"] - row["y"]
    return jnp.square(gap).mean(), {"bias": jnp.abs(gap.mean())}


def start():
    variables = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    return training.State(variables, TX.init(variables), jax.random.key(5), jnp.asarray(0))


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def history(state=None, num_epochs=4, over=None):
    """The last state, and the metrics of every epoch, trained over the devices of a mesh or on one."""
    step, state, data = training.make_step(loss_fn, TX, mesh=over), state or start(), DATA
    if over is not None:
        state, data = distributed.replicate((state, data), over)
    epochs = list(training.fit(step, state, data, batch_size=8, num_epochs=num_epochs))
    return epochs[-1][0] if epochs else state, [jax.device_get(metrics) for _, metrics in epochs]


def test_micro_batches_return_what_the_full_batch_returns():
    batch = support.rows(DATA, slice(12))
    expected = jax.jit(training.make_step(loss_fn, TX))(start(), batch)
    assert set(expected[1]) == {"bias", "loss", "grad_norm"}
    for micro_batch in (1, 4, 12, 100):
        got = jax.jit(training.make_step(loss_fn, TX, micro_batch=micro_batch))(start(), batch)
        assert support.deviation((got[0].variables, got[1]), (expected[0].variables, expected[1])) < 1e-5
        assert got[0].step == 1
    with pytest.raises(ValueError, match="micro_batch is 5; expected a divisor of the 12 networks of a device"):
        training.make_step(loss_fn, TX, micro_batch=5)(start(), batch)


def test_a_step_is_the_gradient_of_the_mean_loss():
    batch = support.rows(DATA, slice(6))

    def noiseless(variables, row, key):
        return loss_fn(variables, row | {"x": row["x"] * 0}, jax.random.key(0))[0], {}

    tx = optax.sgd(1.0)
    state = start()._replace(opt_state=tx.init(start().variables))
    after, metrics = training.make_step(noiseless, tx)(state, batch)
    grad = jax.grad(lambda v: jnp.stack([noiseless(v, support.rows(batch, i), None)[0] for i in range(6)]).mean())
    expected = grad(state.variables)
    assert support.deviation(after.variables, jax.tree.map(jnp.subtract, state.variables, expected)) < 1e-5
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)


def test_every_network_of_every_step_gets_a_key_of_its_own():
    """Noise differs between the rows of a batch (its square's mean exceeds its mean's square) and between steps."""

    def noise(variables, row, key):
        value = jax.random.uniform(key)
        return 0 * variables["bias"].sum(), {"mean": value, "square": value**2}

    step, batch = jax.jit(training.make_step(noise, TX)), support.rows(DATA, slice(4))
    state, first = step(start(), batch)
    _, second = step(state, batch)
    assert first["square"] > 1.01 * first["mean"] ** 2
    assert second["mean"] != first["mean"]


def rates(count, **options):
    """The learning rate at every step: the update of Adam on a constant gradient."""
    tx = training.make_optimizer(weight_decay=0.0, **options)
    state = tx.init(jnp.ones(()))
    updates = []
    for _ in range(count):
        update, state = tx.update(jnp.ones(()), state, jnp.ones(()))
        updates.append(-float(update))
    return updates


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("decay", [None, 10])
def test_learning_rate_rises_linearly_and_ends_on_a_cosine(warmup, decay):
    """lr * min(1, (t + 1) / warmup), then constant or to 0 at `decay_steps`."""
    expected = [0.5 * min(1, (t + 1) / max(1, warmup)) for t in range(12)]
    if decay:
        falling = [0.25 * (1 + math.cos(math.pi * min(1, t / (decay - warmup)))) for t in range(12 - warmup)]
        expected[warmup:] = falling
    got = rates(12, learning_rate=0.5, warmup_steps=warmup, decay_steps=decay)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_optimizer_clips_the_global_norm_and_decays_weights():
    def run(*grads, **options):
        tx = training.make_optimizer(learning_rate=0.5, warmup_steps=0, **options)
        params = {"a": jnp.full(1, 2.0), "b": jnp.full(1, 3.0)}
        state = tx.init(params)
        for a, b in grads:
            updates, state = tx.update({"a": jnp.full(1, a), "b": jnp.full(1, b)}, state, params)
        return np.concatenate([updates["a"], updates["b"]])

    clipped = run((0.3, 0.4), (3e5, 4e5), clip_norm=1.0)
    np.testing.assert_allclose(clipped, run((0.3, 0.4), (0.6, 0.8), clip_norm=1.0), rtol=1e-5)
    assert not np.allclose(clipped, run((0.3, 0.4), (0.9, 1.2), clip_norm=10.0), rtol=1e-3)
    np.testing.assert_allclose(run((0.0, 0.0), weight_decay=0.1), [-0.5 * 0.1 * 2, -0.5 * 0.1 * 3], rtol=1e-5)


def test_muon_moves_matrices_by_orthogonal_steps_and_vectors_as_adam_does():
    tx = training.make_optimizer(learning_rate=0.5, warmup_steps=0, weight_decay=0.1, optimizer="muon")
    params = {"kernel": jnp.full((4, 4), 2.0), "bias": jnp.ones(4)}
    grads = {"kernel": jax.random.normal(jax.random.key(0), (4, 4)), "bias": jnp.asarray([1.0, -2.0, 3.0, -4.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    step = np.asarray(-updates["kernel"] / 0.5 - 0.1 * params["kernel"])
    np.testing.assert_allclose(np.linalg.svd(step)[1], 1.0, atol=0.35)  # as near as five steps of Newton-Schulz come
    adam = optax.adamw(0.4 * 0.5, weight_decay=0.0, nesterov=True)
    expected, _ = adam.update(grads, adam.init(params), params)
    np.testing.assert_allclose(updates["bias"], expected["bias"], rtol=1e-5)
    with pytest.raises(ValueError, match="optimizer is 'lion'; expected 'adamw' or 'muon'"):
        training.make_optimizer(optimizer="lion")


def test_training_continues_bit_for_bit_from_the_middle():
    """Order, noise and optimizer follow from the state alone."""
    whole, metrics = history()
    middle, first = history(num_epochs=2)
    end, second = history(middle, num_epochs=4)
    support.assert_identical(end, whole)
    assert first + second == metrics
    assert int(whole.step) == 8
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert history(end, num_epochs=4)[1] == []


def test_an_epoch_uses_every_network_once_in_an_order_of_its_own():
    def step(state, batch):
        where = jnp.zeros((9, 18)).at[jnp.arange(9), batch].add(1)
        return state._replace(step=state.step + 1), {"where": where.at[0].add(0)}

    rows, seen = jnp.arange(18), []
    for _, metrics in training.fit(step, start(), rows, batch_size=9, num_epochs=3):
        seen.append(2 * np.asarray(metrics["where"]))
        np.testing.assert_array_equal(seen[-1].sum(0), 1)
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])


def test_a_fit_keeps_its_program_as_long_as_its_step_and_not_what_the_loss_reads():
    """The second fit traces nothing; without the step, the images of its loss are freed."""

    class Images:
        mean = 0.5

    images, traces = Images(), []

    def loss(variables, row, key, images=images):
        traces.append(row)
        return jnp.square(variables["bias"] - images.mean).sum() + 0 * row["x"].sum(), {}

    step = training.make_step(loss, TX)
    for _ in range(2):
        list(training.fit(step, start(), DATA, batch_size=8, num_epochs=1))
    once = len(traces)
    list(training.fit(step, start(), DATA, batch_size=8, num_epochs=2))
    assert len(traces) == once > 0
    alive = weakref.ref(images)
    assert alive() is images
    del step, loss, images
    traces.clear()
    gc.collect()
    assert alive() is None


def test_eight_devices_compute_the_losses_of_one():
    _, alone = history()
    _, shared = history(over=mesh())
    assert support.deviation(shared, alone) < 1e-5


def collectives(step, state, batch):
    """The communication in the compiled step, state on every device and batch shared out."""
    whole, shared = (NamedSharding(mesh(), PartitionSpec(*axes)) for axes in ((), ("data",)))
    text = jax.jit(step, in_shardings=(whole, shared)).lower(state, batch).compile().as_text()
    return re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_step_over_devices_communicates_once(micro_batch):
    """One all-reduce of the gradients and metrics, and nothing else."""
    step = training.make_step(loss_fn, TX, micro_batch=micro_batch, mesh=mesh())
    assert collectives(step, start(), support.rows(DATA, slice(16))) == ["all-reduce"]


@pytest.mark.slow
@pytest.mark.parametrize("orbit_weight", [0.0, 0.3])
def test_an_autoencoder_step_over_devices_communicates_once(orbit_weight):
    """Graphs are built inside the step from static topology, and every device matches by itself: no gather, no vote."""
    model = models.autoencoder(SIREN, 3, num_layers=1)
    variables = support.random_variables(model, support.random_params(SIREN))
    step = training.make_step(losses.inr_reconstruction(model, size=(2, 2), orbit_weight=orbit_weight), TX, mesh=mesh())
    state = training.State(variables, TX.init(variables), jax.random.key(0), jnp.asarray(0))
    assert collectives(step, state, support.random_params(SIREN, models=(16,))) == ["all-reduce"]


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"hold 18 networks, fewer than one batch of 19\. Lower batch_size"):
        next(training.fit(training.make_step(loss_fn, TX), start(), DATA, batch_size=19, num_epochs=1))
    step = training.make_step(loss_fn, TX, mesh=mesh())
    with pytest.raises(
        ValueError, match="batch_size is 9 and the mesh has 8 devices on 'data'; expected a multiple of 8, like 16"
    ):
        next(training.fit(step, start(), DATA, batch_size=9, num_epochs=1))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, params):
        return nn.Dense(2)(params["Dense_0"]["bias"])


def test_init_begins_at_step_0_and_follows_its_key():
    params = support.random_params(SIREN)
    states = [training.init(Linear(), TX, params, jax.random.key(seed)) for seed in (0, 0, 1)]
    support.assert_identical(states[0], states[1])
    assert states[0].step == 0
    kernels = [state.variables["params"]["Dense_0"]["kernel"] for state in states]
    assert not np.array_equal(kernels[0], kernels[2])
    seeds = jax.jit(jax.vmap(lambda key: training.init(Linear(), TX, params, key).variables))
    together = seeds(jax.vmap(jax.random.key)(jnp.arange(2)))
    for one, variables in zip(
        (states[0], states[2]), (support.rows(together, 0), support.rows(together, 1)), strict=True
    ):
        assert support.deviation(variables, one.variables) < 1e-6


def test_monitor_smooths_and_counts_since_the_best():
    monitor, seen = training.Monitor(), []
    for loss in (4.0, 2.0, 5.0, 2.0, 1.0):
        monitor = monitor.update(loss)
        seen.append(tuple(monitor))
    assert seen == [(4, 4, 0), (3, 3, 0), (4, 3, 1), (3, 3, 2), (2, 2, 0)]
    assert monitor.update(4.0, smoothing=0.75).smoothed == 2.5
    for loss in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match=f"loss is {loss}: training diverged"):
            monitor.update(loss)


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_model_of_positive_scales_learns_a_function_of_rescaled_networks_with_dead_neurons(bidirectional):
    """To a tenth of the property's variance on unseen networks, at rescalings of exp(3 x normal)."""
    arch = support.ARCHITECTURES["relu mlp"]
    count, held_out = 1024, 128
    stack = support.random_params(arch, models=(count,))
    stack["Dense_0"]["kernel"] = stack["Dense_0"]["kernel"].at[::7, :, 0].set(0)
    stack["Dense_0"]["bias"] = stack["Dense_0"]["bias"].at[::7, 0].set(0)
    stack["Dense_1"]["kernel"] = stack["Dense_1"]["kernel"].at[::5, 2].set(0)
    x = support.example(arch, 32)
    property_of = jax.vmap(lambda params: support.outputs(arch, params, x)[:, 0].mean())(stack)
    property_of = (property_of - property_of.mean()) / property_of.std()
    keys = jax.random.split(jax.random.key(1), count)
    moved = jax.vmap(lambda p, k: symmetry.act(arch, symmetry.random(arch, k, log_scale_std=3.0), p))(stack, keys)
    rows = (moved, property_of)
    unseen, seen = (support.rows(rows, part) for part in (slice(held_out), slice(held_out, None)))
    model = models.Encoder(models.ScaleGMN(arch, 16, num_layers=2, bidirectional=bidirectional), latent=1)
    tx = training.make_optimizer(learning_rate=3e-3, warmup_steps=20)
    state = training.init(model, tx, support.rows(moved, 0), jax.random.key(0))
    step = training.make_step(losses.regression(model), tx)
    *_, (state, metrics) = training.fit(step, state, seen, batch_size=64, num_epochs=20)
    assert np.isfinite(metrics["loss"])
    evaluate = training.make_evaluation(losses.regression(model, train=False))
    assert evaluate(state.variables, unseen)["loss"] < 0.1

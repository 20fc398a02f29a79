"""A population trains each of its trials as if it were alone, in one program."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.sharding import AxisType

import jax_scalegmn as sg
from jax_scalegmn import training
from jax_scalegmn.training import _population, losses

RNG = np.random.default_rng(0)
DATA = {name: RNG.normal(size=(26, 5, size)).astype(np.float32) for name, size in (("x", 3), ("y", 2))}
SELECTION = {name: leaf[:7] for name, leaf in DATA.items()}
TRIALS = training.Trials(
    learning_rate=np.geomspace(0.01, 0.1, 16),
    weight_decay=[0.0, 0.01, 0.1, 0.3] * 4,
    clip_norm=[0.1, 10.0] * 8,
    warmup_steps=[0, 1, 3, 20] * 4,
    orbit_weight=[0.0] * 8 + [0.5] * 8,
    seed=[*range(8)] * 2,
)


def init(key):
    return {"kernel": jax.random.normal(key, (3, 2)), "bias": jnp.zeros(2)}


def make_loss(trial, noise=0.3):
    """Of a linear map with noisy inputs; the second term has a weight of its own."""

    def loss_fn(variables, row, key):
        x = row["x"] + noise * jax.random.normal(key, row["x"].shape)
        gap = x @ variables["kernel"] + variables["bias"] - row["y"]
        metrics = {"gap": jnp.square(gap).mean(), "size": jnp.square(variables["kernel"]).sum()}
        return metrics["gap"] + trial.orbit_weight * metrics["size"], metrics

    return loss_fn


def mesh(devices=8):
    return jax.make_mesh((devices,), ("trial",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def train(trials=TRIALS, **options):
    """The last states, and all numbers of every epoch, on the host."""
    options = {"batch_size": 8, "num_epochs": 3, "micro_batch": 4, "decay_steps": 8} | options
    options.setdefault("selection", (functools.partial(make_loss, noise=0.0), SELECTION))
    epochs = []
    for epoch in training.population(init, make_loss, trials, DATA, **options):
        state = epoch.state._replace(key=jax.random.key_data(epoch.state.key))
        epochs.append(jax.device_get(epoch._replace(state=state)))
    return epochs[-1].state, [epoch._replace(state=None) for epoch in epochs]


def alone(trial, num_epochs=3, decay_steps=8, **options):
    """The last state, and the metrics of every epoch, of `training.fit`."""
    values = {name: value.item() for name, value in trial._asdict().items()}
    orbit_weight, seed = values.pop("orbit_weight"), values.pop("seed")
    tx = training.make_optimizer(**values, decay_steps=decay_steps, **options)
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = init(init_key)
    state = training.State(variables, tx.init(variables), key, jnp.asarray(0))
    loss = make_loss(training.Trials(orbit_weight=orbit_weight))
    measure = training.make_evaluation(make_loss(training.Trials(orbit_weight=orbit_weight), noise=0.0))
    history = []
    step = training.make_step(loss, tx, micro_batch=4)
    for after, metrics in training.fit(step, state, DATA, batch_size=8, num_epochs=num_epochs):
        state = after
        history.append(jax.device_get((metrics, measure(state.variables, SELECTION))))
    return jax.device_get(state._replace(key=jax.random.key_data(state.key))), history


def row(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [(0, 7, 13), range(16)], ids=str)
def test_each_of_sixteen_trials_equals_its_own_run_alone(chosen):
    state, epochs = train()
    for index in chosen:
        expected, history = alone(row(TRIALS.rows(), index))
        assert support.deviation(row(state, index), expected) < 1e-5
        for epoch, (metrics, selection) in zip(epochs, history, strict=True):
            assert support.deviation(row(epoch.metrics, index), metrics) < 1e-5
            assert support.deviation(row(epoch.selection, index), selection) < 1e-5
    assert (epochs[-1].diverged == -1).all()
    assert len({float(loss) for loss in epochs[-1].metrics["loss"]}) == 16


@pytest.mark.slow
def test_trials_of_muon_equal_their_own_runs_and_not_those_of_adamw():
    state, _ = train(optimizer="muon")
    expected, _ = alone(row(TRIALS.rows(), 7), optimizer="muon")
    assert support.deviation(row(state, 7), expected) < 1e-5
    assert support.deviation(row(state, 7).variables, alone(row(TRIALS.rows(), 7))[0].variables) > 1e-3


def test_a_population_compiles_one_program_for_all_trials_and_epochs():
    population = functools.partial(training.population, init, make_loss, TRIALS, DATA, batch_size=8, num_epochs=5)
    for over in (None, mesh()):
        support.COMPILED.clear()
        for epoch in population(mesh=over):
            jax.block_until_ready(epoch)
        # jit(stage) is JAX's own copy of an array, one program for each shape.
        assert [name for name in support.COMPILED if name != "jit(stage)"] == ["jit(_epoch)"]


@pytest.mark.slow
def test_eight_devices_train_what_one_does_without_communication():
    expected, epochs = train()
    state, over = train(mesh=mesh())
    assert support.deviation(state, expected) < 1e-5
    for one, other in zip(over, epochs, strict=True):
        assert support.deviation(one, other) < 1e-5
    # 3 devices: two copies of the last trial fill up, and are dropped again.
    few, _ = train(mesh=mesh(3))
    assert support.deviation(few, expected) < 1e-5


def test_the_program_over_devices_has_no_collective_and_no_device_holds_more_than_its_share():
    one = functools.partial(
        _population._epoch,
        init=init,
        make_loss=make_loss,
        make_selection=None,
        settings=_population._Settings(26, 8, None, 64, None, "adamw"),
    )
    rows = TRIALS.rows()
    placed = _population._placed(rows, _population._empty(init, rows, "adamw"), (DATA, ()), mesh())
    text = _population._program(one, mesh()).lower(np.int32(0), placed[1], placed[0], placed[2]).compile().as_text()
    found = re.findall(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", text)
    assert not found
    epoch = next(training.population(init, make_loss, TRIALS, DATA, batch_size=8, num_epochs=1, mesh=mesh()))
    for leaf in jax.tree.leaves(epoch.state.variables):
        assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [2] * 8


def test_a_trial_that_diverges_is_reported_and_leaves_its_neighbors_bit_equal():
    sound, epochs = train()
    rates = TRIALS.rows().learning_rate.copy()
    rates[5], rates[6] = 5e18, 3e30
    state, others = train(TRIALS._replace(learning_rate=rates))
    assert others[-1].diverged.tolist() == [-1] * 5 + [1, 0] + [-1] * 9
    assert state.step.tolist() == [9] * 5 + [1, 0] + [9] * 9  # the last states that were finite
    rest = ~np.isin(np.arange(16), [5, 6])
    for one, other in zip(jax.tree.leaves((state, others)), jax.tree.leaves((sound, epochs)), strict=True):
        np.testing.assert_array_equal(one[rest], other[rest])
    for epoch in others:
        assert math.isnan(epoch.metrics["loss"][5])
        assert math.isnan(epoch.selection["loss"][5])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables))


def test_the_place_of_a_trial_and_its_neighbors_change_no_bit_of_it():
    state, epochs = train()
    again, others = train(jax.tree.map(lambda leaf: leaf[[3] * 16], TRIALS.rows()))
    for one, other in zip(jax.tree.leaves((again, others)), jax.tree.leaves((state, epochs)), strict=True):
        np.testing.assert_array_equal(one[3], other[3])


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (training.Trials(learning_rate=[0.1, 0.2], seed=[1]), r"trials has the shapes .*; expected vectors of one"),
        (training.Trials(learning_rate=[0.1, math.nan]), r"trials\.learning_rate is \[0\.1, nan\]; expected finite"),
        (training.Trials(seed=[-1]), r"trials\.seed is \[-1\]; expected whole numbers >= 0"),
        (training.Trials(warmup_steps=[1.5]), r"trials\.warmup_steps is \[1\.5\]; expected whole numbers >= 0"),
        (training.Trials(clip_norm=[[1.0]]), r"trials has the shapes .*; expected vectors of one length"),
    ],
)
def test_bad_trials_are_refused(trials, message):
    with pytest.raises(ValueError, match=message):
        trials.rows()


def test_a_mesh_without_trials_and_a_batch_larger_than_the_data_are_refused():
    other = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"The mesh has the axes \('data',\); expected an axis 'trial'"):
        train(mesh=other)
    with pytest.raises(ValueError, match=r"The data hold 26 networks, fewer than one batch of 27"):
        train(batch_size=27)


@pytest.mark.slow
def test_a_population_of_autoencoders_equals_each_alone():
    """The loss of INRs with its matching, dropout, and a diverging neighbor."""
    arch = sg.siren((2, 4, 4, 1))
    stack = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 24))
    model = sg.autoencoder(arch, features=4, num_layers=1, dropout=0.1)
    params = sg.stacks.member(stack, 0)
    trials = training.Trials(
        learning_rate=[1e-3, 3e-3, 1e30, 3e-3], orbit_weight=[0.1, 0.0, 0.1, 0.3], warmup_steps=2, seed=[0, 1, 2, 3]
    )

    def make(trial, train=True):
        return losses.inr_reconstruction(model, size=(5, 5), orbit_weight=trial.orbit_weight, train=train)

    *_, last = training.population(
        lambda key: model.init(key, params),
        make,
        trials,
        stack,
        batch_size=8,
        num_epochs=1,
        selection=(functools.partial(make, train=False), stack),
    )
    assert (last.diverged >= 0).tolist() == [False, False, True, False]
    for index in (0, 1, 3):
        one = row(trials.rows(), index)
        tx = training.make_optimizer(learning_rate=float(one.learning_rate), warmup_steps=2)
        state = training.init(model, tx, params, jax.random.key(int(one.seed)))
        step = training.make_step(make(one._replace(orbit_weight=float(one.orbit_weight))), tx)
        *_, (state, metrics) = training.fit(step, state, stack, batch_size=8, num_epochs=1)
        # Adam divides by the size of the gradients: where these are close to 0, their rounding shows, and it grows.
        for leaf, other in zip(*map(jax.tree.leaves, (row(last.state.variables, index), state.variables)), strict=True):
            np.testing.assert_allclose(leaf, other, atol=1e-4)
        assert float(last.metrics["loss"][index]) == pytest.approx(float(metrics["loss"]), rel=1e-5)

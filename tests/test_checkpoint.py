"""What is restored is what was saved, or an error says why not."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import io, models, training
from jax_scalegmn.models import ScaleGMN
from jax_scalegmn.models.graph import Bucket
from jax_scalegmn.training import checkpoint

TX = training.make_optimizer(learning_rate=0.1, warmup_steps=3)
MODEL = models.Encoder(ScaleGMN(support.ARCHITECTURES["siren"], 3, num_layers=1))
CONFIG = {"model": models.as_json(MODEL), "learning_rate": 0.1}


def state_of(seed):
    """A training state with numbers of its own."""
    variables = support.random_variables(MODEL, support.random_params(MODEL.arch), seed=seed)
    opt_state = jax.tree.map(lambda leaf: leaf + seed, TX.init(variables))
    return training.State(variables, opt_state, jax.random.key(seed), jnp.asarray(seed))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a run with checkpoints at steps 1 to 4; the second is the best."""
    run = checkpoint.Checkpoints(tmp_path_factory.mktemp("written"), CONFIG)
    for seed, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        run.save(state_of(seed), loss=loss, monitor=training.Monitor(loss, 1.0, seed), history=[{"loss": loss}])
    run.close()
    return run.directory


@pytest.fixture
def run(written, tmp_path):
    """That run, opened by another program in a copy of the folder."""
    shutil.copytree(written, tmp_path / "run")
    return checkpoint.Checkpoints(tmp_path / "run", CONFIG)


def test_the_best_and_the_last_come_back_bit_for_bit(run):
    for restored, seed, loss in ((run.restore_best(state_of(0)), 2, 1.0), (run.restore_last(state_of(0)), 4, 2.5)):
        support.assert_identical(restored.state, state_of(seed))
        assert restored.monitor == training.Monitor(loss, 1.0, seed)
        assert restored.history == [{"loss": loss}]
    assert sorted(path.name for path in run.directory.iterdir()) == ["2", "3", "4"]


def test_a_step_is_saved_once(run):
    with pytest.raises(ValueError, match=r"run/4: the folder has a checkpoint of step 4; expected a new step"):
        run.save(state_of(4), loss=0.0)
    assert run.restore_last(state_of(0)).history == [{"loss": 2.5}]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_history_that_grows_while_it_is_written_is_saved_as_it_was(tmp_path, asynchronous, monkeypatch):
    run, history = checkpoint.Checkpoints(tmp_path / "run", CONFIG, asynchronous=asynchronous), [{"loss": 1.0}]
    save = run._manager.save

    def save_and_grow(*args, **options):
        history[0]["loss"] = 3.0
        history.append({"loss": 2.0})  # before orbax's thread comes to write it
        return save(*args, **options)

    monkeypatch.setattr(run._manager, "save", save_and_grow)
    run.save(state_of(1), loss=1.0, history=history)
    assert run.restore_last(state_of(0)).history == [{"loss": 1.0}]


@contextlib.contextmanager
def little_room(bytes_of_a_file):
    """No file of this process grows further, as on a full disk or beyond a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's threads, which go on
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_that_cannot_be_written_is_told_by_its_folder_and_the_others_are_whole(run, asynchronous):
    run = checkpoint.Checkpoints(run.directory, CONFIG, asynchronous=asynchronous)
    told = r"run: a checkpoint cannot be written \(File too large\). Those before it are whole"

    def save():
        run.save(state_of(5), loss=0.5)
        run.wait()

    with little_room(64), pytest.raises(OSError, match=told):
        save()
    again = checkpoint.Checkpoints(run.directory, CONFIG)
    support.assert_identical(again.restore_last(state_of(0)).state, state_of(4))
    again.save(state_of(5), loss=0.5)
    support.assert_identical(again.restore_best(state_of(0)).state, state_of(5))


@pytest.mark.parametrize("use", [lambda folder: checkpoint.Checkpoints(folder, CONFIG), checkpoint.load])
def test_without_orbax_an_error_names_the_extra(use, tmp_path, monkeypatch):
    for name in ("orbax", "orbax.checkpoint", "orbax.checkpoint.checkpoint_managers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r'Checkpoints need orbax-checkpoint: pip install "jax-scalegmn\[checkpoint\]"'
    ):
        use(tmp_path)


@pytest.mark.slow
def test_models_and_training_are_imported_without_orbax():
    code = "import sys, jax_scalegmn.training, jax_scalegmn.models; assert 'orbax' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shapes_are_enough_to_restore(run):
    shapes = jax.eval_shape(lambda: state_of(0))
    support.assert_identical(run.restore_last(shapes).state, state_of(4))


def test_load_returns_the_model_and_its_best_variables(run):
    model, variables = checkpoint.load(run.directory)
    assert model == MODEL
    support.assert_identical(variables, state_of(2).variables)


SIREN, RELU = support.ARCHITECTURES["siren"], support.ARCHITECTURES["relu mlp"]
BUCKET = Bucket((sg.mlp((2, 3, 1)), SIREN), multiple=4)


@pytest.mark.parametrize(
    "model",
    [
        models.Encoder(ScaleGMN(BUCKET, 3, num_layers=1, bidirectional=True), latent=2),
        pytest.param(ScaleGMN(BUCKET, 3, num_layers=1), marks=pytest.mark.slow),
        pytest.param(ScaleGMN(RELU, 3, num_layers=1, bidirectional=True), marks=pytest.mark.slow),
        models.Editor(ScaleGMN(RELU, 3, num_layers=1)),
        models.autoencoder(SIREN, 3, num_layers=1, decoder_hidden=(2,)),
    ],
    ids=["encoder of a bucket", "bucket", "one architecture", "editor", "autoencoder"],
)
def test_every_kind_of_model_is_loaded(model, tmp_path):
    """From its own description: of a bucket too, whose variables fit no single member's params."""
    numbers = itertools.count()
    shapes = models.abstract_variables(model)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, next(numbers), leaf.dtype), shapes)
    run = checkpoint.Checkpoints(tmp_path / "run", {"model": models.as_json(model)})
    run.save(training.State(variables, (), jax.random.key(0), jnp.asarray(1)), loss=1.0)
    run.close()
    loaded, restored = checkpoint.load(tmp_path / "run")
    assert loaded == model
    support.assert_identical(restored, variables)


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    run = checkpoint.Checkpoints(tmp_path / "new", CONFIG)
    assert run.is_empty
    for restore in (run.restore_last, run.restore_best):
        with pytest.raises(FileNotFoundError, match="new: no checkpoint there"):
            restore(state_of(0))
    for folder in ("new", "absent"):
        with pytest.raises(FileNotFoundError, match=f"{folder}: no checkpoint there"):
            checkpoint.load(tmp_path / folder)
    assert not (tmp_path / "absent").exists()


def test_another_configuration_is_refused_and_named(run):
    other = checkpoint.Checkpoints(run.directory, CONFIG | {"learning_rate": 0.2, "seed": 7})
    with pytest.raises(ValueError, match=r"run/4: .*learning_rate is 0.1 in the checkpoint and 0.2 here; seed is None"):
        other.restore_last(state_of(0))


@pytest.mark.slow
def test_a_state_of_another_model_is_refused(run):
    other = models.Encoder(ScaleGMN(MODEL.arch, 4, num_layers=1))
    variables = support.random_variables(other, support.random_params(MODEL.arch))
    with pytest.raises(ValueError, match="run/4: variables, training of this checkpoint cannot be read"):
        run.restore_last(state_of(0)._replace(variables=variables, opt_state=TX.init(variables)))


def truncate(folder):
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])


def delete_arrays(folder):
    for path in folder.rglob("d/*"):
        path.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # threads of orbax that gave up
@pytest.mark.parametrize(
    ("damage", "item"),
    [
        (truncate, "variables"),
        pytest.param(delete_arrays, "variables", marks=pytest.mark.slow),
        pytest.param(shutil.rmtree, "variables", marks=pytest.mark.slow),
        pytest.param(truncate, "training", marks=pytest.mark.slow),
        pytest.param(shutil.rmtree, "training", marks=pytest.mark.slow),
        pytest.param(lambda folder: (folder / "metadata").write_text('{"config": '), "info", marks=pytest.mark.slow),
        pytest.param(lambda folder: (folder / "metadata").unlink(), "info", marks=pytest.mark.slow),
        (lambda folder: (folder / "metadata").write_text("{}"), "info"),
        (lambda folder: (folder / "metadata").write_text('{"config": {}, "monitor": {}, "history": []}'), "info"),
    ],
)
def test_damaged_checkpoints_are_refused_with_their_path(run, damage, item):
    for step in ("2", "3", "4"):
        damage(run.directory / step / item)
    with pytest.raises(ValueError, match="run/4: "):
        run.restore_last(state_of(0))
    if item != "training":
        with pytest.raises(ValueError, match="run/2: "):
            checkpoint.load(run.directory)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_number(folder):
    """What is stored is whole, but is not what was saved."""
    path = folder / "info" / "metadata"
    info = json.loads(path.read_text())
    info["checksums"]["variables"] = info["checksums"]["training"]
    path.write_text(json.dumps(checkpoint._signed({k: v for k, v in info.items() if k != "checksum"})))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda folder: truncate(folder / "variables"), "variables, training of this checkpoint cannot be read"),
        pytest.param(
            lambda folder: cut(folder / "info" / "metadata"),
            "info cannot be read",
            marks=pytest.mark.slow,
        ),
        pytest.param(change_a_number, "variables of this checkpoint are not what was saved", marks=pytest.mark.slow),
        pytest.param(
            lambda folder: (folder / "info" / "metadata").write_text(
                (folder / "info" / "metadata").read_text().replace("2.5", "2.4")
            ),
            "info is not what was saved",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["arrays", "description", "numbers", "history"],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_newest_whole_one(run, capfd, damage, cause):
    """Once with a warning; training comes to the damaged step again and replaces it."""
    damage(run.directory / "4")
    with pytest.warns(UserWarning, match=rf"run/4: {cause}.*Step 3 is restored instead: .*run/3") as caught:
        restored = run.restore_last(state_of(0))
    assert len(caught) == 1
    support.assert_identical(run.restore_best(state_of(0)).state, state_of(2))
    support.assert_identical(restored.state, state_of(3))
    assert restored.history == [{"loss": 2.0}]
    run.save(state_of(4), loss=0.5)
    assert sorted(path.name for path in run.directory.iterdir()) == ["3", "4", "damaged-4"]
    support.assert_identical(run.restore_last(state_of(0)).state, state_of(4))
    run.close()
    assert "Event loop" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_replaced_by_the_best_whole_one(run):
    truncate(run.directory / "2" / "variables")
    for restore in (lambda: run.restore_best(state_of(0)).state.variables, lambda: checkpoint.load(run.directory)[1]):
        with pytest.warns(UserWarning, match=r"run/2: .*Step 3 is restored instead"):
            support.assert_identical(restore(), state_of(3).variables)


@pytest.mark.parametrize(
    "damage", [cut, pytest.param(lambda path: path.write_text('{"loss": 9.0}'), marks=pytest.mark.slow)]
)
def test_a_damaged_metrics_file_is_named_and_written_again(run, damage):
    run.close()
    path = run.directory / "2" / "metrics" / "metrics"
    whole = json.loads(path.read_text())
    damage(path)
    with pytest.warns(UserWarning, match=f"{path}: this file of the validation loss was damaged. It is written again"):
        again = checkpoint.Checkpoints(run.directory, CONFIG)
    assert json.loads(path.read_text()) == whole
    support.assert_identical(again.restore_best(state_of(0)).state, state_of(2))


@pytest.mark.parametrize(
    "content",
    [b"\xff", pytest.param(b"[" * 100_000, marks=pytest.mark.slow), pytest.param(b"{", marks=pytest.mark.slow)],
    ids=["no text", "deep", "half"],
)
def test_loading_names_the_folder_where_a_metrics_file_is_damaged(run, content):
    (run.directory / "2" / "metrics" / "metrics").write_bytes(content)
    with pytest.raises(ValueError, match=f"{run.directory}: the checkpoints in this folder cannot be read"):
        checkpoint.load(run.directory)


def test_what_a_killed_program_was_saving_is_removed(run):
    half = run.directory / "5.orbax-checkpoint-tmp"
    half.mkdir()
    with io.in_use(run.directory):  # it is saving still
        checkpoint.Checkpoints(run.directory, CONFIG)
    assert half.exists()
    checkpoint.Checkpoints(run.directory, CONFIG)
    assert not half.exists()


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_program_that_is_killed_while_it_removes_a_checkpoint_leaves_no_part_of_it(
    written, tmp_path, monkeypatch, asynchronous
):
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    assert sorted(path.name for path in folder.glob("[0-9]*")) == ["2", "3", "4"]

    class Killed(BaseException):
        pass

    def save():
        run.save(state_of(5), loss=4.0)
        run.wait()

    def killed(path, *args, **kwargs):
        for metrics in Path(path).rglob("metrics/metrics"):
            metrics.unlink()
            raise Killed

    run = checkpoint.Checkpoints(folder, CONFIG, asynchronous=asynchronous)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        save()
    monkeypatch.undo()
    assert len(list(folder.rglob("metrics/metrics"))) == 3
    again = checkpoint.Checkpoints(folder, CONFIG)
    assert int(again.restore_last(state_of(0)).state.step) == 5
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5"]
    again.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "2" / "metrics" / "metrics").write_bytes(b"\xff\xfe\xff"), "A metrics file may be"),
        (lambda folder: os.mkfifo(folder / "2" / "info" / "pipe"), "pipe: expected a regular file, got a pipe"),
        (lambda folder: (folder / "2" / "info" / "metadata").write_text("[" * 10_000), "nesting of its JSON is 10000"),
        (lambda folder: (folder / "2" / "info" / "metadata").write_text("5"), "info holds 5; expected"),
        (lambda folder: changed_info(folder, config=[]), "expected dicts"),
        (lambda folder: changed_info(folder, config={"model": 5}), "expected dicts"),
        (lambda folder: changed_info(folder, config={"model": {"type": 5}}), "type is 5; expected one of"),
    ],
)
def test_hostile_checkpoints_are_refused_with_their_path(written, tmp_path, change, words):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copytree(written / "2", folder / "2")
    change(folder)
    with pytest.raises(ValueError, match=rf"{folder}.*{words}") as caught:
        checkpoint.load(folder)
    assert len(str(caught.value)) < 2000


def changed_info(folder, **changes):
    path = folder / "2" / "info" / "metadata"
    info = {name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"}
    path.write_text(json.dumps(info | changes))


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "weights.bin").write_bytes(b"something")
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        checkpoint.load(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        checkpoint.Checkpoints(tmp_path, CONFIG).restore_last(state_of(0))


def test_training_resumes_from_disk_bit_for_bit(tmp_path):
    def loss_fn(variables, row, key):
        loss = jnp.square(row @ variables["w"] + jax.random.normal(key)).mean()
        return loss, {"size": jnp.abs(variables["w"]).sum()}

    def start():
        variables = {"w": jnp.ones(3)}
        return training.State(variables, TX.init(variables), jax.random.key(5), jnp.asarray(0))

    def fit(state, num_epochs):
        states, metrics = zip(*training.fit(step, state, data, batch_size=4, num_epochs=num_epochs), strict=True)
        return states[-1], jax.device_get(metrics)

    step, data = (
        training.make_step(loss_fn, TX),
        jnp.asarray(np.random.default_rng(0).normal(size=(9, 2, 3)), jnp.float32),
    )
    whole, metrics = fit(start(), 4)
    middle, first = fit(start(), 2)
    run = checkpoint.Checkpoints(tmp_path / "run", {})
    run.save(middle, loss=1.0)
    run.close()
    end, second = fit(checkpoint.Checkpoints(tmp_path / "run", {}).restore_last(start()).state, 4)
    support.assert_identical(end, whole)
    support.assert_identical(first + second, metrics)


def test_an_asynchronous_save_keeps_the_state_of_its_call_and_is_awaited(tmp_path):
    """Arrays that change after the call, as donated buffers do, are saved as they were."""
    values = np.arange(100_000.0, dtype=np.float32)
    run = checkpoint.Checkpoints(tmp_path, {}, asynchronous=True)
    for step in (1, 2, 3):
        state = training.State({"w": values}, (), jax.random.key(0), jnp.asarray(step))
        run.save(state, loss=1.0 / step)
        with io.is_unused(tmp_path) as unused:
            assert not unused
        values += 1
    run.wait()
    with io.is_unused(tmp_path) as unused:
        assert unused
    assert (tmp_path / "3" / "variables").is_dir()
    np.testing.assert_array_equal(run.restore_last(state).state.variables["w"], np.arange(100_000.0) + 2)
    run.save(state._replace(step=jnp.asarray(4)), loss=0.1)
    assert int(run.restore_best(state).state.step) == 4  # which waits
    with pytest.raises(ValueError, match="has a checkpoint of step 4"):
        run.save(state._replace(step=jnp.asarray(4)), loss=0.1)
    run.save(state._replace(step=jnp.asarray(5)), loss=0.2)
    run.close()
    again = checkpoint.Checkpoints(tmp_path, {})
    assert int(again.restore_last(state).state.step) == 5
    again.close()

"""Programs compiled for devices that are not there: what they would communicate, move and compute."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from experiments import classify, cnn, compile_only, edit, generalization, inr, merging, runs
from jax_scalegmn import distributed, training

EXPERIMENTS = {
    "inr": (inr, {}, ["training step", "fitting step of 16 INRs", "matching of 16 pairs"]),
    "classify": (classify, {"encoders": ("query",)}, ["function-query", "fitting step of 16 INRs"]),
    "edit": (edit, {"networks": (2,)}, ["editor of 2, training step", "fitting step of 16 INRs"]),
    "generalization": (
        generalization,
        {"encoders": ("statistics",), "activations": ("relu",)},
        ["relu, statistics-of-weights", "relu CNNs, step of 64"],
    ),
    "cnn": (
        cnn,
        {"activations": ("tanh",)},
        [
            "tanh, training step",
            "tanh, matcher's step",
            "tanh, frame's step",
            "tanh CNNs, step of 64",
            "tanh, matching of 32 pairs",
        ],
    ),
    "merging": (
        merging,
        {"networks": ("mlp:64-8-8-10,relu", "resnet:8,4-4-6,input_channels=1")},
        [
            "mlp:64-8-8-10,relu, step of 1",
            "mlp:64-8-8-10,relu, matching of 1 pairs",
            "resnet:8,4-4-6,input_channels=1, step of 1",
            "resnet:8,4-4-6,input_channels=1, matching of 1 pairs",
        ],
    ),
}


def tiny(experiment, changes):
    """The preset in batches that eight devices share; cnn's has 4 networks in one."""
    config = dataclasses.replace(experiment.PRESETS["tiny"][1], compile_only="v5e:2x4", **changes)
    size = max(8, config.train.batch_size)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


@pytest.fixture
def shown(monkeypatch):
    """What is printed, for a mesh of the eight fake devices in place of a topology's."""
    monkeypatch.setattr(compile_only, "topology_mesh", lambda name: distributed.mesh({"data": 8}))
    shown = []
    monkeypatch.setattr(compile_only, "show", lambda name, mesh, found: shown.extend(found))
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_tells_what_its_programs_cost_and_runs_nothing(name, shown):
    """One all-reduce, of the gradient, in the training step of a metanetwork; none elsewhere."""
    experiment, changes, names = EXPERIMENTS[name]
    config = tiny(experiment, changes)
    results = experiment.main(config)
    assert list(results) == names == [cost.name for cost in shown]
    for cost in shown:
        is_step = (cost is shown[0] and name != "merging") or cost.name.endswith(("matcher's step", "frame's step"))
        assert cost.collectives == ({"all-reduce": 1} if is_step else {})
        assert (cost.communicated > 0) == is_step
        assert min(cost.flops, cost.moved, cost.memory) > 0
    assert not config.out.exists()


@pytest.mark.slow
def test_what_a_training_step_communicates_is_its_gradient(shown):
    config = tiny(inr, {})
    inr.main(config)
    model = inr.autoencoders.models.autoencoder(inr.inr_zoo.architecture_of(config.zoo), **config.model.options())
    params = compile_only.params_of(model.arch)
    tx = config.train.make_optimizer(16)
    state = jax.eval_shape(lambda params: training.init(model, tx, params, jax.random.key(0)), params)
    gradient = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.variables))
    assert gradient < shown[0].communicated < gradient + 64  # and some metrics


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra tpu-topologies")
@pytest.mark.parametrize(("topology", "devices"), [("v5e:2x4", 8), ("v5e:8x8", 64)])
@pytest.mark.parametrize("experiment", ["inr", "cnn"])
def test_training_zoo_and_matching_compile_for_a_tpu(experiment, topology, devices):
    """In a program of its own: libtpu ends one whose XLA_FLAGS it does not know."""
    options = ["tiny", "--compile-only", topology]
    options += ["--train.batch-size", str(devices), "--alignment.batch-size", str(devices), "--alignment.epochs", "1"]
    options += ["--activations", "relu"] if experiment == "cnn" else []
    run = subprocess.run(
        [sys.executable, "-m", f"experiments.{experiment}", *options],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert f"What one of {devices} devices of {topology} computes" in run.stdout
    rows = [line for line in run.stdout.splitlines() if "none" in line or "all-reduce" in line]
    # The steps of the autoencoder, the matcher and the frame; fitting and matching.
    assert ["1 all-reduce" in row for row in rows] == [True, True, True, False, False]


def test_a_table_has_a_row_for_each_program(monkeypatch):
    shown = []
    monkeypatch.setattr(compile_only.progress.console, "print", shown.append)
    cost = compile_only.Cost("a step", 2e9, 4e6, 3_000_000, {"all-reduce": 1}, 1_000_000, 0.5)
    compile_only.show("v5e:2x4", distributed.mesh({"data": 8}), [cost])
    (table,) = shown
    cells = [next(iter(column.cells)) for column in table.columns]
    # 2 MB at 200 GB/s, 4 MB at 819 GB/s, 2 GFLOP at 197 TFLOP/s: 10, 4.9 and 10.2 microseconds.
    assert cells == ["a step", "2.000", "4.0", "3.0", "1 all-reduce", "1.00", "500.00", "10.2", "arithmetic"]


def test_unknown_topologies_and_a_missing_extra_are_refused(monkeypatch):
    with pytest.raises(
        SystemExit, match=r"topology is 'v9:2x2'; expected one of \['v4', 'v5e', 'v5p', 'v6e'\] with its sizes"
    ):
        compile_only.topology_mesh("v9:2x2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for experiment, _, _ in EXPERIMENTS.values():
        config = dataclasses.replace(experiment.PRESETS["tiny"][1], compile_only="v5e:2x4")
        with pytest.raises(SystemExit, match=r"needs libtpu: pip install .jax-scalegmn\[tpu-topologies\]"):
            experiment.main(config)


def test_images_that_are_not_read_have_the_size_and_number_that_the_options_say():
    config = runs.RunConfig(inr.Path("nowhere"))
    assert runs.unread_images(config, runs.ImageConfig(train_images=9)).images.shape == (9, 8, 8)
    black = runs.unread_images(config, runs.ImageConfig(train_images=9, size=(28, 20)))
    assert black.images.shape == (9, 28, 20)
    assert black.labels.max() == 8
    assert runs.unread_images(config, runs.ImageConfig(size=(4, 4))).labels.max() == 9

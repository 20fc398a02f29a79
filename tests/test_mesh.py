"""Experiments over the devices of a mesh: encoders are trained and networks are scored as on one device."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import support

from experiments import alignment, classify, cnn, controls, evaluation, generalization, inr, runs, xla_flags
from experiments.autoencoders import Trained
from jax_scalegmn import distributed, models, zoo

ARCH = support.ARCHITECTURES["siren"]


@pytest.fixture(scope="module")
def mesh():
    return distributed.mesh({"data": 8})


def networks(count, seed=0, arch=ARCH):
    return support.random_params(arch, seed, models=(count,))


def assert_close(found, expected):
    """Equal to 1e-5, in every array of numbers."""
    left, right = (jax.tree.leaves(tree) for tree in (found, expected))
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        if not isinstance(other, str):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# --- scoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 8, 21])
def test_stacks_are_computed_on_all_devices_as_on_one(mesh, count):
    x = np.arange(2.0 * count, dtype=np.float32).reshape(count, 2)
    devices = []

    def one(x, y):
        jax.debug.callback(lambda device: devices.append(int(device)), jax.lax.axis_index("data"))
        return {"sum": x + y["y"]}

    over = runs.in_chunks(one, 4, mesh)(x, {"y": 2 * x})
    np.testing.assert_array_equal(over["sum"], 3 * x)
    assert set(devices) == set(range(8))
    np.testing.assert_array_equal(runs.by_rows(lambda x: (2 * x, x[:, 0]), mesh)(x)[1], x[:, 0])


@pytest.fixture(scope="module")
def trained():
    model = models.autoencoder(ARCH, features=4, num_layers=1)
    return Trained(model, support.random_variables(model, support.random_params(ARCH)), [])


@pytest.mark.slow
def test_every_method_merges_on_eight_devices_as_on_one(mesh, trained):
    x = inr.coordinates(inr.images.Images(np.zeros((1, 4, 4)), np.zeros(1)))
    fixed = jax.tree.map(lambda leaf: np.asarray(leaf)[0], networks(1))
    settings = alignment.AlignmentConfig(features=4, num_layers=1, outputs=3, num_iterations=2)
    aligners = {}
    for name in alignment.KINDS:
        model = alignment.make_model(settings, name, ARCH, (1.0,) * len(ARCH.parameters))
        variables = models.init(model, jax.random.key(0), fixed, method=alignment.reads_one(name))
        aligners[name] = Trained(model, variables, [])
    for at in (None, mesh):
        read = evaluation.make_read(trained.model, trained.variables, networks_at_once=5, mesh=at)
        draw = inr.make_draw(ARCH, (4, 4), networks_at_once=5, mesh=at)
        follow = evaluation.make_follow(draw, evaluation.itself, num_points=3, pairs_at_once=3, mesh=at)
        align = evaluation.make_align(ARCH, networks_at_once=5, mesh=at)
        make_search = evaluation.make_search(ARCH, x, at, max_sweeps=1)
        search = {"search": evaluation.pairwise("search", make_search(align))}
        further = search | alignment.make_methods(aligners, make_search, networks_at_once=5, mesh=at)
        methods = evaluation.methods(ARCH, trained.model, trained.variables, fixed, further, align, at)
        a, b = read(networks(9)), read(networks(9, seed=1))
        ends = {name: method.end_points(a, b) for name, method in methods.items()}
        drawn = draw(a.params)
        paths = follow(a.params, ends["search"][1], drawn, draw(b.params), drawn)
        images = np.zeros((2, 4, 4), np.float32)
        whole = zoo.Zoo(ARCH, networks(11), {}, {})
        simple = controls.score(draw, align, whole, images, a.params, drawn, jax.random.key(0))
        if at is None:
            expected = ends, paths, simple
    assert {"search", "learned_matching", "learned_search", "matching_pd_forward"} <= ends.keys()
    assert_close((ends, paths, simple), expected)


# --- whole experiments ----------------------------------------------------------------------------------------------


def tiny(experiment, **changes):
    config = dataclasses.replace(experiment.PRESETS["tiny"][1], **changes)
    size = max(8, config.train.batch_size)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


CONFIGS = {
    "classify": (classify, {"encoders": ("equivariant",), "seeds": 1}),
    "generalization": (generalization, {"encoders": ("equivariant",), "activations": ("relu",), "seeds": 1}),
    "cnn": (cnn, {"activations": ("relu",), "zoo": dataclasses.replace(cnn.PRESETS["tiny"][1].zoo, networks=20)}),
}


def numbers(results):
    """All numbers but times."""
    timed = {"seconds", "cpu_milliseconds", "networks_per_second", "config", "environment"}
    if isinstance(results, dict):
        return {name: numbers(value) for name, value in results.items() if name not in timed}
    return [numbers(value) for value in results] if isinstance(results, list) else results


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_an_experiment_has_the_results_of_one_device_on_eight(name, tmp_path):
    """On the same zoo, since groups of fewer networks are fitted alike to rounding alone."""
    experiment, changes = CONFIGS[name]
    config = tiny(experiment, out=tmp_path / "one", **changes)
    expected = experiment.main(config)
    shutil.copytree(tmp_path / "one" / "zoo", tmp_path / "eight" / "zoo")
    found = experiment.main(dataclasses.replace(config, out=tmp_path / "eight", mesh=8))
    assert_close(numbers(found), numbers(expected))


def test_devices_that_do_not_divide_a_batch_are_refused_before_the_zoo(tmp_path):
    for experiment, changes in CONFIGS.values():
        config = dataclasses.replace(tiny(experiment, **changes), out=tmp_path / "run", mesh=7)
        size = config.train.batch_size
        with pytest.raises(
            ValueError, match=rf"train\.batch_size is {size} and the mesh has 7 devices on 'data'; expected a mul"
        ):
            experiment.main(config)
        with pytest.raises(ValueError, match=r"The mesh {'data': 9} has 9 devices, and there are 8; expected 8"):
            experiment.main(dataclasses.replace(config, mesh=9))
    assert not (tmp_path / "run").exists()


# --- devices of a CPU ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_over_devices_made_of_a_cpu_has_the_numbers_of_one_device(tmp_path):
    words = [sys.executable, "-m", "experiments.inr", "tiny", "--out"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    several = [*words, str(tmp_path / "several"), "--cpu-devices", "2"]
    subprocess.run(several, env=environment, check=True, capture_output=True)
    shutil.copytree(tmp_path / "several" / "zoo", tmp_path / "one" / "zoo")
    subprocess.run([*words, str(tmp_path / "one")], env=environment, check=True, capture_output=True)
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("several", "one"))
    assert [run["environment"]["device"][-3:] for run in (found, expected)] == ["x 2", "x 1"]
    losses = [[epoch["selection_loss"] for epoch in run["training"]] for run in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert_close(found["reconstruction"], expected["reconstruction"])


_LATE = """
import dataclasses, sys
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec
from experiments import inr, runs

config = dataclasses.replace(inr.PRESETS["tiny"][1], cpu_devices=2)
runs.join(config)

def work(x):
    late = jnp.where(jax.lax.axis_index("data") == 0, jnp.int32(sys.argv[1]), 0)
    product = jax.lax.fori_loop(0, late, lambda _, a: jnp.sin(a @ a), jnp.ones((200, 200)))
    return jax.lax.psum(x + 0 * product[0, 0], "data")

spec = PartitionSpec("data")
over = jax.shard_map(work, mesh=runs.device_mesh(config), in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
print(jax.jit(over)(jnp.arange(2.0)))
"""


@pytest.mark.slow
def test_devices_of_a_cpu_wait_for_a_late_one(tmp_path):
    """XLA aborts the process where one is later than its limit, which a run sets to hours."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [sys.executable, "-c", _LATE, "50000"]  # several seconds, on fast cores too
    patient = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (patient.returncode, patient.stdout) == (0, "[1.]\n"), patient.stderr
    seconds = " ".join(f"--{flag}=1" for flag in xla_flags.PATIENT)  # until it warns, and from then on
    short = subprocess.run(words, env=environment | {"XLA_FLAGS": seconds}, capture_output=True, text=True)
    assert short.returncode == -signal.SIGABRT
    assert "Termination timeout" in short.stderr
    assert sum(xla_flags.PATIENT.values()) >= 3600

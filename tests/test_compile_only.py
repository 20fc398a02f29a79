"""Programs compiled for devices that are not there: what they would communicate, move and compute."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from experiments import compile_only, inr
from jax_scalegmn import distributed, training

TINY = inr.PRESETS["tiny"][1]


def check(found, devices):
    """One all-reduce, of the gradient, in training; none elsewhere."""
    step, fitting, match = found
    assert step.collectives == {"all-reduce": 1}
    assert fitting.collectives == match.collectives == {}
    assert fitting.communicated == match.communicated == 0
    for cost in found:
        assert cost.flops > 0
        assert cost.moved > 0
        assert cost.memory > 0
    return step


@pytest.mark.slow
def test_costs_of_the_programs_of_eight_devices_are_those_of_their_gradient(monkeypatch):
    mesh = distributed.mesh({"data": 8})
    monkeypatch.setattr(compile_only, "topology_mesh", lambda name: mesh)
    shown = []
    monkeypatch.setattr(compile_only.progress.console, "print", shown.append)
    results = inr.main(inr.dataclasses.replace(TINY, compile_only="v5e:2x4"))
    step = check([compile_only.Cost(**cost) for cost in results.values()], 8)
    model = inr.autoencoders.models.autoencoder(inr.inr_zoo.architecture_of(TINY.zoo), **TINY.model.options())
    params = jax.eval_shape(lambda: inr.network.init(model.arch, jax.random.key(0)))
    state = jax.eval_shape(
        lambda params: training.init(model, TINY.train.make_optimizer(16), params, jax.random.key(0)), params
    )
    gradient = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.variables))
    assert gradient < step.communicated < gradient + 64  # and some metrics
    assert len(shown) == 1
    assert not TINY.out.exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra tpu")
@pytest.mark.parametrize(("topology", "devices"), [("v5e:2x4", 8), ("v5e:8x8", 64)])
def test_the_programs_compile_for_a_tpu(topology, devices):
    """In a program of its own: libtpu ends one whose XLA_FLAGS it does not know."""
    options = ["tiny", "--compile-only", topology, "--train.batch-size", str(devices)]
    run = subprocess.run(
        [sys.executable, "-m", "experiments.inr", *options],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert f"What one of {devices} devices of {topology} computes" in run.stdout
    kinds = next(line for line in run.stdout.splitlines() if "all-reduce" in line)
    assert kinds.split()[1:] == ["1", "all-reduce", "none", "none"]


def test_unknown_topologies_and_a_missing_extra_are_refused(monkeypatch):
    with pytest.raises(
        SystemExit, match=r"topology is 'v9:2x2'; expected one of \['v4', 'v5e', 'v5p'\] with its sizes"
    ):
        compile_only.topology_mesh("v9:2x2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs libtpu: pip install .jax-scalegmn\[tpu\]"):
        compile_only.topology_mesh("v5e:2x4")

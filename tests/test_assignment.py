"""Assignment solvers: optimal, alone and in batches, on the device and on the host."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_scalegmn.matching import assignment


def test_both_solvers_find_the_optimal_value():
    score = jnp.asarray(np.random.default_rng(0).normal(size=(20, 7, 7)), jnp.float32)
    totals = []
    for assign in (assignment.hungarian, assignment.scipy):
        columns = jax.jit(jax.vmap(assign))(score)
        np.testing.assert_array_equal(np.sort(columns), np.tile(np.arange(7), (20, 1)))
        totals.append(np.take_along_axis(np.asarray(score), np.asarray(columns)[..., None], 2).sum((1, 2)))
    np.testing.assert_allclose(*totals, rtol=1e-6)
    assert (totals[0] > np.trace(score, axis1=1, axis2=2)).all()


@pytest.mark.parametrize("width", [1, 2, 8, 9, 40])
def test_the_default_solves_its_width(width):
    score = jnp.asarray(np.random.default_rng(0).normal(size=(width, width)), jnp.float32)
    columns = assignment.default(width)(score)
    np.testing.assert_array_equal(columns, assignment.hungarian(score))
    np.testing.assert_array_equal(np.sort(columns), np.arange(width))


def test_the_default_is_on_the_device_for_narrow_layers_alone():
    assert assignment.default(8) is assignment.hungarian
    assert assignment.default(9) is assignment.by_platform


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs to choose the cores of a process")
@pytest.mark.parametrize(
    ("devices", "shape"),
    [
        pytest.param(1, (2048, 2048), marks=pytest.mark.slow),
        (1, (400, 32, 32)),
        pytest.param(2, (400, 32, 32), marks=pytest.mark.slow),
    ],
)
def test_large_scores_reach_the_host_where_each_core_has_a_device(devices, shape):
    if len(os.sched_getaffinity(0)) < devices:
        pytest.skip(f"needs {devices} cores")
    program = f"""
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{devices}])
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={devices}"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jax_scalegmn import distributed
from jax_scalegmn.matching import assignment

def solve(scores):
    moved = jax.lax.fori_loop(0, 20, lambda _, s: s + 1e-3 * assignment.scipy(s)[..., None], scores)
    return assignment.scipy(moved)

scores = np.broadcast_to(np.eye({shape[-1]})[::-1], {shape}).astype(np.float32)
if {devices} > 1:
    solve = jax.shard_map(
        solve, mesh=distributed.mesh({{"data": {devices}}}), in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
assert (jax.jit(solve)(scores) == jnp.arange({shape[-1]})[::-1]).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

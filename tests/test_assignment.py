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
def test_large_scores_reach_the_host_on_a_single_core():
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
from jax_scalegmn.matching import assignment
score = jnp.eye(2048)[::-1]
assert (jax.jit(assignment.scipy)(score) == jnp.arange(2048)[::-1]).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

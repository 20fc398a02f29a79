"""Assignment solvers: optimal, alone and in batches, on the device and on the host."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jax_scalegmn.matching import _large_assignment, assignment


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


def _scores(kind, n=700):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(n, n)).astype(np.float32)
    features = rng.normal(size=(n, 40)).astype(np.float32)
    return {
        "noise": noise,
        "tiny": 1e-30 * noise,
        "one sign": noise + 100,
        "planted": features @ features[rng.permutation(n)].T,
        "like those of layers": features @ rng.normal(size=(40, n)).astype(np.float32) + noise,
        "many equal": rng.integers(0, 4, (n, n)).astype(np.float32),
        "columns of memory": np.asfortranarray(noise),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["noise", "tiny", "one sign", "planted", "like those of layers", "many equal", "columns of memory"]
)
def test_few_entries_decide_large_problems_as_all_do(kind):
    score = _scores(kind)
    columns, expected = _large_assignment.solve(score), linear_sum_assignment(score, maximize=True)[1]
    rows = np.arange(len(score))
    if kind == "many equal":  # several are optimal
        assert sorted(columns) == rows.tolist()
        assert score[rows, columns].sum() == score[rows, expected].sum()
    else:
        np.testing.assert_array_equal(columns, expected)


def test_entries_that_the_first_choice_leaves_out_are_found_by_the_prices(monkeypatch):
    """With two candidates for each row the first assignment is not the best one; the prices say which are missing."""
    monkeypatch.setattr(_large_assignment, "_CANDIDATES", 2)
    monkeypatch.setattr(_large_assignment, "_MOST_UNWANTED", 1.0)
    score = _scores("noise")
    expected = linear_sum_assignment(score, maximize=True)[1]
    np.testing.assert_array_equal(_large_assignment.solve(score), expected)
    monkeypatch.setattr(_large_assignment, "_better", lambda score, *prices: np.zeros(score.shape, bool))
    assert (_large_assignment.solve(score) != expected).any()


def test_where_all_want_the_same_few_the_dense_solver_is_asked(monkeypatch):
    rng = np.random.default_rng(0)
    product = np.outer(rng.normal(size=700), rng.normal(size=700)).astype(np.float32)
    for score in (product, np.zeros((700, 700), np.float32)):
        assert _large_assignment.solve(score) is None
        monkeypatch.setattr(assignment, "_LARGE_FROM", 700)
        columns = assignment.scipy(jnp.asarray(score))
        assert _total(score, columns) == _total(score, linear_sum_assignment(score, maximize=True)[1])


@pytest.mark.parametrize("kind", ["noise", "tiny", "one sign", "planted", "like those of layers", "many equal"])
def test_prices_of_columns_change_no_optimum(kind):
    scores = np.stack([_scores(kind, 30), _scores(kind, 30) * np.geomspace(1e-3, 1e3, 30, dtype=np.float32)])
    added = assignment._costs(scores) + scores.astype(np.float64)
    np.testing.assert_allclose(added, np.tile(added[:, :1], (1, 30, 1)), rtol=1e-12)
    for score, columns in zip(scores, np.asarray(jax.vmap(assignment.scipy)(jnp.asarray(scores))), strict=True):
        best = _total(score, linear_sum_assignment(score, maximize=True)[1])
        np.testing.assert_allclose(_total(score, columns), best, rtol=1e-12)


def _total(score, columns):
    return score.astype(np.float64)[np.arange(len(score)), columns].sum()


def test_a_layer_is_large_from_some_width_on(monkeypatch):
    score, asked = jnp.asarray(_scores("noise", 60)), []
    monkeypatch.setattr(_large_assignment, "solve", lambda score: asked.append(len(score)))
    expected = assignment.scipy(score)
    assert asked == []
    monkeypatch.setattr(assignment, "_LARGE_FROM", 60)
    np.testing.assert_array_equal(assignment.scipy(score), expected)
    assert asked == [60]


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

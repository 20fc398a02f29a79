"""Speed of weight matching: over width and depth, batches of pairs, solvers and N networks; and the solvers alone.

    python -m benchmarks.matching                  # prints one JSON line for every row
    python -m benchmarks.matching --help

Every row times jobs in turn in one run, each compiled and warmed up. Memory is what the compiler counts for arguments,
results and temporaries, compared with the bytes of the two networks.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits

import jax_scalegmn as sg
from benchmarks import timing
from experiments import runs
from jax_scalegmn import architecture, matching, network, stacks, symmetry, zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching import assignment
from jax_scalegmn.symmetry import canonical
from jax_scalegmn.types import Params

SOLVERS = {"device": assignment.hungarian, "host": assignment.scipy}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    """The widths of the two hidden layers of perceptrons width-width-width-10, one pair each."""
    depths: tuple[int, ...] = (2, 4, 8, 16)
    """The numbers of hidden layers of width 128, one pair each."""
    batches: tuple[int, ...] = (1, 16, 256, 4096)
    """The numbers of vmapped pairs of perceptrons 16-32-32-10."""
    numbers: tuple[int, ...] = (2, 4, 8, 16)
    """The numbers of perceptrons 64-128-128-10 that are brought into one frame."""
    solver_widths: tuple[int, ...] = (4, 8, 16, 64, 256, 1024)
    """The widths of the assignment problems on which the solvers alone are timed."""
    solver_batches: tuple[int, ...] = (1, 64, 1024)
    """The numbers of such problems solved at once."""
    solver_entries: int = 1 << 22
    """The largest number of entries of the problems that a solver is timed on."""
    device_width: int = 1024
    """The largest width that is solved on the device, whose solver takes minutes beyond."""
    repeats: int = 5
    """The number of timed repeats of a call."""
    independent: tuple[int, ...] = (64, 256, 512)
    """The numbers of pairs of SIRENs 2-32-32-1, fitted to digits, that are matched next to the published loop."""
    fit_steps: int = 300
    """The number of updates of each of them."""


def main(config: Config) -> list[dict[str, Any]]:
    """Times everything; returns the rows and prints each as one JSON line as soon as it is there."""
    rows = []
    for row in _rows(config):
        rows.append(row | runs.environment())
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    for width in config.solver_widths:
        for batch in config.solver_batches:
            if batch * width**2 <= config.solver_entries:
                yield _solver_row(width, batch, config.repeats)
    for width in config.widths:
        solvers = SOLVERS if width <= config.device_width else {"host": assignment.scipy}
        yield matching_row("width", sg.mlp((width, width, width, 10)), 1, solvers, config.repeats)
    for depth in config.depths:
        yield matching_row("depth", sg.mlp((128,) * (depth + 1) + (10,)), 1, SOLVERS, config.repeats)
    for batch in config.batches:
        yield matching_row("batch", sg.mlp((16, 32, 32, 10)), batch, SOLVERS, config.repeats)
    for count in config.independent:
        yield _independent_row(count, config.fit_steps, config.repeats)
    for number in config.numbers:
        yield _frame_row(sg.mlp((64, 128, 128, 10)), number, config.repeats)


def _solver_row(width: int, batch: int, repeats: int) -> dict[str, Any]:
    """Both solvers on scores of normal numbers."""
    score = jnp.asarray(np.random.default_rng(0).normal(size=(batch, width, width)), jnp.float32)
    compiled = {name: timing.compile_once(jax.vmap(solve), score) for name, solve in SOLVERS.items()}
    calls = {name: functools.partial(one.call, score) for name, one in compiled.items()}
    return {"job": "solver", "width": width, "batch": batch, "seconds": timing.in_turn(calls, repeats=repeats)}


def matching_row(
    job: str,
    arch: Architecture,
    batch: int,
    solvers: dict[str, Any],
    repeats: int,
    most_seconds: float = math.inf,
) -> dict[str, Any]:
    """Weight matching of independent random networks with each solver."""
    params, target = (_random_networks(arch, batch, seed) for seed in (0, 1))
    compiled = {}
    for name, solve in solvers.items():
        match = functools.partial(matching.weight_matching, arch, assign=solve)
        if batch > 1:
            match = jax.vmap(match)
        compiled[name] = timing.compile_once(match, params, target)
    calls = {name: functools.partial(one.call, params, target) for name, one in compiled.items()}
    sweeps = next(iter(calls.values()))().sweeps
    return {
        "job": job,
        "network": str(arch),
        "batch": batch,
        "parameters": arch.num_parameters,
        "sweeps": float(jnp.mean(sweeps)),
        "networks_mib": 2 * 4 * batch * arch.num_parameters / 2**20,
        "peak_mib": {name: one.peak_mib for name, one in compiled.items()},
        "compile_s": {name: one.compile_seconds for name, one in compiled.items()},
        "seconds": timing.in_turn(calls, repeats=repeats, most_seconds=most_seconds),
    }


def _independent_row(count: int, num_steps: int, repeats: int) -> dict[str, Any]:
    """Pairs of SIRENs that were fitted to different digits: one vmapped call, and the published loop pair by pair."""
    arch = sg.siren((2, 32, 32, 1))
    images = load_digits().images[: 2 * count].astype(np.float32) / 16
    order = np.arange(2 * count)
    fitted = zoo.fit_images(arch, images, 0 * order, image_index=order, num_steps=num_steps)
    params, target = (jax.tree.map(lambda leaf, one=one: leaf[one::2], fitted.params) for one in (0, 1))
    match = timing.compile_once(jax.vmap(functools.partial(matching.weight_matching, arch)), params, target)
    pairs = [
        [architecture.unpack(arch, stacks.member(stack, row)) for stack in (params, target)] for row in range(count)
    ]
    pairs = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), pairs)
    calls = {
        "ours": functools.partial(match.call, params, target),
        "published": lambda: [loop(*pair) for pair in pairs],
    }
    found = calls["ours"]()
    aligned = jax.vmap(functools.partial(symmetry.act, arch))(found.element, params)
    objectives = [
        float(np.mean(jax.vmap(lambda a, b: optax.tree.vdot(a, b))(aligned, target))),
        float(np.mean([value for value, _ in calls["published"]()])),
    ]
    return {
        "job": "independent",
        "network": str(arch),
        "batch": count,
        "sweeps": {
            "ours": float(jnp.mean(found.sweeps)),
            "published": float(np.mean([sweeps for _, sweeps in calls["published"]()])),
        },
        "objective": dict(zip(calls, objectives, strict=True)),
        "seconds": timing.in_turn(calls, repeats=repeats),
    }


def loop(params: list[np.ndarray], target: list[np.ndarray], *, seed: int = 0) -> tuple[float, int]:
    """Weight matching as published, with matrices in float64: the objective, and the sweeps, one layer after another.

    For a perceptron whose hidden layers may be permuted and flipped (Boufalis et al. 2025, arXiv 2511.12601).
    """
    kernels, biases = params[0::2], params[1::2]
    goal_kernels, goal_biases = target[0::2], target[1::2]
    widths = [kernel.shape[1] for kernel in kernels[:-1]]
    moves = [np.eye(kernels[0].shape[0]), *map(np.eye, widths), np.eye(kernels[-1].shape[1])]
    rng, sweeps, improved = np.random.default_rng(seed), 0, True
    while improved:
        improved, sweeps = False, sweeps + 1
        for layer in rng.permutation(len(widths)):
            score = goal_kernels[layer].T @ moves[layer] @ kernels[layer]
            score += np.outer(goal_biases[layer], biases[layer])
            score += goal_kernels[layer + 1] @ moves[layer + 2] @ kernels[layer + 1].T
            rows, columns = linear_sum_assignment(np.abs(score), maximize=True)
            move = np.zeros_like(score)
            move[rows, columns] = np.where(score[rows, columns] < 0, -1, 1)
            improved |= np.vdot(move, score) > np.vdot(moves[layer + 1], score) + 1e-12
            moves[layer + 1] = move
    moved = [left @ kernel @ right.T for left, kernel, right in zip(moves[:-1], kernels, moves[1:], strict=True)]
    shifted = [move @ bias for move, bias in zip(moves[1:], biases, strict=True)]
    objective = sum(np.vdot(a, b) for a, b in zip([*moved, *shifted], [*goal_kernels, *goal_biases], strict=True))
    return float(objective), sweeps


def _frame_row(arch: Architecture, number: int, repeats: int) -> dict[str, Any]:
    """Independent random networks in one frame: by canonical forms, next to the first, next to their evolving mean."""
    stack = _random_networks(arch, number, 0)
    routes = {
        "canonical": jax.vmap(functools.partial(canonical.form, arch)),
        "first": jax.vmap(lambda one: matching.align(arch, one, stacks.member(stack, 0))),
        "mean": lambda stack: matching.align_all(arch, stack).aligned,
    }
    compiled = {name: timing.compile_once(route, stack) for name, route in routes.items()}
    calls = {name: functools.partial(one.call, stack) for name, one in compiled.items()}
    return {
        "job": "frame",
        "network": str(arch),
        "number": number,
        "compile_s": {name: one.compile_seconds for name, one in compiled.items()},
        "seconds": timing.in_turn(calls, repeats=repeats),
    }


def _random_networks(arch: Architecture, batch: int, seed: int) -> Params:
    """One network, or a stack; moved by random elements, so that the gauge has work to do."""

    def one(key: jax.Array) -> Params:
        return symmetry.act(arch, symmetry.random(arch, key), network.init(arch, key))

    keys = jax.random.split(jax.random.key(seed), batch)
    return jax.jit(one)(keys[0]) if batch == 1 else jax.jit(jax.vmap(one))(keys)


if __name__ == "__main__":
    main(tyro.cli(Config))

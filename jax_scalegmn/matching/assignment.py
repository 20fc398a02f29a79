"""Solvers of the linear assignment problem: which neuron goes with which, for the largest total score."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

__all__ = ["Assign", "default", "hungarian", "scipy"]

# A score (row: neuron of the target, column: neuron of params) -> the column of each row that maximizes the sum.
Assign: TypeAlias = Callable[[Float[Array, "n n"]], Int[Array, " n"]]


_BLOCK = 1 << 20  # entries


def hungarian(score: Float[Array, "n n"]) -> Int[Array, " n"]:
    """The optimal assignment on the device, by `optax.assignment.hungarian_algorithm`."""
    rows, columns = optax.assignment.hungarian_algorithm(-score)
    return columns[jnp.argsort(rows)]


def scipy(score: Float[Array, "n n"]) -> Int[Array, " n"]:
    """The optimal assignment on the host, by `scipy.optimize.linear_sum_assignment`; a batch goes there in one call.

    On a machine with a single core XLA waits for ever on callbacks with batches of 4 million entries or more: take
    `hungarian` for those.
    """

    def solve(*blocks: Array) -> np.ndarray:
        score = np.concatenate([np.asarray(block) for block in blocks], -2)
        flat = score.reshape(-1, *score.shape[-2:])
        columns = [linear_sum_assignment(one, maximize=True)[1] for one in flat]
        return np.asarray(columns, np.int32).reshape(score.shape[:-1])

    shape = jax.ShapeDtypeStruct(score.shape[:-1], jnp.int32)
    # In blocks of rows: on a single core XLA waits for ever to hand over an array of 16 MiB (jax 0.10, CPU).
    blocks = jnp.array_split(score, max(1, -(-score.size // _BLOCK)), axis=-2)
    return jax.pure_callback(solve, shape, *blocks, vmap_method="expand_dims")


def default(width: int) -> Assign:
    """The faster solver for layers of that width, as measured on CPU (`python -m benchmarks.matching`).

    Up to 8 neurons the device's program is as fast as the way to the host and back; from there on SciPy's compiled one
    is 1.4 to 12 times as fast, one problem at a time and in batches. On accelerators it is not measured.
    """
    return hungarian if width <= 8 else scipy

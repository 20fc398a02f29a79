"""Solvers of the linear assignment problem: which neuron goes with which, for the largest total score."""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from jax_scalegmn.matching import _large_assignment

__all__ = ["Assign", "by_platform", "default", "hungarian", "scipy", "with_signs"]

# A score (row: neuron of the target, column: neuron of params) -> the column of each row that maximizes the sum.
Assign: TypeAlias = Callable[[Float[Array, "n n"]], Int[Array, " n"]]

_HUNGARIAN_UP_TO = 8  # neurons
_LARGE_FROM = 2048  # neurons
_ENTRIES_AT_ONCE = 2**16  # of the costs that one thread has prepared
_NEURONS_PER_THREAD = 256  # of all problems together: fewer take less time than the threads' own


def hungarian(score: Float[Array, "n n"]) -> Int[Array, " n"]:
    """Solves one assignment problem on the device, with `optax.assignment.hungarian_algorithm`.

    Maximizes sum_i score[i, columns[i]] over permutations (Kuhn 1955).

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.matching import assignment
    >>> assignment.hungarian(jnp.array([[1.0, 3.0], [2.0, 1.0]])).tolist()
    [1, 0]

    Args:
      score: The score of every pair, [n, n].

    Returns:
      The column that each row is assigned to, [n]; its own place if a score is NaN or infinite (a diverged network).
    """
    return _hungarian(score)


def scipy(score: Float[Array, "n n"]) -> Int[Array, " n"]:
    """Solves one assignment problem on the host, with `scipy.optimize.linear_sum_assignment`.

    Maximizes sum_i score[i, columns[i]] over permutations (Crouse 2016). Under `jax.vmap` the whole batch goes to the
    host in one call. From 2048 neurons on a few entries of every row and column decide the problem where they can, by
    SciPy's sparse solver, which takes half of the time; prices of all columns prove that it is the same optimum.

    On a machine with a single core XLA hangs on callbacks with batches of 4 million entries or more: use
    `hungarian` for those. Where the program is for a TPU, which has no SciPy, or for several platforms, that is a
    ValueError.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.matching import assignment
    >>> assignment.scipy(jnp.array([[1.0, 3.0], [2.0, 1.0]])).tolist()
    [1, 0]

    Args:
      score: The score of every pair, [n, n].

    Returns:
      The column that each row is assigned to, [n]; its own place if a score is NaN or infinite (a diverged network).
    """

    return _solve(score, always=True)


def by_platform(score: Float[Array, "n n"]) -> Int[Array, " n"]:
    """Solves one assignment problem where the platform solves it best: `scipy` on a CPU, else `hungarian`.

    Which of the two it is, is known when the program is compiled or exported for its platform, not before: programs for
    GPU and TPU have no callback. One that `jax.export` exports has none on CPU either, since Python's functions cannot
    be exported.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.matching import assignment
    >>> assignment.by_platform(jnp.array([[1.0, 3.0], [2.0, 1.0]])).tolist()
    [1, 0]

    Args:
      score: The score of every pair, [n, n].

    Returns:
      The column that each row is assigned to, [n]; its own place if a score is NaN or infinite (a diverged network).
    """
    return _solve(score, always=False)


def default(width: int) -> Assign:
    """Returns the faster solver for layers of a width, as measured on CPU (`python -m benchmarks.matching`).

    Up to 8 neurons `hungarian` is as fast as the way to the host and back; from there on `scipy` is 1.4 to 12 times as
    fast, one problem at a time and in batches. On accelerators it is `hungarian` for all: for 4,096 pairs of width 32
    it took 0.13 ms a pair on an H200, `scipy` 1.24 ms (`python -m benchmarks.accelerator`).

    >>> from jax_scalegmn.matching import assignment
    >>> assignment.default(4) is assignment.hungarian, assignment.default(512) is assignment.by_platform
    (True, True)

    Args:
      width: The number of neurons of the layer.

    Returns:
      `hungarian` or `by_platform`.
    """
    return hungarian if width <= _HUNGARIAN_UP_TO else by_platform


def with_signs(
    score: Float[Array, "n n"],
    unsigned: Float[Array, "n n"] | None = None,
    *,
    signs: bool | Bool[Array, ""] = True,
    permute: bool = True,
    assign: Assign | None = None,
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Assigns the neurons of one layer to each other, up to a sign for each.

    Maximizes sum_i sign[i] score[i, order[i]] + unsigned[i, order[i]]: the assignment is that of |score| + unsigned,
    and the sign is that of the score at the assigned place, +1 where the score is 0 (Boufalis et al. 2025,
    arXiv 2511.12601).

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.matching import assignment
    >>> order, sign = assignment.with_signs(jnp.array([[1.0, -3.0], [2.0, 1.0]]))
    >>> order.tolist(), sign.tolist()
    ([1, 0], [-1.0, 1.0])

    Args:
      score: The part of every pair's score that changes with the neuron's sign, [n, n].
      unsigned: The part that no sign changes, [n, n]; None for 0.
      signs: Whether signs may be used; without, all are +1. An array is read when the program runs.
      permute: Whether neurons may be permuted; without, every neuron keeps its place.
      assign: The solver; None for `default` of the width.

    Returns:
      The order and the sign of each row's neuron, both [n].
    """
    width = len(score)
    order = jnp.arange(width)
    if permute:
        solve = default(width) if assign is None else assign
        total = _where(signs, jnp.abs, score)
        order = solve(total if unsigned is None else total + unsigned)

    def find_signs(ones: Array) -> Array:
        return jnp.where(jnp.take_along_axis(score, order[:, None], 1)[:, 0] < 0, -ones, ones)

    return order, _where(signs, find_signs, jnp.ones(width))


def skips(assign: Assign) -> bool:
    """Whether a solver leaves out problems with NaN without work."""
    return assign in (scipy, by_platform)


# --- private ------------------------------------------------------------------------------------------------------


@jax.jit  # which is traced once for all layers of a width
def _hungarian(score: Array) -> Array:
    finite = jnp.isfinite(score).all()
    rows, columns = optax.assignment.hungarian_algorithm(-jnp.where(finite, score, 0))
    return jnp.where(finite, columns[jnp.argsort(rows)], jnp.arange(len(score), dtype=columns.dtype))


def _where(condition: bool | Array, change: Callable[[Array], Array], value: Array) -> Array:
    """The value, changed where the condition holds, which may be known only when the program runs."""
    if isinstance(condition, jax.Array):
        return jnp.where(condition, change(value), value)
    return change(value) if condition else value


def _solve(score: Array, *, always: bool) -> Array:
    """The assignment of every score [..., n, n], by SciPy always or on a CPU alone."""
    columns: Array = _SOLVE.bind(jnp.asarray(score), always=always)
    return columns


def _solve_all(problems: np.ndarray) -> np.ndarray:
    """The assignments of problems [problems, n, n] by SciPy, over several threads where there is work for them."""
    width = problems.shape[-1]
    columns = np.tile(np.arange(width, dtype=np.int32), (len(problems), 1))
    rows = np.flatnonzero(np.isfinite(problems).all((1, 2)))

    def decided(row: np.integer) -> bool:
        found = _large_assignment.solve(problems[row]) if width >= _LARGE_FROM else None
        if found is not None:
            columns[row] = found
        return found is not None

    def solve(rows: np.ndarray) -> None:
        rows = np.array([row for row in rows if not decided(row)], int)
        blocks = min(len(rows), len(rows) * width**2 // _ENTRIES_AT_ONCE)
        for block in np.array_split(rows, max(1, blocks)):
            for row, costs in zip(block, _costs(problems[block]), strict=True):
                columns[row] = linear_sum_assignment(costs)[1]

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(threads, len(rows) * width // _NEURONS_PER_THREAD))
    own, *others = np.array_split(rows, threads)
    elsewhere = [_pool(os.getpid()).submit(solve, part) for part in others]  # SciPy releases Python's lock
    solve(own)
    for part in elsewhere:
        part.result()
    return columns


def _costs(scores: np.ndarray) -> np.ndarray:
    """Costs [problems, n, n] with the same assignments as the scores, which the solver finds along shorter paths.

    What is added to a whole column changes no assignment. The solver begins as if every column were as much in demand
    as any other; prices between the mean and the maximum of its scores, each less the mean of its row, save up to half
    of the time.
    """
    scores = scores.astype(np.promote_types(scores.dtype, np.float32), copy=False)
    halves = np.full((scores.shape[-1], 1), 0.5 / scores.shape[-1], scores.dtype)
    above = 0.5 * scores - scores @ halves  # half of what a score is above its row's mean, which cannot overflow
    prices = 1.2 * above.mean(1, dtype=np.float64, keepdims=True) + 0.8 * above.max(1, keepdims=True)
    costs: np.ndarray = prices - scores
    return costs


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> concurrent.futures.ThreadPoolExecutor:
    """The threads of a process; one that was forked has none of its parent's."""
    return concurrent.futures.ThreadPoolExecutor(thread_name_prefix=f"assignment {process}")


def _on_device(score: Array) -> Array:
    return hungarian(score).astype(jnp.int32)


def _lowered(context: mlir.LoweringRuleContext, score: Any, *, always: bool, platform: str | None) -> Any:
    """The solver that the program's platform has; `jax.lax.platform_dependent` would trace both in every program."""
    several = len(context.module_context.platforms) > 1  # one program for all, which JAX builds without callbacks
    if always and (platform == "tpu" or several):
        wanted = "a TPU" if platform == "tpu" else f"all of {', '.join(context.module_context.platforms)}"
        raise ValueError(
            f"assign is assignment.scipy, and the program is for {wanted}; expected a solver on the device. Leave out "
            "assign, or pass assignment.hungarian."
        )
    exported = getattr(context.module_context.lowering_parameters, "for_export", False)
    given: list[Any] = [*context.avals_in]
    found: list[Any] = [*context.avals_out]
    if not always and (platform != "cpu" or exported):
        solve = functools.reduce(lambda each, _: jax.vmap(each), given[0].shape[:-2], _on_device)
        return mlir.lower_fun(solve, multiple_results=False)(context, score)
    # `jax.pure_callback` would first put the scores on a device, which takes a thread. None is left, and all hangs,
    # where as many devices as there are cores call back at once (jax 0.10, CPU).
    columns, _, _ = mlir.emit_python_callback(
        context, _called_back, None, [score], given, found, has_side_effect=False, returns_token=False
    )
    return columns


def _called_back(scores: np.ndarray) -> tuple[np.ndarray]:
    """The assignments of all scores [..., n, n]."""
    return (_solve_all(scores.reshape(-1, *scores.shape[-2:])).reshape(scores.shape[:-1]),)


# A primitive, since what a program is compiled for is known only when it is lowered.
_SOLVE = jax.extend.core.Primitive("assignment")
_SOLVE.def_impl(jax.jit(_SOLVE.bind, static_argnames="always"))
_SOLVE.def_abstract_eval(lambda score, *, always: score.update(shape=score.shape[:-1], dtype=jnp.dtype("int32")))
for _platform in (None, "cpu", "tpu"):
    mlir.register_lowering(_SOLVE, functools.partial(_lowered, platform=_platform), platform=_platform)
batching.primitive_batchers[_SOLVE] = lambda args, dims, *, always: (
    _SOLVE.bind(jnp.moveaxis(args[0], dims[0], 0), always=always),
    0,
)
# An assignment is constant where it is differentiable.
ad.primitive_jvps[_SOLVE] = lambda primals, tangents, *, always: (
    (columns := _SOLVE.bind(*primals, always=always)),
    np.zeros(columns.shape, jax.dtypes.float0),
)

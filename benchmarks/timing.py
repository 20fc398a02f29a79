"""Timing of compiled functions: compile and run apart, warmed up, blocked until ready, median and spread."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Compiled(NamedTuple):
    """A compiled function with what the compiler says of it."""

    call: Callable[..., Any]
    compile_seconds: float
    gflop: float
    peak_mib: float


def compile_once(fn: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles for the shapes of `args`; peak memory is arguments, results and temporaries as the compiler counts."""
    start = time.perf_counter()
    call = jax.jit(fn).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = call.memory_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Compiled(call, seconds, call.cost_analysis()["flops"] / 1e9, size / 2**20)


def in_turn(calls: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of every call, all in turn `repeats` times after one warm-up: median, lowest, highest."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {
        name: {"median_s": statistics.median(one), "min_s": min(one), "max_s": max(one)} for name, one in times.items()
    }


def matmul(size: int) -> tuple[Callable[[], Any], float]:
    """A float32 matrix product that shows the machine's rate, and its GFLOP."""
    a, b = jnp.ones((size, size)), jnp.ones((size, size))
    product = jax.jit(lambda a, b: a @ b)
    return lambda: product(a, b), 2 * size**3 / 1e9

"""Timing of compiled functions: compile and run apart, warmed up, blocked until ready, median and spread."""

import math
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
    compiled_gflop = (call.cost_analysis() or {}).get("flops", 0.0) / 1e9
    gflop = compiled_gflop if jax.default_backend() == "cpu" else count_gflop(fn, *args)
    return Compiled(call, seconds, gflop, size / 2**20)


def count_gflop(fn: Callable[..., Any], *args: Any) -> float:
    """The operations of a function on arguments of these shapes, before any optimization; the body of a loop once.

    Lowered for the CPU: the compilers of accelerators replace products by calls of libraries, whose operations they do
    not count.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(fn).lower(*shapes).cost_analysis()["flops"] / 1e9


def in_turn(
    calls: dict[str, Callable[[], Any]], *, repeats: int, most_seconds: float = math.inf
) -> dict[str, dict[str, float]]:
    """Seconds of every call, all in turn `repeats` times after one warm-up: median, lowest, highest; of CPU the median.

    After `most_seconds` no other turn begins; there is one at least. The CPU seconds of the process, over all its
    threads, are what other work on the machine disturbs least.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    used: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - begin >= most_seconds:
            break
        for name, call in calls.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
            used[name].append(time.process_time() - start_cpu)
    return {
        name: {
            "median_s": statistics.median(one),
            "min_s": min(one),
            "max_s": max(one),
            "cpu_s": statistics.median(used[name]),
        }
        for name, one in times.items()
    }


def matmul(size: int, dtype: str = "float32", precision: str | None = None) -> tuple[Callable[[], Any], float]:
    """A matrix product of random numbers that shows the machine's rate, and its GFLOP."""
    # Not of ones: an accelerator multiplies equal numbers at a lower power, and so at a higher clock.
    a, b = (jax.random.normal(jax.random.key(seed), (size, size)).astype(dtype) for seed in (0, 1))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return lambda: product(a, b), 2 * size**3 / 1e9

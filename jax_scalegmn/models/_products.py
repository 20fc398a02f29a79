"""x @ kernel for many rows x and one kernel, with a gradient of the kernel that is fast on a CPU.

The gradient is a product over all rows, x.T @ y. On a CPU XLA's fast products take x.T only as an array in memory;
otherwise XLA transposes y for a slower product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


@jax.custom_jvp
def times(x: Float[Array, "*rows features"], kernel: Float[Array, "features out"]) -> Float[Array, "*rows out"]:
    """x @ kernel, where the kernel is that of all rows. Derivatives of any order, in both modes."""
    return x @ kernel


# --- private ------------------------------------------------------------------------------------------------------


@functools.partial(times.defjvp, symbolic_zeros=True)
def _tangent(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y, dy = times(x, kernel), None
    if not isinstance(dx, SymbolicZero):
        dy = dx @ kernel
    if not isinstance(dkernel, SymbolicZero):
        along = _TIMES.bind(x, dkernel) if _is_usual(x, dkernel) else x @ dkernel
        dy = along if dy is None else dy + along
    return y, jnp.zeros_like(y) if dy is None else dy


def _is_usual(x: Array, kernel: Array) -> bool:
    """Whether these are rows of one dtype whose types say no more, like over which devices' axes an array varies."""
    plain = all(str(jax.typeof(a)) == f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in (x, kernel))
    return plain and x.ndim > 1 and x.dtype == kernel.dtype


def _times(x: Array, kernel: Array) -> Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _over_rows(x: Array, y: Array) -> Array:
    """x.T @ y, of all rows."""
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((rows, rows), ((), ())))


def _over_rows_on_cpu(x: Array, y: Array) -> Array:
    if x.dtype != jnp.float32:
        return _over_rows(x, y)
    x, y = (array.reshape(-1, array.shape[-1]) for array in (x, y))
    return jax.lax.optimization_barrier(x.T) @ y


def _operation(
    name: str, default: Callable[[Array, Array], Array], on_cpu: Callable[[Array, Array], Array], shape: Any
) -> Any:
    """An operation that is linear in each of two arrays. Its gradient is stated; a `jax.custom_jvp` would derive it."""
    operation = Primitive(name)
    program = jax.jit(operation.bind)

    def run(x: Array, y: Array) -> Array:
        with jax.disable_jit(False):
            return program(x, y)

    operation.def_impl(run)
    operation.def_abstract_eval(lambda x, y: x.update(shape=shape(x.shape, y.shape), weak_type=False))
    mlir.register_lowering(operation, mlir.lower_fun(default, multiple_results=False))
    mlir.register_lowering(operation, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")
    return operation


_TIMES = _operation("times", _times, _times, lambda x, kernel: (*x[:-1], kernel[1]))
_OVER_ROWS = _operation("over_rows", _over_rows, _over_rows_on_cpu, lambda x, y: (x[-1], y[-1]))
ad.defbilinear(_TIMES, lambda g, x, kernel: _TIMES.bind(g, kernel.T), lambda g, x, kernel: _OVER_ROWS.bind(x, g))
ad.defbilinear(_OVER_ROWS, lambda g, x, y: _TIMES.bind(y, g.T), lambda g, x, y: _TIMES.bind(x, g))


def _times_of_many(args: Any, axes: Any) -> tuple[Array, int]:
    """With one kernel, further rows; else a product for each kernel."""
    if axes[1] is None:
        return _TIMES.bind(jnp.moveaxis(args[0], axes[0], 0), args[1]), 0
    return jax.vmap(_times, axes)(*args), 0


batching.primitive_batchers[_TIMES] = _times_of_many
batching.primitive_batchers[_OVER_ROWS] = lambda args, axes: (jax.vmap(_over_rows, tuple(axes))(*args), 0)

"""Sine for networks: on a CPU a polynomial, ten times as fast as XLA's own sine there.

XLA's sine calls the system's library for every element on a CPU; a polynomial becomes vector instructions. Programs for
accelerators, float64 and complex numbers use `jax.numpy.sin`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

# pi/2 in three parts (Cody and Waite 1980). The first two have 8 and 11 bits, so that their products with a whole
# number of up to 13 bits are exact, as are the differences: whether a compiler fuses products and sums does not matter.
_QUARTER = tuple(map(np.float32, (1.5703125, 4.837512969970703125e-4, 7.54978995489188216e-8)))
# Near-best polynomials on [-pi/4, pi/4] (Moshier's Cephes, sinf.c), for the powers of r^2.
_SINE = tuple(map(np.float32, (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)))
_COSINE = tuple(map(np.float32, (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)))


def sine(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The sine of every entry, in radians; the layer function of SIRENs.

    Programs for a CPU compute float32 by a polynomial after a reduction to [-pi/4, pi/4]. Up to |x| = 1e4 the result is
    within 2 units in the last place or 1e-7 of the sine. Far beyond, where neighboring numbers are apart by a part of
    a turn, it is the sine of a number within 2^-22 |x| of x, a few roundings of x itself; it is always in [-1, 1].
    Half precision is computed in float32 and rounded. sine(-x) is -sine(x) to the last bit, also for 0; of NaN and
    infinities it is NaN. Derivatives of any order are as exact.

    Programs for accelerators, float64 and complex numbers use `jax.numpy.sin`.

    Args:
      x: The arguments, in radians.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> sg.network.sine(jax.numpy.array([0.0, -0.0, jax.numpy.pi / 2])).tolist()
    [0.0, -0.0, 1.0]
    >>> float(jax.grad(sg.network.sine)(0.0))
    1.0
    """
    return _SINE_OPERATION.bind(jnp.asarray(x))


# --- private ------------------------------------------------------------------------------------------------------


def _by_polynomial(x: Array) -> tuple[Array, Array]:
    """Sine and cosine in float32, in the dtype of x; what is not used is not compiled."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    size = jnp.abs(x)
    turns = jax.lax.round(size * np.float32(2 / np.pi), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    r = size
    for part in _QUARTER:
        r = r - turns * part
    r = jnp.clip(r, -1.0, 1.0)  # of arguments too large to be reduced
    z = r * r
    sin = r + r * (z * (_SINE[0] + z * (_SINE[1] + z * _SINE[2])))
    cos = 1 - (0.5 * z - z * z * (_COSINE[0] + z * (_COSINE[1] + z * _COSINE[2])))
    half = jnp.floor(0.5 * turns)
    is_odd = turns != 2 * half
    sign = 1 - 2 * (half - 2 * jnp.floor(0.5 * half))
    sin, cos = jnp.where(is_odd, cos, sin), jnp.where(is_odd, -sin, cos)
    return _with_sign(sign * sin, x).astype(dtype), (sign * cos).astype(dtype)


def _with_sign(value: Array, x: Array) -> Array:
    """-value where x is negative, and for -0."""
    bits, sign = (jax.lax.bitcast_convert_type(array, jnp.uint32) for array in (value, x))
    return jax.lax.bitcast_convert_type(bits ^ (sign & np.uint32(1 << 31)), jnp.float32)


# Operations of their own, because the rule of a `jax.custom_jvp` is lost where a loop is differentiated twice:
# `jax.lax.scan` then differentiates what the function computes (jax 0.10), which a bit operation ends. What sine and
# cosine have in common is computed once where XLA puts both into one loop.
def _operation(name: str, fast: Callable[[Array], Array], exact: Callable[[Array], Array]) -> Any:
    """An element-wise operation: `fast` in programs for a CPU in float32 or less, else `exact`."""

    def on_cpu(x: Array) -> Array:
        return fast(x) if x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else exact(x)

    operation = Primitive(name)
    program = jax.jit(operation.bind)

    def run(x: Array) -> Array:
        with jax.disable_jit(False):
            return program(x)

    operation.def_impl(run)
    operation.def_abstract_eval(lambda x: x)
    mlir.register_lowering(operation, mlir.lower_fun(exact, multiple_results=False))
    mlir.register_lowering(operation, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")
    batching.primitive_batchers[operation] = lambda args, dims: (operation.bind(*args), dims[0])
    return operation


_SINE_OPERATION = _operation("sine", lambda x: _by_polynomial(x)[0], jnp.sin)
_COSINE_OPERATION = _operation("cosine", lambda x: _by_polynomial(x)[1], jnp.cos)
ad.defjvp(_SINE_OPERATION, lambda tangent, x: tangent * _COSINE_OPERATION.bind(x))
ad.defjvp(_COSINE_OPERATION, lambda tangent, x: tangent * -_SINE_OPERATION.bind(x))

"""The convolutions of a traced function as products of matrices, which XLA's CPU compiler makes faster inside loops."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_scalegmn import architecture


def by_patches(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with each of its plain convolutions computed by one product of all patches of the maps.

    Dilated and grouped convolutions, and those inside of loops and of functions with derivatives of their own, stay.

    Args:
      function: A function of pytrees that JAX can trace.
    """

    def call(*arguments: Any) -> Any:
        program, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _evaluate(program.jaxpr, program.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return call


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of one operation of a jaxpr.

    Args:
      eqn: The operation.
      operands: Its operands.
    """
    options = eqn.primitive.get_bind_params(eqn.params)
    functions, options = options if isinstance(options, tuple) else ((), options)  # JAX before 0.10
    results = eqn.primitive.bind(*functions, *operands, **options)
    return list(results) if eqn.primitive.multiple_results else [results]


# --- private ------------------------------------------------------------------------------------------------------

_NAME = "conv_general_dilated"


def _evaluate(program: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    known: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    known |= dict(zip(program.invars, inputs, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known[atom]

    for eqn in program.eqns:
        operands, called = [value(atom) for atom in eqn.invars], architecture.called_program(eqn)
        if eqn.primitive.name == _NAME and _is_plain(eqn):
            results = [_convolve(eqn, *operands)]
        elif called is not None and "custom" not in eqn.primitive.name and _NAME in architecture.operations(called):
            results = _evaluate(getattr(called, "jaxpr", called), getattr(called, "consts", ()), operands)
        else:
            results = bind(eqn, operands)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in program.outvars]


def _is_plain(eqn: Any) -> bool:
    """Whether a convolution has no groups, dilation or negative padding."""
    groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    ones = (*groups, *eqn.params["lhs_dilation"], *eqn.params["rhs_dilation"])
    sizes = (*ones, *eqn.outvars[0].aval.shape)
    return set(ones) == {1} and min(sizes) > 0 and min(itertools.chain(*eqn.params["padding"]), default=0) >= 0


def _convolve(eqn: Any, x: Array, kernel: Array) -> Array:
    """The convolution of an operation, in whatever order it has its axes."""
    numbers, strides = eqn.params["dimension_numbers"], eqn.params["window_strides"]
    (batch, channels, *places), (out, into, *sides) = numbers.lhs_spec, numbers.rhs_spec
    x = jnp.pad(x.transpose(batch, *places, channels), [(0, 0), *eqn.params["padding"], (0, 0)])
    kernel = kernel.transpose(*sides, into, out)
    counts = [eqn.outvars[0].aval.shape[axis] for axis in numbers.out_spec[2:]]
    patches = []
    for corner in itertools.product(*map(range, kernel.shape[:-2])):
        window = [
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(corner, counts, strides, strict=True)
        ]
        patches.append(x[(slice(None), *window)])
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
    y = jnp.matmul(jnp.concatenate(patches, -1), kernel.reshape(-1, kernel.shape[-1]), **options)
    order = [numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]]  # where each of y's axes goes
    return y.transpose(sorted(range(y.ndim), key=order.__getitem__)).astype(eqn.outvars[0].aval.dtype)

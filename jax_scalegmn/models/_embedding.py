"""What a model makes of many networks: micro-batches that fill the caches, part by part."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.extend import core

from jax_scalegmn import stacks

# The largest array of a micro-batch, in bytes. On CPU it should fit into the caches of a core; an accelerator wants
# work. `python -m benchmarks.embed` prints what other sizes give.
_CPU_NBYTES = 2**22
_ACCELERATOR_NBYTES = 2**28
_MICRO_BATCHES = 64  # in one call: long enough to hide the call, short enough to show progress


def embed(
    model: nn.Module,
    variables: Any,
    networks: Any,
    *,
    method: str | None = None,
    micro_batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Applies a model to many networks, faster than `jax.vmap(model.apply)` on all at once and in bounded memory.

    The networks go through the model in micro-batches, in one compiled program. A micro-batch is as large as the
    model's largest array allows: on CPU it stays in the caches, where one `vmap` over a whole zoo is limited by memory.
    The results are those of `jax.vmap(lambda params: model.apply(variables, params))(stack)`, to rounding.

    Args:
      model: A model that reads the params of one network, like `Encoder`, `Autoencoder` or a module of your own.
      variables: Its variables.
      networks: A stack of networks: params in any container, every array with a leading axis [networks], NumPy's or
        JAX's. Or an iterator of stacks, like `(part.params for part in zoo.parts(path))`, of which
        one at a time is kept in memory.
      method: The model's method to call, like "encode"; None calls the model.
      micro_batch: The number of networks that are computed at once; None chooses it.
      progress: A function that is called with the number of networks that have become ready.

    Returns:
      The model's results as NumPy arrays, each with a leading axis [networks].

    Raises:
      ValueError: If there are no networks, arrays differ in their leading axis, or `micro_batch` is below 1.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> stack = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 5))
    >>> model = sg.Encoder(sg.ScaleGMN(arch, features=4, num_layers=1), latent=3)
    >>> variables = sg.models.init(model, jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], stack))
    >>> sg.models.embed(model, variables, stack).shape
    (5, 3)
    """
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}; expected 1 or more networks, or None to choose it.")
    given: Iterable[Any] = networks if isinstance(networks, Iterator) else (networks,)
    made: list[Any] = []
    size, rows = micro_batch, 0
    for part in given:
        stack = jax.tree.map(np.asarray, stacks.to_dict(part))
        count = _count(stack)
        if count and not rows:  # of the first part; the later ones run in the same program
            size = min(size or _micro_batch(model, method, variables, stack), count)
            rows = size * min(_MICRO_BATCHES, math.ceil(count / size))
            variables = jax.device_put(variables)
        for first in range(0, count, rows or 1):
            index = np.arange(first, first + rows) % count  # the last call is filled up, and cut again
            results = _many(model, method, size, variables, jax.tree.map(lambda leaf, at=index: leaf[at], stack))
            made.append(jax.tree.map(lambda leaf, left=count - first: np.asarray(leaf)[:left], results))
            if progress is not None:
                progress(min(rows, count - first))
    if not made:
        raise ValueError("There are no networks; expected a stack of one or more, or an iterator of such stacks.")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *made)


# --- private ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one(model: nn.Module, method: str | None, variables: Any, params: Any) -> Any:
    return model.apply(variables, params, method=method)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _many(model: nn.Module, method: str | None, size: int, variables: Any, stack: Any) -> Any:
    one = functools.partial(_one, model, method, variables)
    return jax.vmap(one)(stack) if size >= _count(stack) else jax.lax.map(one, stack, batch_size=size)


def _count(stack: Any) -> int:
    leaves = jax.tree.leaves(stack)
    shapes = sorted({leaf.shape[:1] for leaf in leaves})
    if len(shapes) != 1 or shapes == [()]:
        raise ValueError(
            f"The arrays of the stack have leading axes {shapes}; expected one size, the number of networks. "
            "Stack params with stacks.stack; one network alone needs no embed: use model.apply."
        )
    return int(shapes[0][0])


def _micro_batch(model: nn.Module, method: str | None, variables: Any, stack: Any) -> int:
    """The number of networks whose largest array in the model fits into the memory that this platform computes in."""
    limit = _CPU_NBYTES if jax.default_backend() == "cpu" else _ACCELERATOR_NBYTES
    program = _one.trace(model, method, variables, jax.tree.map(lambda leaf: leaf[0], stack)).jaxpr
    most = max(1, limit // max(1, _largest(program.jaxpr)))
    return 1 << (most.bit_length() - 1)  # a power of two fills the calls, and mostly the zoo


def _largest(program: core.Jaxpr) -> int:
    """The bytes of the largest array that a program makes, those within loops and calls included."""
    sizes = [0]
    for equation in program.eqns:
        arrays = [variable.aval for variable in equation.outvars if isinstance(variable.aval, jax.core.ShapedArray)]
        sizes += [math.prod(array.shape) * array.dtype.itemsize for array in arrays]
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: isinstance(p, core.Jaxpr)):
            if isinstance(parameter, core.ClosedJaxpr):
                sizes.append(_largest(parameter.jaxpr))
            elif isinstance(parameter, core.Jaxpr):
                sizes.append(_largest(parameter))
    return max(sizes)

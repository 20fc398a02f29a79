"""Means and variances of channels over positions and examples, all at once or from batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["EXAMPLES", "Moments", "batches", "over_examples", "pooled"]

# The axis over which `jax.vmap` takes the examples that have statistics in common.
EXAMPLES = "jax_scalegmn.examples"


class Moments(NamedTuple):
    """Mean and biased variance of every channel; the names are those of a batch normalization's stored ones."""

    mean: Float[Array, "*batches channels"]
    var: Float[Array, "*batches channels"]


def over_examples(x: Float[Array, "*positions channels"]) -> Moments:
    """The moments over the positions of one example and over all examples, inside `jax.vmap` over `EXAMPLES`.

    In two passes: the mean of the squares less the squared mean cancels in float32, the least precision used.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    positions = tuple(range(x.ndim - 1))
    mean = jax.lax.pmean(x.mean(positions), EXAMPLES)
    return Moments(mean, jax.lax.pmean(jnp.square(x - mean).mean(positions), EXAMPLES))


def pooled(parts: Moments, counts: Float[Array, " batches"]) -> Moments:
    """The moments of all examples from those of batches: exact, and without cancellation (Chan et al. 1983).

    Args:
      parts: of the batches, each array with a leading axis [batches].
      counts: how many examples every batch has.
    """
    shares = counts / counts.sum()
    mean = shares @ parts.mean
    return Moments(mean, shares @ (parts.var + jnp.square(parts.mean - mean)))


def batches(x: Float[Array, "examples ..."], size: int) -> tuple[Float[Array, "batches size ..."], ...]:
    """The examples in batches of that size, and what remains as a second stack with one smaller batch.

    Raises:
      ValueError: on a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected a number >= 1, like 256.")
    full = len(x) // size * size
    stacks = (x[:full].reshape(-1, size, *x.shape[1:]), x[full:][None])
    return tuple(stack for stack in stacks if stack.size)

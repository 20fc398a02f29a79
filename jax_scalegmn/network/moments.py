"""Means and variances of channels over positions and examples, all at once or from batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["EXAMPLES", "Moments", "batches", "over_examples", "pooled", "varies"]

# The axis over which `jax.vmap` takes the examples that have statistics in common.
EXAMPLES = "jax_scalegmn.examples"


class Moments(NamedTuple):
    """Mean and biased variance of every channel, with the names that a batch normalization stores them under.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.network import moments
    >>> moments.Moments(mean=jnp.zeros(3), var=jnp.ones(3)).var.shape
    (3,)

    Attributes:
      mean: [channels].
      var: The mean squared distance from the mean, [channels].
    """

    mean: Float[Array, "*batches channels"]
    var: Float[Array, "*batches channels"]


def over_examples(x: Float[Array, "*positions channels"]) -> Moments:
    """The moments over the positions of one example and over all examples, inside `jax.vmap` over `EXAMPLES`.

    In two passes: the mean of the squares less the squared mean cancels in float32, the least precision used.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.network import moments
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
    >>> jax.vmap(moments.over_examples, axis_name=moments.EXAMPLES, out_axes=None)(x)
    Moments(mean=Array([2., 5.], dtype=float32), var=Array([1., 0.], dtype=float32))

    Args:
      x: The values of one example.

    Returns:
      The moments over all examples, the same for each.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    positions = tuple(range(x.ndim - 1))
    mean = jax.lax.pmean(x.mean(positions), EXAMPLES)
    return Moments(mean, jax.lax.pmean(jnp.square(x - mean).mean(positions), EXAMPLES))


def pooled(parts: Moments, counts: Float[Array, " batches"]) -> Moments:
    """The moments of all examples from those of batches: exact, and without cancellation (Chan et al. 1983).

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.network import moments
    >>> parts = moments.Moments(mean=jnp.array([[1.0], [4.0]]), var=jnp.array([[0.0], [3.0]]))
    >>> mean, var = moments.pooled(parts, jnp.array([2.0, 1.0]))  # of the values 1, 1 and a batch of mean 4, variance 3
    >>> print(f"{mean[0]:.4f} {var[0]:.4f}")
    2.0000 3.0000

    Args:
      parts: The moments of the batches, each array with a leading axis [batches].
      counts: The number of examples in each batch.

    Returns:
      The moments of all examples.
    """
    shares = counts / counts.sum()
    mean = jnp.tensordot(shares, parts.mean, 1, precision="highest")
    return Moments(mean, jnp.tensordot(shares, parts.var + jnp.square(parts.mean - mean), 1, precision="highest"))


def varies(found: Moments) -> Bool[Array, "*batches channels"]:
    """Tells which channels vary by more than the rounding errors of their values.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.network import moments
    >>> moments.varies(moments.Moments(jnp.array([5.0, 5.0]), jnp.array([1.0, 1e-13]))).tolist()
    [True, False]

    Args:
      found: The means and variances of the channels.
    """
    return found.var > jnp.square(8 * jnp.finfo(found.var.dtype).eps * found.mean)


def batches(x: Float[Array, "examples ..."], size: int) -> tuple[Float[Array, "batches size ..."], ...]:
    """Splits examples into a stack of batches of one size, and a second stack with one smaller batch of what remains.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.network import moments
    >>> [stack.shape for stack in moments.batches(jnp.zeros((7, 2)), 3)]
    [(2, 3, 2), (1, 1, 2)]

    Args:
      x: The examples.
      size: The number of examples in a batch.

    Returns:
      One stack or two: whichever of the two holds examples.

    Raises:
      ValueError: On a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected a number >= 1, like 256.")
    full = len(x) // size * size
    stacks = (x[:full].reshape(-1, size, *x.shape[1:]), x[full:][None])
    return tuple(stack for stack in stacks if stack.size)

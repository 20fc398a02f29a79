"""Merging: from two or more networks to one, on params or on any other pytree (embeddings too).

Networks merge where they lie in one copy of their orbits. Three ways there:
- pairwise: `matching.align` one to the other; the end points stay exact, N networks need N^2 alignments for all pairs;
- decoded: merge the canonical networks of an autoencoder; no alignment, end points as good as its reconstructions;
- canonical frame: `matching.align` every network to its own decoded one, then merge the originals; the end points
  stay exact and N networks need N alignments.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def lerp(a: Any, b: Any, t: Float[Array, ""] | float) -> Any:
    """(1 - t) a + t b, leaf by leaf.

    Raises:
      ValueError: if a and b differ in structure or shapes.
    """
    _check_alike(a, b)
    return jax.tree.map(lambda x, y: (1 - t) * x + t * y, a, b)


def slerp(a: Any, b: Any, t: Float[Array, ""] | float) -> Any:
    """Along the great circle from a to b, all leaves as one vector (Shoemake 1985).

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b with w the angle between a and b; `lerp` where they are parallel
    or one of them is 0.

    Raises:
      ValueError: if a and b differ in structure or shapes.
    """
    _check_alike(a, b)
    dot, aa, bb = (_inner(*pair) for pair in ((a, b), (a, a), (b, b)))
    some = aa * bb > 0  # guarded inside the root: its derivative at 0 is infinite
    cosine = jnp.where(some, dot / jnp.sqrt(jnp.where(some, aa * bb, 1)), 1)
    straight = jnp.abs(cosine) > 1 - 1e-6
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    left = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    right = jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle))
    return jax.tree.map(lambda x, y: left * x + right * y, a, b)


def average(stack: Any, weights: Float[Array, " models"] | None = None) -> Any:
    """The (weighted) mean of N networks, every array with a leading axis [models].

    Args:
      stack: the networks.
      weights: divided by their sum; None for equal ones.

    Raises:
      ValueError: if the weights are not one for each network.
    """
    count = len(jax.tree.leaves(stack)[0])
    weights = jnp.ones(count) if weights is None else jnp.asarray(weights)
    if weights.shape != (count,):
        raise ValueError(f"weights have shape {weights.shape}; expected ({count},), one for each network.")
    return jax.tree.map(lambda leaf: jnp.tensordot(weights / weights.sum(), leaf, 1), stack)


# --- private ------------------------------------------------------------------------------------------------------


def _check_alike(a: Any, b: Any) -> None:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"a and b differ in structure or shapes: {shapes[0]} and {shapes[1]}. Merge networks of one kind."
        )


def _inner(a: Any, b: Any) -> Array:
    return jnp.stack([jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]).sum()

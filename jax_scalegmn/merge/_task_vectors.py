"""Task vectors: what fine-tuning changed, added up over tasks on one base network.

All networks here come from one base, by fine-tuning. Networks that were trained apart have no common base: bring them
into one frame first (`matching.align` to the base, `matching.align_all`). Stored statistics of batch normalizations
count as parameters like all others; after a merge `merge.reset_batch_norm` gives the merged network its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from jax_scalegmn import stacks


def task_vector(base: Any, tuned: Any) -> Any:
    """tuned - base, leaf by leaf (Ilharco et al. 2023, arXiv 2212.04089, section 2).

    Raises:
      ValueError: if the two differ in structure or shapes.
    """
    stacks.check_alike(tuned, base, names=("tuned", "base"))
    return jax.tree.map(lambda x, y: y - x, base, tuned)


def task_arithmetic(
    base: Any, vectors: Any, weights: Float[Array, " networks"] | Float[Array, ""] | float = 1.0
) -> Any:
    """Task arithmetic: base + sum_i weights_i vectors_i (Ilharco et al. 2023, arXiv 2212.04089, section 2).

    A negative weight forgets a task.

    Args:
      base: the common network.
      vectors: a stack of `task_vector`s, every array with a leading axis [networks].
      weights: one for each vector, or one for all. The published ones are 0.3 to 0.5 for several tasks at once.

    Raises:
      ValueError: if vectors and base differ in structure or shapes, or weights and vectors in number, or (where the
        values are at hand) on weights that are not finite.
    """
    models = _check_stack(base, vectors, "vectors")
    weights = jnp.asarray(weights, float)
    if weights.shape not in ((), (models,)):
        raise ValueError(
            f"weights have shape {weights.shape}; expected ({models},), one for each vector, or one number."
        )
    _check_finite(weights, "weights")
    weights = jnp.broadcast_to(weights, (models,))
    return jax.tree.map(
        lambda x, v: (x + jnp.tensordot(weights, v, 1, precision="highest")).astype(x.dtype), _arrays(base), vectors
    )


def ties(base: Any, stack: Any, *, density: float = 0.2, weight: Float[Array, ""] | float = 1.0) -> Any:
    """TIES merging: trim, elect signs, and take the mean of those that agree (Yadav et al. 2023, arXiv 2306.01708).

    1. Trim: of every task vector stay the k = round(density * size) entries of largest magnitude, 1 at least, counted
       over the whole network; of equal magnitudes the earlier entries, in the order of `jax.tree.leaves`.
    2. Elect: an entry's sign is that of the sum of what stayed of it.
    3. Merge: the mean of the entries that stayed and have that sign.

    Where positive and negative mass are equal no sign is elected, and where nothing stayed there is nothing to merge:
    the base's entry stays. So the rule does not know positive from negative, and it commutes with permutations and
    signs of neurons as long as no magnitudes are equal; with positive scales it does not.

    Args:
      base: the common network.
      stack: the fine-tuned networks (not their vectors), every array with a leading axis [networks].
      density: the share of entries that stay, in (0, 1]. Static: it sets shapes.
      weight: base + weight * merged vector.

    Raises:
      ValueError: if stack and base differ in structure or shapes, on a density outside (0, 1], or (where the values are
        at hand) on NaN and infinite entries.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; expected a share inside (0, 1], like 0.2.")
    _check_stack(base, stack, "stack")
    for name, tree in (("base", base), ("stack", stack)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            _check_finite(leaf, name + jax.tree_util.keystr(path))
    vectors = jax.vmap(lambda tuned: ravel_pytree(task_vector(base, tuned))[0])(_arrays(stack))
    trimmed = jnp.where(jax.vmap(lambda v: _largest(v, density))(vectors), vectors, 0)
    elected = jnp.sign(trimmed.sum(0))
    agree = (jnp.sign(trimmed) == elected) & (elected != 0)
    merged = jnp.where(agree, trimmed, 0).sum(0) / jnp.maximum(agree.sum(0), 1)
    flat, unravel = ravel_pytree(base)
    return unravel((flat + weight * merged).astype(flat.dtype))


# --- private ------------------------------------------------------------------------------------------------------


def _largest(vector: Float[Array, " entries"], density: float) -> Bool[Array, " entries"]:
    """Which round(density * size) entries are largest in magnitude; of equal ones `top_k` takes the earlier."""
    kept = max(1, round(density * vector.size))
    _, places = jax.lax.top_k(jnp.abs(vector), kept)
    return jnp.zeros(vector.shape, bool).at[places].set(True)


def _arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def _check_stack(base: Any, stack: Any, name: str) -> int:
    """Checks a stack of networks of the base's kind, and returns how many it holds."""
    models = stacks.count(stack, name=name)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], float), stack)
    stacks.check_alike(one, base, names=(f"The networks of {name}", "base"))
    return models


def _check_finite(value: Any, name: str) -> None:
    if not isinstance(value, jax.core.Tracer) and not np.isfinite(np.asarray(value)).all():
        raise ValueError(f"{name} holds NaN or infinite entries; expected finite numbers.")

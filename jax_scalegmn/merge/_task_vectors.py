"""Task vectors: what fine-tuning changed, added up over tasks on one base network.

All networks here are fine-tuned from one base. Networks that were trained apart have no common base: bring them
into one frame first (`matching.align` to the base, `matching.align_all`). Stored statistics of batch normalizations
count as parameters like all others; after a merge `merge.reset_batch_norm` computes the merged network's own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from jax_scalegmn import stacks


@stacks.any_container("base", "tuned", returns=True)
def task_vector(base: Any, tuned: Any) -> Any:
    """What fine-tuning changed: tuned - base, array by array (Ilharco et al. 2023, arXiv 2212.04089, section 2).

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.merge.task_vector({"bias": jnp.array([1.0, 2.0])}, {"bias": jnp.array([1.5, 2.0])})["bias"].tolist()
    [0.5, 0.0]

    Args:
      base: The network before fine-tuning.
      tuned: The network after fine-tuning.

    Returns:
      The task vector, with the structure of the networks; 0 for arrays that are no floating-point numbers.

    Raises:
      ValueError: If the two differ in structure or shapes.
    """
    stacks.check_alike(tuned, base, names=("tuned", "base"))
    return jax.tree.map(lambda x, y: y - x if stacks.is_floating(x) else jnp.zeros_like(x), base, tuned)


@stacks.any_container("base", "vectors", returns=True)
def task_arithmetic(
    base: Any, vectors: Any, weights: Float[Array, " networks"] | Float[Array, ""] | float = 1.0
) -> Any:
    """Adds task vectors to a base: base + sum_i weights_i vectors_i (Ilharco et al. 2023, arXiv 2212.04089, section 2).

    A negative weight makes the network forget a task.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> vectors = {"bias": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
    >>> sg.merge.task_arithmetic({"bias": jnp.array([1.0, 2.0])}, vectors, jnp.array([1.0, -0.5]))["bias"].tolist()
    [2.0, 1.0]

    Args:
      base: The common network.
      vectors: A stack of `task_vector`s, every array with a leading axis [networks].
      weights: One for each vector, or one for all. The published ones are 0.3 to 0.5 for several tasks at once.

    Returns:
      The merged network, in the dtypes of the base.

    Raises:
      ValueError: If vectors and base differ in structure or shapes, or weights and vectors in number, or (where the
        values are known) on weights that are not finite.
    """
    count = _check_stack(base, vectors, "vectors")
    weights = jnp.asarray(weights, float)
    if weights.shape not in ((), (count,)):
        raise ValueError(
            f"weights have shape {weights.shape}; expected ({count},), one for each vector, or one number."
        )
    stacks.check_finite(weights, name="weights")
    weights = jnp.broadcast_to(weights, (count,))

    def added(x: Array, v: Array) -> Array:
        if not stacks.is_floating(x):
            return x
        wide = jnp.promote_types(x.dtype, jnp.float32)
        total = jnp.tensordot(weights.astype(wide), jnp.asarray(v, wide), 1, precision="highest")
        return (x.astype(wide) + total).astype(x.dtype)

    return jax.tree.map(added, _arrays(base), vectors)


@stacks.any_container("base", "stack", returns=True)
def ties(base: Any, stack: Any, *, density: float = 0.2, weight: Float[Array, ""] | float = 1.0) -> Any:
    """TIES merging: trim, elect signs, and take the mean of those that agree (Yadav et al. 2023, arXiv 2306.01708).

    1. Trim: each task vector keeps its k = max(1, round(density * size)) entries of largest magnitude, counted over
       the whole network; of equal magnitudes the earlier entries, in the order of `jax.tree.leaves`.
    2. Elect: an entry's sign is the sign of the sum of its kept values.
    3. Merge: the mean of the kept values that have that sign.

    Where positive and negative mass are equal no sign is elected, and where nothing was kept there is nothing to merge:
    the base's entry stays. So the rule is symmetric in positive and negative, and it commutes with permutations and
    signs of neurons as long as no magnitudes are equal; with positive scales it does not.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> base = {"bias": jnp.zeros(3)}
    >>> stack = {"bias": jnp.array([[3.0, 1.0, 0.0], [1.0, -4.0, 0.0]])}
    >>> sg.merge.ties(base, stack, density=1.0)["bias"].tolist()
    [2.0, -4.0, 0.0]

    Args:
      base: The common network.
      stack: The fine-tuned networks (not their vectors), every array with a leading axis [networks].
      density: The share of entries that are kept, in (0, 1]. Static under `jax.jit`: it sets shapes.
      weight: The factor of the merged vector: base + weight * merged vector.

    Returns:
      The merged network, in the dtypes of the base.

    Raises:
      ValueError: If stack and base differ in structure or shapes, on a density outside (0, 1], or (where the values are
        known) on NaN and infinite entries.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; expected a share inside (0, 1], like 0.2.")
    _check_stack(base, stack, "stack")
    stacks.check_finite(base, name="base")
    stacks.check_finite(stack, name="stack")
    leaves, structure = jax.tree.flatten(_arrays(base))
    floats = [index for index, leaf in enumerate(leaves) if stacks.is_floating(leaf)]
    whole = [leaf.dtype for leaf in leaves]
    base_floats = stacks.at_least_float32([leaves[index] for index in floats])
    tuned_floats = stacks.at_least_float32([jax.tree.leaves(_arrays(stack))[index] for index in floats])
    vectors = jax.vmap(lambda tuned: ravel_pytree(task_vector(base_floats, tuned))[0])(tuned_floats)
    trimmed = jnp.where(jax.vmap(lambda v: _largest(v, density))(vectors), vectors, 0)
    elected = jnp.sign(trimmed.sum(0))
    agree = (jnp.sign(trimmed) == elected) & (elected != 0)
    merged = jnp.where(agree, trimmed, 0).sum(0) / jnp.maximum(agree.sum(0), 1)
    flat, unravel = ravel_pytree(base_floats)
    for index, leaf in zip(floats, unravel((flat + weight * merged).astype(flat.dtype)), strict=True):
        leaves[index] = leaf.astype(whole[index])
    return jax.tree.unflatten(structure, leaves)


# --- private ------------------------------------------------------------------------------------------------------


def _largest(vector: Float[Array, " entries"], density: float) -> Bool[Array, " entries"]:
    """Which round(density * size) entries are largest in magnitude; `top_k` takes the earlier of equal ones."""
    kept = max(1, round(density * vector.size))
    _, places = jax.lax.top_k(jnp.abs(vector), kept)
    return jnp.zeros(vector.shape, bool).at[places].set(True)


def _arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def _check_stack(base: Any, stack: Any, name: str) -> int:
    """Checks a stack of networks with the base's structure and shapes, and returns their number."""
    count = stacks.count(stack, name=name)
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], float), stack)
    stacks.check_alike(member, base, names=(f"The networks of {name}", "base"))
    return count

"""Stacks of networks: a params pytree whose arrays have a leading axis [networks]."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = ["at_least_float32", "check_alike", "count", "member", "stack"]


def stack(*networks: Any) -> Any:
    """Networks of one kind as a stack: every array gets a leading axis [networks]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)


def member(stack: Any, index: int | Array) -> Any:
    """One network of a stack."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], stack)


def count(stack: Any, *, least: int = 1, name: str = "stack") -> int:
    """How many networks a stack holds, every array with a leading axis [networks].

    Raises:
      ValueError: if its arrays disagree, or on fewer than `least`.
    """
    counts = {(jnp.shape(leaf) or (0,))[0] for leaf in jax.tree.leaves(stack)}
    if len(counts) != 1 or min(counts) < least:
        raise ValueError(
            f"The arrays of {name} have leading sizes {sorted(counts)}; expected one size for all, the number of "
            f"networks, and {least} or more of them. Stack them with stacks.stack(a, b)."
        )
    return counts.pop()


def check_alike(a: Any, b: Any, *, names: tuple[str, str] = ("a", "b")) -> None:
    """Checks that two networks are of one kind.

    Raises:
      ValueError: if they differ in structure or shapes.
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} differ in structure or shapes: {shapes[0]} and {shapes[1]}. Merge networks of "
            "one kind."
        )


def at_least_float32(tree: Any) -> Any:
    """The arrays in float32 where they were of half precision, which loses the ties that neurons are compared by."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.promote_types(jnp.asarray(leaf).dtype, jnp.float32)), tree)

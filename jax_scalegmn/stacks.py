"""Params as pytrees: stacks of networks, with a leading axis [networks] on every array, and checks of their values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

__all__ = ["at_least_float32", "check_alike", "check_finite", "count", "is_concrete", "member", "stack"]


def stack(*networks: Any) -> Any:
    """Stacks networks of one architecture: every array gets a leading axis [networks].

    Args:
      *networks: One or more params pytrees of one structure, with equal shapes.

    Returns:
      The pytree of stacked arrays.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> both = stacks.stack({"bias": np.zeros(3)}, {"bias": np.ones(3)})
    >>> both["bias"].shape
    (2, 3)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)


def member(stack: Any, index: int | Array) -> Any:
    """Takes one network, or several, out of a stack.

    Args:
      stack: The networks, every array with a leading axis [networks].
      index: The network's place; an array of places returns a stack.

    Returns:
      The pytree of `array[index]`.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.member({"bias": np.array([[1, 2], [3, 4]])}, 1)["bias"].tolist()
    [3, 4]
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], stack)


def count(stack: Any, *, least: int = 1, name: str = "stack") -> int:
    """Counts the networks of a stack.

    Args:
      stack: The networks, every array with a leading axis [networks].
      least: The smallest number that is accepted.
      name: What error messages call the stack.

    Returns:
      The leading size that all arrays have.

    Raises:
      ValueError: If the arrays disagree, or if there are fewer networks than `least`.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.count({"kernel": np.zeros((5, 2, 3)), "bias": np.zeros((5, 3))})
    5
    """
    first_path_of: dict[int, str] = {}
    for path, leaf in jax.tree.leaves_with_path(stack):
        first_path_of.setdefault((jnp.shape(leaf) or (0,))[0], f"{name}{jax.tree_util.keystr(path)}")
    if len(first_path_of) != 1 or min(first_path_of) < least:
        sizes = dict(sorted(first_path_of.items()))
        raise ValueError(
            f"The arrays of {name} have leading sizes {list(sizes)}; expected one size for all, the number of "
            f"networks, and {least} or more of them. The first array of each size: {list(sizes.values())}. Stack "
            "networks with stacks.stack(a, b)."
        )
    return first_path_of.popitem()[0]


def check_alike(a: Any, b: Any, *, names: tuple[str, str] = ("a", "b")) -> None:
    """Checks that two networks have the same structure and shapes.

    Args:
      a: A params pytree.
      b: Another one.
      names: What error messages call the two.

    Raises:
      ValueError: If they differ in structure or shapes.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.check_alike({"bias": np.zeros(3)}, {"bias": np.ones(3)})
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} differ in structure or shapes: {shapes[0]} and {shapes[1]}. Merge networks of "
            "one kind."
        )


def is_concrete(tree: Any) -> bool:
    """Tells whether the values of all arrays are known now, that is outside `jax.jit`, `jax.vmap` and `jax.grad`.

    Args:
      tree: An array or a pytree of arrays, which may be `jax.ShapeDtypeStruct` (without values).

    Returns:
      False if any array is traced or has no values.

    >>> import jax
    >>> from jax_scalegmn import stacks
    >>> stacks.is_concrete({"bias": jax.numpy.zeros(3)})
    True
    >>> bool(jax.jit(lambda x: stacks.is_concrete(x))(0.0))
    False
    """
    return not any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def check_finite(tree: Any, *, name: str = "params") -> None:
    """Checks that no array holds a NaN or an infinity; arrays whose values are not known yet (`is_concrete`) pass.

    It copies the arrays to the host. So call it where data enters a program, not inside a computation.

    Args:
      tree: An array or a pytree of arrays.
      name: What error messages call the tree.

    Raises:
      ValueError: If a value is NaN or infinite; the message names the array and the entry.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.check_finite({"bias": np.array([0.0, np.inf])})
    Traceback (most recent call last):
    ...
    ValueError: params['bias'] holds 1 NaN or infinite entries, the first at (1,); expected finite numbers. ...
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_concrete(leaf):
            continue
        finite = np.isfinite(np.asarray(leaf))
        if not finite.all():
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} holds {int((~finite).sum())} NaN or infinite entries, the first "
                f"at {first}; expected finite numbers. The network diverged or its file is damaged: train or export "
                "it again."
            )


def at_least_float32(tree: Any) -> Any:
    """Converts arrays of half precision to float32, since half precision confuses neurons that nearly tie.

    Args:
      tree: A pytree of arrays.

    Returns:
      The pytree with float16 and bfloat16 arrays in float32, all others unchanged.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn import stacks
    >>> stacks.at_least_float32(jnp.zeros(3, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.promote_types(jnp.asarray(leaf).dtype, jnp.float32)), tree)

"""Params as pytrees: containers, stacks of networks with a leading axis [networks], means, and checks of values."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

__all__ = [
    "abstract",
    "any_container",
    "at_least_float32",
    "average",
    "check_alike",
    "check_finite",
    "check_floating",
    "check_weights",
    "combine",
    "count",
    "is_concrete",
    "is_floating",
    "lerp",
    "like",
    "member",
    "reader",
    "stack",
    "to_dict",
]

_PART = 2**22
Function = TypeVar("Function", bound=Callable[..., Any])


def to_dict(tree: Any) -> Any:
    """The arrays of a network as nested dicts, by the names of its attributes, keys and places.

    Every pytree whose leaves have names is a network: FrozenDict, OrderedDict, lists (Keras), an `nnx.Module`, an
    `nnx.State`, an Equinox module. Of modules the floating-point arrays are taken, not the functions, keys of random
    numbers and counters in them.

    Args:
      tree: The network. Nested dicts of arrays, a single array and tuples, which are no networks, are returned
        unchanged.

    Returns:
      The nested dicts.

    Raises:
      ValueError: If two arrays have one name, as 1 and "1" in a dict, or if an `nnx.Module` holds one variable twice,
        since JAX would make two of it.

    >>> import collections
    >>> from jax_scalegmn import stacks
    >>> params = [collections.OrderedDict(kernel=1.0, bias=2.0)]
    >>> stacks.to_dict(params)
    {'0': {'kernel': 1.0, 'bias': 2.0}}
    """
    if _is_plain(tree):
        return tree
    _check_shared(tree)
    nested: dict[str, Any] = {}
    for path, leaf in _arrays(tree):
        *before, last = path
        node = nested
        for name in before:
            node = node.setdefault(name, {})
        if last in node:
            raise ValueError(f"Two arrays are named {path}; expected one name for each. Rename one of them.")
        node[last] = leaf
    return nested


def like(template: Any, params: Any) -> Any:
    """Puts the arrays of nested dicts into a container; the inverse of `to_dict`.

    Args:
      template: A network in the container wanted; what is no array of `params` is taken from it.
      params: The arrays by the names that `to_dict(template)` has. They may be stacked.

    Returns:
      The network, of the type of `template`.

    Raises:
      ValueError: If an array has no place in the template.

    >>> from jax_scalegmn import stacks
    >>> stacks.like([{"kernel": 1.0}, {"kernel": 2.0}], {"0": {"kernel": 3.0}, "1": {"kernel": 4.0}})
    [{'kernel': 3.0}, {'kernel': 4.0}]
    """
    if _is_plain(template):
        return params
    arrays = dict(_flat(params, ()))
    places = {path for path, _ in _arrays(template)}
    if strange := [path for path in arrays if path not in places]:
        raise ValueError(
            f"The {type(template).__name__} has no array {'.'.join(strange[0])}; expected the names {_some(places)}. "
            "Pass networks of one kind."
        )
    return jax.tree.map_with_path(lambda path, leaf: arrays.get(_names(path), leaf), template)


def reader(function: Callable[..., Any], template: Any) -> Callable[..., Any]:
    """A function of nested dicts made of one that reads networks in another container.

    Args:
      function: A function whose first argument is a network in the container of `template`.
      template: A network in that container.

    Returns:
      The function of nested dicts, and of whatever else `function` takes.

    >>> from jax_scalegmn import stacks
    >>> stacks.reader(sum, [1.0, 2.0])({"0": 3.0, "1": 4.0})
    7.0
    """

    @functools.wraps(function)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        return function(like(template, params), *args, **kwargs)

    return wrapped


def any_container(
    *names: str, returns: bool = False, fields: tuple[str, ...] = (), calls: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Lets a function that computes with nested dicts take networks in any container that `to_dict` reads.

    Args:
      *names: The arguments that are networks or stacks. The container of the first is that of the results.
      returns: Whether the function returns a network.
      fields: The fields of the NamedTuple that the function returns which are networks.
      calls: The arguments that are functions of a network (their first argument), which they get in the container.

    Returns:
      The decorator.

    >>> from jax_scalegmn import stacks
    >>> @stacks.any_container("params", returns=True)
    ... def twice(params):
    ...     return {name: 2 * value for name, value in params.items()}
    >>> twice([1.0, 2.0])
    [2.0, 4.0]
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            networks = {name: given[name] for name in names if name in given}
            if all(map(_is_plain, networks.values())):
                return function(*args, **kwargs)
            template = networks[names[0]]
            given |= {name: to_dict(network) for name, network in networks.items()}
            given |= {name: reader(given[name], template) for name in calls if callable(given.get(name))}
            bound = inspect.BoundArguments(signature, given)
            result = function(*bound.args, **bound.kwargs)
            if fields:
                return result._replace(**{field: like(template, getattr(result, field)) for field in fields})
            return like(template, result) if returns else result

        return wrapped  # type: ignore[return-value]

    return decorate


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
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(to_dict, networks))
    return like(networks[0], stacked)


@any_container("stack", returns=True)
def member(stack: Any, index: int | Array | np.ndarray) -> Any:
    """Takes one network, or several, out of a stack.

    Args:
      stack: The networks, every array with a leading axis [networks].
      index: The network's place; an array of places returns a stack.

    Returns:
      The pytree of `array[index]`.

    Raises:
      ValueError: If (where places are known) the stack has no such place; JAX would take the nearest one.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.member({"bias": np.array([[1, 2], [3, 4]])}, 1)["bias"].tolist()
    [3, 4]
    """
    _check_places(stack, index)
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
    for path, leaf in jax.tree.leaves_with_path(to_dict(stack)):
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
    shapes = [jax.tree.map(jnp.shape, to_dict(tree)) for tree in (a, b)]
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


def abstract(tree: Any) -> Any:
    """The shapes and dtypes of arrays, to trace a program with: the same one for arrays of weak and of strong types.

    Args:
      tree: A pytree of arrays.

    Returns:
      The pytree of `jax.ShapeDtypeStruct`; what is no array stays.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn import stacks
    >>> jnp.full(3, 2.0).weak_type, stacks.abstract(jnp.full(3, 2.0)).weak_type
    (True, False)
    """

    def of_leaf(leaf: Any) -> Any:
        known = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if known else leaf

    return jax.tree.map(of_leaf, tree)


def check_finite(tree: Any, *, name: str = "params") -> None:
    """Checks that no array holds a NaN or an infinity; arrays whose values are not known yet (`is_concrete`) pass.

    It copies the arrays to the host. So call it where data enters a program, not inside a computation. Of arrays over
    several processes, each checks what it holds.

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
    for path, leaf in jax.tree.leaves_with_path(to_dict(tree)):
        if not is_concrete(leaf):
            continue
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            for shard in leaf.addressable_shards:
                check_finite(shard.data, name=f"{name}{jax.tree_util.keystr(path)}, on {shard.device},")
            continue
        values = np.asarray(leaf)
        entries = values.reshape(-1)
        # In parts: the truth values of all entries would take a quarter of the array's memory.
        if not all(np.isfinite(entries[at : at + _PART]).all() for at in range(0, entries.size, _PART)):
            finite = np.isfinite(values)
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} holds {int((~finite).sum())} NaN or infinite entries, the first "
                f"at {first}; expected finite numbers. The network diverged or its file is damaged: train or export "
                "it again."
            )


def is_floating(leaf: Any) -> bool:
    """Tells whether an array is of floating-point numbers, and not a counter, a mask or quantized weights.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.is_floating(np.ones(2, "float16")), stacks.is_floating(np.ones(2, "int8"))
    (True, False)
    """
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def check_floating(tree: Any, *, name: str = "params") -> None:
    """Checks that all arrays are of floating-point numbers; works on traced arrays.

    Args:
      tree: An array or a pytree of arrays.
      name: What error messages call the tree.

    Raises:
      ValueError: If one is not; the message names it.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.check_floating({"bias": np.zeros(2, "int8")})
    Traceback (most recent call last):
    ...
    ValueError: params['bias'] is int8; expected floating-point numbers. Convert quantized weights.
    """
    for path, leaf in jax.tree.leaves_with_path(to_dict(tree)):
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {dtype}; expected floating-point numbers. Convert quantized "
                "weights."
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

    def wide(leaf: Any) -> Any:
        if callable(leaf) or not is_floating(leaf):  # modules of Equinox hold functions
            return leaf
        return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))

    return jax.tree.map(wide, tree)


@any_container("a", "b", returns=True)
def lerp(a: Any, b: Any, t: Float[Array, ""] | float) -> Any:
    """Interpolates linearly between two networks: (1 - t) a + t b, array by array.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.merge.lerp({"bias": jnp.array([0.0, 4.0])}, {"bias": jnp.array([1.0, 0.0])}, 0.25)["bias"].tolist()
    [0.25, 3.0]

    Args:
      a: The network at t = 0.
      b: The network at t = 1.
      t: The point; it may be outside [0, 1].

    Returns:
      The network at t, in the networks' dtypes; counters, masks and other arrays that are no floating-point numbers are
      those of a.

    Raises:
      ValueError: If a and b differ in structure or shapes.
    """
    check_alike(a, b)
    return combine(a, b, 1 - t, t)


@any_container("stack", returns=True)
def average(stack: Any, weights: Float[Array, " networks"] | None = None) -> Any:
    """The (weighted) mean of N networks: sum_i w_i a_i / sum_i w_i.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> stack = {"bias": jnp.array([[0.0, 4.0], [4.0, 0.0]])}
    >>> sg.merge.average(stack)["bias"].tolist()
    [2.0, 2.0]
    >>> sg.merge.average(stack, jnp.array([3.0, 1.0]))["bias"].tolist()
    [1.0, 3.0]

    Args:
      stack: The networks, every array with a leading axis [networks].
      weights: One weight for each network, divided by their sum; None for equal ones.

    Returns:
      The mean, in the dtypes of the networks; arrays that are no floating-point numbers are those of the first one.

    Raises:
      ValueError: If the arrays disagree on the number of networks, if there is not one weight for each network, or
        (where their values are known) if weights are not finite or their sum is 0.
    """
    number = count(stack)
    weights = jnp.ones(number) if weights is None else jnp.asarray(weights)
    check_weights(weights, number)
    weights = weights / weights.sum()

    def mean(leaf: Array) -> Array:
        # Half precision is summed in float32; the result has the networks' dtype, whatever the weights' dtype is.
        if not is_floating(leaf):
            return leaf[0]
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        total = jnp.tensordot(weights.astype(dtype), leaf.astype(dtype), 1, precision="highest")
        return total.astype(leaf.dtype)

    return jax.tree.map(lambda leaf: mean(jnp.asarray(leaf)), stack)


def check_weights(weights: Float[ArrayLike, " networks"], number: int) -> None:
    """Checks the weights of a mean.

    Args:
      weights: One weight for each network.
      number: The number of networks.

    Raises:
      ValueError: If there is not one weight for each network, or (where their values are known) if weights are not
        finite or their sum is 0.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.check_weights(np.array([1.0, -1.0]), 2)
    Traceback (most recent call last):
    ...
    ValueError: weights are [ 1. -1.] with sum 0.0; expected finite ones whose sum is not 0.
    """
    if jnp.shape(weights) != (number,):
        raise ValueError(f"weights have shape {jnp.shape(weights)}; expected ({number},), one for each network.")
    if is_concrete(weights):
        values = np.asarray(weights, np.float64)
        # Relative: 0.1 + 0.2 - 0.3 is a rounding error.
        if not np.isfinite(values.sum()) or abs(values.sum()) <= 1e-6 * np.abs(values).sum():
            raise ValueError(f"weights are {values} with sum {values.sum()}; expected finite ones whose sum is not 0.")


@any_container("a", "b", returns=True)
def combine(a: Any, b: Any, left: ArrayLike, right: ArrayLike) -> Any:
    """The linear combination of two networks: left a + right b, array by array.

    Args:
      a: A params pytree.
      b: Another one, of the same structure and shapes.
      left: The factor of a.
      right: The factor of b.

    Returns:
      The network, summed at least in float32, in the networks' dtypes; arrays that are no floats are those of a.

    >>> import numpy as np
    >>> from jax_scalegmn import stacks
    >>> stacks.combine({"bias": np.float16([1.0, 2.0])}, {"bias": np.float16([3.0, 4.0])}, 2.0, -1.0)["bias"].tolist()
    [-1.0, 0.0]
    """

    def mixed(x: Any, y: Any) -> Array:
        dtype = jnp.result_type(x, y)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.asarray(x)
        wide = jnp.promote_types(dtype, jnp.float32)
        x, y, one, other = (jnp.asarray(value).astype(wide) for value in (x, y, left, right))
        return (one * x + other * y).astype(dtype)

    return jax.tree.map(mixed, a, b)


# --- private ------------------------------------------------------------------------------------------------------


def _check_places(stack: Any, index: Any) -> None:
    """Checks places in a stack, where they are known; slices and masks have none."""
    leaves = jax.tree.leaves(stack)
    if not leaves or isinstance(index, slice) or not is_concrete(index):
        return
    places, number = np.asarray(index), np.shape(leaves[0])[0]
    if places.dtype.kind in "iu" and places.size and not -number <= places.min() <= places.max() < number:
        raise ValueError(f"The place is {index}; expected places of a stack of {number}, 0 to {number - 1}.")


def _is_plain(tree: Any) -> bool:
    """Whether a tree needs no conversion: an array, nested dicts of arrays, or a tuple, like an `Element`."""
    if isinstance(tree, dict):
        names = all(isinstance(name, str) for name in tree)
        return type(tree) is dict and names and all(map(_is_plain, tree.values()))
    return tree is None or isinstance(tree, tuple) or jax.tree_util.all_leaves([tree])


def _check_shared(tree: Any) -> None:
    """Checks that no NNX variable is at two places of a module, which JAX's pytrees do not keep."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(tree, nnx.Module):
        return
    places: dict[int, str] = {}
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        if isinstance(node, nnx.Variable):
            place = ".".join(map(_text, path))
            if id(node) in places:
                raise ValueError(
                    f"The module holds one variable as {places[id(node)]} and {place}; expected each once, since JAX "
                    "would make two of it. Pass graphdef, state = nnx.split(module): the state, and a function of it "
                    "that calls nnx.merge(graphdef, state)."
                )
            places[id(node)] = place


def _arrays(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The arrays of a container by their names: of an object the floating-point ones alone."""
    leaves = jax.tree.leaves_with_path(tree)
    keys = jax.tree_util.DictKey | jax.tree_util.SequenceKey
    is_object = any(not isinstance(key, keys) for path, _ in leaves for key in path)
    for path, leaf in leaves:
        if not is_object or (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)):
            yield _names(path), leaf


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path as text. NNX stores an array as the attribute `value` of a variable, which is left out."""
    *before, last = path
    if before and isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        path = tuple(before)
    return tuple(map(_text, path))


def _text(key: Any) -> str:
    """A key of a path: of a dict, a sequence or an attribute."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _flat(params: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(params, Mapping):
        yield path, params
        return
    for key, node in params.items():
        yield from _flat(node, (*path, str(key)))


def _some(paths: Any) -> str:
    """A few names, for an error message."""
    names = sorted(".".join(path) for path in paths)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")

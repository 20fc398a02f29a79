"""Validates a params pytree against an architecture and converts it to and from a flat list of arrays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import stacks
from jax_scalegmn.architecture._description import Architecture, Parameter, describe
from jax_scalegmn.types import Params


def unpack(arch: Architecture, params: Params, *, name: str = "params") -> list[Any]:
    """Lists the arrays of a network in the order of `arch.parameters`, after a check of paths and shapes.

    An array that is described in blocks is cut into them. Values are not looked at (`check_params` does), so that
    nothing is copied to the host, and the function works inside `jax.jit` and `jax.vmap`.

    Args:
      arch: The architecture.
      params: One network's params.
      name: What error messages call the params.

    Returns:
      One array, or block of an array, for each of `arch.parameters`.

    Raises:
      ValueError: If an array is missing, additional or of another shape; the message names its path.

    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> params = sg.architecture.abstract_params(arch)
    >>> [value.shape for value in sg.architecture.unpack(arch, params)]
    [(2, 3), (3,), (3, 1), (1,)]
    """
    if not isinstance(arch, Architecture):
        cure = "Pass its .arch." if hasattr(arch, "arch") else "The architecture comes first, then params."
        raise ValueError(f"arch is of type {type(arch).__name__}; expected an Architecture. {cure}")
    leaves = flatten(stacks.to_dict(params))
    expected = arch.array_shapes
    for path in leaves:
        if path not in expected:
            cure = "Remove it, or describe it in the Architecture."
            if sorted(np.shape(leaf) for leaf in leaves.values()) == sorted(expected.values()):
                cure = (
                    "The shapes are these: rename the arrays, or infer the architecture from your function (sg.infer)."
                )
            if path[:1] in (("params",), ("batch_stats",)):
                stored = any(other[:1] == ("batch_stats",) for other in leaves)
                cure = f"Pass network.merge_variables({name})." if stored else f"Pass {name}['params']."
            elif ("params", *path) in expected:
                cure = f"The description is of variables: pass {{'params': {name}}}, or infer it from params alone."
            raise ValueError(
                f"{name}{describe(path)} is no parameter of {arch.name!r}, which has {_listed(expected)}. {cure}"
            )
    for path, shape in expected.items():
        where = f"{name}{describe(path)}"
        if path not in leaves:
            raise ValueError(f"{where} is missing; {arch.name!r} expects shape {shape}.")
        if np.shape(leaves[path]) != shape:
            raise ValueError(
                f"{where} has shape {np.shape(leaves[path])}; {arch.name!r} expects {shape}. "
                "PyTorch kernels are transposed (use io.from_torch); a stack of networks needs jax.vmap."
            )
    return [cut(arch, parameter, leaves[parameter.path]) for parameter in arch.parameters]


def cut(arch: Architecture, parameter: Parameter, array: Any) -> Any:
    """A parameter out of its whole array: its block, with joined axes apart."""
    if parameter.start:
        return array[arch.block(parameter)]
    if not parameter.joined:
        return array
    shape = arch.shape(parameter)
    return jax.ShapeDtypeStruct(shape, array.dtype) if not hasattr(array, "reshape") else array.reshape(shape)


def pack(arch: Architecture, values: Sequence[Any]) -> dict[str, Any]:
    """Builds the params pytree from arrays in the order of `arch.parameters`; the inverse of `unpack`.

    Args:
      arch: The architecture.
      values: One array, or block of an array, for each of `arch.parameters`. They may have leading axes, like
        [networks], which stay.

    Returns:
      The params as nested dicts.

    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> values = sg.architecture.unpack(arch, sg.architecture.abstract_params(arch))
    >>> sg.architecture.pack(arch, values)["Dense_1"]["kernel"].shape
    (3, 1)
    """
    leaves: dict[tuple[str, ...], Any] = {}
    shapes = arch.array_shapes
    for parameter, value in zip(arch.parameters, values, strict=True):
        if not parameter.start:
            leading = value.shape[: value.ndim - len(parameter.axes)] if parameter.joined else ()
            joined = value.reshape(*leading, *shapes[parameter.path]) if parameter.joined else value
            leaves[parameter.path] = joined
            continue
        if parameter.path not in leaves:
            leading = value.shape[: value.ndim - len(parameter.axes)]
            leaves[parameter.path] = jnp.zeros((*leading, *shapes[parameter.path]), value.dtype)
        block = (..., *arch.block(parameter))
        leaves[parameter.path] = leaves[parameter.path].at[block].set(value)
    return unflatten(leaves)


def abstract_params(arch: Architecture, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The structure of a network's params with `jax.ShapeDtypeStruct` in place of arrays, for `jax.eval_shape`.

    Args:
      arch: The architecture.
      dtype: The type of every array.

    Returns:
      Nested dicts of `jax.ShapeDtypeStruct`.

    >>> import jax_scalegmn as sg
    >>> sg.architecture.abstract_params(sg.mlp((2, 3, 1)))["Dense_0"]
    {'kernel': ShapeDtypeStruct(shape=(2, 3), dtype=float32), 'bias': ShapeDtypeStruct(shape=(3,), dtype=float32)}
    """
    return unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in arch.array_shapes.items()})


def check_params(arch: Architecture, params: Params, *, name: str = "params") -> None:
    """Checks one network where it enters a program: its paths, its shapes, and that all its values are finite.

    It copies the arrays to the host; inside `jax.jit` and `jax.vmap` only paths and shapes are checked.

    Args:
      arch: The architecture.
      params: One network's params.
      name: What error messages call the params.

    Raises:
      ValueError: As `unpack`, and if an array is not of floating-point numbers or a value is NaN or infinite; the
        message names the array.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> sg.architecture.check_params(arch, sg.network.init(arch, jax.random.key(0)))
    >>> sg.architecture.check_params(arch, {"Dense_0": {}})
    Traceback (most recent call last):
    ...
    ValueError: params['Dense_0']['kernel'] is missing; 'mlp 2-3-1 relu' expects shape (2, 3).
    """
    unpack(arch, params, name=name)
    stacks.check_floating(params, name=name)
    stacks.check_finite(params, name=name)


def check_stack(arch: Architecture, stack: Params, *, least: int = 1, name: str = "params") -> int:
    """Checks a stack of networks as `check_params` checks one, and counts them.

    Args:
      arch: The architecture of all the networks.
      stack: The networks, every array with a leading axis [networks].
      least: The smallest number of networks that is accepted.
      name: What error messages call the stack.

    Returns:
      The number of networks.

    Raises:
      ValueError: As `check_params`, and if the arrays disagree on the number of networks, or hold fewer than `least`.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> sg.architecture.check_stack(arch, sg.stacks.stack(params, params, params))
    3
    """
    count = stacks.count(stack, least=least, name=name)
    jax.eval_shape(jax.vmap(lambda params: unpack(arch, params, name=name)), stacks.to_dict(stack))
    stacks.check_floating(stack, name=name)
    stacks.check_finite(stack, name=name)
    return count


def flatten(params: Params) -> dict[tuple[str, ...], Any]:
    """The arrays of nested mappings by path, in the order of the mappings.

    Args:
      params: Nested mappings with string keys, like Flax's params.

    Returns:
      A dict from paths to arrays.

    >>> import jax_scalegmn as sg
    >>> sg.architecture.flatten({"Dense_0": {"kernel": 1, "bias": 2}})
    {('Dense_0', 'kernel'): 1, ('Dense_0', 'bias'): 2}
    """
    return _flatten(params, ())


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dicts of arrays by path; the inverse of `flatten`.

    Args:
      leaves: Arrays by path; no path may begin with another one.

    Returns:
      The nested dicts.

    >>> import jax_scalegmn as sg
    >>> sg.architecture.unflatten({("Dense_0", "kernel"): 1, ("Dense_0", "bias"): 2})
    {'Dense_0': {'kernel': 1, 'bias': 2}}
    """
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


# --- private ------------------------------------------------------------------------------------------------------


def _flatten(tree: Any, path: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {where: leaf for key, node in tree.items() for where, leaf in _flatten(node, (*path, str(key))).items()}


def _listed(paths: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(describe(path) for path in paths)

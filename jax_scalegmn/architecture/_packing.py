"""Params at the door: a pytree as the arrays that an architecture describes, checked, and back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn.architecture._description import Architecture, Parameter, describe
from jax_scalegmn.types import Params


def unpack(arch: Architecture, params: Params, *, name: str = "params") -> list[Any]:
    """The arrays of a params pytree, or the blocks of them, in the order of `arch.parameters`, checked.

    Shapes are always checked; values wherever they are at hand, that is outside `jax.jit` and `jax.vmap`.

    Raises:
      ValueError: on a missing, additional or misshapen parameter, or one with a NaN or an infinity.
    """
    leaves = _leaves(params)
    expected = arch.array_shapes
    for path in leaves:
        if path not in expected:
            cure = "Remove it, or describe it in the Architecture."
            if path[:1] in (("params",), ("batch_stats",)):
                stored = any(other[:1] == ("batch_stats",) for other in leaves)
                cure = f"Pass network.merge_variables({name})." if stored else f"Pass {name}['params']."
            raise ValueError(
                f"{name}{describe(path)} is no parameter of {arch.name!r}, which has {_listed(expected)}. {cure}"
            )
    for path, shape in expected.items():
        where = f"{name}{describe(path)}"
        if path not in leaves:
            raise ValueError(f"{where} is missing; {arch.name!r} expects shape {shape}.")
        leaf = leaves[path]
        if np.shape(leaf) != shape:
            raise ValueError(
                f"{where} has shape {np.shape(leaf)}; {arch.name!r} expects {shape}. "
                "PyTorch kernels are transposed (use io.from_torch); a stack of networks needs jax.vmap."
            )
        if not isinstance(leaf, jax.core.Tracer):
            _check_finite(where, leaf)
    return [
        leaves[parameter.path][_slices(arch, parameter)] if parameter.start else leaves[parameter.path]
        for parameter in arch.parameters
    ]


def pack(arch: Architecture, values: Sequence[Any]) -> dict[str, Any]:
    """The params pytree of arrays, or blocks of them, that stand in the order of `arch.parameters`.

    Leading axes, as of a stack of networks, are left as they are.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    shapes = arch.array_shapes
    for parameter, value in zip(arch.parameters, values, strict=True):
        if not parameter.start:
            leaves[parameter.path] = value
            continue
        if parameter.path not in leaves:
            leading = value.shape[: value.ndim - len(parameter.axes)]
            leaves[parameter.path] = jnp.zeros((*leading, *shapes[parameter.path]), value.dtype)
        where = (..., *_slices(arch, parameter))
        leaves[parameter.path] = leaves[parameter.path].at[where].set(value)
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def check_stack(arch: Architecture, params: Params, *, name: str = "params") -> int:
    """Checks a stack of networks, one leading axis on every array, and returns how many it holds.

    Raises:
      ValueError: as `unpack`, or if the arrays disagree on how many networks there are.
    """
    leaves = _leaves(params)
    counts = {path: (np.shape(leaf) or (0,))[0] for path, leaf in leaves.items()}
    if len(set(counts.values())) != 1:
        listed = {describe(path): count for path, count in counts.items()}
        raise ValueError(f"The arrays of {name} disagree on how many networks they hold: {listed}.")
    for path, leaf in leaves.items():
        _check_finite(f"{name}{describe(path)}", leaf)
    jax.eval_shape(lambda stack: jax.vmap(lambda one: unpack(arch, one, name=name))(stack), dict(params))
    return int(next(iter(counts.values())))


# --- private ------------------------------------------------------------------------------------------------------


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(tree, Mapping):
        return {where: leaf for key, node in tree.items() for where, leaf in _leaves(node, (*path, str(key))).items()}
    return {path: tree}


def _check_finite(where: str, leaf: Any) -> None:
    finite = np.isfinite(np.asarray(leaf))
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{where} holds {int((~finite).sum())} NaN or infinite entries, the first at {first}; expected finite "
            "numbers. The network diverged or its file is damaged: train or export it again."
        )


def _slices(arch: Architecture, parameter: Parameter) -> tuple[slice, ...]:
    """Where a block stands in its array."""
    ends = zip(parameter.offset, arch.shape(parameter), strict=True)
    return tuple(slice(start, start + size) for start, size in ends)


def _listed(paths: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(describe(path) for path in paths)

"""Many pairs of networks matched at once, over the devices of a mesh."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

from jax_scalegmn import architecture, distributed, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching._weights import Matching, weight_matching
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params


@stacks.any_container("params", "target")
def many(
    arch: Architecture,
    params: Params,
    target: Params,
    *,
    match: Callable[..., Matching] = weight_matching,
    pairs_at_once: int = 128,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Matching:
    """Matches N pairs of networks, each as if it were alone, by one compiled program over the devices of a mesh.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> target = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 5))
    >>> params = jax.tree.map(lambda leaf: -leaf, target)
    >>> sg.matching.many(arch, params, target, mesh=sg.distributed.mesh({"data": 1})).similarity.shape
    (5,)

    Args:
      arch: The architecture of all networks.
      params: The networks to transform, every array with a leading axis [pairs].
      target: The network that each has to come close to, with the same leading axis.
      match: (arch, params, target, **options) -> the matching of one pair, like `weight_matching`,
        `canonical_matching`, or a function with the data that others compare networks on. It is kept, with the compiled
        program: give the same function in every call.
      pairs_at_once: The pairs that a device matches as one vmapped pair; the others follow in the same program.
      mesh: Devices (`distributed.mesh`) over whose axis "data" the pairs are shared out; nothing is communicated. None:
        one device.
      progress: A function that is called with the number of pairs that have become ready.
      **options: Those of `match`; arrays are the same for all pairs.

    Returns:
      The matchings, with a leading axis [pairs]: on the devices of the mesh where these divide the number of pairs,
      else NumPy arrays, the same in every process.

    Raises:
      ValueError: If a network does not fit the architecture or holds NaN or infinite values, or on another number of
        targets.
    """
    count = architecture.check_stack(arch, params)
    if architecture.check_stack(arch, target, name="target") != count:
        raise ValueError(f"target holds {stacks.count(target)} networks; expected {count}, one for each of params.")
    arrays, static = parted(options)
    program = _program(match, static, mesh, pairs_at_once)
    return distributed.place_rows(program((params, target), arch, arrays, progress=progress), mesh)


Static: TypeAlias = tuple[tuple[str, Any], ...]


def parted(options: dict[str, Any]) -> tuple[dict[str, Any], Static]:
    """The options of a matching: those that are arrays, and those that a compiled program depends on."""
    arrays = {name: value for name, value in options.items() if name == "key" or isinstance(value, Element | jax.Array)}
    return arrays, tuple(sorted((name, value) for name, value in options.items() if name not in arrays))


@functools.lru_cache(maxsize=16)
def _program(match: Callable[..., Matching], static: Static, mesh: Mesh | None, at_once: int) -> Callable[..., Any]:
    def one(params: Params, target: Params, arch: Architecture, arrays: dict[str, Any]) -> Matching:
        return match(arch, params, target, **arrays, **dict(static))

    return distributed.make_map(one, mesh, rows_at_once=at_once)

"""What is computed along the edges of a graph: for all small blocks at once, for large ones a part at a time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jax_scalegmn.models._features import Edges, num_ends


class Piece(NamedTuple):
    """What a computation along edges reads: of all edges of a block, or of those of some senders.

    All arrays have the axes [senders, receivers, ...], of size 1 where they do not depend on them.

    Attributes:
      edges: The features of the edges.
      nodes: What neurons at their ends give to them: products of the senders' features, or of both ends'.
      extra: Further invariant features, or None.
      present: Which edges of a padded graph exist; None: all.
    """

    edges: Edges
    nodes: tuple[Float[Array, "_senders _receivers _features"], ...]
    extra: Float[Array, "_senders _receivers _extra"] | None = None
    present: Bool[Array, "_senders _receivers 1"] | None = None


# (module, pieces, indices of their blocks) -> an array with the axes [senders, receivers, ...] for each
Along: TypeAlias = Callable[[Any, list[Piece], list[int]], list[Array]]


def along_edges(
    module: nn.Module, compute: Along, blocks: Mapping[int, Piece], edges_at_once: int | None
) -> dict[int, Array]:
    """compute(module, pieces, indices) for blocks by index: once for the small ones, by parts for each large one.

    Large are those of more edges than are computed at a time. Their parts are some senders each, and are computed again
    for the gradient, which keeps nothing of them. Where `compute` reduces the axis of senders to one, the result
    has one for each part.

    Args:
      module: The module whose variables `compute` uses.
      compute: What to compute.
      blocks: The blocks by their indices.
      edges_at_once: As `models.ScaleGMN`.
    """
    most = edges_at_once or (_ON_CPU if jax.default_backend() == "cpu" else _ELSEWHERE)
    small = [index for index, piece in blocks.items() if _num_edges(piece) <= most]
    results = dict(zip(small, compute(module, [blocks[index] for index in small], small), strict=True)) if small else {}
    return {
        index: results[index] if index in results else _by_parts(module, compute, piece, index, most)
        for index, piece in blocks.items()
    }


# --- private ------------------------------------------------------------------------------------------------------

_ON_CPU, _ELSEWHERE = 2**11, 2**16  # edges: a CPU's caches hold that many features


def _num_edges(piece: Piece) -> int:
    senders, receivers = num_ends(piece.edges)
    return senders * receivers


def _by_parts(module: nn.Module, compute: Along, block: Piece, index: int, most: int) -> Array:
    senders, receivers = num_ends(block.edges)
    size = max(1, most // receivers)
    size = next((n for n in range(size, size // 2, -1) if senders % n == 0), size)  # or the last part is smaller
    whole = senders - senders % size
    leaves, treedef = jax.tree.flatten(block)
    own = [leaf.shape[0] == senders for leaf in leaves]

    def part(module: nn.Module, rows: list[Array]) -> Array:
        given = iter(rows)
        filled = [next(given) if of_senders else leaf for leaf, of_senders in zip(leaves, own, strict=True)]
        return compute(module, [jax.tree.unflatten(treedef, filled)], [index])[0]

    part = nn.remat(part, prevent_cse=False)
    scan = nn.scan(
        lambda module, _, rows: (None, part(module, rows)),
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    rows = [leaf for leaf, of_senders in zip(leaves, own, strict=True) if of_senders]
    _, results = scan(module, None, [leaf[:whole].reshape(-1, size, *leaf.shape[1:]) for leaf in rows])
    results = results.reshape(-1, *results.shape[2:])
    if whole == senders:
        return results
    return jnp.concatenate([results, part(module, [leaf[whole:] for leaf in rows])])

"""Features of neurons and weights, in the forms whose products cost least.

An edge feature that still is "weight times a vector" is never multiplied edge by edge, and what is computed for the
edges of many blocks is computed for all of them at once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, Union

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn.models._products import times


class Factored(NamedTuple):
    """Edge features that are linear in the edge's weights: sum over k of weights[..., k] * basis[..., k, :].

    `basis` has size 1 along senders or receivers where it does not depend on them.
    """

    weights: Float[Array, "senders receivers k"]
    basis: Float[Array, "#senders #receivers k features"]

    def value(self) -> Float[Array, "senders receivers features"]:
        """The features as one array."""
        senders, receivers, k, _ = self.basis.shape
        if k == 1:
            return self.weights * self.basis[..., 0, :]
        if (senders, receivers) == (1, 1):
            return self.weights @ self.basis[0, 0]
        if receivers == 1:
            return jnp.einsum("srk,skd->srd", self.weights, self.basis[:, 0])
        if senders == 1:
            return jnp.einsum("srk,rkd->srd", self.weights, self.basis[0])
        return jnp.einsum("srk,srkd->srd", self.weights, self.basis)


# An axis word that begins with "_" may differ from one array to the next: layers have different widths.
Edges: TypeAlias = Factored | Float[Array, "_senders _receivers features"]


class Joined(NamedTuple):
    """The edge features of several blocks, one row for each edge.

    Attributes:
      parts: The features of every block; arrays may have size 1 along senders or receivers where they are all equal.
      shapes: The numbers of senders and receivers of every block.
    """

    parts: Sequence[Edges]
    shapes: Sequence[tuple[int, int]]

    def value(self) -> Float[Array, "edges features"]:
        """The features as one array."""
        return jnp.concatenate(
            [
                jnp.broadcast_to(value(part), (*shape, width(part))).reshape(-1, width(part))
                for part, shape in zip(self.parts, self.shapes, strict=True)
            ]
        )

    def split(self, rows: Float[Array, "edges out"]) -> list[Float[Array, "_senders _receivers out"]]:
        """Rows for these edges as one array for each block."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        parts = jnp.split(rows, ends)
        return [part.reshape(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]


Features: TypeAlias = Union[Factored, Joined, Float[Array, "*batch features"]]  # noqa: UP007  # a type that is a string


def num_ends(edges: Edges) -> tuple[int, int]:
    """The numbers of senders and receivers of a block."""
    senders, receivers = (edges.weights if isinstance(edges, Factored) else edges).shape[:2]
    return senders, receivers


def value(x: Features) -> Float[Array, "*batch features"]:
    """The features as one array."""
    return x.value() if isinstance(x, Factored | Joined) else x


def as_dtype(x: Features, dtype: jnp.dtype) -> Features:
    """The features in another dtype."""
    parts = x.parts if isinstance(x, Joined) else [x]
    cast = [
        Factored(part.weights.astype(dtype), part.basis.astype(dtype))
        if isinstance(part, Factored)
        else part.astype(dtype)
        for part in parts
    ]
    return x._replace(parts=cast) if isinstance(x, Joined) else cast[0]


def width(x: Features) -> int:
    """How many features x has."""
    if isinstance(x, Joined):
        return width(x.parts[0])
    return int(x.basis.shape[-1] if isinstance(x, Factored) else x.shape[-1])


def project(x: Features, kernel: Float[Array, "features out"]) -> Float[Array, "*batch out"]:
    """x @ kernel; of what is factored, or equal along senders or receivers, the small array alone is multiplied."""
    if isinstance(x, Factored):
        return Factored(x.weights, x.basis @ kernel).value()
    if not isinstance(x, Joined):
        return times(x, kernel)
    if all(
        not isinstance(part, Factored) and part.shape[:2] == shape
        for part, shape in zip(x.parts, x.shapes, strict=True)
    ):
        return times(x.value(), kernel)
    return x._replace(parts=[project(part, kernel) for part in x.parts]).value()


def project_parts(x: Joined, kernel: Float[Array, "features out"]) -> list[Edges]:
    """x @ kernel for each block; factored features stay factored."""
    if not any(isinstance(part, Factored) for part in x.parts):
        return [*x.split(project(x, kernel))]
    return [
        part._replace(basis=part.basis @ kernel) if isinstance(part, Factored) else times(part, kernel)
        for part in x.parts
    ]


def scale_edges(edges: Edges, nodes: Float[Array, "_senders _receivers features"]) -> Edges:
    """edges * nodes, for features of senders or receivers; factored edges stay factored if that is cheaper."""
    if not isinstance(edges, Factored):
        return edges * nodes
    scaled = edges._replace(basis=edges.basis * nodes[..., None, :])
    products, direct = math.prod(scaled.basis.shape[:3]), math.prod(edges.weights.shape[:2])
    return scaled if products < direct else scaled.value()

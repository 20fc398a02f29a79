"""Relaxed group elements: matrices in place of permutations and signs, through which gradients flow.

One matrix of logits for every hidden layer is softened to a doubly stochastic matrix, with soft signs where signs act,
or hardened to a group element. Positive scales are not relaxed: `symmetry.balance` settles them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from jax_scalegmn import architecture, symmetry
from jax_scalegmn.architecture import Architecture, Axis, Scaling
from jax_scalegmn.matching import assignment
from jax_scalegmn.matching.assignment import Assign
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params


class Soft(NamedTuple):
    """A relaxed group element: one matrix for every hidden layer in place of a permutation with signs.

    Attributes:
      permutation: doubly stochastic; row: neuron of the moved network, column: of the given one.
      signed: the same times a soft sign in [-1, 1] for each entry; `permutation` itself where no sign acts.
    """

    permutation: dict[str, Float[Array, "n n"]]
    signed: dict[str, Float[Array, "n n"]]


def soften(arch: Architecture, logits: Mapping[str, Float[Array, "n n"]], *, num_iterations: int = 20) -> Soft:
    """The maximum-entropy matrices of the logits: entropic optimal transport by Sinkhorn's iteration.

    Permutations: P = argmax <P, X> + H(P) over doubly stochastic matrices (Mena et al. 2018, arXiv 1802.08665). With
    signs, the same problem over pairs P+ + P- doubly stochastic with <P+ - P-, X>: its solution is P = Sinkhorn(log 2
    cosh X) and P+ - P- = P tanh X. So one matrix of logits carries both, its sign is the neuron's sign, and its limit
    for large logits is `harden`: the assignment that maximizes |X|, by which `matching.weight_matching` chooses signs.

    Args:
      arch: the architecture; signs are relaxed in its SIGN layers.
      logits: for every hidden layer, divided by the entropy's weight already.
      num_iterations: of Sinkhorn. They are differentiated one by one: the implicit gradient needs a linear system that
        is singular for nearly hard matrices, where its solvers fail. Rows sum to 1 exactly, columns in the limit.

    Raises:
      ValueError: if the logits do not fit the architecture.
    """
    _check(arch, logits)
    signs = {neurons.name for neurons in arch.hidden if neurons.scaling is Scaling.SIGN}
    scores = {name: jnp.logaddexp(x, -x) if name in signs else x for name, x in logits.items()}
    permutation = _doubly_stochastic(scores, num_iterations)
    signed = {name: p * jnp.tanh(logits[name]) if name in signs else p for name, p in permutation.items()}
    return Soft(permutation, signed)


def harden(arch: Architecture, logits: Mapping[str, Float[Array, "n n"]], *, assign: Assign | None = None) -> Element:
    """The group element next to the logits: an assignment, and the sign of the logit at its place (+1 for 0).

    Args:
      arch: the architecture; layers of other groups than SIGN get scale 1.
      logits: for every hidden layer.
      assign: the assignment solver; None for `assignment.default` of each layer's width.

    Raises:
      ValueError: if the logits do not fit the architecture.
    """
    _check(arch, logits)
    permutation, scale = {}, {}
    for neurons in arch.hidden:
        x, signed = logits[neurons.name], neurons.scaling is Scaling.SIGN
        solve = assignment.default(neurons.width) if assign is None else assign
        order = solve(jnp.abs(x) if signed else x).astype(jnp.int32)
        places = jnp.take_along_axis(x, order[:, None], 1)[:, 0]
        permutation[neurons.name], scale[neurons.name] = order, jnp.where((places < 0) & signed, -1.0, 1.0)
    return Element(permutation, scale)


def logits_of(arch: Architecture, element: Element) -> dict[str, Float[Array, "n n"]]:
    """The element's monomial matrices: 0 but for the scale of neuron i at [i, permutation[i]].

    `harden` brings permutations and signs back; positive scales are lost in it.

    Raises:
      ValueError: if the element does not fit the architecture.
    """
    symmetry.check(arch, element)
    return {
        name: jax.nn.one_hot(order, len(order), dtype=element.scale[name].dtype) * element.scale[name][:, None]
        for name, order in element.permutation.items()
    }


def act(arch: Architecture, soft: Soft, params: Params) -> dict[str, Any]:
    """The relaxed action: every neuron axis times the layer's matrix, `signed` where signs touch it (power 1 or -1).

    With matrices that are signed permutations it is `symmetry.act`.

    Raises:
      ValueError: if matrices or params do not fit the architecture.
    """
    for mapping in soft:
        _check(arch, mapping)
    values = []
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        for position, axis in enumerate(parameter.axes):
            if isinstance(axis, Axis) and axis.neurons in soft.permutation:
                # Variances stay positive: what no sign touches is mixed with weights >= 0.
                matrix = (soft.signed if axis.power else soft.permutation)[axis.neurons]
                value = _contract(matrix, position, value)
        values.append(value)
    return architecture.pack(arch, values)


# --- private ------------------------------------------------------------------------------------------------------


def _doubly_stochastic(scores: Mapping[str, Array], num_iterations: int) -> dict[str, Float[Array, "n n"]]:
    """Layers of one width go through one Sinkhorn, whose gradient is long to compile."""
    solve = sinkhorn.Sinkhorn(
        min_iterations=num_iterations,
        max_iterations=num_iterations,
        inner_iterations=num_iterations,
        implicit_diff=None,
    )

    def one(score: Float[Array, "n n"]) -> Float[Array, "n n"]:
        # Its marginals are 1 / n.
        cost = geometry.Geometry(cost_matrix=-score, epsilon=1.0)
        return len(score) * solve(linear_problem.LinearProblem(cost)).matrix

    found: dict[str, Array] = {}
    for width in {len(score) for score in scores.values()}:
        names = [name for name, score in scores.items() if len(score) == width]
        found |= dict(zip(names, jax.vmap(one)(jnp.stack([scores[name] for name in names])), strict=True))
    return {name: found[name] for name in scores}


def _contract(matrix: Float[Array, "n n"], position: int, value: Array) -> Array:
    """The matrix along one axis, on which the layer may stand several times."""
    moved = jnp.moveaxis(value, position, 0)
    blocks = moved.reshape(-1, len(matrix), *moved.shape[1:])
    mixed = jnp.einsum("ij,rj...->ri...", matrix, blocks, precision="highest")
    return jnp.moveaxis(mixed.reshape(moved.shape), 0, position)


def _check(arch: Architecture, matrices: Mapping[str, Array]) -> None:
    shapes = {name: jnp.shape(matrix) for name, matrix in matrices.items()}
    expected = {neurons.name: (neurons.width, neurons.width) for neurons in arch.hidden}
    if shapes != expected:
        raise ValueError(
            f"The matrices have layers {shapes}; {arch.name!r} expects {expected}. Use jax.vmap for a batch."
        )

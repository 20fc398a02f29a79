"""Relaxed group elements: matrices in place of permutations and signs, through which gradients flow.

Each hidden layer has one matrix of logits. `soften` turns it into a doubly stochastic matrix, with soft signs where
signs act; `harden` turns it into a group element. Positive scales are not relaxed: `symmetry.balance` settles them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import architecture, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Axis
from jax_scalegmn.matching import assignment
from jax_scalegmn.matching.assignment import Assign
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params

__all__ = ["Soft", "harden", "logits_of", "sinkhorn_solver", "soft_act", "soften"]


class Soft(NamedTuple):
    """A relaxed group element: one matrix for every hidden layer in place of a permutation with signs.

    >>> from jax_scalegmn.matching import relaxation
    >>> relaxation.Soft._fields
    ('permutation', 'signed')

    Attributes:
      permutation: Doubly stochastic matrices; row: neuron of the moved network, column: neuron of the given one.
      signed: The same times a soft sign in [-1, 1] for each entry; `permutation` itself where no sign acts.
    """

    permutation: dict[str, Float[Array, "n n"]]
    signed: dict[str, Float[Array, "n n"]]


def soften(arch: Architecture, logits: Mapping[str, Float[Array, "n n"]], *, num_iterations: int = 20) -> Soft:
    """The maximum-entropy matrices of the logits: entropic optimal transport by Sinkhorn's iteration.

    Permutations: P = argmax <P, X> + H(P) over doubly stochastic matrices (Mena et al. 2018, arXiv 1802.08665). With
    signs, the same problem over pairs P+ + P- doubly stochastic with <P+ - P-, X>: its solution is P = Sinkhorn(log 2
    cosh X) and P+ - P- = P tanh X. So one matrix of logits carries both, its sign is the neuron's sign, and its limit
    for large logits is `harden`: the assignment that maximizes |X|, by which `matching.weight_matching` chooses signs.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> soft = sg.matching.relaxation.soften(sg.siren((2, 2, 1)), {"hidden_0": jnp.array([[0.0, -9.0], [9.0, 0.0]])})
    >>> soft.signed["hidden_0"].round(2).tolist()
    [[0.0, -1.0], [1.0, 0.0]]

    Args:
      arch: The architecture; signs are relaxed in layers whose group has them.
      logits: For every hidden layer [n, n], divided by the entropy's weight already.
      num_iterations: The number of Sinkhorn iterations. They are differentiated one by one: the implicit gradient needs
        a linear system that is singular for nearly hard matrices, where its solvers fail. Rows sum to 1 exactly,
        columns in the limit.

    Returns:
      The soft element.

    Raises:
      ImportError: If ott-jax is not installed.
      ValueError: If the logits do not fit the architecture.
    """
    _check(arch, logits)
    signs = {neurons.name for neurons in arch.hidden if neurons.scaling.has_signs}
    scores = {name: jnp.logaddexp(x, -x) if name in signs else x for name, x in logits.items()}
    permutation = _doubly_stochastic(scores, num_iterations)
    signed = {name: p * jnp.tanh(logits[name]) if name in signs else p for name, p in permutation.items()}
    return Soft(permutation, signed)


def harden(arch: Architecture, logits: Mapping[str, Float[Array, "n n"]], *, assign: Assign | None = None) -> Element:
    """The group element next to the logits: an assignment, and the sign of the logit at its place (+1 for 0).

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> element = sg.matching.relaxation.harden(sg.siren((2, 2, 1)), {"hidden_0": jnp.array([[0.0, -2.0], [1.0, 0.0]])})
    >>> element.permutation["hidden_0"].tolist(), element.scale["hidden_0"].tolist()
    ([1, 0], [-1.0, 1.0])

    Args:
      arch: The architecture; layers whose group has no signs get scale 1.
      logits: For every hidden layer [n, n].
      assign: The assignment solver; None for `assignment.default` of each layer's width.

    Returns:
      The element, its permutations in int32.

    Raises:
      ValueError: If the logits do not fit the architecture.
    """
    _check(arch, logits)
    permutation, scale = {}, {}
    for neurons in arch.hidden:
        signs = neurons.scaling.has_signs
        order, scale[neurons.name] = assignment.with_signs(logits[neurons.name], signs=signs, assign=assign)
        permutation[neurons.name] = order.astype(jnp.int32)
    return Element(permutation, scale)


def logits_of(arch: Architecture, element: Element) -> dict[str, Float[Array, "n n"]]:
    """The element's monomial matrices: the scale of neuron i at [i, permutation[i]], 0 elsewhere.

    `harden` recovers permutations and signs from them, but not positive scales.

    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 2, 1))
    >>> sg.matching.relaxation.logits_of(arch, sg.symmetry.identity(arch))["hidden_0"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Args:
      arch: The architecture.
      element: A group element of one network.

    Returns:
      One matrix [n, n] for every hidden layer.

    Raises:
      ValueError: If the element does not fit the architecture.
    """
    symmetry.check(arch, element)
    return {
        name: jax.nn.one_hot(order, len(order), dtype=element.scale[name].dtype) * element.scale[name][:, None]
        for name, order in element.permutation.items()
    }


@stacks.any_container("params", returns=True)
def soft_act(arch: Architecture, soft: Soft, params: Params) -> dict[str, Any]:
    """The relaxed action: every neuron axis times the layer's matrix, `signed` where its signs follow the neuron's.

    With matrices that are signed permutations it is `symmetry.act`.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 2, 1))
    >>> params, matrices = sg.network.init(arch, jax.random.key(0)), {"hidden_0": jax.numpy.eye(2)}
    >>> moved = sg.matching.relaxation.soft_act(arch, sg.matching.relaxation.Soft(matrices, matrices), params)
    >>> bool((moved["Dense_0"]["kernel"] == params["Dense_0"]["kernel"]).all())
    True

    Args:
      arch: The architecture.
      soft: The soft element.
      params: One network's params.

    Returns:
      The moved params.

    Raises:
      ValueError: If matrices or params do not fit the architecture.
    """
    for mapping in soft:
        _check(arch, mapping)
    values = []
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        for position, axis in enumerate(parameter.axes):
            if isinstance(axis, Axis) and axis.neurons in soft.permutation:
                # Variances stay positive: what no sign touches is mixed with weights >= 0.
                matrix = (soft.signed if axis.shows_sign else soft.permutation)[axis.neurons]
                value = _contract(matrix, position, value)
        values.append(value)
    return architecture.pack(arch, values)


def sinkhorn_solver(num_iterations: int) -> Callable[[Float[Array, "n n"]], Float[Array, "n n"]]:
    """Returns score -> doubly stochastic matrix by ott-jax, which is imported here since it is optional.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn.matching import relaxation
    >>> relaxation.sinkhorn_solver(5)(jnp.zeros((2, 2))).round(4).tolist()
    [[0.5, 0.5], [0.5, 0.5]]

    Args:
      num_iterations: The number of Sinkhorn iterations.

    Raises:
      ImportError: If ott-jax is not installed.
    """
    try:
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn
    except ImportError as error:
        raise ImportError('Sinkhorn matching needs ott-jax: pip install "jax-scalegmn[sinkhorn]"') from error
    solve = sinkhorn.Sinkhorn(
        min_iterations=num_iterations,
        max_iterations=num_iterations,
        inner_iterations=num_iterations,
        implicit_diff=None,
    )

    def doubly_stochastic(score: Float[Array, "n n"]) -> Float[Array, "n n"]:
        cost = geometry.Geometry(cost_matrix=-score, epsilon=1.0)
        # Its marginals are 1 / n.
        return len(score) * solve(linear_problem.LinearProblem(cost)).matrix

    return doubly_stochastic


# --- private ------------------------------------------------------------------------------------------------------


def _doubly_stochastic(scores: Mapping[str, Array], num_iterations: int) -> dict[str, Float[Array, "n n"]]:
    """The layers' matrices; all layers of one width in one call, whose gradient takes long to compile."""
    solve = jax.vmap(sinkhorn_solver(num_iterations))
    matrices: dict[str, Array] = {}
    for width in {len(score) for score in scores.values()}:
        names = [name for name, score in scores.items() if len(score) == width]
        matrices |= dict(zip(names, solve(jnp.stack([scores[name] for name in names])), strict=True))
    return {name: matrices[name] for name in scores}


def _contract(matrix: Float[Array, "n n"], position: int, value: Array) -> Array:
    """The matrix times one axis, along which the layer may be repeated."""
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

"""Activation matching: pairs neurons whose activations agree on data.

Each hidden layer is matched by itself, in one pass over the examples and without any search, from the correlations of
the two networks' activations (Li et al. 2016, arXiv 1511.07543; Ainsworth et al. 2023, arXiv 2209.04836,
section 3.1). Only what a neuron computes on the data counts: neurons that are dead or constant there
cannot be told from each other, whatever their weights are.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_scalegmn import architecture, network, stacks, symmetry
from jax_scalegmn.architecture import Architecture, NeuronLayer
from jax_scalegmn.matching import _weights, assignment
from jax_scalegmn.matching._weights import Matching
from jax_scalegmn.matching.assignment import Assign
from jax_scalegmn.network import moments
from jax_scalegmn.network.moments import Moments
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params


@stacks.any_container("params", "target")
def activation_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    x: Float[Array, "examples ..."],
    *,
    permute: bool = True,
    scale: bool = True,
    assign: Assign | None = None,
    batch_size: int = 256,
) -> Matching:
    """Finds the group element that brings the activations of `params` closest to those of `target` on data.

    A hidden layer's score C[i, j] is the correlation of the target's neuron i with params' neuron j over all examples,
    positions and places of `network.activations`. Where signs may be used it is the cosine instead, not centered, so
    that a neuron's mean tells its sign too: the assignment maximizes |C|, and the sign is that of C at the matched
    place (+1 where C is 0). Neurons that never vary on the data correlate with none; they are assigned to the places
    that are left (Li et al. 2016, arXiv 1511.07543; Ainsworth et al. 2023, arXiv 2209.04836, section 3.1).

    Positive scales are those between the norm-balanced gauges, as in `matching.weight_matching`: act(element, params)
    is in the target's own gauge, and members of one orbit are matched exactly. Scales that give the activations the
    target's size would do so too, but enlarge neurons that are nearly 0 on the data, and merged midpoints lose by it.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> target = sg.network.init(arch, jax.random.key(0))
    >>> planted = sg.symmetry.random(arch, jax.random.key(1))
    >>> x = jax.random.normal(jax.random.key(2), (32, 2))
    >>> matching = sg.matching.activation_matching(arch, sg.symmetry.act(arch, planted, target), target, x)
    >>> bool((matching.element.scale["hidden_0"] == sg.symmetry.inverse(arch, planted).scale["hidden_0"]).all())
    True

    Args:
      arch: The architecture of both networks; it has to describe how they compute (`arch.layers`, or `infer`).
      params: The network to transform.
      target: The network to come close to.
      x: The data, [examples, ...] with examples as `network.apply` takes one. A few hundred are enough for layers of a
        hundred neurons.
      permute: Whether neurons may be permuted.
      scale: Whether signs and positive scales may be used, where a layer's group has them.
      assign: The assignment solver, as in `matching.weight_matching`.
      batch_size: The number of examples that are computed at a time; it changes memory and speed alone.

    Returns:
      The matching, with one sweep, converged.

    Raises:
      ValueError: If networks or data do not fit the architecture, if it does not say how to compute its function, or
        if one of its hidden layers has no activation.
    """
    architecture.check_params(arch, target, name="target")
    architecture.check_params(arch, params)
    network.check_examples(arch, x)
    element = _matched(arch, params, target, x, permute=permute, scale=scale, assign=assign, batch_size=batch_size)
    if scale:
        element = symmetry.balanced_pair(arch, params, target).between_given(element)
    similarity = _weights.similarity(arch, symmetry.act(arch, element, params), target)
    return _weights.marked(Matching(element, similarity, jnp.asarray(1), jnp.asarray(True)), params, target)


def correlations(
    arch: Architecture, params: Params, target: Params, x: Float[Array, "examples ..."], *, batch_size: int = 256
) -> dict[str, Float[Array, "n n"]]:
    """By hidden layer the scores of `activation_matching`: |C| where signs may be used, C elsewhere.

    Args:
      arch: The architecture of both networks.
      params: The network whose neurons are the columns.
      target: The network whose neurons are the rows.
      x: The data, [examples, ...].
      batch_size: The number of examples that are computed at a time.

    Returns:
      Layer name -> [target's neurons, params' neurons].
    """
    found = _all_products(arch, params, target, x, batch_size, signed=True)
    scores = {}
    for neurons in arch.hidden:
        products = found[neurons.name]
        score = _inverse_std(products.theirs)[:, None] * products.covariance * _inverse_std(products.ours)
        scores[neurons.name] = jnp.abs(score) if neurons.scaling.has_signs else score
    return scores


# --- private ------------------------------------------------------------------------------------------------------


class _Products(NamedTuple):
    """What one layer's activations in both networks have in common.

    A layer whose signs are sought has means of 0, so that nothing is centered.

    Attributes:
      values: The number of values of each neuron that the averages are over.
      theirs: The moments of the target's neurons.
      ours: The moments of params' neurons.
      covariance: Of the target's neuron i with params' neuron j.
    """

    values: Float[Array, ""]
    theirs: Moments
    ours: Moments
    covariance: Float[Array, "n n"]


@functools.partial(jax.jit, static_argnames=("permute", "scale", "assign", "batch_size"))
def _matched(
    arch: Architecture,
    params: Params,
    target: Params,
    x: Array,
    *,
    permute: bool,
    scale: bool,
    assign: Assign | None,
    batch_size: int,
) -> Element:
    """The order of every hidden layer, and its signs; compiled once for an architecture and shapes."""
    products = _all_products(arch, params, target, x, batch_size, signed=scale)
    orders, signs = {}, {}
    for neurons in arch.hidden:
        order, sign = _best(neurons, products[neurons.name], permute=permute, scale=scale, assign=assign)
        orders[neurons.name], signs[neurons.name] = order, sign
    return Element(orders, signs)


def _all_products(
    arch: Architecture, params: Params, target: Params, x: Array, batch_size: int, *, signed: bool
) -> dict[str, _Products]:
    """The products of every hidden layer; in memory are one batch's activations and [n, n] averages."""

    def add(products: dict[str, _Products], batch: Array) -> tuple[dict[str, _Products], None]:
        ours, theirs = (jax.vmap(lambda x, p=p: network.activations(arch, p, x))(batch) for p in (params, target))
        pooled = {}
        for neurons in arch.hidden:
            centered = not (signed and neurons.scaling.has_signs)
            new = _products(_values(arch, neurons, theirs), _values(arch, neurons, ours), centered=centered)
            pooled[neurons.name] = _pooled(products[neurons.name], new)
        return pooled, None

    products = {neurons.name: _no_products(neurons.width) for neurons in arch.hidden}
    for batches in moments.batches(x, batch_size):
        products, _ = jax.lax.scan(add, products, batches)
    return products


def _values(
    arch: Architecture, neurons: NeuronLayer, activations: Mapping[str, tuple[Array, ...]]
) -> Float[Array, "values n"]:
    """All activations of a layer in a batch, one row for every example, position and place."""
    places = activations[neurons.name]
    if not places:
        raise ValueError(
            f"{arch.name!r}: neuron layer {neurons.name!r} has no value after an activation. "
            "Use matching.weight_matching."
        )
    rows = jnp.concatenate([place.reshape(-1, neurons.width) for place in places])
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


def _no_products(width: int) -> _Products:
    nothing = Moments(jnp.zeros(width), jnp.zeros(width))
    return _Products(jnp.zeros(()), nothing, nothing, jnp.zeros((width, width)))


def _products(theirs: Float[Array, "values n"], ours: Float[Array, "values n"], *, centered: bool) -> _Products:
    their_mean, our_mean = (x.mean(0) if centered else jnp.zeros_like(x[0]) for x in (theirs, ours))
    theirs, ours = theirs - their_mean, ours - our_mean
    values = jnp.asarray(len(ours), ours.dtype)
    covariance = jnp.matmul(theirs.T, ours, precision="highest") / values
    return _Products(
        values,
        Moments(their_mean, jnp.square(theirs).mean(0)),
        Moments(our_mean, jnp.square(ours).mean(0)),
        covariance,
    )


def _pooled(a: _Products, b: _Products) -> _Products:
    """The products over both sets of values, without cancellation (Chan et al. 1983)."""
    parts = stacks.stack(a, b)
    theirs, ours = (moments.pooled(part, parts.values) for part in (parts.theirs, parts.ours))
    share = b.values / (a.values + b.values)
    between = jnp.outer(b.theirs.mean - a.theirs.mean, b.ours.mean - a.ours.mean)
    covariance = a.covariance + share * (b.covariance - a.covariance) + share * (1 - share) * between
    return _Products(a.values + b.values, theirs, ours, covariance)


def _best(
    neurons: NeuronLayer, products: _Products, *, permute: bool, scale: bool, assign: Assign | None
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The assignment of the largest total score, and the signs (1 where none are sought)."""
    score = _inverse_std(products.theirs)[:, None] * products.covariance * _inverse_std(products.ours)
    signs = scale and neurons.scaling.has_signs
    return assignment.with_signs(score, signs=signs, permute=permute, assign=assign)


def _inverse_std(found: Moments) -> Float[Array, " n"]:
    """1 / standard deviation, and 0 for neurons that do not vary."""
    alive = moments.varies(found)
    return jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, found.var, 1)), 0.0)

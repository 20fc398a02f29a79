"""Activation matching: neurons go together that compute alike on data.

Each hidden layer is matched by itself, in one pass over the examples and without any search, from the correlations of
the two networks' activations (Li et al. 2016, arXiv 1511.07543; Ainsworth et al. 2023, arXiv 2209.04836,
section 3.1). What a neuron computes on the data is all that counts: neurons that are dead or constant there
cannot be told from each other, whatever their weights are.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_scalegmn import architecture, network, symmetry
from jax_scalegmn.architecture import Architecture, NeuronLayer, Scaling
from jax_scalegmn.matching import _weights, assignment
from jax_scalegmn.matching._weights import Matching
from jax_scalegmn.matching.assignment import Assign
from jax_scalegmn.network import moments
from jax_scalegmn.types import Params


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
    """The group element under which the activations of `params` come closest to those of `target`.

    A hidden layer's score C[i, j] is the correlation of the target's neuron i with params' neuron j over all examples,
    positions and places of `network.activations`. Where signs may be used it is the cosine instead, not centerd, so
    that a neuron's mean tells its sign too: the assignment maximizes |C|, the sign is that of C at the matched place
    (+1 where C is 0). NeuronLayer that never vary on the data correlate with none: they get what the others leave over.

    Positive scales are those between the norm-balanced gauges, as in `matching.weight_matching`: act(element, params)
    stands in the target's own gauge, and members of one orbit come out exactly. Scales that give the activations the
    target's size do so too, but blow up neurons that the data hardly show: merged midpoints lose by it.

    Args:
      arch: of both networks, with layers to compute.
      params: the network to transform.
      target: the network to come close to.
      x: the data, as `network.apply` takes one; a few hundred examples settle layers of a hundred neurons.
      permute: whether neurons may be permuted.
      scale: whether signs (SIGN layers) and positive scales (POSITIVE layers) may be used.
      assign: as in `matching.weight_matching`.
      batch_size: examples that are computed at a time; it changes nothing but memory and speed.

    Returns:
      The matching; of its one sweep it says converged.

    Raises:
      ValueError: if networks or data do not fit the architecture, if its function is not described by layers, or if
        one of its hidden layers shows behind no activation.
    """
    architecture.unpack(arch, target, name="target")
    architecture.unpack(arch, params)
    network.check_examples(arch, x)
    found = _all_products(arch, params, target, x, batch_size, signed=scale)
    best = {n.name: _best(n, found[n.name], permute=permute, scale=scale, assign=assign) for n in arch.hidden}
    orders, signs = ({name: pair[i] for name, pair in best.items()} for i in range(2))
    element = symmetry.Element(orders, signs)
    if scale:
        ours, theirs = symmetry.balance(arch, params), symmetry.balance(arch, target)
        element = symmetry.compose(arch, symmetry.inverse(arch, theirs), symmetry.compose(arch, element, ours))
    similarity = _weights.similarity(arch, symmetry.act(arch, element, params), target)
    return Matching(element, similarity, jnp.asarray(1), jnp.asarray(True))


# --- private ------------------------------------------------------------------------------------------------------


class _Products(NamedTuple):
    """Averages over so many values of every neuron of the target ("their") and of params ("our"); `both`: covariances.

    A layer whose signs are sought has means of 0, so that nothing is centerd.
    """

    values: Float[Array, ""]
    their_mean: Float[Array, " n"]
    our_mean: Float[Array, " n"]
    their_var: Float[Array, " n"]
    our_var: Float[Array, " n"]
    both: Float[Array, "n n"]


def _all_products(
    arch: Architecture, params: Params, target: Params, x: Array, batch_size: int, *, signed: bool
) -> dict[str, _Products]:
    """Of every hidden layer, in batches: besides one batch's activations only [n, n] is held."""

    def add(found: dict[str, _Products], batch: Array) -> tuple[dict[str, _Products], None]:
        ours, theirs = (jax.vmap(lambda one, p=p: network.activations(arch, p, one))(batch) for p in (params, target))
        new = {}
        for neurons in arch.hidden:
            centerd = not (signed and neurons.scaling is Scaling.SIGN)
            one = _products(_values(arch, neurons, theirs), _values(arch, neurons, ours), centerd=centerd)
            new[neurons.name] = _together(found[neurons.name], one)
        return new, None

    found = {neurons.name: _nothing(neurons.width) for neurons in arch.hidden}
    for stack in moments.batches(x, batch_size):
        found, _ = jax.lax.scan(add, found, stack)
    return found


def _values(
    arch: Architecture, neurons: NeuronLayer, found: Mapping[str, tuple[Array, ...]]
) -> Float[Array, "values n"]:
    """All that the layer shows in a batch, one row for every example, position and place."""
    places = found[neurons.name]
    if not places:
        raise ValueError(
            f"{arch.name!r}: neuron layer {neurons.name!r} shows behind no activation. Use matching.weight_matching."
        )
    rows = jnp.concatenate([place.reshape(-1, neurons.width) for place in places])
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


def _nothing(width: int) -> _Products:
    vector = jnp.zeros(width)
    return _Products(jnp.zeros(()), vector, vector, vector, vector, jnp.zeros((width, width)))


def _products(theirs: Float[Array, "values n"], ours: Float[Array, "values n"], *, centerd: bool) -> _Products:
    their_mean, our_mean = (x.mean(0) if centerd else jnp.zeros_like(x[0]) for x in (theirs, ours))
    theirs, ours = theirs - their_mean, ours - our_mean
    values = jnp.asarray(len(ours), ours.dtype)
    both = jnp.matmul(theirs.T, ours, precision="highest") / values
    return _Products(values, their_mean, our_mean, jnp.square(theirs).mean(0), jnp.square(ours).mean(0), both)


def _together(a: _Products, b: _Products) -> _Products:
    """The averages over both sets of values, without cancellation (Chan et al. 1983)."""
    values = a.values + b.values
    share = b.values / values

    def mix(x: Array, y: Array) -> Array:
        return x + share * (y - x)

    spread = share * (1 - share)
    their_step, our_step = b.their_mean - a.their_mean, b.our_mean - a.our_mean
    return _Products(
        values,
        mix(a.their_mean, b.their_mean),
        mix(a.our_mean, b.our_mean),
        mix(a.their_var, b.their_var) + spread * jnp.square(their_step),
        mix(a.our_var, b.our_var) + spread * jnp.square(our_step),
        mix(a.both, b.both) + spread * jnp.outer(their_step, our_step),
    )


def _best(
    neurons: NeuronLayer, found: _Products, *, permute: bool, scale: bool, assign: Assign | None
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The assignment of the largest total score, and the signs (1 where none are sought)."""
    score = _inverse_std(found.their_var, found.their_mean)[:, None] * found.both
    score = score * _inverse_std(found.our_var, found.our_mean)
    signed = scale and neurons.scaling is Scaling.SIGN
    order = jnp.arange(neurons.width)
    if permute:
        solve = assignment.default(neurons.width) if assign is None else assign
        order = solve(jnp.abs(score) if signed else score)
    sign = jnp.ones(neurons.width)
    if signed:
        sign = jnp.where(jnp.take_along_axis(score, order[:, None], 1)[:, 0] < 0, -1.0, 1.0)
    return order, sign


def _inverse_std(var: Float[Array, " n"], mean: Float[Array, " n"]) -> Float[Array, " n"]:
    """0 for neurons that vary by no more than roundings of their values."""
    alive = var > jnp.square(8 * jnp.finfo(var.dtype).eps * mean)
    return jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, var, 1)), 0.0)

"""The same encoder once more, edge by edge: gathers, `segment_sum`, and every map applied straight from the equations.

This is how graph networks are usually written, and nothing here is rewritten for speed: flat nodes [N, d] and edges
[E, d], rho(x) + rho(-x) as two mlps, every rule evaluated everywhere and chosen by a mask. It reads the variables of
`models.Encoder`, so that both compute one function by two routes, and shares no layer with it.

Equations: arXiv 2406.10685, section 5 and appendix; types and positional encodings as in arXiv 2403.12143.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax import Array

from jax_scalegmn.architecture import Scaling
from jax_scalegmn.models import graph
from jax_scalegmn.models._heads import Encoder, Readout
from jax_scalegmn.models._layers import EPSILON, IO, PUBLISHED_NORM_EPSILON, Canonical
from jax_scalegmn.models._scalegmn import ScaleGMN
from jax_scalegmn.models.graph import Topology

__all__ = ["encode"]


def encode(model: Encoder, variables: Any, built: jraph.GraphsTuple) -> Array:
    """The embedding of one network's graph: `model.apply(variables, built, method="read")`, without dropout.

    Args:
      model: the encoder; its scales have to be divided out before the graph is built.
      variables: of the encoder.
      built: of `graph.from_params`, padded if the encoder is for a bucket.

    Raises:
      ValueError: if the encoder has scales.
    """
    if model.scales is not None:
        raise ValueError("Graphs are read as they are: divide the scales out before the graph is built, use None here.")
    gmn, topo, params = model.gmn, graph.topology(model.arch), variables["params"]
    if gmn.dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(gmn.dtype), params)
    net = _network(gmn, topo, built)
    ends = model.readout is Readout.LAST_LAYER
    h = _features(gmn, params["gmn"], topo, net, built, ends=ends)
    inputs, outputs = (h[net.ends[end]].reshape(-1) for end in ("inputs", "outputs"))
    if ends and gmn.bidirectional:
        parts = (("outputs", outputs), ("inputs", inputs))
        joint = jnp.concatenate([part @ params[name]["kernel"] + params[name]["bias"] for name, part in parts])
    elif ends:
        joint = outputs
    elif model.readout is Readout.DEEP_SET:
        joint = _sum(gmn, _mlp(params["local"], h), net.present)
    else:
        inner = _sum(gmn, _invariant(gmn, params["invariant"], h, net.groups), net.present & ~net.io)
        joint = jnp.concatenate([inner, h[np.flatnonzero(net.io)].reshape(-1)])
    return _mlp(params["mlp"], joint)


# --- private: what is where -----------------------------------------------------------------------------------------


class _Network(NamedTuple):
    """Masks and counts of all nodes [N] and edges [E].

    `groups`: of each group, the nodes on which it acts; inputs and outputs count to the first group with scales.
    `senders_in_block`, `receivers_in_block`: of each edge, how many nodes its kernel joins on that side.
    """

    senders: Array
    receivers: Array
    io: np.ndarray
    inputs: np.ndarray
    ends: dict[str, np.ndarray]
    layer: np.ndarray
    present: Array | np.ndarray
    present_edges: Array | np.ndarray
    groups: dict[Scaling, Array | np.ndarray]
    lifted: np.ndarray
    senders_in_block: Array
    receivers_in_block: Array


def _network(gmn: ScaleGMN, topo: Topology, built: jraph.GraphsTuple) -> _Network:
    layer = np.zeros(topo.num_nodes, int)
    of = {name: np.zeros(topo.num_nodes, bool) for name in topo.nodes}
    for index, (name, where) in enumerate(topo.nodes.items()):
        layer[where], of[name][where] = index, True
    none = np.zeros(topo.num_nodes, bool)
    inputs, outputs = (sum((of[name] for name in names), none) for names in (topo.inputs, topo.outputs))
    presence: graph.Presence | None = built.globals
    fixed = next((s for s in graph.SCALED if topo.is_under(s)), Scaling.PERMUTATION)
    groups: dict[Scaling, Any] = dict.fromkeys(Scaling, none) | {fixed: inputs | outputs}
    for name, possible in topo.scalings.items():
        for scaling in possible:
            acts = True if presence is None else presence.scalings[name][scaling.value]
            groups[scaling] = groups[scaling] | (of[name] & acts)
    block = np.concatenate([np.full(b.edges.stop - b.edges.start, i) for i, b in enumerate(topo.blocks)])
    nodes = np.ones(topo.num_nodes, bool) if presence is None else presence.nodes
    edges = np.ones(topo.num_edges, bool) if presence is None else presence.edges

    def in_block(other_end: Array) -> Array:
        place = block * topo.num_nodes + other_end
        count = jraph.segment_sum(jnp.asarray(edges, int), place, len(topo.blocks) * topo.num_nodes)
        return jnp.maximum(count[place], 1)

    return _Network(
        built.senders,
        built.receivers,
        inputs | outputs,
        inputs,
        {"inputs": np.flatnonzero(inputs), "outputs": np.flatnonzero(outputs)},
        layer,
        nodes,
        edges,
        groups,
        np.asarray([b.lifted for b in topo.blocks])[block],
        in_block(built.receivers),
        in_block(built.senders),
    )


# --- private: message passing ---------------------------------------------------------------------------------------


def _features(
    gmn: ScaleGMN, p: Mapping[str, Any], topo: Topology, net: _Network, built: jraph.GraphsTuple, *, ends: bool
) -> Array:
    """Node features behind the last layer; where only the ends are read, hidden ones stay those of the layer before."""
    plain = not topo.is_under(*graph.SCALED)
    h, e, encoding = _start(gmn, p, topo, net, built, plain)
    back = e
    if gmn.bidirectional and not gmn.parity and topo.is_under(Scaling.POSITIVE):
        back = e * _degree_reversals(topo, net, built)[:, None].astype(e.dtype)
    for index in range(gmn.num_layers):
        layer, last = p[f"layer_{index}"], index + 1 == gmn.num_layers
        forward = (net.senders, net.receivers, net.senders_in_block, "")
        backward = (net.receivers, net.senders, net.receivers_in_block, "backward_")
        sums = []
        for edges, (senders, receivers, count, prefix) in ((e, forward), (back, backward))[: 1 + gmn.bidirectional]:
            if plain:
                m = _mlp(layer[f"{prefix}message"], jnp.concatenate([edges, h[senders]], -1))
            else:
                m = (h[senders] @ layer[f"{prefix}sender_kernel"]) * (edges @ layer[f"{prefix}edge_kernel"])
                read_at = senders if gmn.bidirectional else receivers
                extra = encoding[read_at] if gmn.encoding_features else None
                m = _equivariants(gmn, layer[f"{prefix}message"], m, _at(net, receivers), extra)
            if gmn.normalized:
                m = m / jnp.sqrt(count)[:, None].astype(m.dtype)
            m = jnp.where(net.present_edges[:, None], m, 0)
            sums.append(jraph.segment_sum(m, receivers, topo.num_nodes))
        joined = jnp.concatenate([h, *sums], -1)
        if plain:
            new = _mlp(layer["update"], joined)
        else:
            everywhere = _at(net, np.arange(topo.num_nodes))
            new = _equivariants(gmn, layer["update"], joined, everywhere, encoding if gmn.encoding_features else None)
        if gmn.skip:
            new = new + h @ layer["skip_kernel"]
        if not last:
            parts = (h[net.senders], h[net.receivers])
            if plain:
                e = _mlp(layer["edge_update"], jnp.concatenate([e, *parts], -1))
            else:
                e = _edge_update(gmn, layer["edge_update"], e, h, net.groups, net.senders, net.receivers)
                # Signs and permutations: backward messages read the first edges in every layer, as published.
                if "backward_edge_update" in layer:
                    back = _edge_update(
                        gmn, layer["backward_edge_update"], back, h, net.groups, net.receivers, net.senders
                    )
        if last and ends:
            updated = net.io if gmn.bidirectional else net.io & ~net.inputs
            new = jnp.where(updated[:, None], new, h)
        h = jnp.where(net.present[:, None], new, 0)
    return h


def _start(
    gmn: ScaleGMN, p: Mapping[str, Any], topo: Topology, net: _Network, built: jraph.GraphsTuple, plain: bool
) -> tuple[Array, Array, Array | None]:
    """The first features of nodes and edges, and the positional encoding of every node."""
    dtype = p["node_kernel"].dtype if gmn.dtype is None else gmn.dtype
    along, against, _ = topo.columns
    follows, opposes, free = jnp.split(built.nodes, [along, along + against], -1)
    vectors = jnp.concatenate([follows, _reciprocal(opposes)], -1).astype(dtype)
    h = vectors @ p["node_kernel"]
    encoding = p["node_encoding"][topo.node_types] if gmn.node_encoding else None
    invariant = encoding
    if free.shape[-1]:
        invariant = free.astype(dtype) @ p["free_kernel"] + (1 if encoding is None else encoding)
    if invariant is not None:
        h = jnp.where(plain | net.io[:, None], h + invariant, h * invariant)
    e = built.edges.astype(dtype) @ p["edge_kernel"]
    if gmn.edge_encoding:
        types = np.concatenate([np.broadcast_to(b.types, b.shape).reshape(-1) for b in topo.blocks])
        e = e + p["edge_encoding"][types] if plain else e * p["edge_encoding"][types]
    for index, block in enumerate(topo.blocks):
        if block.lifted:
            of_block = np.isin(np.arange(topo.num_edges), np.arange(topo.num_edges)[block.edges])
            lift = (vectors @ p[f"lift_kernel_{index}"])[net.receivers]
            e = jnp.where(of_block[:, None], e * lift, e)
    return jnp.where(net.present[:, None], h, 0), e, encoding


def _degree_reversals(topo: Topology, net: _Network, built: jraph.GraphsTuple) -> Array:
    """What turns the degree of every weight around under positive scales: s_sender / s_receiver, one an edge.

    s = 1 at inputs and outputs, elsewhere s_i = b_i^2 + mean over incoming j of w_ij^2 s_j, layer behind layer.
    """
    along, against, _ = topo.columns
    nodes, edges = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (built.nodes, built.edges))
    own = jnp.square(nodes[:, :along]).sum(-1) + jnp.square(_reciprocal(nodes[:, along : along + against])).sum(-1)
    layer = jnp.asarray(net.layer)
    comes_before = layer[net.senders] < layer[net.receivers]
    w = jnp.where(comes_before & ~net.lifted, jnp.square(edges).sum(-1), 0) / net.senders_in_block
    s = jnp.ones(topo.num_nodes, own.dtype)
    for index in range(len(topo.nodes)):
        incoming = jraph.segment_sum(w * s[net.senders], net.receivers, topo.num_nodes)
        s = jnp.where((net.layer == index) & ~net.io, own + incoming, s)
    positive = jnp.asarray(net.groups[Scaling.POSITIVE] & ~net.io)
    ratio = s[net.senders] * _reciprocal(s[net.receivers])
    return jnp.where(positive[net.senders] | positive[net.receivers], ratio, 1)


def _edge_update(
    gmn: ScaleGMN,
    p: Mapping[str, Any],
    e: Array,
    h: Array,
    groups: Mapping[Scaling, Any],
    senders: Array,
    receivers: Array,
) -> Array:
    """(e @ W) * phi([c(h_sender), c(h_receiver)])."""
    c = _canonical(gmn, p.get("canonical", {}), h, groups)
    return (e @ p["kernel"]) * _mlp(p["phi"], jnp.concatenate([c[senders], c[receivers]], -1))


# --- private: maps, a row each --------------------------------------------------------------------------------------


class _Rules(NamedTuple):
    """Of every row: whether it belongs to an input or output, to an input, and which group acts on it."""

    io: Array | np.ndarray
    inputs: Array | np.ndarray
    groups: dict[Scaling, Any]


def _at(net: _Network, nodes: Any) -> _Rules:
    """The rules of those nodes."""
    groups = {scaling: jnp.asarray(acts)[nodes] for scaling, acts in net.groups.items()}
    return _Rules(jnp.asarray(net.io)[nodes], jnp.asarray(net.inputs)[nodes], groups)


def _mlp(p: Mapping[str, Any], x: Array) -> Array:
    """Linear, layer normalization, silu, linear."""
    u = x @ p["kernel_in"] + p["bias_in"]
    wide = u.astype(jnp.promote_types(u.dtype, jnp.float32))
    wide = (wide - wide.mean(-1, keepdims=True)) / jnp.sqrt(wide.var(-1, keepdims=True) + EPSILON)
    a = jax.nn.silu(wide * p["norm_scale"] + p["norm_bias"]).astype(u.dtype)
    return a @ p["kernel_out"] + p["bias_out"]


def _canonical(gmn: ScaleGMN, p: Mapping[str, Any], x: Array, groups: Mapping[Scaling, Any]) -> Array:
    """c(x): each group's map on every row, chosen by the masks."""
    if gmn.canonical is Canonical.ABLATED:
        return _mlp(p["rho"], x)
    c = jnp.where(groups[Scaling.POSITIVE][:, None], _normed(gmn, x), x)
    if gmn.canonical is Canonical.ABSOLUTE:
        return jnp.where(groups[Scaling.SIGN][:, None], jnp.abs(x), c)
    if "rho" not in p:  # no layer has signs
        return c
    return jnp.where(groups[Scaling.SIGN][:, None], _mlp(p["rho"], x) + _mlp(p["rho"], -x), c)


def _invariant(
    gmn: ScaleGMN, p: Mapping[str, Any], x: Array, groups: Mapping[Scaling, Any], extra: Array | None = None
) -> Array:
    """phi([c(x), extra])."""
    c = _canonical(gmn, p.get("canonical", {}), x, groups)
    return _mlp(p["phi"], c if extra is None else jnp.concatenate([c, extra], -1))


def _equivariants(gmn: ScaleGMN, p: Mapping[str, Any], x: Array, rules: _Rules, extra: Array | None) -> Array:
    """Several ScaleEq maps in sequence, each (x @ gamma) * ScaleInv(x), and its rule for inputs and outputs."""
    for index in range(len(p)):
        x = _equivariant(gmn, p[f"maps_{index}"], x, rules, extra)
    return x


def _equivariant(gmn: ScaleGMN, p: Mapping[str, Any], x: Array, rules: _Rules, extra: Array | None) -> Array:
    """A rule without parameters is one that no row of this map has."""
    linear = x @ p["gamma"]["kernel"] if "gamma" in p else None
    read = x if extra is None else jnp.concatenate([x, extra], -1)
    out: Any = 0
    if "gate" in p:
        out = linear * _invariant(gmn, p["gate"], x, rules.groups, extra)
    for name, here in (("end_input", rules.io & rules.inputs), ("end_output", rules.io & ~rules.inputs)):
        name = name if gmn.io is IO.SEPARATE else "end_output"
        if name in p:
            free = _mlp(p[name], read)
            out = jnp.where(here[:, None], linear * free if gmn.io is IO.GATE else free, out)
    return out


def _normed(gmn: ScaleGMN, x: Array) -> Array:
    """x / |x|, and 0 where x is 0."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.square(wide).sum(-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1)) + (PUBLISHED_NORM_EPSILON if gmn.parity else 0)
    return jnp.where(square > 0, wide / norm, 0).astype(x.dtype)


def _reciprocal(x: Array) -> Array:
    """1 / x, and 0 where x is 0."""
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


def _sum(gmn: ScaleGMN, rows: Array, where: Any) -> Array:
    """The sum of some rows, over the root of their number where the model is normalized."""
    total = jnp.where(where[:, None], rows, 0).sum(0)
    return total / jnp.sqrt(where.sum()).astype(total.dtype) if gmn.normalized else total

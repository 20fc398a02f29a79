"""The encoder edge by edge: the equations in their readable form, and the oracle of the tests.

This is how graph networks are usually written: flat nodes [N, d] and edges [E, d], gathers and `segment_sum`, every map
applied straight from its equation, every rule evaluated everywhere and chosen by a mask. Nothing is rewritten for
speed. It reads the variables of `models.Encoder` and shares no layer with it, so that both compute one function by two
routes. The model, for an edge from sender j to receiver i with weight w_ij and for a neuron i with vectors x_i
(Kalogeropoulos et al. 2024, arXiv 2406.10685, section 5 and appendix; types and encodings p as in Kofinas et al. 2024,
arXiv 2403.12143):

    first features      h_i = (x_i U_node) * p_type(i)      e_ij = (w_ij U_edge) * p_type(ij)          `_start`
                        (a sum with p at inputs and outputs, on which no group acts)
    message             m_ij = ScaleEq([h_j W_v] * [e_ij W_e])                                         `_messages`
    node update         h_i' = ScaleEq([h_i, sum_j m_ij]) + h_i W_skip                                 `_new_nodes`
    edge update         e_ij' = (e_ij W) * phi([c(h_j), c(h_i)])                                       `_edge_update`
    readout             z = mlp([sum over hidden i of phi(c(h_i)), h of inputs and outputs])           `encode`

    ScaleEq(x) = (x Gamma) * phi(c(x))                                                                 `_equivariant`
    c(x) = rho(x) + rho(-x)  where signs act                                                           `_canonical`
         = x / |x|           where positive scales act
         = x                 where no scale acts

    mlp, phi, rho: linear, layer normalization, silu, linear                                           `_mlp`

A backward edge carries w_ij s_j / s_i, which follows its receiver j (`_degree_reversals`). Where all layers have
permutations only, mlps take the place of messages and updates: of [e_ij, h_j], [h_i, sum_j m_ij] and [e_ij, h_j, h_i].
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

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

# Senders and receivers: of NumPy where the topology is a constant, of JAX where graphs are stacked.
Indices: TypeAlias = Array | np.ndarray


def encode(model: Encoder, variables: Any, built: jraph.GraphsTuple) -> Array:
    """The embedding of one network's graph: `model.apply(variables, built, method="read")`, without dropout.

    Args:
      model: The encoder; its scales have to be divided out before the graph is built.
      variables: The encoder's variables.
      built: The graph of `graph.from_params`, padded if the encoder is for a bucket.

    Returns:
      The embedding [latent].

    Raises:
      ValueError: If the encoder has scales.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> built = sg.models.graph.from_params(arch, sg.network.init(arch, jax.random.key(0)))
    >>> model = sg.Encoder(sg.ScaleGMN(arch, features=4, num_layers=1), latent=3)
    >>> variables = sg.models.abstract_variables(model)
    >>> jax.eval_shape(lambda variables: sg.models.reference.encode(model, variables, built), variables).shape
    (3,)
    """
    if model.scales is not None:
        raise ValueError("Graphs are read as they are: divide the scales out before the graph is built, use None here.")
    gmn, topo, params = model.gmn, graph.topology(model.arch), variables["params"]
    if gmn.dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(gmn.dtype), params)
    net = _network(topo, built)
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

    Attributes:
      io, inputs: The nodes that are inputs or outputs, and the inputs alone.
      ends: The indices of the inputs and of the outputs.
      layer: The index of every node's neuron layer.
      present, present_edges: What of a padded graph exists.
      groups: For each group, the nodes on which it acts.
      lifted: The edges whose kernel does not follow its receiver (`graph.EdgeBlock.lifted`).
      unsigned: The edges whose kernel does not follow the sign of its sender, and of its receiver.
      senders_in_block, receivers_in_block: For each edge, how many nodes its kernel joins on that side.
    """

    senders: Indices
    receivers: Indices
    io: np.ndarray
    inputs: np.ndarray
    ends: dict[str, np.ndarray]
    layer: np.ndarray
    present: Array | np.ndarray
    present_edges: Array | np.ndarray
    groups: dict[Scaling, Array | np.ndarray]
    lifted: np.ndarray
    unsigned: tuple[np.ndarray, np.ndarray]
    senders_in_block: Array
    receivers_in_block: Array


def _network(topo: Topology, built: jraph.GraphsTuple) -> _Network:
    layer = np.zeros(topo.num_nodes, int)
    for index, where in enumerate(topo.nodes.values()):
        layer[where] = index
    mask: graph.Mask | None = built.globals
    inputs, outputs = (_nodes_of(topo, names) for names in (topo.inputs, topo.outputs))
    block = np.concatenate([np.full(b.edges.stop - b.edges.start, i) for i, b in enumerate(topo.blocks)])
    nodes = np.ones(topo.num_nodes, bool) if mask is None else mask.nodes
    edges = np.ones(topo.num_edges, bool) if mask is None else mask.edges

    def in_block(other_end: Indices) -> Array:
        place = block * topo.num_nodes + other_end
        count = jraph.segment_sum(jnp.asarray(edges, int), place, len(topo.blocks) * topo.num_nodes)
        return jnp.maximum(count[place], 1)

    unsigned = np.asarray([b.unsigned for b in topo.blocks])
    return _Network(
        built.senders,
        built.receivers,
        inputs | outputs,
        inputs,
        {"inputs": np.flatnonzero(inputs), "outputs": np.flatnonzero(outputs)},
        layer,
        nodes,
        edges,
        _groups(topo, mask),
        np.asarray([b.lifted for b in topo.blocks])[block],
        (unsigned[block, 0], unsigned[block, 1]),
        in_block(built.receivers),
        in_block(built.senders),
    )


def _nodes_of(topo: Topology, names: frozenset[str]) -> np.ndarray:
    """A mask of the nodes of some neuron layers."""
    nodes = np.zeros(topo.num_nodes, bool)
    for name in names:
        nodes[topo.nodes[name]] = True
    return nodes


def _groups(topo: Topology, mask: graph.Mask | None) -> dict[Scaling, Any]:
    """Masks of the nodes on which each group acts; for canonical maps one of them covers inputs and outputs, too."""
    groups: dict[Scaling, Any] = dict.fromkeys(Scaling, np.zeros(topo.num_nodes, bool))
    groups[topo.io_scaling] = _nodes_of(topo, topo.io)
    for name, possible in topo.scalings.items():
        for scaling in possible:
            acts = True if mask is None else mask.scalings[name][scaling.value]
            groups[scaling] = groups[scaling] | (_nodes_of(topo, frozenset({name})) & acts)
    return groups


# --- private: message passing ---------------------------------------------------------------------------------------


def _features(
    gmn: ScaleGMN, p: Mapping[str, Any], topo: Topology, net: _Network, built: jraph.GraphsTuple, *, ends: bool
) -> Array:
    """Node features after the last layer; where only the ends are read, hidden ones stay those of the layer before."""
    h, e, encoding = _start(gmn, p, topo, net, built)
    back = e
    if gmn.bidirectional and not gmn.parity and topo.has_sizes:
        back = e * _degree_reversals(topo, net, built)[:, None].astype(e.dtype)
    for index in range(gmn.num_layers):
        layer, last = p[f"layer_{index}"], index + 1 == gmn.num_layers
        sums = [_messages(gmn, layer, topo, net, h, e, encoding, forward=True)]
        if gmn.bidirectional:
            sums.append(_messages(gmn, layer, topo, net, h, back, encoding, forward=False))
        new = _new_nodes(gmn, layer, topo, net, h, sums, encoding)
        if not last:
            e, back = _new_edges(gmn, layer, topo, net, h, e, back)
        if last and ends:
            updated = net.io if gmn.bidirectional else net.io & ~net.inputs
            new = jnp.where(updated[:, None], new, h)
        h = jnp.where(net.present[:, None], new, 0)
    return h


def _messages(
    gmn: ScaleGMN,
    layer: Mapping[str, Any],
    topo: Topology,
    net: _Network,
    h: Array,
    e: Array,
    encoding: Array | None,
    *,
    forward: bool,
) -> Array:
    """sum_j m_ij at every node i, from senders to receivers or, backward, from receivers to senders."""
    senders, receivers, count, hidden = net.senders, net.receivers, net.senders_in_block, net.unsigned
    if not forward:
        senders, receivers, count, hidden = net.receivers, net.senders, net.receivers_in_block, net.unsigned[::-1]
    prefix = "" if forward else "backward_"
    if topo.has_scales:
        read = h[senders] @ layer[f"{prefix}sender_kernel"]
        m = jnp.where(hidden[0][:, None], jnp.abs(read), read) * (e @ layer[f"{prefix}edge_kernel"])
        read_at = senders if gmn.bidirectional else receivers
        extra = encoding[read_at] if gmn.encoding_features and encoding is not None else None
        m = _equivariants(gmn, layer[f"{prefix}message"], m, _at(net, receivers), extra)
        if f"{prefix}sign_kernel" in layer:
            signs = (_normed(gmn, h) @ layer[f"{prefix}sign_kernel"])[receivers]
            m = jnp.where(hidden[1][:, None], m * signs, m)
    else:
        m = _mlp(layer[f"{prefix}message"], jnp.concatenate([e, h[senders]], -1))
    if gmn.normalized:
        m = m / jnp.sqrt(count)[:, None].astype(m.dtype)
    m = jnp.where(net.present_edges[:, None], m, 0)
    return jraph.segment_sum(m, receivers, topo.num_nodes)


def _new_nodes(
    gmn: ScaleGMN,
    layer: Mapping[str, Any],
    topo: Topology,
    net: _Network,
    h: Array,
    sums: list[Array],
    encoding: Array | None,
) -> Array:
    """h' = ScaleEq([h, sums]) + h W_skip."""
    joined = jnp.concatenate([h, *sums], -1)
    if topo.has_scales:
        everywhere = _at(net, np.arange(topo.num_nodes))
        new = _equivariants(gmn, layer["update"], joined, everywhere, encoding if gmn.encoding_features else None)
    else:
        new = _mlp(layer["update"], joined)
    return new + h @ layer["skip_kernel"] if gmn.skip else new


def _new_edges(
    gmn: ScaleGMN, layer: Mapping[str, Any], topo: Topology, net: _Network, h: Array, e: Array, back: Array
) -> tuple[Array, Array]:
    """e' of the forward and of the backward edges."""
    if not topo.has_scales:
        return _mlp(layer["edge_update"], jnp.concatenate([e, h[net.senders], h[net.receivers]], -1)), back
    e = _edge_update(gmn, layer["edge_update"], e, h, net.groups, net.senders, net.receivers)
    # Signs and permutations: backward messages read the first edges in every layer, as published.
    if "backward_edge_update" in layer:
        back = _edge_update(gmn, layer["backward_edge_update"], back, h, net.groups, net.receivers, net.senders)
    return e, back


def _start(
    gmn: ScaleGMN, p: Mapping[str, Any], topo: Topology, net: _Network, built: jraph.GraphsTuple
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
        h = jnp.where(net.io[:, None] | (not topo.has_scales), h + invariant, h * invariant)
    e = built.edges.astype(dtype) @ p["edge_kernel"]
    if gmn.edge_encoding:
        types = np.concatenate([np.broadcast_to(b.types, b.shape).reshape(-1) for b in topo.blocks])
        e = e * p["edge_encoding"][types] if topo.has_scales else e + p["edge_encoding"][types]
    for index, block in enumerate(topo.blocks):
        if block.lifted:
            of_block = np.isin(np.arange(topo.num_edges), np.arange(topo.num_edges)[block.edges])
            lift = (vectors @ p[f"lift_kernel_{index}"])[net.receivers]
            e = jnp.where(of_block[:, None], e * lift, e)
    return jnp.where(net.present[:, None], h, 0), e, encoding


def _degree_reversals(topo: Topology, net: _Network, built: jraph.GraphsTuple) -> Array:
    """The factor s_sender / s_receiver of every edge, which reverses the degree of its weight under positive scales.

    s = 1 at inputs and outputs, elsewhere s_i = b_i^2 + mean over incoming j of w_ij^2 s_j, layer after layer.
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
    positive = jnp.asarray((net.groups[Scaling.POSITIVE] | net.groups[Scaling.NONZERO]) & ~net.io)
    ratio = s[net.senders] * _reciprocal(s[net.receivers])
    return jnp.where(positive[net.senders] | positive[net.receivers], ratio, 1)


def _edge_update(
    gmn: ScaleGMN,
    p: Mapping[str, Any],
    e: Array,
    h: Array,
    groups: Mapping[Scaling, Any],
    senders: Indices,
    receivers: Indices,
) -> Array:
    """(e @ W) * phi([c(h_sender), c(h_receiver)])."""
    c = _canonical(gmn, p.get("canonical", {}), h, groups)
    return (e @ p["kernel"]) * _mlp(p["phi"], jnp.concatenate([c[senders], c[receivers]], -1))


# --- private: maps, a row each --------------------------------------------------------------------------------------


class _Rules(NamedTuple):
    """For every row: whether it belongs to an input or output, to an input, and which group acts on it."""

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
    sizes, signs = (groups[one] | groups[Scaling.NONZERO] for one in (Scaling.POSITIVE, Scaling.SIGN))
    c = jnp.where(sizes[:, None], _normed(gmn, x), x)
    if gmn.canonical is Canonical.ABSOLUTE:
        return jnp.where(signs[:, None], jnp.abs(c), c)
    if "rho" not in p:  # no layer has signs
        return c
    return jnp.where(signs[:, None], _mlp(p["rho"], c) + _mlp(p["rho"], -c), c)


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
    """(x gamma) * phi(c(x)), or the rule for inputs and outputs; a rule without parameters applies to no row."""
    linear: Any = x @ p["gamma"]["kernel"] if "gamma" in p else None
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

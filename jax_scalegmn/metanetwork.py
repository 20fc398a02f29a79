"""The ScaleGMN: a graph network on the weights of a network, equivariant to the network's own symmetry.

Written for one network; `jax.vmap` makes it one for many.
"""

import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
import jraph
from flax import linen as nn
from jaxtyping import Array

from jax_scalegmn import graph
from jax_scalegmn.architecture import Scaling
from jax_scalegmn.graph import Bucket, Presence, Readable, Topology
from jax_scalegmn.layers import IO, PUBLISHED_NORM_EPSILON, Canonical, Factored, Groups, cast, value
from jax_scalegmn.message_passing import Context, MessagePassing, Nodes, PlainMessagePassing, State, rules


class Output(enum.Enum):
    """What the last layer of a ScaleGMN computes."""

    FEATURES = "features"
    """New node features; edge features stay those of the layer before, which no invariant model reads."""
    ENDS = "ends"
    """New features of output neurons, and of input neurons if bidirectional; hidden ones stay."""
    PARAMETERS = "parameters"
    """For every neuron and weight numbers in the form of `graph.from_params`, for `graph.to_params`."""


class ScaleGMN(nn.Module):
    """A scale equivariant graph metanetwork (arXiv 2406.10685).

    What permutes, flips or rescales hidden neurons of the network that it reads does the same to the node and edge
    features. Each neuron layer has the group that the architecture says. Where all hidden layers are PERMUTATION, every
    map is a plain mlp (arXiv 2406.10685, equations 2 to 4), and `canonical`, `io`, `encoding_features`,
    `message_layers` and `update_layers` must keep their defaults.

    Attributes:
      arch: of the networks that it reads, or a bucket of several architectures, whose graphs come padded.
      features: d, entries of a node or edge feature.
      num_layers: message passing layers.
      hidden: width of the hidden layer of every mlp inside; None for `features`.
      bidirectional: whether messages also run from receivers to senders, with parameters of their own.
      canonical: how features lose their sign or scale.
      io: the rule for inputs and outputs.
      node_encoding, edge_encoding: whether neurons and weights learn a vector for their type (`graph.Topology`).
      encoding_features: whether messages and updates read the node encodings as further invariant features.
      skip: whether h @ W_skip is added in every node update.
      message_layers, update_layers: equivariant maps in sequence in a message and in a node update.
      dropout: rate on the node features behind every layer during training.
      normalized: whether sums over neurons are divided by the square root of their number; False as published.
      parity: True repeats what the published code does against its own claim, for imported weights: 1e-10 added to
        norms, and backward messages of positive scales that carry the weight itself, so that a bidirectional model is
        not equivariant.
      dtype: of features and products, like "bfloat16"; canonical maps stay in float32. None: that of the parameters.
    """

    arch: Readable
    features: int
    num_layers: int = 4
    hidden: int | None = None
    bidirectional: bool = False
    canonical: Canonical = Canonical.SYMMETRISED
    io: IO = IO.GATE
    node_encoding: bool = True
    edge_encoding: bool = True
    encoding_features: bool = False
    skip: bool = True
    message_layers: int = 1
    update_layers: int = 1
    dropout: float = 0.0
    normalized: bool = True
    parity: bool = False
    dtype: str | None = None

    @nn.compact
    def __call__(
        self, graph_in: jraph.GraphsTuple, *, train: bool = False, output: Output = Output.FEATURES
    ) -> jraph.GraphsTuple:
        """Node features [nodes, d] and edge features [edges, d] of a graph of `graph.from_params`.

        Training with dropout needs `rngs={"dropout": key}`.

        Raises:
          ValueError: if the graph is of another architecture, or an option does not go with the architecture.
        """
        topo = graph.topology(self.arch)
        _check_options(self, topo)
        _check_graph(self.arch, topo, graph_in)
        plain = not topo.is_under(*graph.SCALED)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        context, state, raw = self._start(topo, graph_in, plain)
        wanted = {
            Output.FEATURES: frozenset(topo.nodes),
            Output.ENDS: topo.outputs | (topo.inputs if self.bidirectional else frozenset()),
            Output.PARAMETERS: topo.biased,
        }[output]
        for index in range(self.num_layers):
            last = index + 1 == self.num_layers
            writes = last and output is Output.PARAMETERS
            edge_outputs = topo.edge_features if writes else 0 if last else self.features
            options: dict[str, Any] = {
                "features": self.features,
                "hidden": self.hidden or self.features,
                "outputs": self.features,
                "edge_outputs": edge_outputs,
                "updated": tuple(name for name in topo.nodes if name in wanted or not last),
                "bidirectional": self.bidirectional,
                "skip": self.skip and not writes,
                "normalized": self.normalized,
                "dtype": self.dtype,
                "name": f"layer_{index}",
            }
            if plain:
                options |= {"outputs": topo.node_features} if writes else {}
                state = PlainMessagePassing(**options)(context, state)
            else:
                if writes:
                    along, against, free = topo.columns
                    options |= {"outputs": along + against, "invariants": free}
                state = MessagePassing(
                    canonical=self.canonical,
                    io=self.io,
                    message_layers=self.message_layers,
                    update_layers=self.update_layers,
                    epsilon=PUBLISHED_NORM_EPSILON if self.parity else 0.0,
                    extra=self.features if self.encoding_features else 0,
                    update_backward=self.bidirectional and not last,
                    **options,
                )(context, state, [r or e for r, e in zip(raw, state.edges, strict=True)] if writes else None)
            if not writes:
                state = state._replace(nodes={name: dropout(h) for name, h in state.nodes.items()})
        if output is Output.PARAMETERS:  # neurons without parameters of their own get zeros
            state = state._replace(
                nodes={
                    name: h if name in wanted else jnp.zeros((len(h), topo.node_features), h.dtype)
                    for name, h in state.nodes.items()
                }
            )
        nodes = jnp.concatenate(list(state.nodes.values()))
        edges = jnp.concatenate([value(e).reshape(math.prod(e.shape[:2]), -1) for e in map(value, state.edges)])
        return graph_in._replace(nodes=nodes, edges=edges)

    def _start(
        self, topo: Topology, graph_in: jraph.GraphsTuple, plain: bool
    ) -> tuple[Context, State, list[Factored | None]]:
        """What the layers share, the first features, and the edges that a lift changed, as they were."""
        d, lecun, normal = self.features, nn.initializers.lecun_normal(), nn.initializers.normal(1.0)
        presence: Presence | None = graph_in.globals
        along, against, free = topo.columns

        def weight(name: str, init: Any, shape: tuple[int, ...]) -> Array:
            return cast(self.param(name, init, shape), self.dtype)

        scaled = graph_in.nodes[:, : along + against]
        if against:
            scaled = jnp.concatenate([scaled[:, :along], _reciprocal(scaled[:, along:])], -1)
        scaled, free_columns = (cast(x, self.dtype) for x in (scaled, graph_in.nodes[:, along + against :]))
        node_kernel = weight("node_kernel", lecun, (along + against, d))
        encoding = weight("node_encoding", normal, (topo.num_node_types, d)) if self.node_encoding else None
        rows = None if encoding is None else encoding[topo.node_types]
        invariant = rows
        if free:
            read = free_columns @ weight("free_kernel", lecun, (free, d))
            invariant = read + (1 if rows is None else rows)
        nodes: Nodes = {}
        for name, where in topo.nodes.items():
            h = scaled[where] @ node_kernel
            if invariant is not None:
                h = h + invariant[where] if plain or name in topo.io else h * invariant[where]
            nodes[name] = h

        edge_kernel = weight("edge_kernel", lecun, (topo.edge_features, d))
        types = weight("edge_encoding", normal, (topo.num_edge_types, d)) if self.edge_encoding else None
        edges: list[Factored] = []
        for block in topo.blocks:
            weights = cast(graph_in.edges[block.edges].reshape(*block.shape, -1), self.dtype)
            basis = edge_kernel[None, None]
            if types is not None and plain:  # weights @ kernel + encoding, with the encoding as one more weight of 1
                weights = jnp.concatenate([weights, jnp.ones_like(weights[..., :1])], -1)
                basis = jnp.broadcast_to(basis, (*block.types.shape, *edge_kernel.shape))
                basis = jnp.concatenate([basis, types[block.types][..., None, :]], -2)
            elif types is not None:
                basis = basis * types[block.types][..., None, :]
            edges.append(Factored(weights, basis))
        raw: list[Factored | None] = [None] * len(edges)
        for index, block in enumerate(topo.blocks):
            if block.lifted:
                lift = scaled[topo.nodes[block.receiver]] @ weight(f"lift_kernel_{index}", lecun, (along + against, d))
                raw[index] = edges[index]
                edges[index] = edges[index]._replace(basis=edges[index].basis * lift[None, :, None])
        backward = edges
        if self.bidirectional and not self.parity and topo.is_under(Scaling.POSITIVE):
            ratios = _degree_reversals(topo, graph_in)
            backward = [
                e._replace(weights=e.weights * cast(ratio, self.dtype)) for e, ratio in zip(edges, ratios, strict=True)
            ]
        found = rules(topo, presence)
        fixed = Groups((next((s for s in graph.SCALED if topo.is_under(s)), Scaling.PERMUTATION),))
        context = Context(
            topo,
            found,
            {name: rule if isinstance(rule, Groups) else fixed for name, rule in found.items()},
            {name: rows[where] for name, where in topo.nodes.items()}
            if self.encoding_features and rows is not None
            else None,
            None if presence is None else {n: presence.nodes[where, None] for n, where in topo.nodes.items()},
            None if presence is None else [presence.edges[b.edges].reshape(*b.shape, 1) for b in topo.blocks],
        )
        return context, State(context.mask(nodes), list(edges), list(backward)), raw


# --- private ------------------------------------------------------------------------------------------------------


def _reciprocal(x: Array) -> Array:
    """1 / x, and 0 where x is 0."""
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


def _degree_reversals(topo: Topology, graph_in: jraph.GraphsTuple) -> list[Array]:
    """For every block the factors [senders, receivers, 1] that turn w, of degree q_receiver / q_sender, around.

    s_i = b_i^2 + mean over incoming j of w_ij^2 s_j, with s = 1 at inputs and outputs, has degree q_i^2 and is smooth
    in the weights, so w s_sender / s_receiver has degree q_sender / q_receiver and no singularity but where all that
    comes into a neuron is 0, or below 5e-15 in float32; there it is 0. (1 / w has the same degree, and explodes at
    every small weight.)
    """
    presence: Presence | None = graph_in.globals
    wide = jnp.promote_types(graph_in.nodes.dtype, jnp.float32)
    along, against, _ = topo.columns
    nodes, edges = (x.astype(wide) for x in (graph_in.nodes, graph_in.edges))
    vectors = jnp.concatenate([nodes[:, :along], _reciprocal(nodes[:, along : along + against])], -1)
    order = {name: index for index, name in enumerate(topo.nodes)}
    square: dict[str, Array] = {}
    for name, where in topo.nodes.items():
        if name in topo.io:
            square[name] = jnp.ones(where.stop - where.start, wide)
            continue
        square[name] = jnp.square(vectors[where]).sum(-1)
        for block in topo.blocks:
            if block.receiver == name and order[block.sender] < order[name] and not block.lifted:
                w = jnp.square(edges[block.edges]).sum(-1).reshape(block.shape)
                count: int | Array = block.shape[0]
                if presence is not None:
                    count = jnp.maximum(presence.nodes[topo.nodes[block.sender]].sum(), 1)
                square[name] += square[block.sender] @ w / count
    factors = []
    smallest = float(jnp.finfo(wide).tiny) ** 0.75  # below it 1 / s comes near to overflow: as good as silent
    for block in topo.blocks:
        senders, receivers = square[block.sender][:, None, None], square[block.receiver][None, :, None]
        silent = receivers < smallest
        receivers = jnp.where(silent, 1, receivers)
        size = jax.lax.stop_gradient(receivers)  # the gradient, -1 / s^2, is taken in two steps and does not overflow
        ratio = jnp.where(silent, 0, senders / size / (receivers / size))
        positive = _is_positive(topo, presence, block.sender) | _is_positive(topo, presence, block.receiver)
        factors.append(jnp.where(positive, ratio, 1))
    return factors


def _is_positive(topo: Topology, presence: Presence | None, name: str) -> Any:
    """Whether positive scales act on a neuron layer; of a padded graph known when the program runs."""
    possible = topo.scalings.get(name, ())
    if presence is None or Scaling.POSITIVE not in possible:
        return Scaling.POSITIVE in possible
    return presence.scalings[name][Scaling.POSITIVE.value]


def _check_options(model: ScaleGMN, topo: Topology) -> None:
    name = model.arch.name
    if not topo.scalings:
        raise ValueError(f"{name!r} has hidden layers none: there is no symmetry that a ScaleGMN could follow.")
    if model.encoding_features and not model.node_encoding:
        raise ValueError("encoding_features=True passes node encodings on, but node_encoding is False. Set it too.")
    if min(model.num_layers, model.message_layers, model.update_layers) < 1:
        raise ValueError(
            f"num_layers, message_layers and update_layers are {model.num_layers}, {model.message_layers} and "
            f"{model.update_layers}; expected numbers >= 1."
        )
    if not topo.is_under(*graph.SCALED):
        names = ("canonical", "io", "encoding_features", "message_layers", "update_layers")
        fields = {f.name: f.default for f in dataclasses.fields(model)}
        changed = [field for field in names if getattr(model, field) != fields[field]]
        if changed:
            raise ValueError(
                f"{name!r} has permutations only, where every map is a plain mlp: {changed} would be ignored. Leave "
                "their defaults."
            )


def _check_graph(arch: Readable, topo: Topology, graph_in: jraph.GraphsTuple) -> None:
    got = (jnp.shape(graph_in.nodes), jnp.shape(graph_in.edges), isinstance(graph_in.globals, Presence))
    bucket = isinstance(arch, Bucket)
    expected = ((topo.num_nodes, topo.node_features), (topo.num_edges, topo.edge_features), bucket)
    if got != expected:
        raise ValueError(
            f"The graph has nodes {got[0]}, edges {got[1]} and is{'' if got[2] else ' not'} padded; {arch.name!r} "
            f"expects nodes {expected[0]}, edges {expected[1]}, {'padded' if bucket else 'not padded'}. Make it with "
            f"graph.from_params{' and the bucket' if bucket else ''}; a stack of networks needs jax.vmap."
        )

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

from jax_scalegmn.architecture import Scaling
from jax_scalegmn.models import graph
from jax_scalegmn.models._layers import IO, PUBLISHED_NORM_EPSILON, Canonical, Edges, Factored, Groups, cast, value
from jax_scalegmn.models._message_passing import Context, MessagePassing, Nodes, PlainMessagePassing, State, rules
from jax_scalegmn.models.graph import Bucket, Presence, Readable, Topology

lecun, normal = nn.initializers.lecun_normal(), nn.initializers.normal(1.0)


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
      parity: True repeats what the published code does to positive scales against its own claim, for imported weights:
        1e-10 added to norms, and backward messages that carry the weight itself, so that a bidirectional model is not
        equivariant.
      dtype: of features and products, like "bfloat16"; canonical maps and the statistics of layer normalizations stay
        in float32. None: that of the parameters.
    """

    arch: Readable
    features: int
    num_layers: int = 4
    hidden: int | None = None
    bidirectional: bool = False
    canonical: Canonical = Canonical.SYMMETRIZED
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
        encoding = None
        if self.node_encoding:
            encoding = self._weight("node_encoding", (topo.num_node_types, self.features), normal)[topo.node_types]
        nodes = self._nodes(topo, graph_in, encoding, plain)
        raw, edges = self._edges(topo, graph_in, plain)
        context = _context(topo, graph_in.globals, encoding if self.encoding_features else None)
        state = State(context.mask(nodes), list(edges), self._backward_edges(topo, graph_in, edges))
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
        return graph_in._replace(
            nodes=jnp.concatenate(list(state.nodes.values())),
            edges=jnp.concatenate([e.reshape(math.prod(e.shape[:2]), -1) for e in map(value, state.edges)]),
        )

    def _weight(self, name: str, shape: tuple[int, ...], init: Any = lecun) -> Array:
        return cast(self.param(name, init, shape), self.dtype)

    def _nodes(self, topo: Topology, graph_in: jraph.GraphsTuple, encoding: Array | None, plain: bool) -> Nodes:
        """The first node features: products with what is invariant, and sums where no scale acts."""
        h = cast(_vectors(topo, graph_in.nodes), self.dtype) @ self._weight(
            "node_kernel", (topo.columns.along + topo.columns.against, self.features)
        )
        invariant = encoding
        if topo.columns.free:
            free = cast(graph_in.nodes[:, -topo.columns.free :], self.dtype)
            read = free @ self._weight("free_kernel", (topo.columns.free, self.features))
            invariant = read + (1 if encoding is None else encoding)
        if invariant is None:
            return {name: h[where] for name, where in topo.nodes.items()}
        return {
            name: h[where] + invariant[where] if plain or name in topo.io else h[where] * invariant[where]
            for name, where in topo.nodes.items()
        }

    def _edges(
        self, topo: Topology, graph_in: jraph.GraphsTuple, plain: bool
    ) -> tuple[list[Factored | None], list[Factored]]:
        """The first edge features, behind those that a lift changed, as they were without it."""
        kernel = self._weight("edge_kernel", (topo.edge_features, self.features))
        encoding = None
        if self.edge_encoding:
            encoding = self._weight("edge_encoding", (topo.num_edge_types, self.features), normal)
        raw: list[Factored | None] = []
        edges: list[Factored] = []
        for index, block in enumerate(topo.blocks):
            weights = cast(graph_in.edges[block.edges].reshape(*block.shape, -1), self.dtype)
            basis = kernel[None, None]
            if encoding is not None and plain:  # weights @ kernel + encoding, the encoding as one more weight of 1
                weights = jnp.concatenate([weights, jnp.ones_like(weights[..., :1])], -1)
                basis = jnp.broadcast_to(basis, (*block.types.shape, *kernel.shape))
                basis = jnp.concatenate([basis, encoding[block.types][..., None, :]], -2)
            elif encoding is not None:
                basis = basis * encoding[block.types][..., None, :]
            raw.append(Factored(weights, basis) if block.lifted else None)
            if block.lifted:  # what follows the receiver's rescaling lifts a kernel that does not
                vectors = cast(_vectors(topo, graph_in.nodes)[topo.nodes[block.receiver]], self.dtype)
                lift = vectors @ self._weight(f"lift_kernel_{index}", (vectors.shape[-1], self.features))
                basis = basis * lift[None, :, None]
            edges.append(Factored(weights, basis))
        return raw, edges

    def _backward_edges(self, topo: Topology, graph_in: jraph.GraphsTuple, edges: list[Factored]) -> list[Edges]:
        """The edges as backward messages read them: against the receiver, along the sender."""
        if not self.bidirectional or self.parity or not topo.is_under(Scaling.POSITIVE):
            return list(edges)
        factors = _degree_reversals(topo, graph_in)
        return [
            e._replace(weights=e.weights * cast(factor, self.dtype)) for e, factor in zip(edges, factors, strict=True)
        ]


# --- private ------------------------------------------------------------------------------------------------------


def _context(topo: Topology, presence: Presence | None, extra: Array | None) -> Context:
    """What the layers share."""
    found = rules(topo, presence)
    fixed = Groups((next((scaling for scaling in graph.SCALED if topo.is_under(scaling)), Scaling.PERMUTATION),))
    return Context(
        topology=topo,
        rules=found,
        groups={name: rule if isinstance(rule, Groups) else fixed for name, rule in found.items()},
        extra=None if extra is None else {name: extra[where] for name, where in topo.nodes.items()},
        present_nodes=None
        if presence is None
        else {name: presence.nodes[where, None] for name, where in topo.nodes.items()},
        present_edges=None
        if presence is None
        else [presence.edges[block.edges].reshape(*block.shape, 1) for block in topo.blocks],
    )


def _vectors(topo: Topology, nodes: Array) -> Array:
    """The node features that follow a rescaling of their neuron, those that go against it turned around."""
    along, against, _ = topo.columns
    return jnp.concatenate([nodes[:, :along], _reciprocal(nodes[:, along : along + against])], -1)


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
    edges, vectors = graph_in.edges.astype(wide), _vectors(topo, graph_in.nodes.astype(wide))
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
    if model.parity and not topo.is_under(Scaling.POSITIVE):
        raise ValueError(f"parity=True is about positive scales, and {name!r} has none: it would be ignored. Leave it.")
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

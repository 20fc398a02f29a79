"""The ScaleGMN: a graph network on the weights of a network, equivariant to the network's own symmetry.

Written for one network; `jax.vmap` makes it one for many.
"""

import dataclasses
import enum
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jraph
from flax import linen as nn
from jaxtyping import Array, Float

from jax_scalegmn.models import graph
from jax_scalegmn.models._features import Edges, Factored, value
from jax_scalegmn.models._layers import IO, PUBLISHED_NORM_EPSILON, Canonical, Groups, cast
from jax_scalegmn.models._message_passing import (
    Context,
    GraphFeatures,
    MessagePassing,
    Nodes,
    Options,
    PlainMessagePassing,
    rules,
)
from jax_scalegmn.models.graph import Bucket, EdgeBlock, Mask, Readable, Topology

lecun, normal = nn.initializers.lecun_normal(), nn.initializers.normal(1.0)


class Output(enum.Enum):
    """What the last layer of a ScaleGMN computes.

    >>> from jax_scalegmn import models
    >>> [output.value for output in models.Output]
    ['features', 'ends', 'parameters']
    """

    FEATURES = "features"
    """New node features; edge features stay those of the layer before, which no invariant model reads."""
    ENDS = "ends"
    """New features of output neurons, and of input neurons if bidirectional; hidden ones stay."""
    PARAMETERS = "parameters"
    """Numbers for every neuron and weight, in the form of `graph.from_params`, for `graph.to_params`."""


class ScaleGMN(nn.Module):
    """A scale equivariant graph metanetwork: node and edge features of a network's graph that follow its symmetry.

    A permutation, sign flip or rescaling of the network's hidden neurons does the same to the features. Every layer
    computes messages, their sums, and new nodes and edges (Kalogeropoulos et al. 2024, arXiv 2406.10685, section 5):

        m_ij = ScaleEq([h_j @ W_v] * [e_ij @ W_e])      h_i' = ScaleEq([h_i, sum_j m_ij]) + h_i @ W_skip
        e_ij' = (e_ij @ W) * phi([c(h_i), c(h_j)])      ScaleEq(x) = (x @ Gamma) * phi(c(x))

    Each neuron layer has the group that the architecture states. Where a kernel does not follow a neuron's sign, as
    after abs, messages from the neuron read |h_j @ W_v|, and their sums at it are multiplied by (h_i @ W) / |h_i|.
    Where all hidden layers are PERMUTATION, every map is a plain mlp (equations 2 to 4), and `canonical`, `io`,
    `encoding_features`, `message_layers` and `update_layers` must keep their defaults.

    Attributes:
      arch: The architecture of the networks that it reads, or a bucket of several, whose graphs are padded.
      features: d, the number of entries of a node or edge feature.
      num_layers: The number of message passing layers.
      hidden: The width of the hidden layer of every mlp inside; None for `features`.
      bidirectional: Whether messages also run from receivers to senders, with parameters of their own.
      canonical: How features lose their sign or scale.
      io: The rule for inputs and outputs.
      node_encoding, edge_encoding: Whether neurons and weights learn a vector for their type (`graph.Topology`).
      encoding_features: Whether messages and updates also read the node encodings, as invariant features.
      skip: Whether h @ W_skip is added in every node update.
      message_layers, update_layers: The number of equivariant maps in sequence in a message and in a node update.
      dropout: The rate on the node features after every layer during training.
      normalized: Whether sums over neurons are divided by the square root of their number; False as published.
      parity: True repeats what the published code does to positive scales against its own claim, for imported weights:
        1e-10 added to norms, and backward messages that carry the weight itself, so that a bidirectional model is not
        equivariant.
      dtype: The dtype of features and products, like "bfloat16"; canonical maps and the statistics of layer
        normalizations stay in float32. None: that of the parameters.
      edges_at_once: Blocks of more edges are computed in parts of up to as many, and again for the gradient, which
        bounds the memory that networks of wide layers take. None: 2,048 on a CPU, whose caches hold them, and 65,536
        elsewhere.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> built = sg.models.graph.from_params(arch, sg.network.init(arch, jax.random.key(0)))
    >>> model = sg.ScaleGMN(arch, features=8, num_layers=1)
    >>> features, variables = jax.eval_shape(model.init_with_output, jax.random.key(1), built)
    >>> features.nodes.shape, features.edges.shape
    ((7, 8), (12, 8))
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
    edges_at_once: int | None = None

    @nn.compact
    def __call__(
        self,
        graph_in: jraph.GraphsTuple,
        *,
        train: bool = False,
        output: Output = Output.FEATURES,
        networks: int | None = None,
    ) -> jraph.GraphsTuple:
        """Reads one graph: encode, process, decode.

        Args:
          graph_in: The graph of one network, as `graph.from_params` returns it.
          train: Whether dropout acts, which needs `rngs={"dropout": key}`.
          output: What the last layer computes.
          networks: k, the number of networks whose PARAMETERS the last layer computes, each with weights of its own;
            None for one, without a further axis.

        Returns:
          The graph with node features [nodes, d] and edge features [edges, d]; [k, nodes, ...] and [k, edges, ...] with
          `networks`.

        Raises:
          ValueError: If the graph is of another architecture, or an option does not go with the architecture.
        """
        _check_options(self)
        check_graph(self.arch, graph_in)
        if networks is not None and (networks < 1 or output is not Output.PARAMETERS):
            raise ValueError(f"networks is {networks} with {output}; expected a number >= 1 with Output.PARAMETERS.")
        context, features = self._encode(graph_in)
        features = self._process(context, features, output, networks or 1, train=train)
        decoded = self._decode(context, features, output, networks or 1, graph_in)
        return decoded if networks is None else _each(context.topology, decoded, networks)

    def _encode(self, graph_in: jraph.GraphsTuple) -> tuple[Context, GraphFeatures]:
        """Weights and biases as features, and what the layers know of the graph."""
        topo = graph.topology(self.arch)
        encoding = None
        if self.node_encoding:
            encoding = self._weight("node_encoding", (topo.num_node_types, self.features), normal)[topo.node_types]
        nodes = self._encode_nodes(topo, graph_in, encoding)
        unlifted, edges = self._encode_edges(topo, graph_in)
        context = _context(topo, graph_in.globals, self.io, encoding if self.encoding_features else None, unlifted)
        return context, GraphFeatures(context.mask(nodes), list(edges), self._backward_edges(topo, graph_in, edges))

    def _process(
        self, context: Context, features: GraphFeatures, output: Output, networks: int, *, train: bool
    ) -> GraphFeatures:
        """Layer after layer; dropout after each, except where the last one writes parameters."""
        kept = self._kept(context.topology) if train and self.dropout else None
        for index in range(self.num_layers):
            last = index + 1 == self.num_layers
            features = self._layer(context.topology, index, output, networks)(context, features)
            if kept is not None and not (last and output is Output.PARAMETERS):
                where = context.topology.nodes
                nodes = {name: h * cast(kept[index, where[name]], self.dtype) for name, h in features.nodes.items()}
                features = features._replace(nodes=nodes)
        return features

    def _kept(self, topo: Topology) -> Float[Array, "layers nodes features"]:
        """What dropout multiplies node features by. One draw for all layers, since each takes long to compile."""
        ones = jnp.ones((self.num_layers, topo.num_nodes, self.features))
        factors: Array = nn.Dropout(self.dropout, deterministic=False)(ones)
        return factors

    def _decode(
        self, context: Context, features: GraphFeatures, output: Output, networks: int, graph_in: jraph.GraphsTuple
    ) -> jraph.GraphsTuple:
        """The features as one graph."""
        topo, nodes = context.topology, features.nodes
        if output is Output.PARAMETERS:  # neurons without parameters of their own get zeros
            nodes = {
                name: h if name in topo.biased else jnp.zeros((len(h), networks * topo.node_features), h.dtype)
                for name, h in nodes.items()
            }
        return graph_in._replace(
            nodes=jnp.concatenate(list(nodes.values())),
            edges=jnp.concatenate([e.reshape(math.prod(e.shape[:2]), -1) for e in map(value, features.edges)]),
        )

    def _layer(self, topo: Topology, index: int, output: Output, networks: int) -> MessagePassing | PlainMessagePassing:
        """The layer with that index; the last one computes no more than the output needs."""
        last = index + 1 == self.num_layers
        writes = last and output is Output.PARAMETERS
        copies = networks if writes else 1
        common: dict[str, Any] = {
            "options": self._options(),
            "edge_outputs": copies * topo.edge_features if writes else 0 if last else self.features,
            "updated": _updated(topo, output, bidirectional=self.bidirectional) if last else tuple(topo.nodes),
            "skip": self.skip and not writes,
            "name": f"layer_{index}",
        }
        if not topo.has_scales:
            return PlainMessagePassing(outputs=copies * topo.node_features if writes else self.features, **common)
        along, against, free = topo.columns if writes else (self.features, 0, 0)
        return MessagePassing(
            outputs=copies * (along + against),
            invariants=copies * free,
            writes=writes,
            update_backward=self.bidirectional and not last,
            **common,
        )

    def _options(self) -> Options:
        return Options(
            features=self.features,
            hidden=self.hidden or self.features,
            bidirectional=self.bidirectional,
            normalized=self.normalized,
            canonical=self.canonical,
            io=self.io,
            message_layers=self.message_layers,
            update_layers=self.update_layers,
            epsilon=PUBLISHED_NORM_EPSILON if self.parity else 0.0,
            extra=self.features if self.encoding_features else 0,
            dtype=self.dtype,
            edges_at_once=self.edges_at_once,
        )

    def _weight(self, name: str, shape: tuple[int, ...], init: Any = lecun) -> Array:
        return cast(self.param(name, init, shape), self.dtype)

    def _encode_nodes(self, topo: Topology, graph_in: jraph.GraphsTuple, encoding: Array | None) -> Nodes:
        """The first node features: products with invariant vectors, and sums with them where no scale acts."""
        h = cast(node_vectors(topo, graph_in.nodes), self.dtype) @ self._weight(
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
            name: h[where] * invariant[where]
            if topo.has_scales and name not in topo.io
            else h[where] + invariant[where]
            for name, where in topo.nodes.items()
        }

    def _encode_edges(self, topo: Topology, graph_in: jraph.GraphsTuple) -> tuple[dict[int, Edges], list[Factored]]:
        """(unlifted, edges): the first edge features, and those of lifted blocks, by index, before the lift.

        The kernel before a batch normalization does not follow a rescaling of its receiver. Its features are
        multiplied by a linear map of the receiver's vectors, which do.
        """
        kernel = self._weight("edge_kernel", (topo.edge_features, self.features))
        encoding = None
        if self.edge_encoding:
            encoding = self._weight("edge_encoding", (topo.num_edge_types, self.features), normal)
        unlifted: dict[int, Edges] = {}
        edges: list[Factored] = []
        for index, block in enumerate(topo.blocks):
            weights = cast(graph_in.edges[block.edges].reshape(*block.shape, -1), self.dtype)
            basis = kernel[None, None]
            if encoding is not None and not topo.has_scales:
                # weights @ kernel + encoding, the encoding as the basis of one more weight, which is 1
                weights = jnp.concatenate([weights, jnp.ones_like(weights[..., :1])], -1)
                basis = jnp.broadcast_to(basis, (*block.types.shape, *kernel.shape))
                basis = jnp.concatenate([basis, encoding[block.types][..., None, :]], -2)
            elif encoding is not None:
                basis = basis * encoding[block.types][..., None, :]
            if block.lifted:
                unlifted[index] = Factored(weights, basis)
                vectors = cast(node_vectors(topo, graph_in.nodes)[topo.nodes[block.receiver]], self.dtype)
                lift = vectors @ self._weight(f"lift_kernel_{index}", (vectors.shape[-1], self.features))
                basis = basis * lift[None, :, None]
            edges.append(Factored(weights, basis))
        return unlifted, edges

    def _backward_edges(self, topo: Topology, graph_in: jraph.GraphsTuple, edges: list[Factored]) -> list[Edges]:
        """The edges as backward messages read them: they follow the sender and go against the receiver."""
        if not self.bidirectional or self.parity or not topo.has_sizes:
            return list(edges)
        factors = _degree_reversals(topo, graph_in)
        return [
            e._replace(weights=e.weights * cast(factor, self.dtype)) for e, factor in zip(edges, factors, strict=True)
        ]


# --- private ------------------------------------------------------------------------------------------------------


def _each(topo: Topology, written: jraph.GraphsTuple, networks: int) -> jraph.GraphsTuple:
    """The numbers of several networks, which the last layer writes next to each other, with a leading axis [k]."""
    vectors = networks * (topo.columns.along + topo.columns.against)
    parts = [written.nodes[:, :vectors], written.nodes[:, vectors:]]
    nodes = jnp.concatenate([part.reshape(len(part), networks, -1) for part in parts if part.shape[-1]], -1)
    edges = written.edges.reshape(len(written.edges), networks, -1)
    return written._replace(nodes=nodes.swapaxes(0, 1), edges=edges.swapaxes(0, 1))


def _updated(topo: Topology, output: Output, *, bidirectional: bool) -> tuple[str, ...]:
    """The neuron layers whose features the last layer updates."""
    needed = {
        Output.FEATURES: frozenset(topo.nodes),
        Output.ENDS: topo.outputs | (topo.inputs if bidirectional else frozenset()),
        Output.PARAMETERS: topo.biased,
    }[output]
    return tuple(name for name in topo.nodes if name in needed)


def _context(topo: Topology, mask: Mask | None, io: IO, extra: Array | None, unlifted: dict[int, Edges]) -> Context:
    by_layer = rules(topo, mask, io)
    present_nodes, present_edges = None, None
    if mask is not None:
        present_nodes = {name: mask.nodes[where, None] for name, where in topo.nodes.items()}
        present_edges = [mask.edges[block.edges].reshape(*block.shape, 1) for block in topo.blocks]
    return Context(
        topology=topo,
        rules=by_layer,
        groups={
            name: rule if isinstance(rule, Groups) else Groups((topo.io_scaling,)) for name, rule in by_layer.items()
        },
        extra=None if extra is None else {name: extra[where] for name, where in topo.nodes.items()},
        unlifted=unlifted,
        present_nodes=present_nodes,
        present_edges=present_edges,
    )


def node_vectors(topo: Topology, nodes: Array) -> Array:
    """The node features that follow a rescaling of their neuron, and the reciprocals of those that go against it."""
    along, against, _ = topo.columns
    return jnp.concatenate([nodes[:, :along], _reciprocal(nodes[:, along : along + against])], -1)


def _reciprocal(x: Array) -> Array:
    """1 / x, and 0 where x is 0."""
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


def _degree_reversals(topo: Topology, graph_in: jraph.GraphsTuple) -> list[Array]:
    """For every block the factors [senders, receivers, 1] that reverse the degree of w, q_receiver / q_sender.

    s_i = b_i^2 + mean over incoming j of w_ij^2 s_j, with s = 1 at inputs and outputs, has degree q_i^2 and is smooth
    in the weights. So w s_sender / s_receiver has degree q_sender / q_receiver, and its only singularity is a neuron
    whose incoming weights and bias are all 0, or below 5e-15 in float32; there it is 0. (1 / w has the same degree,
    and explodes at every small weight.)
    """
    wide = jnp.promote_types(graph_in.nodes.dtype, jnp.float32)
    mask: Mask | None = graph_in.globals
    edges, vectors = graph_in.edges.astype(wide), node_vectors(topo, graph_in.nodes.astype(wide))
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
                square[name] += square[block.sender] @ w / _num_present(topo, mask, block.sender)
    return [_degree_reversal(topo, mask, block, square) for block in topo.blocks]


def _num_present(topo: Topology, mask: Mask | None, name: str) -> int | Array:
    """The number of neurons of a layer that exist, at least 1."""
    where = topo.nodes[name]
    return where.stop - where.start if mask is None else jnp.maximum(mask.nodes[where].sum(), 1)


def _degree_reversal(topo: Topology, mask: Mask | None, block: EdgeBlock, square: dict[str, Array]) -> Array:
    """s_sender / s_receiver where positive scales act on either end of the block, else 1."""
    senders, receivers = square[block.sender][:, None, None], square[block.receiver][None, :, None]
    silent = receivers < float(jnp.finfo(receivers.dtype).tiny) ** 0.75  # below it 1 / s comes near to overflow
    receivers = jnp.where(silent, 1, receivers)
    size = jax.lax.stop_gradient(receivers)  # the gradient, -1 / s^2, is taken in two steps and does not overflow
    ratio = jnp.where(silent, 0, senders / size / (receivers / size))
    positive = _is_positive(topo, mask, block.sender) | _is_positive(topo, mask, block.receiver)
    return jnp.where(positive, ratio, 1)


def _is_positive(topo: Topology, mask: Mask | None, name: str) -> Any:
    """Whether positive scales act on a neuron layer; for a padded graph known only when the program runs."""
    possible = topo.scalings.get(name, ())
    rescaling = [scaling for scaling in possible if scaling.has_sizes]
    if mask is None or not rescaling:
        return bool(rescaling)
    return functools.reduce(jnp.logical_or, [mask.scalings[name][scaling.value] for scaling in rescaling])


def _check_options(model: ScaleGMN) -> None:
    topo, name = graph.topology(model.arch), model.arch.name
    if not topo.scalings:
        raise ValueError(
            f"{name!r} has no hidden neuron layers; expected at least one, whose symmetry a ScaleGMN follows. Read its "
            "weights as a vector."
        )
    if model.encoding_features and not model.node_encoding:
        raise ValueError("encoding_features=True passes node encodings on, but node_encoding is False. Set it too.")
    if min(model.num_layers, model.message_layers, model.update_layers) < 1:
        raise ValueError(
            f"num_layers, message_layers and update_layers are {model.num_layers}, {model.message_layers} and "
            f"{model.update_layers}; expected numbers >= 1."
        )
    if model.edges_at_once is not None and model.edges_at_once < 1:
        raise ValueError(f"edges_at_once is {model.edges_at_once}; expected a number >= 1, or None to choose it.")
    if model.parity and not topo.has_sizes:
        raise ValueError(
            f"parity=True is about positive scales, but {name!r} has none: it would be ignored. Use parity=False."
        )
    if not topo.has_scales:
        names = ("canonical", "io", "encoding_features", "message_layers", "update_layers")
        fields = {f.name: f.default for f in dataclasses.fields(model)}
        changed = [field for field in names if getattr(model, field) != fields[field]]
        if changed:
            raise ValueError(
                f"{name!r} has permutations only, where every map is a plain mlp: {changed} would be ignored. Leave "
                "their defaults."
            )


def check_graph(arch: Readable, graph_in: jraph.GraphsTuple) -> None:
    topo, bucket = graph.topology(arch), isinstance(arch, Bucket)
    got = (jnp.shape(graph_in.nodes), jnp.shape(graph_in.edges), isinstance(graph_in.globals, Mask))
    expected = ((topo.num_nodes, topo.node_features), (topo.num_edges, topo.edge_features), bucket)
    if got != expected:
        raise ValueError(
            f"The graph has nodes {got[0]}, edges {got[1]} and is{'' if got[2] else ' not'} padded; {arch.name!r} "
            f"expects nodes {expected[0]}, edges {expected[1]}, {'padded' if bucket else 'not padded'}. Make it with "
            f"graph.from_params{' and the bucket' if bucket else ''}; a stack of networks needs jax.vmap."
        )

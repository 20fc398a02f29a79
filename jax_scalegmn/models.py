"""Networks that read networks: the ScaleGMN, and on it an invariant encoder, an editor and an autoencoder.

Every model is written for one network; `jax.vmap` makes it one for many:

    model = autoencoder(arch, features=32)
    variables = model.init(key, params)
    decoded = jax.vmap(lambda p: model.apply(variables, p))(stack)

The symmetry that a model follows is that of its architecture. With `architecture.restrict(arch,
Scaling.PERMUTATION)` it is the permutation-only metanetwork of the literature.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jax_scalegmn import architecture, graph
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.graph import Bucket, Presence, Readable, Topology
from jax_scalegmn.layers import (
    IO,
    MLP,
    PUBLISHED_NORM_EPSILON,
    Canonical,
    Factored,
    Groups,
    ScaleInvariant,
    cast,
    value,
)
from jax_scalegmn.message_passing import (
    Context,
    MessagePassing,
    Nodes,
    PlainMessagePassing,
    State,
    by_rule,
    join,
    rules,
)
from jax_scalegmn.types import Params


class Output(enum.Enum):
    """What the last layer of a ScaleGMN computes."""

    FEATURES = "features"
    """New node features; edge features stay those of the layer before, which no invariant model reads."""
    ENDS = "ends"
    """New features of output neurons, and of input neurons if bidirectional; hidden ones stay."""
    PARAMETERS = "parameters"
    """For every neuron and weight numbers in the form of `graph.from_params`, for `graph.to_params`."""


class Readout(enum.Enum):
    """How an encoder comes from node features to one vector (arXiv 2406.10685, section 5)."""

    FULL_GRAPH = "full_graph"
    """mlp([sum over hidden neurons of ScaleInv(h), h of every input and output neuron])."""
    LAST_LAYER = "last_layer"
    """mlp of the outputs' features; if bidirectional, of linear maps of the outputs' and of the inputs'."""
    DEEP_SET = "deep_set"
    """mlp(sum over all neurons of mlp(h)): for networks with permutations only."""


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


class Encoder(nn.Module):
    """An invariant embedding of a network: every member of an orbit has the same one (arXiv 2511.12601, section 3).

    With `latent` classes it is a classifier, with `latent=1` a regressor.

    Attributes:
      gmn: reads the network.
      latent: entries of the embedding; None for the features of `gmn`.
      readout: from node features to the embedding.
      scales: the usual size of every parameter's entries, in the order of `arch.parameters` (`zoo.scales`), divided
        out before the graph is built; a positive number each, so no symmetry is lost. None: weights as they come.
    """

    gmn: ScaleGMN
    latent: int | None = None
    readout: Readout = Readout.FULL_GRAPH
    scales: tuple[float, ...] | None = None

    @property
    def arch(self) -> Readable:
        """What it reads."""
        return self.gmn.arch

    def __call__(self, params: Params, *, train: bool = False) -> Float[Array, " latent"]:
        """The embedding of one network of `arch`."""
        arch = _one_architecture(self.arch, "Encoder reads params of one architecture: call method='read' on a graph")
        return self._read(graph.from_params(arch, _divided(arch, params, self.scales)), train=train)

    def read(self, graph_in: jraph.GraphsTuple, *, train: bool = False) -> Float[Array, " latent"]:
        """The embedding of one network's graph, of `graph.from_params` with the encoder's bucket if it has one.

        Raises:
          ValueError: if the encoder has scales, which are for params: divide them out before the graph is built.
        """
        if self.scales is not None:
            raise ValueError("An Encoder with scales reads params, not graphs: call it, or make it with scales=None.")
        return self._read(graph_in, train=train)

    @nn.compact
    def _read(self, graph_in: jraph.GraphsTuple, *, train: bool) -> Float[Array, " latent"]:
        gmn, topo = self.gmn, graph.topology(self.arch)
        hidden, latent = gmn.hidden or gmn.features, self.latent or gmn.features
        ends = self.readout is Readout.LAST_LAYER
        read = gmn(graph_in, train=train, output=Output.ENDS if ends else Output.FEATURES)
        nodes = {name: read.nodes[where] for name, where in topo.nodes.items()}
        if ends:
            joint = jnp.concatenate([nodes[name] for name in nodes if name in topo.outputs]).reshape(-1)
            if gmn.bidirectional:
                inputs = jnp.concatenate([nodes[name] for name in nodes if name in topo.inputs]).reshape(-1)
                parts = (("outputs", joint), ("inputs", inputs))
                joint = jnp.concatenate(
                    [nn.Dense(gmn.features, dtype=gmn.dtype, name=name)(part) for name, part in parts]
                )
        elif self.readout is Readout.DEEP_SET:
            if topo.is_under(*graph.SCALED):
                raise ValueError(
                    f"The DEEP_SET readout is for permutations only; {self.arch.name!r} has scale symmetries. Use "
                    "FULL_GRAPH, or restrict the architecture to Scaling.PERMUTATION."
                )
            local = MLP(gmn.features, hidden, gmn.features, dtype=gmn.dtype, name="local")(read.nodes)
            joint = self._sum(local, None if read.globals is None else read.globals.nodes)
        else:
            invariant = ScaleInvariant(
                gmn.features,
                hidden,
                gmn.features,
                gmn.canonical,
                PUBLISHED_NORM_EPSILON if gmn.parity else 0.0,
                dtype=gmn.dtype,
                name="invariant",
            )
            found = {name: rule for name, rule in rules(topo, read.globals).items() if isinstance(rule, Groups)}
            groups = by_rule(found, tuple(found))
            inner = jnp.concatenate([invariant(join(nodes, names), found[names[0]]) for names in groups])
            present = None
            if read.globals is not None:
                present = jnp.concatenate([read.globals.nodes[topo.nodes[name]] for names in groups for name in names])
            outer = jnp.concatenate([nodes[name] for name in nodes if name in topo.io]).reshape(-1)
            joint = jnp.concatenate([self._sum(inner, present), outer])
        return MLP(joint.shape[0], hidden, latent, dtype=gmn.dtype, name="mlp")(joint)

    def _sum(self, rows: Array, present: Array | None) -> Array:
        """The sum over the nodes that are there, over the root of their number where the model is normalised."""
        total = rows.sum(0) if present is None else jnp.where(present[:, None], rows, 0).sum(0)
        if not self.gmn.normalized:
            return total
        count = len(rows) if present is None else present.sum()
        return total / jnp.sqrt(count).astype(total.dtype)


class Editor(nn.Module):
    """An equivariant map from networks to networks: params + learned scale * delta (arXiv 2406.10685, section 5).

    Attributes:
      gmn: reads the network and writes the delta.
      out_scale: of the delta at initialisation, one learned factor a parameter; published: 0.01.
      scales: as `Encoder.scales`; the delta is multiplied by them.
    """

    gmn: ScaleGMN
    out_scale: float = 0.01
    scales: tuple[float, ...] | None = None

    @property
    def arch(self) -> Readable:
        """What it reads and writes."""
        return self.gmn.arch

    def __call__(self, params: Params, *, train: bool = False) -> dict[str, Any]:
        """The edited network."""
        delta = self.delta(params, train=train)
        return jax.tree.map(jnp.add, dict(params), delta)

    @nn.compact
    def delta(self, params: Params, *, train: bool = False) -> dict[str, Any]:
        """What is added to the network."""
        arch = _one_architecture(self.arch, "Editor writes params of one architecture")
        divided = _divided(arch, params, self.scales)
        written = self.gmn(graph.from_params(arch, divided), train=train, output=Output.PARAMETERS)
        factors = self.param("out_scales", nn.initializers.constant(self.out_scale), (len(arch.parameters),))
        values = []
        for parameter, delta, own, factor, scale in zip(
            arch.parameters,
            architecture.unpack(arch, graph.to_params(arch, written)),
            architecture.unpack(arch, divided),
            factors,
            _checked_scales(arch, self.scales),
            strict=True,
        ):
            # The delta follows a rescaling; a vector that goes against it needs one that does too.
            against = len(parameter.neuron_axes) == 1 and parameter.neuron_axes[0].power < 0
            values.append((jnp.square(own) * delta if against else delta) * factor * scale)
        return architecture.pack(arch, values)


class Decoder(nn.Module):
    """An mlp from an embedding to the params of a network: silu, no normalisation (arXiv 2511.12601, section 3).

    Attributes:
      arch: of the networks that it writes.
      hidden: widths of the hidden layers.
      scales: multiplied onto every parameter, as `Encoder.scales`. With them, the last bias starts as a random
        network of that size, since a network of zeros is a saddle point of the loss. None: plain.
    """

    arch: Architecture
    hidden: tuple[int, ...]
    scales: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, z: Float[Array, " latent"]) -> dict[str, Any]:
        for index, width in enumerate(self.hidden):
            z = nn.silu(nn.Dense(width, name=f"dense_{index}")(z))
        bias_init = nn.initializers.zeros if self.scales is None else nn.initializers.normal(1.0)
        flat = nn.Dense(self.arch.num_parameters, bias_init=bias_init, name="output")(z)
        sizes = [math.prod(self.arch.shape(parameter)) for parameter in self.arch.parameters]
        values = [
            part.reshape(self.arch.shape(parameter)) * scale
            for parameter, part, scale in zip(
                self.arch.parameters,
                jnp.split(flat, np.cumsum(sizes)[:-1]),
                _checked_scales(self.arch, self.scales),
                strict=True,
            )
        ]
        return architecture.pack(self.arch, values)


class Autoencoder(nn.Module):
    """Encoder and decoder: maps every member of an orbit to one canonical network (arXiv 2511.12601)."""

    encoder: Encoder
    decoder: Decoder

    @property
    def arch(self) -> Architecture:
        """Of the networks that it reads and writes."""
        return self.decoder.arch

    def __call__(self, params: Params, *, train: bool = False) -> dict[str, Any]:
        """The canonical network of the orbit of `params`."""
        return self.decode(self.encode(params, train=train))

    def encode(self, params: Params, *, train: bool = False) -> Float[Array, " latent"]:
        """The embedding of the orbit of `params`."""
        return self.encoder(params, train=train)

    def decode(self, z: Float[Array, " latent"]) -> dict[str, Any]:
        """The network of an embedding."""
        return self.decoder(z)


def autoencoder(
    arch: Architecture,
    features: int,
    *,
    latent: int | None = None,
    readout: Readout = Readout.FULL_GRAPH,
    decoder_hidden: Sequence[int] | None = None,
    scales: tuple[float, ...] | None = None,
    **options: Any,
) -> Autoencoder:
    """The autoencoder of one architecture, with the published decoder of widths (2 d, 4 d) unless they are given.

    Args:
      arch: of the networks.
      features: d, of the ScaleGMN.
      latent, readout: as `Encoder`.
      decoder_hidden: as `Decoder.hidden`.
      scales: of encoder and decoder.
      options: further attributes of `ScaleGMN`.
    """
    hidden = (2 * features, 4 * features) if decoder_hidden is None else tuple(decoder_hidden)
    return Autoencoder(
        Encoder(ScaleGMN(arch, features, **options), latent, readout, scales), Decoder(arch, hidden, scales)
    )


def abstract_variables(model: nn.Module) -> Any:
    """The shapes of a model's variables, from its own description; nothing is computed.

    Raises:
      ValueError: for a Decoder alone, whose input is not part of its description.
    """
    arch: Readable = model.arch
    if isinstance(model, Decoder):
        raise ValueError("A Decoder alone does not know its input; describe the Autoencoder.")
    member = arch.members[0] if isinstance(arch, Bucket) else arch
    params = architecture.pack(
        member, [jax.ShapeDtypeStruct(member.shape(parameter), jnp.float32) for parameter in member.parameters]
    )
    bucket = arch if isinstance(arch, Bucket) else None
    if not (isinstance(model, ScaleGMN) or bucket):
        return jax.eval_shape(model.init, jax.random.key(0), params)

    def init(params: Params) -> Any:
        built = graph.from_params(member, params, bucket=bucket)
        return model.init(jax.random.key(0), built, method=None if isinstance(model, ScaleGMN) else "read")

    return jax.eval_shape(init, params)


def as_json(model: nn.Module) -> dict[str, Any]:
    """A model's configuration as plain JSON values, for checkpoints; `from_json` reads it."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name")}
    return {"type": type(model).__name__, **{name: _to_json(field) for name, field in fields.items()}}


def from_json(description: Mapping[str, Any]) -> nn.Module:
    """The model that `as_json` described.

    Raises:
      ValueError: if the description is not one of a model of this module.
    """
    kinds = {kind.__name__: kind for kind in (ScaleGMN, Encoder, Editor, Decoder, Autoencoder)}
    enums = {"canonical": Canonical, "io": IO, "readout": Readout}
    fields: dict[str, Any] = {}
    try:
        for name, given in description.items():
            if name == "arch" and "members" in given:
                members = tuple(architecture.from_json(member) for member in given["members"])
                fields[name] = Bucket(members, given["multiple"])
            elif name == "arch":
                fields[name] = architecture.from_json(given)
            elif isinstance(given, Mapping):
                fields[name] = from_json(given)
            elif name in enums:
                fields[name] = enums[name](given)
            else:
                fields[name] = tuple(given) if isinstance(given, list) else given
        return kinds[fields.pop("type")](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"This is no description of a model ({error!r}): expected the JSON of models.as_json for one of "
            f"{sorted(kinds)}, got {str(description)[:200]!r}. The checkpoint is foreign or of another version."
        ) from error


# --- private ------------------------------------------------------------------------------------------------------


def _to_json(field: Any) -> Any:
    if isinstance(field, nn.Module):
        return as_json(field)
    if isinstance(field, Bucket):
        return {"members": [member.as_json() for member in field.members], "multiple": field.multiple}
    if isinstance(field, Architecture):
        return field.as_json()
    return field.value if isinstance(field, enum.Enum) else field


def _reciprocal(x: Array) -> Array:
    """1 / x, and 0 where x is 0."""
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


def _degree_reversals(topo: Topology, graph_in: jraph.GraphsTuple) -> list[Array]:
    """For every block the factors [senders, receivers, 1] that turn w, of degree q_receiver / q_sender, around.

    s_i = b_i^2 + mean over incoming j of w_ij^2 s_j, with s = 1 at inputs and outputs, has degree q_i^2 and is smooth
    in the weights, so w s_sender / s_receiver has degree q_sender / q_receiver and no singularity but where all that
    comes into a neuron is 0; there it is 0. (1 / w has the same degree, and explodes at every small weight.)
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
    for block in topo.blocks:
        senders, receivers = square[block.sender][:, None, None], square[block.receiver][None, :, None]
        ratio = senders * _reciprocal(receivers)
        positive = _is_positive(topo, presence, block.sender) | _is_positive(topo, presence, block.receiver)
        factors.append(jnp.where(positive, ratio, 1))
    return factors


def _is_positive(topo: Topology, presence: Presence | None, name: str) -> Any:
    """Whether positive scales act on a neuron layer; of a padded graph known when the program runs."""
    possible = topo.scalings.get(name, ())
    if presence is None or Scaling.POSITIVE not in possible:
        return Scaling.POSITIVE in possible
    return presence.scalings[name][Scaling.POSITIVE.value]


def _one_architecture(arch: Readable, what: str) -> Architecture:
    if isinstance(arch, Bucket):
        raise ValueError(f"{what}; this one is for a {arch.name}.")
    return arch


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


def _divided(arch: Architecture, params: Params, scales: tuple[float, ...] | None) -> Params:
    """The params over their usual sizes."""
    values = architecture.unpack(arch, params)
    checked = _checked_scales(arch, scales)
    return architecture.pack(arch, [value / scale for value, scale in zip(values, checked, strict=True)])


def _checked_scales(arch: Architecture, scales: tuple[float, ...] | None) -> tuple[float, ...]:
    if scales is None:
        return (1.0,) * len(arch.parameters)
    if len(scales) != len(arch.parameters) or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(
            f"scales are {scales}; expected {len(arch.parameters)} finite numbers > 0, one for each parameter of "
            f"{arch.name!r}. Use zoo.scales."
        )
    return scales

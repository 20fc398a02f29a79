"""Layers of a ScaleGMN on the blocks of a graph: messages, their sums, node updates, edge updates.

`MessagePassing` follows every group; `PlainMessagePassing` is for networks with permutations only, where any mlp is
equivariant. Both work forward alone or in both directions (arXiv 2406.10685, section 5 and appendix).
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jax_scalegmn.models._edges import Piece, along_edges
from jax_scalegmn.models._features import Edges, Joined, num_ends, project, project_parts, scale_edges
from jax_scalegmn.models._layers import (
    IO,
    MLP,
    Canonical,
    CanonicalMap,
    FixedLayer,
    Groups,
    Rule,
    ScaleEquivariant,
    ScaleEquivariantNet,
    ScaleInvariant,
    cast,
    inverse_norm,
)
from jax_scalegmn.models._products import times
from jax_scalegmn.models.graph import EdgeBlock, Mask, Topology

# An axis word that begins with "_" may differ from one array to the next: layers have different widths.
Nodes: TypeAlias = dict[str, Float[Array, "_n features"]]


def rules(topology: Topology, mask: Mask | None, io: IO) -> dict[str, Rule]:
    """For every neuron layer, which group acts on it; of inputs and outputs, one rule where they share their maps."""
    by_layer: dict[str, Rule] = {}
    for name in topology.nodes:
        if name in topology.scalings:
            scalings = topology.scalings[name]
            present: tuple[Array, ...] = ()
            if mask is not None and len(scalings) > 1:
                present = tuple(mask.scalings[name][scaling.value] for scaling in scalings)
            by_layer[name] = Groups(scalings, present)
        else:
            own = io is IO.SEPARATE and name in topology.inputs
            by_layer[name] = FixedLayer.INPUT if own else FixedLayer.OUTPUT
    return by_layer


class GraphFeatures(NamedTuple):
    """Features between two layers: nodes by neuron layer, edges by block.

    Forward edges follow their receiver and go against their sender, `backward` edges the other way round.
    """

    nodes: Nodes
    edges: list[Edges]
    backward: list[Edges]


class Context(NamedTuple):
    """What all layers of a model know of the graph.

    Attributes:
      topology: The graph without its weights.
      rules: For every neuron layer: an input, an output, or the group that acts on it.
      groups: For every neuron layer, inputs and outputs included: how edge updates canonicalize it.
      extra: Further invariant node features that messages and updates read, or None.
      unlifted: By index, the first features of blocks that do not follow their receiver (`graph.EdgeBlock.lifted`).
      present_nodes, present_edges: By neuron layer and by block, what of a padded graph exists; None: everything.
    """

    topology: Topology
    rules: dict[str, Rule]
    groups: dict[str, Groups]
    extra: Nodes | None
    unlifted: dict[int, Edges]
    present_nodes: dict[str, Bool[Array, "_n 1"]] | None
    present_edges: list[Bool[Array, "_senders _receivers 1"]] | None

    def mask(self, nodes: Nodes) -> Nodes:
        """The features of nodes that exist, and zeros for those that do not."""
        if self.present_nodes is None:
            return nodes
        return {name: jnp.where(self.present_nodes[name], h, 0) for name, h in nodes.items()}

    def present(self, index: int) -> Bool[Array, "_senders _receivers 1"] | None:
        """Which edges of a block of a padded graph exist; None for all."""
        return None if self.present_edges is None else self.present_edges[index]


class Direction(NamedTuple):
    """Forward: from axis 0 of a block to its axis 1. Backward: from axis 1 to axis 0."""

    sender_axis: int

    def ends(self, block: EdgeBlock) -> tuple[str, str]:
        """The names of the sending and of the receiving neuron layer."""
        names = (block.sender, block.receiver)
        return names[self.sender_axis], names[1 - self.sender_axis]

    def hide_signs(self, block: EdgeBlock) -> tuple[bool, bool]:
        """Whether the block does not follow the sign of the sending neuron, and that of the receiving one."""
        return block.unsigned[self.sender_axis], block.unsigned[1 - self.sender_axis]

    def at_sender(self, x: Array) -> Array:
        """Features of senders, to be added to a block."""
        return jnp.expand_dims(x, 1 - self.sender_axis)

    def at_receiver(self, x: Array) -> Array:
        """Features of receivers, to be added to a block."""
        return jnp.expand_dims(x, self.sender_axis)


FORWARD, BACKWARD = Direction(0), Direction(1)


def joined_edges(pieces: list[Piece]) -> Joined:
    """The features of the edges."""
    return Joined([piece.edges for piece in pieces], [num_ends(piece.edges) for piece in pieces])


def joined_ends(pieces: list[Piece]) -> Float[Array, "edges features"]:
    """The sum of what both ends of every edge give to it."""
    return joined_edges(pieces)._replace(parts=[first + second for first, second in (p.nodes for p in pieces)]).value()


def summed(direction: Direction, piece: Piece, messages: Float[Array, "_senders _receivers features"]) -> Array:
    """The messages along edges that exist, summed over their senders, whose axis stays."""
    if piece.present is not None:
        messages = jnp.where(piece.present, messages, 0)
    return messages.sum(direction.sender_axis, keepdims=True)


def total(context: Context, direction: Direction, index: int, sums: Array, *, normalized: bool) -> Array:
    """The sum of `summed` of a block's parts, over the root of the number of senders where `normalized`."""
    axis, present = direction.sender_axis, context.present(index)
    sums = sums.sum(axis)
    if not normalized:
        return sums
    if present is None:
        return sums / math.sqrt(context.topology.blocks[index].shape[axis])
    return sums / jnp.sqrt(jnp.maximum(present.sum(axis).max(0), 1)).astype(sums.dtype)


def by_rule(rules: Mapping[str, Rule], names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The neuron layers by their rule: few large products instead of many small ones."""
    alike: dict[Rule | str, tuple[str, ...]] = {}
    for name in names:
        rule = rules[name]
        # What acts on a padded graph's layers is known only when the program runs.
        key = name if isinstance(rule, Groups) and rule.present else rule
        alike[key] = (*alike.get(key, ()), name)
    return list(alike.values())


def join(features: Nodes, names: tuple[str, ...]) -> Float[Array, "nodes features"]:
    """The features of some neuron layers in one array."""
    return jnp.concatenate([features[name] for name in names])


def split(
    joined: Float[Array, "nodes features"], names: tuple[str, ...], like: dict[str, Float[Array, "_n _features"]]
) -> Nodes:
    """What `join` joined, by neuron layer, each as long as in `like`."""
    ends = np.cumsum([like[name].shape[0] for name in names])[:-1]
    return dict(zip(names, jnp.split(joined, ends), strict=True))


class Options(NamedTuple):
    """What all layers of a model have in common, by the names of `models.ScaleGMN`.

    Attributes:
      hidden: The width of every mlp's hidden layer.
      epsilon: Added to norms.
      extra: The number of further invariant node features that messages and updates read.
      edges_at_once: As `models.ScaleGMN`.
    """

    features: int
    hidden: int
    bidirectional: bool
    normalized: bool
    canonical: Canonical
    io: IO
    message_layers: int
    update_layers: int
    epsilon: float
    extra: int
    dtype: str | None
    edges_at_once: int | None


class EdgeUpdate(nn.Module):
    """e' = (e @ W) * phi([c(h_sender), c(h_receiver)]) (arXiv 2406.10685, equation 15)."""

    options: Options
    outputs: int

    @nn.compact
    def __call__(
        self, context: Context, direction: Direction, nodes: Nodes, edges: list[Edges]
    ) -> list[Float[Array, "_senders _receivers outputs"]]:
        features, hidden, dtype = self.options.features, self.options.hidden, self.options.dtype
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (features, self.outputs))
        canonical = CanonicalMap(features, hidden, self.options.canonical, self.options.epsilon, name="canonical")
        phi = MLP(2 * features, hidden, self.outputs, 1.0, dtype, name="phi")
        # The first product of phi is taken on the nodes, half of it for each end, and summed on the edges.
        halves = jnp.concatenate(jnp.split(phi.centered_kernel, 2), -1)
        ends: Nodes = {}
        for names in by_rule(context.groups, tuple(nodes)):
            ends |= split(canonical.project(join(nodes, names), halves, context.groups[names[0]]), names, nodes)
        parts = {name: jnp.split(end, 2, -1) for name, end in ends.items()}
        pieces = {}
        for index, (block, e) in enumerate(zip(context.topology.blocks, edges, strict=True)):
            sender, receiver = direction.ends(block)
            both = direction.at_sender(parts[sender][0]), direction.at_receiver(parts[receiver][1])
            pieces[index] = Piece(e, both)
        own = cast(kernel, dtype)

        def update(phi: MLP, pieces: list[Piece], indices: list[int]) -> list[Array]:
            edges, ends = joined_edges(pieces), joined_ends(pieces)
            return edges.split(project(edges, own) * phi.lower(phi.activate(ends)))

        return list(along_edges(phi, update, pieces, self.options.edges_at_once).values())


class MessagePassing(nn.Module):
    """One layer (arXiv 2406.10685, equations 12 to 15): messages, their sums, node update, edge update.

    Where `options.normalized`, the sums are divided by the square root of the number of senders, which keeps their
    variance; the published layers do not divide.

    Attributes:
      options: What all layers of the model have in common.
      outputs: The number of new node features that follow the group.
      invariants: The number of further new node features that are invariant.
      edge_outputs: The number of new edge features; 0 leaves the edges unchanged.
      updated: The neuron layers that get new features; the others keep theirs.
      skip: Whether h @ W_skip is added to the new node features.
      writes: Whether the outputs are a change of the parameters, whose edges must not be lifted.
      update_backward: Whether another layer reads the backward edges.
    """

    options: Options
    outputs: int
    invariants: int
    edge_outputs: int
    updated: tuple[str, ...]
    skip: bool
    writes: bool
    update_backward: bool

    @nn.compact
    def __call__(self, context: Context, old: GraphFeatures) -> GraphFeatures:
        sums = [self._sums(context, FORWARD, old.nodes, old.edges)]
        if self.options.bidirectional:
            sums.append(self._sums(context, BACKWARD, old.nodes, old.backward))
        nodes = self._update_nodes(context, old.nodes, sums)
        edges = self._update_edges(context, old) if self.edge_outputs else old.edges
        backward = self._update_backward(context, old) if self.edge_outputs else old.backward
        return GraphFeatures(context.mask(nodes), edges, backward)

    def _sums(self, context: Context, direction: Direction, nodes: Nodes, edges: list[Edges]) -> Nodes:
        """The sums of the messages to every neuron layer that is updated; zeros where none arrives."""
        options = self.options
        sums = {name: jnp.zeros_like(h) for name, h in nodes.items()}
        if not any(direction.ends(block)[1] in self.updated for block in context.topology.blocks):
            return sums
        prefix = "" if direction is FORWARD else "backward_"
        sender_kernel = self._kernel(f"{prefix}sender_kernel", options.features)
        edge_kernel = self._kernel(f"{prefix}edge_kernel", options.features)
        message = self._equivariant(f"{prefix}message", options.features, options.message_layers, options.features)
        signs = self._signs(f"{prefix}sign_kernel", context, direction, nodes)
        names = tuple(nodes)
        sent = split(times(join(nodes, names), sender_kernel), names, nodes)
        pieces = {}
        for index, (block, e) in enumerate(zip(context.topology.blocks, edges, strict=True)):
            sender, receiver = direction.ends(block)
            if receiver in self.updated:
                h = jnp.abs(sent[sender]) if direction.hide_signs(block)[0] else sent[sender]
                pieces[index] = Piece(
                    e, (direction.at_sender(h),), self._extra(context, direction, block), context.present(index)
                )
        compute = functools.partial(self._messages, context, direction, edge_kernel)
        for index, parts in along_edges(message, compute, pieces, options.edges_at_once).items():
            block = context.topology.blocks[index]
            receiver = direction.ends(block)[1]
            arrived = total(context, direction, index, parts, normalized=options.normalized)
            sums[receiver] += arrived * signs[receiver] if direction.hide_signs(block)[1] else arrived
        return sums

    def _extra(self, context: Context, direction: Direction, block: EdgeBlock) -> Array | None:
        """Further invariant features: of the sender in both directions, of the receiver in one, as published."""
        if context.extra is None:
            return None
        sender, receiver = direction.ends(block)
        if self.options.bidirectional:
            return direction.at_sender(context.extra[sender])
        return direction.at_receiver(context.extra[receiver])

    def _messages(
        self,
        context: Context,
        direction: Direction,
        kernel: Array,
        message: ScaleEquivariantNet,
        pieces: list[Piece],
        indices: list[int],
    ) -> list[Array]:
        """The messages of every piece summed over its senders; those of one rule are computed at once."""
        edges = joined_edges(pieces)
        carried = [
            scale_edges(e, piece.nodes[0]) for e, piece in zip(project_parts(edges, kernel), pieces, strict=True)
        ]
        receivers = [direction.ends(context.topology.blocks[index])[1] for index in indices]
        sums: dict[int, Array] = {}
        for names in by_rule(context.rules, tuple(dict.fromkeys(receivers))):
            own = [number for number, receiver in enumerate(receivers) if receiver in names]
            rows = Joined([carried[number] for number in own], [edges.shapes[number] for number in own])
            others = [piece.extra for piece in (pieces[number] for number in own) if piece.extra is not None]
            further = Joined(others, rows.shapes) if others else None
            messages = rows.split(message(rows, context.rules[names[0]], further))
            sums |= {number: summed(direction, pieces[number], m) for number, m in zip(own, messages, strict=True)}
        return [sums[number] for number in range(len(pieces))]

    def _signs(self, name: str, context: Context, direction: Direction, nodes: Nodes) -> Nodes:
        """(h @ W) / |h|, which follows a neuron's sign and not its size, where messages arrive without the sign."""
        blocks = [block for block in context.topology.blocks if direction.hide_signs(block)[1]]
        receivers = sorted({direction.ends(block)[1] for block in blocks} & set(self.updated))
        if not receivers:
            return {}
        kernel = self._kernel(name, self.options.features)
        return {r: (nodes[r] @ kernel) * inverse_norm(nodes[r]).astype(nodes[r].dtype) for r in receivers}

    def _update_nodes(self, context: Context, old: Nodes, sums: list[Nodes]) -> Nodes:
        """h' = ScaleEq([h, sums]) + h @ W_skip, layers of one rule at a time."""
        options, width = self.options, (1 + len(sums)) * self.options.features
        update = self._equivariant("update", width, options.update_layers, self.outputs)
        free = None
        if self.invariants:
            sizes = width, options.hidden, self.invariants
            free = ScaleInvariant(*sizes, options.canonical, options.epsilon, dtype=options.dtype, name="invariant")
        skip = self._kernel("skip_kernel", self.outputs) if self.skip else None
        nodes = dict(old)
        for names in by_rule(context.rules, self.updated):
            joined = jnp.concatenate([join(each, names) for each in (old, *sums)], -1)
            new = update(joined, context.rules[names[0]], None if context.extra is None else join(context.extra, names))
            if skip is not None:
                new += times(join(old, names), skip)
            if free is not None:
                new = jnp.concatenate([new, free(joined, context.groups[names[0]])], -1)
            nodes |= split(new, names, old)
        return nodes

    def _update_edges(self, context: Context, old: GraphFeatures) -> list[Edges]:
        """New features of the edges, from the old nodes; those that become weights are read before the lift."""
        edges = old.edges
        if self.writes:
            edges = [context.unlifted.get(index, e) for index, e in enumerate(edges)]
        return self._edge_update("edge_update")(context, FORWARD, old.nodes, edges)

    def _update_backward(self, context: Context, old: GraphFeatures) -> list[Edges]:
        """New features of the backward edges; under signs and permutations the first ones remain, as published."""
        if not (self.update_backward and context.topology.has_sizes):
            return old.backward
        return self._edge_update("backward_edge_update")(context, BACKWARD, old.nodes, old.backward)

    def _kernel(self, name: str, outputs: int) -> Array:
        kernel: Array = self.param(name, nn.initializers.lecun_normal(), (self.options.features, outputs))
        return cast(kernel, self.options.dtype)

    def _equivariant(self, name: str, inputs: int, num_layers: int, outputs: int) -> ScaleEquivariantNet:
        """Maps in sequence, of which the first changes the number of features."""
        o = self.options
        layer = functools.partial(
            ScaleEquivariant,
            hidden=o.hidden,
            outputs=outputs,
            kind=o.canonical,
            io=o.io,
            epsilon=o.epsilon,
            extra=o.extra,
            dtype=o.dtype,
            parent=None,
        )
        widths = (inputs, *[outputs] * (num_layers - 1))
        return ScaleEquivariantNet(tuple(layer(width) for width in widths), name=name)

    def _edge_update(self, name: str) -> EdgeUpdate:
        return EdgeUpdate(self.options, self.edge_outputs, name=name)


class PlainMessagePassing(nn.Module):
    """One layer for networks with permutations only, of three mlps (arXiv 2406.10685, equations 2 to 4).

    One of [e, h_sender] is the message, one of [h, sums] the node update, one of [e, h_sender, h_receiver] the edge
    update.

    Attributes: As `MessagePassing`.
    """

    options: Options
    outputs: int
    edge_outputs: int
    updated: tuple[str, ...]
    skip: bool

    @nn.compact
    def __call__(self, context: Context, old: GraphFeatures) -> GraphFeatures:
        d = self.options.features
        sums = [self._sums(context, FORWARD, old.nodes, old.edges)]
        if self.options.bidirectional:
            sums.append(self._sums(context, BACKWARD, old.nodes, old.backward))
        joined = join(old.nodes, self.updated)
        new = self._mlp("update", (1 + len(sums)) * d, self.outputs)(
            jnp.concatenate([joined, *(join(total, self.updated) for total in sums)], -1)
        )
        if self.skip:
            kernel = self.param("skip_kernel", nn.initializers.lecun_normal(), (d, self.outputs))
            new += joined @ cast(kernel, self.options.dtype)
        nodes = context.mask(dict(old.nodes) | split(new, self.updated, old.nodes))
        return old._replace(nodes=nodes, edges=self._update_edges(context, old) if self.edge_outputs else old.edges)

    def _update_edges(self, context: Context, old: GraphFeatures) -> list[Edges]:
        mlp = self._mlp("edge_update", 3 * self.options.features, self.edge_outputs)
        own, *halves = jnp.split(mlp.centered_kernel, 3)
        names = tuple(old.nodes)
        first, second = (split(times(join(old.nodes, names), half), names, old.nodes) for half in halves)
        pieces = {
            index: Piece(e, (FORWARD.at_sender(first[block.sender]), FORWARD.at_receiver(second[block.receiver])))
            for index, (block, e) in enumerate(zip(context.topology.blocks, old.edges, strict=True))
        }

        def update(mlp: MLP, pieces: list[Piece], indices: list[int]) -> list[Array]:
            edges, ends = joined_edges(pieces), joined_ends(pieces)
            return edges.split(mlp.lower(mlp.activate(project(edges, own) + ends)))

        return list(along_edges(mlp, update, pieces, self.options.edges_at_once).values())

    def _sums(self, context: Context, direction: Direction, nodes: Nodes, edges: list[Edges]) -> Nodes:
        """The sums of the messages to every neuron layer that is updated; zeros where none arrives."""
        d = self.options.features
        message = self._mlp("message" if direction is FORWARD else "backward_message", 2 * d, d)
        pieces = {}
        for index, (block, e) in enumerate(zip(context.topology.blocks, edges, strict=True)):
            sender, receiver = direction.ends(block)
            if receiver in self.updated:
                pieces[index] = Piece(e, (direction.at_sender(nodes[sender]),), present=context.present(index))

        def messages(message: MLP, pieces: list[Piece], indices: list[int]) -> list[Array]:
            edges = joined_edges(pieces)
            senders = edges._replace(parts=[piece.nodes[0] for piece in pieces])
            return [
                summed(direction, piece, m)
                for piece, m in zip(pieces, edges.split(message(edges, senders)), strict=True)
            ]

        sums = {name: jnp.zeros_like(h) for name, h in nodes.items()}
        for index, parts in along_edges(message, messages, pieces, self.options.edges_at_once).items():
            receiver = direction.ends(context.topology.blocks[index])[1]
            sums[receiver] += total(context, direction, index, parts, normalized=self.options.normalized)
        return sums

    def _mlp(self, name: str, inputs: int, outputs: int) -> MLP:
        return MLP(inputs, self.options.hidden, outputs, dtype=self.options.dtype, name=name)

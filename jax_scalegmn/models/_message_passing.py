"""Layers of a ScaleGMN on the blocks of a graph: messages, their sums, node updates, edge updates.

`MessagePassing` follows every group; `PlainMessagePassing` is for networks with permutations only, where any mlp is
equivariant. Both work forward alone or in both directions (arXiv 2406.10685, section 5 and appendix).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jax_scalegmn.architecture import Scaling
from jax_scalegmn.models._layers import (
    IO,
    MLP,
    Canonical,
    CanonicalMap,
    Edges,
    End,
    Groups,
    Rule,
    ScaleEquivariant,
    ScaleEquivariantNet,
    ScaleInvariant,
    cast,
    project,
    scale_edges,
)
from jax_scalegmn.models.graph import Block, Presence, Topology

# An axis word that begins with "_" may differ from one array to the next: layers have different widths.
Nodes: TypeAlias = dict[str, Float[Array, "_n features"]]


def rules(topology: Topology, presence: Presence | None) -> dict[str, Rule]:
    """Of every neuron layer, which end of the network it is, or which group acts on it."""
    found: dict[str, Rule] = {}
    for name in topology.nodes:
        if name in topology.scalings:
            scalings = topology.scalings[name]
            present: tuple[Array, ...] = ()
            if presence is not None and len(scalings) > 1:
                present = tuple(presence.scalings[name][scaling.value] for scaling in scalings)
            found[name] = Groups(scalings, present)
        else:
            found[name] = End.INPUT if name in topology.inputs else End.OUTPUT
    return found


class State(NamedTuple):
    """Features on the way: of nodes by neuron layer, of edges by block; those of `backward` edges in both directions.

    Forward edges follow their receiver and go against their sender, backward edges the other way round.
    """

    nodes: Nodes
    edges: list[Edges]
    backward: list[Edges]


class Context(NamedTuple):
    """What all layers of a model share.

    Attributes:
      topology: of the graph.
      rules: of every neuron layer: where no group acts, which end it is; elsewhere its group.
      groups: of every neuron layer, inputs and outputs included: how the edge update canonicalizes it.
      extra: invariant features of nodes that messages and updates read besides, or None.
      present_nodes, present_edges: by neuron layer and by block, what of a padded graph is there; None: all.
    """

    topology: Topology
    rules: dict[str, Rule]
    groups: dict[str, Groups]
    extra: Nodes | None
    present_nodes: dict[str, Bool[Array, "_n 1"]] | None
    present_edges: list[Bool[Array, "_senders _receivers 1"]] | None

    def mask(self, nodes: Nodes) -> Nodes:
        """The nodes that are there; zeros elsewhere."""
        if self.present_nodes is None:
            return nodes
        return {name: jnp.where(self.present_nodes[name], h, 0) for name, h in nodes.items()}


class Direction(NamedTuple):
    """Forward: from axis 0 of a block to its axis 1. Backward: from axis 1 to axis 0."""

    sender_axis: int

    def ends(self, block: Block) -> tuple[str, str]:
        """The names of the sending and of the receiving neuron layer."""
        names = (block.sender, block.receiver)
        return names[self.sender_axis], names[1 - self.sender_axis]

    def at_sender(self, x: Array) -> Array:
        """Features of senders, to be added to a block."""
        return jnp.expand_dims(x, 1 - self.sender_axis)

    def at_receiver(self, x: Array) -> Array:
        """Features of receivers, to be added to a block."""
        return jnp.expand_dims(x, self.sender_axis)


FORWARD, BACKWARD = Direction(0), Direction(1)


def aggregate(
    context: Context, direction: Direction, index: int, messages: Array, *, normalized: bool
) -> Float[Array, "n features"]:
    """The messages of one block summed over its senders, over the root of their number where `normalized`."""
    axis = direction.sender_axis
    if context.present_edges is None:
        total = messages.sum(axis)
        return total / math.sqrt(messages.shape[axis]) if normalized else total
    present = context.present_edges[index]
    total = jnp.where(present, messages, 0).sum(axis)
    count = jnp.maximum(present.sum(axis).max(0), 1)
    return total / jnp.sqrt(count).astype(total.dtype) if normalized else total


def by_rule(rules: Mapping[str, Rule], names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The neuron layers by their rule: few large products instead of many small ones."""
    found: dict[Rule | str, tuple[str, ...]] = {}
    for name in names:
        rule = rules[name]
        # What acts on a padded graph's layers is known only when the program runs.
        key = name if isinstance(rule, Groups) and rule.present else rule
        found[key] = (*found.get(key, ()), name)
    return list(found.values())


def join(features: Nodes, names: tuple[str, ...]) -> Float[Array, "nodes features"]:
    """The features of some neuron layers in one array."""
    return jnp.concatenate([features[name] for name in names])


def split(
    joined: Float[Array, "nodes features"], names: tuple[str, ...], like: dict[str, Float[Array, "_n _features"]]
) -> Nodes:
    """What `join` joined, by neuron layer, each as long as in `like`."""
    ends = np.cumsum([like[name].shape[0] for name in names])[:-1]
    return dict(zip(names, jnp.split(joined, ends), strict=True))


class EdgeUpdate(nn.Module):
    """e' = (e @ W) * phi([c(h_sender), c(h_receiver)]) (arXiv 2406.10685, equation 15)."""

    features: int
    hidden: int
    outputs: int
    kind: Canonical
    epsilon: float = 0.0
    dtype: str | None = None

    @nn.compact
    def __call__(
        self, context: Context, direction: Direction, nodes: Nodes, edges: list[Edges]
    ) -> list[Float[Array, "_senders _receivers outputs"]]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.features, self.outputs))
        canonical = CanonicalMap(self.features, self.hidden, self.kind, self.epsilon, name="canonical")
        phi = MLP(2 * self.features, self.hidden, self.outputs, 1.0, self.dtype, name="phi")
        halves = jnp.concatenate(jnp.split(phi.centered_kernel, 2), -1)
        parts = {
            name: jnp.split(canonical.project(h, halves, context.groups[name]), 2, -1) for name, h in nodes.items()
        }
        updated = []
        for block, e in zip(context.topology.blocks, edges, strict=True):
            sender, receiver = direction.ends(block)
            u = direction.at_sender(parts[sender][0]) + direction.at_receiver(parts[receiver][1])
            updated.append(project(e, cast(kernel, self.dtype)) * phi.lower(phi.activate(u)))
        return updated


class MessagePassing(nn.Module):
    """One layer (arXiv 2406.10685, equations 12 to 15): messages, their sums, node update, edge update.

    The sums are divided by the square root of the number of senders where `normalized`, which keeps their variance;
    the published layers sum plainly.

    Attributes:
      features: d, entries of a node or edge feature. hidden: width of the mlps.
      outputs: entries of a new node feature that follow the group; invariants: further ones that are free of it.
      edge_outputs: entries of a new edge feature; 0 to leave the edges as they are.
      update_backward: whether a further layer reads the backward edges.
      updated: the neuron layers that get new features; the others keep theirs.
      Others: as `models.ScaleGMN`.
    """

    features: int
    hidden: int
    outputs: int
    edge_outputs: int
    update_backward: bool
    updated: tuple[str, ...]
    canonical: Canonical
    io: IO
    bidirectional: bool
    message_layers: int
    update_layers: int
    skip: bool
    normalized: bool
    invariants: int = 0
    epsilon: float = 0.0
    extra: int = 0
    dtype: str | None = None

    @nn.compact
    def __call__(self, context: Context, state: State, raw: list[Edges] | None = None) -> State:
        """The new features; the edge update reads the `raw` edges in place of the state's where they are given."""
        sums = [self._sums(context, FORWARD, state.nodes, state.edges)]
        if self.bidirectional:
            sums.append(self._sums(context, BACKWARD, state.nodes, state.backward))
        inputs = {name: jnp.concatenate([h, *(total[name] for total in sums)], -1) for name, h in state.nodes.items()}
        width = (1 + len(sums)) * self.features

        update = self._equivariant("update", width, self.update_layers, self.outputs)
        free = None
        if self.invariants:
            sizes = width, self.hidden, self.invariants
            free = ScaleInvariant(*sizes, self.canonical, self.epsilon, dtype=self.dtype, name="invariant")
        skip = self._kernel("skip_kernel", self.outputs) if self.skip else None
        nodes = dict(state.nodes)
        for names in by_rule(context.rules, self.updated):
            joined = join(inputs, names)
            new = update(joined, context.rules[names[0]], None if context.extra is None else join(context.extra, names))
            if skip is not None:
                new += join(state.nodes, names) @ skip
            if free is not None:
                new = jnp.concatenate([new, free(joined, context.groups[names[0]])], -1)
            nodes |= split(new, names, inputs)

        edges, backward = state.edges, state.backward
        if self.edge_outputs:
            edges = self._edge_update("edge_update")(context, FORWARD, state.nodes, edges if raw is None else raw)
            # Signs and permutations: backward messages read the first edges in every layer, as published.
            if self.update_backward and context.topology.is_under(Scaling.POSITIVE):
                update_backward = self._edge_update("backward_edge_update")
                backward = update_backward(context, BACKWARD, state.nodes, backward)
        return State(context.mask(nodes), edges, backward)

    def _sums(self, context: Context, direction: Direction, nodes: Nodes, edges: list[Edges]) -> Nodes:
        """The sums of the messages to every neuron layer that is updated; zeros where none comes."""
        sums = {name: jnp.zeros_like(h) for name, h in nodes.items()}
        if not any(direction.ends(block)[1] in self.updated for block in context.topology.blocks):
            return sums
        prefix = "" if direction is FORWARD else "backward_"
        sender_kernel = self._kernel(f"{prefix}sender_kernel", self.features)
        edge_kernel = self._kernel(f"{prefix}edge_kernel", self.features)
        message = self._equivariant(f"{prefix}message", self.features, self.message_layers, self.features)
        for index, (block, e) in enumerate(zip(context.topology.blocks, edges, strict=True)):
            sender, receiver = direction.ends(block)
            if receiver not in self.updated:
                continue
            m = scale_edges(e, edge_kernel, nodes[sender] @ sender_kernel, direction.sender_axis)
            extra = None
            if context.extra is not None:  # of the sender in both directions, of the receiver in one, as published
                at = direction.at_sender if self.bidirectional else direction.at_receiver
                extra = at(context.extra[sender if self.bidirectional else receiver])
            m = message(m, context.rules[receiver], extra)
            sums[receiver] += aggregate(context, direction, index, m, normalized=self.normalized)
        return sums

    def _kernel(self, name: str, outputs: int) -> Array:
        kernel: Array = self.param(name, nn.initializers.lecun_normal(), (self.features, outputs))
        return cast(kernel, self.dtype)

    def _equivariant(self, name: str, inputs: int, num_layers: int, outputs: int) -> ScaleEquivariantNet:
        """Maps in sequence, of which the first changes the number of features."""
        options = self.hidden, outputs, self.canonical, self.io, self.epsilon, self.extra, self.dtype
        widths = (inputs, *[outputs] * (num_layers - 1))
        return ScaleEquivariantNet(tuple(ScaleEquivariant(width, *options, parent=None) for width in widths), name=name)

    def _edge_update(self, name: str) -> EdgeUpdate:
        return EdgeUpdate(
            self.features, self.hidden, self.edge_outputs, self.canonical, self.epsilon, self.dtype, name=name
        )


class PlainMessagePassing(nn.Module):
    """One layer for networks with permutations only: an mlp of [e, h_sender] as message, of [h, sums] as node update,
    of [e, h_sender, h_receiver] as edge update (arXiv 2406.10685, equations 2 to 4).

    Attributes: as `MessagePassing`.
    """

    features: int
    hidden: int
    outputs: int
    edge_outputs: int
    updated: tuple[str, ...]
    bidirectional: bool
    skip: bool
    normalized: bool
    dtype: str | None = None

    @nn.compact
    def __call__(self, context: Context, state: State) -> State:
        d = self.features
        sums = [self._sums(context, FORWARD, state.nodes, state.edges)]
        if self.bidirectional:
            sums.append(self._sums(context, BACKWARD, state.nodes, state.backward))
        joined = join(state.nodes, self.updated)
        new = self._mlp("update", (1 + len(sums)) * d, self.outputs)(
            jnp.concatenate([joined, *(join(total, self.updated) for total in sums)], -1)
        )
        if self.skip:
            kernel = self.param("skip_kernel", nn.initializers.lecun_normal(), (d, self.outputs))
            new += joined @ cast(kernel, self.dtype)
        nodes = context.mask(dict(state.nodes) | split(new, self.updated, state.nodes))
        if not self.edge_outputs:
            return state._replace(nodes=nodes)
        mlp = self._mlp("edge_update", 3 * d, self.edge_outputs)
        own, first, second = jnp.split(mlp.centered_kernel, 3)
        edges: list[Edges] = []
        for block, e in zip(context.topology.blocks, state.edges, strict=True):
            ends = FORWARD.at_sender(state.nodes[block.sender] @ first)
            ends += FORWARD.at_receiver(state.nodes[block.receiver] @ second)
            edges.append(mlp.lower(mlp.activate(project(e, own) + ends)))
        return State(nodes, edges, state.backward)

    def _sums(self, context: Context, direction: Direction, nodes: Nodes, edges: list[Edges]) -> Nodes:
        message = self._mlp("message" if direction is FORWARD else "backward_message", 2 * self.features, self.features)
        sums = {name: jnp.zeros_like(h) for name, h in nodes.items()}
        for index, (block, e) in enumerate(zip(context.topology.blocks, edges, strict=True)):
            sender, receiver = direction.ends(block)
            if receiver in self.updated:
                m = message(e, direction.at_sender(nodes[sender]))
                sums[receiver] += aggregate(context, direction, index, m, normalized=self.normalized)
        return sums

    def _mlp(self, name: str, inputs: int, outputs: int) -> MLP:
        return MLP(inputs, self.hidden, outputs, dtype=self.dtype, name=name)

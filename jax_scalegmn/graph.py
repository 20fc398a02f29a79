"""Networks as graphs: one node a neuron, one directed edge a weight (Kofinas et al. 2024, arXiv 2403.12143).

The topology follows from the architecture alone and is NumPy, so it is a constant of the compiled program. Edges
stand by block (one for each parameter with two neuron axes), then by sender, then by receiver: a block's edges
reshape to [senders, receivers, features] without a gather.
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture, Parameter, Scaling
from jax_scalegmn.types import Params


class Block(NamedTuple):
    """All edges of one kernel: a complete bipartite graph between two neuron layers."""

    sender: str
    receiver: str
    shape: tuple[int, int]  # (senders, receivers)
    edges: slice
    types: np.ndarray  # edge types, broadcastable to [senders, receivers]


class Topology(NamedTuple):
    """What does not depend on the weights.

    Attributes:
      nodes: where each neuron layer's nodes stand.
      blocks: the edges, kernel by kernel, in the order of `arch.parameters`.
      io: the neuron layers on which no group acts, inputs and outputs.
      node_types: [nodes]: every input and every output neuron its own, each hidden layer one.
      num_edge_types: first blocks have one a sender, last blocks one a receiver, hidden blocks one.
      node_features: entries of a node feature; edge_features: entries of an edge feature.
    """

    nodes: dict[str, slice]
    blocks: tuple[Block, ...]
    io: frozenset[str]
    node_types: np.ndarray
    num_edge_types: int
    node_features: int
    edge_features: int

    @property
    def num_nodes(self) -> int:
        return len(self.node_types)

    @property
    def num_node_types(self) -> int:
        return int(self.node_types.max()) + 1


@functools.lru_cache(maxsize=256)
def topology(arch: Architecture) -> Topology:
    """The graph of an architecture without its weights."""
    nodes, start = {}, 0
    for neurons in arch.neurons:
        nodes[neurons.name] = slice(start, start + neurons.width)
        start += neurons.width
    kernels = [parameter for parameter in arch.parameters if len(parameter.neuron_axes) == 2]
    sending = {kernel.neuron_axes[0].neurons for kernel in kernels}
    io = frozenset(neurons.name for neurons in arch.neurons if neurons.scaling is Scaling.FIXED)
    node_types: list[int] = []
    for neurons in arch.neurons:
        first = node_types[-1] + 1 if node_types else 0
        node_types += list(range(first, first + neurons.width)) if neurons.name in io else [first] * neurons.width
    blocks, first_edge, first_type = [], 0, 0
    for kernel in kernels:
        sender, receiver = (arch.layer(axis.neurons) for axis in kernel.neuron_axes)
        by_sender, by_receiver = sender.name in io, receiver.name in io and receiver.name not in sending
        shape = (sender.width if by_sender else 1, receiver.width if by_receiver else 1)
        types = first_type + np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        edges = slice(first_edge, first_edge + sender.width * receiver.width)
        blocks.append(Block(sender.name, receiver.name, (sender.width, receiver.width), edges, types))
        first_edge, first_type = edges.stop, first_type + types.size
    return Topology(
        nodes=nodes,
        blocks=tuple(blocks),
        io=io,
        node_types=np.asarray(node_types, np.int32),
        num_edge_types=first_type,
        node_features=max(1, max(len(_vectors(arch, neurons.name)) for neurons in arch.neurons)),
        edge_features=_slots(arch),
    )


def from_params(arch: Architecture, params: Params) -> jraph.GraphsTuple:
    """The graph of one network.

    Node features [nodes, k] are the biases (and any further vectors of the neuron layer), input nodes carry 1, or 0
    in convolutional networks, as published. Edge features [edges, k] are the weights; kernels are flattened and
    zero-padded symmetrically to the largest one, and a scalar stands in slot 0.

    Raises:
      ValueError: if params do not fit the architecture.
    """
    topo = topology(arch)
    values = dict(zip(arch.parameters, architecture.unpack(arch, params), strict=True))
    dtype = jnp.result_type(*values.values())
    nodes = []
    for neurons in arch.neurons:
        columns = [values[vector] for vector in _vectors(arch, neurons.name)]
        if not columns:
            columns = [jnp.full(neurons.width, 0.0 if _kernel_size(arch) else 1.0, dtype)]
        columns += [jnp.zeros(neurons.width, dtype)] * (topo.node_features - len(columns))
        nodes.append(jnp.stack(columns, -1))
    edges = [
        _to_edges(arch, parameter, value, topo.edge_features)
        for parameter, value in values.items()
        if len(parameter.neuron_axes) == 2
    ]
    senders, receivers = _endpoints(arch)
    return jraph.GraphsTuple(
        nodes=jnp.concatenate(nodes),
        edges=jnp.concatenate(edges),
        senders=senders,
        receivers=receivers,
        globals=None,
        n_node=np.asarray([topo.num_nodes], np.int32),
        n_edge=np.asarray([len(senders)], np.int32),
    )


def to_params(arch: Architecture, graph: jraph.GraphsTuple) -> dict[str, dict[str, Array]]:
    """The params of a graph: `to_params(arch, from_params(arch, params))` is `params`, bit for bit.

    Raises:
      ValueError: if the graph is not one of this architecture.
    """
    topo = topology(arch)
    shapes = {
        "nodes": (jnp.shape(graph.nodes), (topo.num_nodes, topo.node_features)),
        "edges": (jnp.shape(graph.edges), (len(_endpoints(arch)[0]), topo.edge_features)),
    }
    for field, (got, expected) in shapes.items():
        if got != expected:
            raise ValueError(f"graph.{field} has shape {got}; {arch.name!r} expects {expected}: one network's graph.")
    blocks = iter(topo.blocks)
    values: list[Any] = []
    for parameter in arch.parameters:
        if len(parameter.neuron_axes) == 2:
            values.append(_from_edges(arch, parameter, graph.edges[next(blocks).edges]))
        else:
            name = parameter.neuron_axes[0].neurons
            column = _vectors(arch, name).index(parameter)
            values.append(graph.nodes[topo.nodes[name], column])
    return architecture.pack(arch, values)


# --- private ------------------------------------------------------------------------------------------------------


def _vectors(arch: Architecture, neurons: str) -> list[Parameter]:
    """The parameters that are node features of one neuron layer."""
    return [p for p in arch.parameters if [axis.neurons for axis in p.neuron_axes] == [neurons]]


def _spatial(parameter: Parameter) -> tuple[int, ...]:
    return tuple(axis for axis in parameter.axes if isinstance(axis, int))


def _kernel_size(arch: Architecture) -> tuple[int, ...]:
    """The largest spatial kernel, axis by axis; empty without convolutions."""
    sizes = [_spatial(parameter) for parameter in arch.parameters if _spatial(parameter)]
    return tuple(max(side) for side in zip(*sizes, strict=True)) if sizes else ()


def _slots(arch: Architecture) -> int:
    repeats = [axis.repeat for parameter in arch.parameters for axis in parameter.neuron_axes]
    return max(math.prod(_kernel_size(arch)), *repeats)


@functools.lru_cache(maxsize=256)
def _endpoints(arch: Architecture) -> tuple[np.ndarray, np.ndarray]:
    """Senders and receivers of all edges, [edges] each."""
    topo = topology(arch)
    senders, receivers = [], []
    for block in topo.blocks:
        rows, columns = np.indices(block.shape, np.int32)
        senders.append(rows.reshape(-1) + topo.nodes[block.sender].start)
        receivers.append(columns.reshape(-1) + topo.nodes[block.receiver].start)
    return np.concatenate(senders), np.concatenate(receivers)


def _split_shape(arch: Architecture, parameter: Parameter) -> tuple[list[int], list[int]]:
    """A kernel's shape with repeats as axes of their own, and the order (sender, receiver, spatial axes)."""
    shape: list[int] = []
    neurons: list[int] = []
    for axis in parameter.axes:
        if isinstance(axis, int):
            shape.append(axis)
        else:
            shape += [axis.repeat, arch.layer(axis.neurons).width]
            neurons.append(len(shape) - 1)
    return shape, neurons + [i for i in range(len(shape)) if i not in neurons]


def _margins(arch: Architecture, parameter: Parameter) -> list[tuple[int, int]]:
    """Zeros before and behind a kernel along its spatial axes, symmetric up to one."""
    pairs = zip(_kernel_size(arch), _spatial(parameter), strict=False)
    return [((large - small) // 2, large - small - (large - small) // 2) for large, small in pairs]


def _to_edges(arch: Architecture, parameter: Parameter, value: Array, slots: int) -> Float[Array, "edges features"]:
    shape, order = _split_shape(arch, parameter)
    value = jnp.transpose(jnp.reshape(value, shape), order)
    ends, sizes = value.shape[:2], _spatial(parameter)
    if sizes:
        value = jnp.pad(value.reshape(*ends, *sizes), [(0, 0), (0, 0), *_margins(arch, parameter)])
    value = value.reshape(math.prod(ends), -1)
    return jnp.pad(value, [(0, 0), (0, slots - value.shape[1])])


def _from_edges(arch: Architecture, parameter: Parameter, edges: Array) -> Array:
    shape, order = _split_shape(arch, parameter)
    ordered = [shape[i] for i in order]
    sizes = _spatial(parameter)
    if sizes:
        full = _kernel_size(arch)
        maps = edges[:, : math.prod(full)].reshape(-1, *full)
        inner = [slice(low, low + size) for (low, _), size in zip(_margins(arch, parameter), sizes, strict=True)]
        edges = maps[(slice(None), *inner)].reshape(len(edges), -1)
    value = edges[:, : math.prod(ordered[2:])].reshape(ordered)
    return value.transpose(np.argsort(order)).reshape(arch.shape(parameter))

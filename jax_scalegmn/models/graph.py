"""Networks as graphs: one node a neuron, one directed edge a weight (Kofinas et al. 2024, arXiv 2403.12143).

The topology follows from the architecture alone and is NumPy, so it is a constant of the compiled program. Edges
stand by block (one for each parameter with two neuron axes, an array or a part of one), then by sender, then by
receiver: a block's edges reshape to [senders, receivers, features] without a gather.

A `Bucket` holds several architectures. Their graphs are padded to one topology, and what is there of it travels with
each graph, so that one compiled program reads them all.
"""

import dataclasses
import functools
import graphlib
import itertools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Bool, Float

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture, Parameter, Scaling
from jax_scalegmn.types import Params

__all__ = [
    "SCALED",
    "Block",
    "Bucket",
    "Columns",
    "Presence",
    "Readable",
    "Topology",
    "from_params",
    "to_params",
    "topology",
]

SCALED = (Scaling.SIGN, Scaling.POSITIVE)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Bucket:
    """Architectures whose networks stand in one batch: neuron layers of one name share their place in the graph.

    Attributes:
      members: the architectures; they may differ in depth, widths, kernels and groups.
      multiple: hidden widths are rounded up to a multiple of it, so that few buckets serve many architectures.

    Raises:
      ValueError: without members, or if they disagree on which layers are inputs and outputs, or on their order.
    """

    members: tuple[Architecture, ...]
    multiple: int = 1

    def __post_init__(self) -> None:
        if not self.members or self.multiple < 1:
            raise ValueError(
                f"A bucket needs members and a multiple >= 1; got {len(self.members)} members and {self.multiple}."
            )
        for name in _ordered_layers(self.members):
            scalings = {n.scaling for member in self.members for n in member.neuron_layers if n.name == name}
            if Scaling.FIXED in scalings and len(scalings) > 1:
                raise ValueError(
                    f"Neuron layer {name!r} is an input or output of one member and hidden in another: "
                    f"{[member.name for member in self.members]}. Rename it in one of them."
                )

    @property
    def name(self) -> str:
        return f"bucket of {', '.join(member.name for member in self.members)}"


# What a model can read.
Readable: TypeAlias = Architecture | Bucket


class Presence(NamedTuple):
    """What of a bucket's topology one member has: `globals` of its graph.

    Attributes:
      nodes: [nodes], whether the neuron exists.
      edges: [edges], whether the weight exists.
      scalings: for every hidden neuron layer, which group acts on it; keys: names of layers, values of `Scaling`.
    """

    nodes: Bool[Array, " nodes"]
    edges: Bool[Array, " edges"]
    scalings: dict[str, dict[str, Bool[Array, ""]]]


class Block(NamedTuple):
    """All edges of one kernel: a complete bipartite graph between two neuron layers.

    `lifted`: the kernel does not follow a rescaling of the receiver, as in front of a batch normalization.
    """

    sender: str
    receiver: str
    shape: tuple[int, int]  # (senders, receivers)
    edges: slice
    types: np.ndarray  # edge types, broadcastable to [senders, receivers]
    lifted: bool


class Columns(NamedTuple):
    """How many node features follow a rescaling of their neuron, go against it, and are free of it; in that order."""

    along: int
    against: int
    free: int


class Topology(NamedTuple):
    """What does not depend on the weights.

    Attributes:
      nodes: where each neuron layer's nodes stand, in topological order.
      blocks: the edges, kernel by kernel, in the order of `arch.parameters`.
      scalings: of each hidden neuron layer, the groups that may act on it: one, but for a bucket of several.
      inputs, outputs: the neuron layers on which no group acts; outputs are fed by some kernel.
      biased: the neuron layers that have parameters of their own, like a bias.
      node_types: [nodes]: every input and every output neuron its own, each hidden layer one.
      num_edge_types: first blocks have one a sender, last blocks one a receiver, hidden blocks one.
      columns: of a node feature.
      edge_features: entries of an edge feature.
      kernel_size: the largest spatial kernel, axis by axis; empty without convolutions.
    """

    nodes: dict[str, slice]
    blocks: tuple[Block, ...]
    scalings: dict[str, tuple[Scaling, ...]]
    inputs: frozenset[str]
    outputs: frozenset[str]
    biased: frozenset[str]
    node_types: np.ndarray
    num_edge_types: int
    columns: Columns
    edge_features: int
    kernel_size: tuple[int, ...]

    @property
    def io(self) -> frozenset[str]:
        """The neuron layers on which no group acts."""
        return self.inputs | self.outputs

    @property
    def num_nodes(self) -> int:
        return len(self.node_types)

    @property
    def num_edges(self) -> int:
        return self.blocks[-1].edges.stop

    @property
    def num_node_types(self) -> int:
        return int(self.node_types.max()) + 1

    @property
    def node_features(self) -> int:
        """Entries of a node feature."""
        return sum(self.columns)

    def is_under(self, *scalings: Scaling) -> bool:
        """Whether one of these groups may act on some hidden layer."""
        return any(scaling in scalings for possible in self.scalings.values() for scaling in possible)


@functools.lru_cache(maxsize=256)
def topology(arch: Readable) -> Topology:
    """The graph of an architecture, or of a bucket of them, without its weights.

    Raises:
      ValueError: if a kernel reads a rescaled layer without undoing it (power 0), which no equivariant graph has, or
        if a parameter belongs to no neuron layer.
    """
    members = arch.members if isinstance(arch, Bucket) else (arch,)
    multiple = arch.multiple if isinstance(arch, Bucket) else 1
    scalings: dict[str, tuple[Scaling, ...]] = {}
    nodes, start = {}, 0
    for name in _ordered_layers(members):
        found = [neurons for member in members for neurons in member.neuron_layers if neurons.name == name]
        width = max(neurons.width for neurons in found)
        if found[0].scaling is not Scaling.FIXED:
            width = -(-width // multiple) * multiple
            scalings[name] = tuple(s for s in Scaling if s in {neurons.scaling for neurons in found})
        nodes[name] = slice(start, start + width)
        start += width
    keys = dict.fromkeys(key for member in members for key in _kernels(member).values())
    fed = {key.receiver for key in keys}
    sending = {key.sender for key in keys}
    io = frozenset(nodes) - frozenset(scalings)
    node_types: list[int] = []
    for name, where in nodes.items():
        first, width = node_types[-1] + 1 if node_types else 0, where.stop - where.start
        node_types += list(range(first, first + width)) if name in io else [first] * width
    blocks, first_edge, first_type = [], 0, 0
    for key in keys:
        senders, receivers = (nodes[name].stop - nodes[name].start for name in (key.sender, key.receiver))
        by_sender, by_receiver = key.sender in io, key.receiver in io and key.receiver not in sending
        shape = (senders if by_sender else 1, receivers if by_receiver else 1)
        types = first_type + np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        edges = slice(first_edge, first_edge + senders * receivers)
        blocks.append(Block(key.sender, key.receiver, (senders, receivers), edges, types, key.lifted))
        first_edge, first_type = edges.stop, first_type + types.size
    kernels = [parameter for member in members for parameter in _kernels(member)]
    kernel_size = _largest([_spatial(parameter) for parameter in kernels])
    repeats = [axis.repeat for parameter in kernels for axis in parameter.neuron_axes]
    counts = [
        [sum(_num_columns(parameter) for parameter in part) for part in _columns(member, n.name)]
        for member in members
        for n in member.neuron_layers
    ]
    along, against, free = (max(count) for count in zip(*counts, strict=True))
    return Topology(
        nodes=nodes,
        blocks=tuple(blocks),
        scalings=scalings,
        inputs=io - fed,
        outputs=io & fed,
        biased=frozenset(n.name for member in members for n in member.neuron_layers if any(_columns(member, n.name))),
        node_types=np.asarray(node_types, np.int32),
        num_edge_types=first_type,
        columns=Columns(max(1, along), against, free),
        edge_features=max(math.prod(kernel_size), *repeats),
        kernel_size=kernel_size,
    )


def from_params(arch: Architecture, params: Params, *, bucket: Bucket | None = None) -> jraph.GraphsTuple:
    """The graph of one network.

    Node features [nodes, k] are the biases and any further vectors of the neuron layer, those that follow a rescaling
    first, in `Topology.columns`; input nodes carry 1, or 0 in convolutional networks, as published. Edge features
    [edges, k] are the weights; kernels are flattened and zero-padded symmetrically to the largest one, and a scalar
    stands in slot 0.

    Args:
      arch: of the network.
      params: the network.
      bucket: one that has `arch` as a member: the graph is padded with zeros to the bucket's topology, and a
        `Presence` stands in its `globals`.

    Raises:
      ValueError: if params do not fit the architecture, or it is no member of the bucket.
    """
    if bucket is not None and arch not in bucket.members:
        raise ValueError(f"{arch.name!r} is no member of the {bucket.name}. Make the Bucket with it.")
    topo = topology(bucket or arch)
    values = dict(zip(arch.parameters, architecture.unpack(arch, params), strict=True))
    dtype = jnp.result_type(*values.values())
    convolutional = any(_spatial(parameter) for parameter in _kernels(arch))
    nodes = jnp.zeros((topo.num_nodes, topo.node_features), dtype)
    for neurons in arch.neuron_layers:
        start = topo.nodes[neurons.name].start
        where = slice(start, start + neurons.width)
        columns = _places(arch, topo, neurons.name)
        for parameter, place in columns.items():
            shape, order = _split_shape(arch, parameter)
            vectors = jnp.transpose(jnp.reshape(values[parameter], shape), order).reshape(neurons.width, -1)
            nodes = nodes.at[where, place].set(vectors)
        if not columns and not convolutional:
            nodes = nodes.at[where, 0].set(1)
    edges = jnp.concatenate(
        [
            jnp.zeros((math.prod(block.shape), topo.edge_features), dtype)
            if parameter is None
            else _to_edges(arch, topo, block, parameter, values[parameter])
            for block, parameter in _blocks(arch, topo, bucket)
        ]
    )
    senders, receivers = _endpoints(bucket or arch)
    return jraph.GraphsTuple(
        nodes=nodes,
        edges=edges,
        senders=senders,
        receivers=receivers,
        globals=None if bucket is None else _presence(arch, bucket),
        n_node=np.asarray([topo.num_nodes], np.int32),
        n_edge=np.asarray([len(senders)], np.int32),
    )


def to_params(arch: Architecture, graph: jraph.GraphsTuple) -> dict[str, Any]:
    """The params of a graph: `to_params(arch, from_params(arch, params))` is `params`, bit for bit.

    Raises:
      ValueError: if the graph is not one of this architecture.
    """
    topo = topology(arch)
    shapes = {
        "nodes": (jnp.shape(graph.nodes), (topo.num_nodes, topo.node_features)),
        "edges": (jnp.shape(graph.edges), (topo.num_edges, topo.edge_features)),
    }
    for field, (got, expected) in shapes.items():
        if got != expected:
            raise ValueError(f"graph.{field} has shape {got}; {arch.name!r} expects {expected}: one network's graph.")
    kernels = {parameter: graph.edges[block.edges] for block, parameter in _blocks(arch, topo, None)}
    values: list[Any] = []
    for parameter in arch.parameters:
        if len(parameter.neuron_axes) == 2:
            values.append(_from_edges(arch, topo, parameter, kernels[parameter]))
        else:
            name = parameter.neuron_axes[0].neurons
            shape, order = _split_shape(arch, parameter)
            vectors = graph.nodes[topo.nodes[name], _places(arch, topo, name)[parameter]]
            value = vectors.reshape([shape[i] for i in order]).transpose(np.argsort(order))
            values.append(value.reshape(arch.shape(parameter)))
    return architecture.pack(arch, values)


# --- private: where everything stands -----------------------------------------------------------------------------


class _Kernel(NamedTuple):
    """Which block of a topology a kernel is: `number` counts those between the same layers."""

    sender: str
    receiver: str
    lifted: bool
    number: int


def _ordered_layers(members: tuple[Architecture, ...]) -> tuple[str, ...]:
    """The names of all neuron layers in an order that is each member's own."""
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for member in members:
        names = [neurons.name for neurons in member.neuron_layers]
        for index, name in enumerate(names):
            sorter.add(name, *names[:index])
    try:
        return tuple(sorter.static_order())
    except graphlib.CycleError as error:
        raise ValueError(
            f"The members of a bucket order their neuron layers differently: {error.args[1]}. Rename them in one."
        ) from error


@functools.lru_cache(maxsize=256)
def _kernels(arch: Architecture) -> dict[Parameter, _Kernel]:
    """The block of every kernel."""
    found: dict[Parameter, _Kernel] = {}
    for parameter in arch.parameters:
        if not parameter.neuron_axes:
            raise ValueError(
                f"{arch.name!r}: {parameter} has no neuron axis, so that its numbers stand at no node and no edge. "
                "Leave it out of what is read: close the network's function over it."
            )
        if len(parameter.neuron_axes) == 1:
            continue
        reads, feeds = parameter.neuron_axes
        if reads.power == 0 and arch.neuron_layer(reads.neurons).scaling in SCALED:
            raise ValueError(
                f"{arch.name!r}: {parameter} reads {reads.neurons!r} with power 0, but a "
                f"{arch.neuron_layer(reads.neurons).scaling.value} group acts there. Give the axis power -1, or the layer "
                "Scaling.PERMUTATION."
            )
        lifted = feeds.power == 0 and arch.neuron_layer(feeds.neurons).scaling in SCALED
        key = _Kernel(reads.neurons, feeds.neurons, lifted, 0)
        found[parameter] = key._replace(number=sum(other._replace(number=0) == key for other in found.values()))
    return found


def _columns(arch: Architecture, neurons: str) -> tuple[list[Parameter], list[Parameter], list[Parameter]]:
    """The vectors of one neuron layer: along a rescaling, against it, free of it."""
    scaled = arch.neuron_layer(neurons).scaling in SCALED
    parts: tuple[list[Parameter], list[Parameter], list[Parameter]] = ([], [], [])
    for parameter in arch.parameters:
        if [axis.neurons for axis in parameter.neuron_axes] == [neurons]:
            power = parameter.neuron_axes[0].power if scaled else 1
            parts[{1: 0, -1: 1, 0: 2}[power]].append(parameter)
    return parts


def _num_columns(parameter: Parameter) -> int:
    """How many node features a parameter with one neuron axis takes: 1 for a vector, 9 for a depthwise 3 x 3 kernel."""
    return math.prod(_spatial(parameter)) * parameter.neuron_axes[0].repeat


def _places(arch: Architecture, topo: Topology, neurons: str) -> dict[Parameter, slice]:
    """The columns of the node features in which each vector of a neuron layer stands."""
    places: dict[Parameter, slice] = {}
    starts = (0, topo.columns.along, topo.columns.along + topo.columns.against)
    for start, part in zip(starts, _columns(arch, neurons), strict=True):
        for parameter in part:
            places[parameter] = slice(start, start + _num_columns(parameter))
            start = places[parameter].stop
    return places


def _blocks(arch: Architecture, topo: Topology, bucket: Bucket | None) -> list[tuple[Block, Parameter | None]]:
    """The blocks of a topology with the parameter of `arch` that stands in each."""
    members = bucket.members if bucket else (arch,)
    keys = dict.fromkeys(key for member in members for key in _kernels(member).values())
    parameters = {key: parameter for parameter, key in _kernels(arch).items()}
    return [(block, parameters.get(key)) for block, key in zip(topo.blocks, keys, strict=True)]


def _presence(arch: Architecture, bucket: Bucket) -> Presence:
    topo = topology(bucket)
    nodes = np.zeros(topo.num_nodes, bool)
    for neurons in arch.neuron_layers:
        start = topo.nodes[neurons.name].start
        nodes[start : start + neurons.width] = True
    edges = np.concatenate(
        [
            np.full(block.shape, parameter is not None).reshape(-1)
            & np.outer(nodes[topo.nodes[block.sender]], nodes[topo.nodes[block.receiver]]).reshape(-1)
            for block, parameter in _blocks(arch, topo, bucket)
        ]
    )
    own = {neurons.name: neurons.scaling for neurons in arch.hidden}
    scalings = {
        name: {scaling.value: jnp.asarray(own.get(name) is scaling) for scaling in possible}
        for name, possible in topo.scalings.items()
    }
    return Presence(jnp.asarray(nodes), jnp.asarray(edges), scalings)


@functools.lru_cache(maxsize=256)
def _endpoints(arch: Readable) -> tuple[np.ndarray, np.ndarray]:
    """Senders and receivers of all edges, [edges] each."""
    topo = topology(arch)
    senders, receivers = [], []
    for block in topo.blocks:
        rows, columns = np.indices(block.shape, np.int32)
        senders.append(rows.reshape(-1) + topo.nodes[block.sender].start)
        receivers.append(columns.reshape(-1) + topo.nodes[block.receiver].start)
    return np.concatenate(senders), np.concatenate(receivers)


# --- private: kernels as edge features ----------------------------------------------------------------------------


def _spatial(parameter: Parameter) -> tuple[int, ...]:
    return tuple(axis for axis in parameter.axes if isinstance(axis, int))


def _largest(sizes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(side) for side in itertools.zip_longest(*sizes, fillvalue=1))


def _split_shape(arch: Architecture, parameter: Parameter) -> tuple[list[int], list[int]]:
    """A kernel's shape with repeats as axes of their own, and the order (sender, receiver, spatial axes)."""
    shape: list[int] = []
    neurons: list[int] = []
    for axis in parameter.axes:
        if isinstance(axis, int):
            shape.append(axis)
        else:
            shape += [axis.repeat, arch.neuron_layer(axis.neurons).width]
            neurons.append(len(shape) - 1)
    return shape, neurons + [i for i in range(len(shape)) if i not in neurons]


def _margins(topo: Topology, parameter: Parameter) -> list[tuple[int, int]]:
    """Zeros before and behind a kernel along its spatial axes, symmetric up to one."""
    pairs = zip(topo.kernel_size, _map_size(topo, parameter), strict=True)
    return [((large - small) // 2, large - small - (large - small) // 2) for large, small in pairs]


def _map_size(topo: Topology, parameter: Parameter) -> tuple[int, ...]:
    """A kernel's spatial size, with ones behind it where others have more spatial axes."""
    size = _spatial(parameter)
    return (*size, *(1 for _ in topo.kernel_size[len(size) :]))


def _to_edges(
    arch: Architecture, topo: Topology, block: Block, parameter: Parameter, value: Array
) -> Float[Array, "edges features"]:
    shape, order = _split_shape(arch, parameter)
    value = jnp.transpose(jnp.reshape(value, shape), order)
    ends = value.shape[:2]
    if _spatial(parameter):
        value = jnp.pad(value.reshape(*ends, *_map_size(topo, parameter)), [(0, 0), (0, 0), *_margins(topo, parameter)])
    value = value.reshape(*ends, -1)
    absent = [(0, there - here) for here, there in zip(ends, block.shape, strict=True)]
    return jnp.pad(value, [*absent, (0, topo.edge_features - value.shape[2])]).reshape(-1, topo.edge_features)


def _from_edges(arch: Architecture, topo: Topology, parameter: Parameter, edges: Array) -> Array:
    shape, order = _split_shape(arch, parameter)
    ordered = [shape[i] for i in order]
    if _spatial(parameter):
        sizes = _map_size(topo, parameter)
        maps = edges[:, : math.prod(topo.kernel_size)].reshape(-1, *topo.kernel_size)
        inner = [slice(low, low + size) for (low, _), size in zip(_margins(topo, parameter), sizes, strict=True)]
        edges = maps[(slice(None), *inner)].reshape(len(edges), -1)
    value = edges[:, : math.prod(ordered[2:])].reshape(ordered)
    return value.transpose(np.argsort(order)).reshape(arch.shape(parameter))

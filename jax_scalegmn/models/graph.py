"""Networks as graphs: one node a neuron, one directed edge a weight (Kofinas et al. 2024, arXiv 2403.12143).

The topology follows from the architecture alone and is NumPy, so it is a constant of the compiled program. Edges are
ordered by block (one block for each parameter with two neuron axes, which is an array or a part of one), then by
sender, then by receiver: the edges of a block reshape to [senders, receivers, features] without a gather.

A `Bucket` holds several architectures. Their graphs are padded to one topology, and every graph carries a mask of what
exists in it, so that one compiled program reads them all.
"""

import dataclasses
import functools
import graphlib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.types import Params

__all__ = [
    "Bucket",
    "Columns",
    "EdgeBlock",
    "Mask",
    "Readable",
    "Topology",
    "from_params",
    "is_turned",
    "to_params",
    "topology",
]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Bucket:
    """Several architectures whose networks share a batch: their graphs are padded to one size.

    Neuron layers of one name have the same place in the padded graph.

    Attributes:
      members: The architectures; they may differ in depth, widths, kernels and groups.
      multiple: Hidden widths are rounded up to a multiple of it, so that few buckets serve many architectures.

    Raises:
      ValueError: Without members, or if they disagree on which layers are inputs and outputs, or on their order.

    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn.models import graph
    >>> bucket = graph.Bucket((sg.mlp((2, 3, 1)), sg.mlp((2, 5, 5, 1), "tanh")), multiple=4)
    >>> graph.topology(bucket).num_nodes  # 2 inputs, 8 and 8 hidden neurons, 1 output
    19
    """

    members: tuple[Architecture, ...]
    multiple: int = 1

    def __post_init__(self) -> None:
        if not self.members or self.multiple < 1:
            raise ValueError(
                f"A bucket needs members and a multiple >= 1; got {len(self.members)} members and {self.multiple}."
            )
        for name in _ordered_names(self.members):
            scalings = {layer.scaling for layer in _layers_named(self.members, name)}
            if Scaling.FIXED in scalings and len(scalings) > 1:
                raise ValueError(
                    f"Neuron layer {name!r} is an input or output of one member and hidden in another: "
                    f"{[member.name for member in self.members]}. Rename it in one of them."
                )

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"bucket of {', '.join(member.name for member in self.members)}"


# What a model can read.
Readable: TypeAlias = Architecture | Bucket


class Mask(NamedTuple):
    """What of a bucket's topology one network has; the `globals` of its padded graph.

    Attributes:
      nodes: [nodes], whether the neuron exists.
      edges: [edges], whether the weight exists.
      scalings: For every hidden neuron layer, which group acts on it; keys: names of layers, values of `Scaling`.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn.models import graph
    >>> arch = sg.mlp((2, 3, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> padded = graph.from_params(arch, params, bucket=graph.Bucket((arch,), multiple=4))
    >>> padded.globals.nodes.astype(int).tolist()
    [1, 1, 1, 1, 1, 0, 1]
    """

    nodes: Bool[Array, " nodes"]
    edges: Bool[Array, " edges"]
    scalings: dict[str, dict[str, Bool[Array, ""]]]


class EdgeBlock(NamedTuple):
    """All edges of one kernel: a complete bipartite graph between two neuron layers.

    Attributes:
      sender, receiver: The names of the neuron layers.
      shape: (senders, receivers).
      edges: The block's place among all edges.
      types: The edges' types, broadcastable to [senders, receivers].
      lifted: Whether the kernel does not follow a rescaling of the receiver, as before a batch normalization.
      unsigned: For sender and receiver whether the kernel does not follow its sign, as after an even activation.

    >>> import jax_scalegmn as sg
    >>> first, _ = sg.models.graph.topology(sg.mlp((2, 3, 1))).blocks
    >>> first.sender, first.receiver, first.shape, first.edges
    ('input', 'hidden_0', (2, 3), slice(0, 6, None))
    """

    sender: str
    receiver: str
    shape: tuple[int, int]
    edges: slice
    types: np.ndarray
    lifted: bool
    unsigned: tuple[bool, bool]


class Columns(NamedTuple):
    """How many node features follow a rescaling of their neuron, go against it, and are free of it; in that order.

    >>> import jax_scalegmn as sg
    >>> sg.models.graph.topology(sg.mlp((2, 3, 1))).columns  # one bias, which follows
    Columns(along=1, against=0, free=0)
    """

    along: int
    against: int
    free: int


# The powers of a rescaling with which the vectors of a neuron layer go, in the order of `Columns`.
_POWERS = (1, -1, 0)
# The groups under which features carry a sign or a size.
_SCALED = architecture.SCALED


class Topology(NamedTuple):
    """What of a graph does not depend on the weights.

    Attributes:
      nodes: The place of each neuron layer's nodes, in topological order.
      blocks: The edges, kernel by kernel, in the order of `arch.parameters`.
      senders, receivers: [edges], the nodes that every edge joins.
      scalings: For each hidden neuron layer, the groups that may act on it: one, except for a bucket of several.
      inputs, outputs: The neuron layers on which no group acts; outputs are fed by some kernel.
      biased: The neuron layers that have parameters of their own, like a bias.
      node_types: [nodes]: one for every input and every output neuron, one for each hidden layer.
      num_edge_types: First blocks have one type a sender, last blocks one a receiver, hidden blocks one.
      columns: The groups of columns of a node feature.
      edge_features: The number of entries of an edge feature.
      kernel_size: The largest spatial kernel, axis by axis; empty without convolutions.

    >>> import jax_scalegmn as sg
    >>> topo = sg.models.graph.topology(sg.siren((2, 3, 1)))
    >>> topo.num_nodes, topo.num_edges, topo.node_types.tolist()
    (6, 9, [0, 1, 2, 2, 2, 3])
    """

    nodes: dict[str, slice]
    blocks: tuple[EdgeBlock, ...]
    senders: Int[np.ndarray, " edges"]
    receivers: Int[np.ndarray, " edges"]
    scalings: dict[str, tuple[Scaling, ...]]
    inputs: frozenset[str]
    outputs: frozenset[str]
    biased: frozenset[str]
    node_types: Int[np.ndarray, " nodes"]
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
        """The number of neurons."""
        return len(self.node_types)

    @property
    def num_edges(self) -> int:
        """The number of weights; a kernel's spatial positions share an edge."""
        return len(self.senders)

    @property
    def num_node_types(self) -> int:
        """The number of node types."""
        return int(self.node_types.max()) + 1

    @property
    def node_features(self) -> int:
        """The number of entries of a node feature."""
        return sum(self.columns)

    def has(self, scaling: Scaling) -> bool:
        """Whether this group may act on some hidden layer."""
        return any(scaling in possible for possible in self.scalings.values())

    @property
    def has_sizes(self) -> bool:
        """Whether positive scales may act on some hidden layer."""
        return any(self.has(scaling) for scaling in _SCALED if scaling.has_sizes)

    @property
    def has_scales(self) -> bool:
        """Whether signs or positive scales may act on some hidden layer, and not permutations alone."""
        return any(self.has(scaling) for scaling in _SCALED)

    @property
    def io_scaling(self) -> Scaling:
        """The group by whose canonical map edge updates read inputs and outputs, on which no group acts.

        Signs take precedence over positive scales where a network has both; without either it is PERMUTATION.
        """
        in_order = (scaling for scaling in (Scaling.SIGN, Scaling.NONZERO, Scaling.POSITIVE) if self.has(scaling))
        return next(in_order, Scaling.PERMUTATION)


@functools.lru_cache(maxsize=256)
def topology(arch: Readable) -> Topology:
    """The graph of an architecture, or of a bucket of them, without its weights.

    Types are as in Kofinas et al. (2024, arXiv 2403.12143): one node type for each input and output neuron and for each
    hidden layer, one edge type for each input, each output and each hidden kernel.

    Args:
      arch: The architecture or the bucket.

    Returns:
      The topology, computed once for each `arch`.

    Raises:
      ValueError: If a kernel reads a rescaled layer without undoing it (power 0), which no equivariant graph has, or
        if a parameter belongs to no neuron layer.

    >>> import jax_scalegmn as sg
    >>> topo = sg.models.graph.topology(sg.siren((2, 32, 32, 1)))
    >>> topo.num_nodes, topo.num_edges
    (67, 1120)
    """
    members, multiple = (arch.members, arch.multiple) if isinstance(arch, Bucket) else ((arch,), 1)
    nodes, scalings = _node_places(members, multiple)
    fixed = frozenset(nodes) - frozenset(scalings)
    keys = _block_keys(members)
    blocks = _edge_blocks(keys, nodes, fixed)
    senders, receivers = _endpoints(blocks, nodes)
    fed = {key.receiver for key in keys}
    kernels = [kernel for member in members for kernel in _kernels(member)]
    kernel_size = _largest([_spatial(kernel) for kernel in kernels])
    repeats = [axis.repeat for kernel in kernels for axis in kernel.neuron_axes]
    return Topology(
        nodes=nodes,
        blocks=blocks,
        senders=senders,
        receivers=receivers,
        scalings=scalings,
        inputs=fixed - fed,
        outputs=fixed & fed,
        biased=frozenset(n.name for member in members for n in member.neuron_layers if any(_vectors(member, n.name))),
        node_types=_node_types(nodes, fixed),
        num_edge_types=sum(block.types.size for block in blocks),
        columns=_most_columns(members),
        edge_features=max(math.prod(kernel_size), *repeats),
        kernel_size=kernel_size,
    )


@functools.lru_cache(maxsize=256)
def is_turned(arch: Architecture) -> bool:
    """Whether edges go from the second axis of a kernel to the first, and with the inverse of each scale.

    So it is where kernels are [out, in] and normalizations follow them: the first axis has power 0 on a rescaled layer.

    Args:
      arch: The architecture.

    >>> import jax_scalegmn as sg
    >>> layers = [sg.layers.Dense(4), sg.layers.BatchNorm(), "relu", sg.layers.Dense(1)]
    >>> sg.models.graph.is_turned(sg.sequential(layers, (2,))), sg.models.graph.is_turned(sg.mlp((2, 4, 1)))
    (True, False)
    """
    kernels = [parameter.neuron_axes for parameter in arch.parameters if len(parameter.neuron_axes) == 2]

    def undone(end: int) -> bool:
        return any(axes[end].power == 0 and arch.neuron_layer(axes[end].neurons).scaling in _SCALED for axes in kernels)

    return undone(0) and not undone(1)


def from_params(arch: Architecture, params: Params, *, bucket: Bucket | None = None) -> jraph.GraphsTuple:
    """The graph of one network, as a `jraph.GraphsTuple`.

    Node features [nodes, k] are the biases and any further vectors of the neuron layer, in `Topology.columns`; input
    nodes carry 1, or 0 in convolutional networks, as published (arXiv 2406.10685). Edge features [edges, k] are the
    weights: kernels are flattened and zero-padded symmetrically to the largest one, and a scalar is stored in slot 0.

    Args:
      arch: The network's architecture.
      params: The network.
      bucket: A bucket that has `arch` as a member: the graph is padded with zeros to the bucket's topology, and its
        `globals` are a `Mask` of what exists.

    Returns:
      The graph, whose topology is NumPy and so a constant under `jax.jit`.

    Raises:
      ValueError: If params do not fit the architecture, or it is no member of the bucket.

    Any model on jraph's graphs reads it. Here one step of message passing along weights computes the network's own
    weighted sums, [inputs 1, 2] @ kernel:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jraph
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> params |= {"Dense_0": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}}
    >>> built = sg.models.graph.from_params(arch, params)
    >>> built.nodes.shape, built.edges.shape
    ((6, 1), (9, 1))
    >>> built.senders.tolist(), built.receivers.tolist()
    ([0, 0, 0, 1, 1, 1, 2, 3, 4], [2, 3, 4, 2, 3, 4, 5, 5, 5])
    >>> values = jnp.asarray([1.0, 2.0, 0.0, 0.0, 0.0, 0.0])[:, None]
    >>> sums = jraph.segment_sum(values[built.senders] * built.edges, built.receivers, num_segments=6)
    >>> sums[2:5, 0].tolist()
    [6.0, 9.0, 12.0]
    """
    if bucket is not None and arch not in bucket.members:
        raise ValueError(f"{arch.name!r} is no member of the {bucket.name}. Make the Bucket with it.")
    topo = topology(bucket or arch)
    values = dict(zip(arch.parameters, architecture.unpack(arch, params), strict=True))
    dtype = jnp.result_type(*values.values())
    edges = [
        jnp.zeros((math.prod(block.shape), topo.edge_features), dtype)
        if parameter is None
        else _to_edges(arch, topo, block, parameter, values[parameter])
        for block, parameter in _blocks(arch, topo, bucket)
    ]
    return jraph.GraphsTuple(
        nodes=_to_nodes(arch, topo, values, dtype),
        edges=jnp.concatenate(edges),
        senders=topo.senders,
        receivers=topo.receivers,
        globals=None if bucket is None else _mask(arch, bucket),
        n_node=np.asarray([topo.num_nodes], np.int32),
        n_edge=np.asarray([topo.num_edges], np.int32),
    )


def to_params(arch: Architecture, graph: jraph.GraphsTuple) -> dict[str, Any]:
    """The params of a graph; the inverse of `from_params`, bit for bit.

    Args:
      arch: The architecture.
      graph: One network's graph, not padded.

    Returns:
      The params, as nested dicts.

    Raises:
      ValueError: If the graph is not one of this architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> again = sg.models.graph.to_params(arch, sg.models.graph.from_params(arch, params))
    >>> bool((again["Dense_0"]["kernel"] == params["Dense_0"]["kernel"]).all())
    True
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
    return architecture.pack(
        arch,
        [
            _from_edges(arch, topo, parameter, kernels[parameter])
            if len(parameter.neuron_axes) == 2
            else _from_nodes(arch, topo, parameter, graph.nodes)
            for parameter in arch.parameters
        ],
    )


# --- private: the parts of a topology -----------------------------------------------------------------------------


class _BlockKey(NamedTuple):
    """Which block of a topology a kernel is: `number` counts those between the same layers."""

    sender: str
    receiver: str
    lifted: bool
    unsigned: tuple[bool, bool]
    number: int


def _ordered_names(members: Sequence[Architecture]) -> tuple[str, ...]:
    """The names of all neuron layers in an order that is each member's own."""
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for member in members:
        names = [layer.name for layer in member.neuron_layers]
        for index, name in enumerate(names):
            sorter.add(name, *names[:index])
    try:
        return tuple(sorter.static_order())
    except graphlib.CycleError as error:
        raise ValueError(
            f"The members of a bucket order their neuron layers differently: {error.args[1]}. Rename them in one."
        ) from error


def _layers_named(members: Iterable[Architecture], name: str) -> list[NeuronLayer]:
    """The neuron layers of that name, at most one of each member."""
    return [layer for member in members for layer in member.neuron_layers if layer.name == name]


def _node_places(
    members: Sequence[Architecture], multiple: int
) -> tuple[dict[str, slice], dict[str, tuple[Scaling, ...]]]:
    """The place of every neuron layer's nodes, and the groups that may act on each hidden one."""
    nodes: dict[str, slice] = {}
    scalings: dict[str, tuple[Scaling, ...]] = {}
    start = 0
    for name in _ordered_names(members):
        layers = _layers_named(members, name)
        width = max(layer.width for layer in layers)
        if layers[0].scaling is not Scaling.FIXED:
            width = math.ceil(width / multiple) * multiple
            scalings[name] = tuple(s for s in Scaling if s in {layer.scaling for layer in layers})
        nodes[name] = slice(start, start + width)
        start += width
    return nodes, scalings


def _node_types(nodes: dict[str, slice], fixed: frozenset[str]) -> np.ndarray:
    """[nodes], a type for every input and output neuron, and one for each hidden layer."""
    types: list[int] = []
    for name, place in nodes.items():
        first, width = types[-1] + 1 if types else 0, place.stop - place.start
        types += list(range(first, first + width)) if name in fixed else [first] * width
    return np.asarray(types, np.int32)


def _edge_blocks(keys: Sequence[_BlockKey], nodes: dict[str, slice], fixed: frozenset[str]) -> tuple[EdgeBlock, ...]:
    """The blocks in order: a type for every input that sends, for every final output that receives, else one."""
    sending = {key.sender for key in keys}
    blocks: list[EdgeBlock] = []
    first_edge, first_type = 0, 0
    for key in keys:
        senders, receivers = (nodes[name].stop - nodes[name].start for name in (key.sender, key.receiver))
        is_last = key.receiver in fixed and key.receiver not in sending
        shape = (senders if key.sender in fixed else 1, receivers if is_last else 1)
        types = first_type + np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        edges = slice(first_edge, first_edge + senders * receivers)
        ends = (key.sender, key.receiver)
        blocks.append(EdgeBlock(*ends, (senders, receivers), edges, types, key.lifted, key.unsigned))
        first_edge, first_type = edges.stop, first_type + types.size
    return tuple(blocks)


def _endpoints(blocks: Sequence[EdgeBlock], nodes: dict[str, slice]) -> tuple[np.ndarray, np.ndarray]:
    """Senders and receivers of all edges, [edges] each."""
    senders, receivers = [], []
    for block in blocks:
        rows, columns = np.indices(block.shape, np.int32)
        senders.append(rows.reshape(-1) + nodes[block.sender].start)
        receivers.append(columns.reshape(-1) + nodes[block.receiver].start)
    return np.concatenate(senders), np.concatenate(receivers)


@functools.lru_cache(maxsize=256)
def _kernels(arch: Architecture) -> dict[Parameter, _BlockKey]:
    """The block of every kernel."""
    keys: dict[Parameter, _BlockKey] = {}
    for parameter in arch.parameters:
        if not parameter.neuron_axes:
            raise ValueError(
                f"{arch.name!r}: {parameter} has no neuron axis, so that its numbers belong to no node and no edge. "
                "Leave it out of what is read: close the network's function over it."
            )
        if len(parameter.neuron_axes) == 1:
            continue
        reads, feeds = _ends(arch, parameter)
        scaling = arch.neuron_layer(reads.neurons).scaling
        if reads.power == 0 and scaling in _SCALED:
            raise ValueError(
                f"{arch.name!r}: {parameter} reads {reads.neurons!r} with power 0, but a {scaling.value} group acts "
                "there. Give the axis power -1, or the layer Scaling.PERMUTATION."
            )
        lifted = feeds.power == 0 and arch.neuron_layer(feeds.neurons).scaling in _SCALED
        unsigned = (_hides_sign(arch, reads), _hides_sign(arch, feeds))
        key = _BlockKey(reads.neurons, feeds.neurons, lifted, unsigned, 0)
        keys[parameter] = key._replace(number=sum(other._replace(number=0) == key for other in keys.values()))
    return keys


def _ends(arch: Architecture, parameter: Parameter) -> tuple[Axis, Axis]:
    """The axes of a kernel where its edges begin and end."""
    first, second = parameter.neuron_axes
    return (second, first) if is_turned(arch) else (first, second)


def _hides_sign(arch: Architecture, axis: Axis) -> bool:
    """Whether an axis follows the size of a neuron's scale, but not its sign."""
    return axis.unsigned and arch.neuron_layer(axis.neurons).scaling.has_signs


def _block_keys(members: Iterable[Architecture]) -> tuple[_BlockKey, ...]:
    """All blocks of the members, each once."""
    return tuple(dict.fromkeys(key for member in members for key in _kernels(member).values()))


def _vectors(arch: Architecture, name: str) -> tuple[list[Parameter], ...]:
    """The vectors of one neuron layer, by the power with which they follow a rescaling, in the order of `Columns`."""
    scaled = arch.neuron_layer(name).scaling in _SCALED
    vectors = [p for p in arch.parameters if [axis.neurons for axis in p.neuron_axes] == [name]]
    for parameter in vectors:
        if _hides_sign(arch, parameter.neuron_axes[0]):
            raise ValueError(
                f"{arch.name!r}: {parameter} follows the sizes of {name!r} but not its signs, which no graph's vectors "
                "do. Read the networks with architecture.restrict(arch, Scaling.POSITIVE), or SIGN in the balanced "
                "gauge."
            )
    along = -1 if is_turned(arch) else 1
    powers = [along * parameter.neuron_axes[0].power if scaled else 1 for parameter in vectors]
    return tuple([p for p, power in zip(vectors, powers, strict=True) if power == wanted] for wanted in _POWERS)


def _num_columns(parameter: Parameter) -> int:
    """How many node features a parameter with one neuron axis takes: 1 for a vector, 9 for a depthwise 3 x 3 kernel."""
    return math.prod(_spatial(parameter)) * parameter.neuron_axes[0].repeat


def _most_columns(members: Iterable[Architecture]) -> Columns:
    """The largest number of columns of any neuron layer, at least one that follows a rescaling."""
    counts = [
        [sum(_num_columns(parameter) for parameter in vectors) for vectors in _vectors(member, layer.name)]
        for member in members
        for layer in member.neuron_layers
    ]
    along, against, free = (max(count) for count in zip(*counts, strict=True))
    return Columns(max(1, along), against, free)


# --- private: one architecture in a topology ----------------------------------------------------------------------


def _places(arch: Architecture, topo: Topology, name: str) -> dict[Parameter, slice]:
    """The columns of the node features in which each vector of a neuron layer is stored."""
    places: dict[Parameter, slice] = {}
    starts = (0, topo.columns.along, topo.columns.along + topo.columns.against)
    for start, vectors in zip(starts, _vectors(arch, name), strict=True):
        for parameter in vectors:
            places[parameter] = slice(start, start + _num_columns(parameter))
            start = places[parameter].stop
    return places


def _blocks(arch: Architecture, topo: Topology, bucket: Bucket | None) -> list[tuple[EdgeBlock, Parameter | None]]:
    """The blocks of a topology, each with the parameter of `arch` that it holds."""
    keys = _block_keys(bucket.members if bucket else (arch,))
    parameters = {key: parameter for parameter, key in _kernels(arch).items()}
    return [(block, parameters.get(key)) for block, key in zip(topo.blocks, keys, strict=True)]


def _mask(arch: Architecture, bucket: Bucket) -> Mask:
    topo = topology(bucket)
    nodes = np.zeros(topo.num_nodes, bool)
    for layer in arch.neuron_layers:
        start = topo.nodes[layer.name].start
        nodes[start : start + layer.width] = True
    in_arch = np.concatenate(
        [np.full(math.prod(block.shape), parameter is not None) for block, parameter in _blocks(arch, topo, bucket)]
    )
    edges = in_arch & nodes[topo.senders] & nodes[topo.receivers]
    own = {layer.name: layer.scaling for layer in arch.hidden}
    scalings = {
        name: {scaling.value: jnp.asarray(own.get(name) is scaling) for scaling in possible}
        for name, possible in topo.scalings.items()
    }
    return Mask(jnp.asarray(nodes), jnp.asarray(edges), scalings)


# --- private: vectors as node features ----------------------------------------------------------------------------


def _to_nodes(
    arch: Architecture, topo: Topology, values: dict[Parameter, Any], dtype: Any
) -> Float[Array, "nodes features"]:
    convolutional = any(_spatial(parameter) for parameter in _kernels(arch))
    nodes = jnp.zeros((topo.num_nodes, topo.node_features), dtype)
    for layer in arch.neuron_layers:
        start = topo.nodes[layer.name].start
        rows = slice(start, start + layer.width)
        columns = _places(arch, topo, layer.name)
        for parameter, place in columns.items():
            shape, order = _split_shape(arch, parameter)
            vectors = jnp.transpose(jnp.reshape(values[parameter], shape), order).reshape(layer.width, -1)
            nodes = nodes.at[rows, place].set(vectors)
        if not columns and not convolutional and layer.scaling not in _SCALED:
            nodes = nodes.at[rows, 0].set(1)
    return nodes


def _from_nodes(arch: Architecture, topo: Topology, parameter: Parameter, nodes: Array) -> Array:
    name = parameter.neuron_axes[0].neurons
    shape, order = _split_shape(arch, parameter)
    vectors = nodes[topo.nodes[name], _places(arch, topo, name)[parameter]]
    value = vectors.reshape([shape[i] for i in order]).transpose(np.argsort(order))
    return value.reshape(arch.shape(parameter))


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
    neurons = neurons[::-1] if is_turned(arch) else neurons
    return shape, neurons + [i for i in range(len(shape)) if i not in neurons]


def _margins(topo: Topology, parameter: Parameter) -> list[tuple[int, int]]:
    """Zeros before and after a kernel along its spatial axes, symmetric up to one."""
    pairs = zip(topo.kernel_size, _map_size(topo, parameter), strict=True)
    return [((large - small) // 2, large - small - (large - small) // 2) for large, small in pairs]


def _map_size(topo: Topology, parameter: Parameter) -> tuple[int, ...]:
    """A kernel's spatial size, followed by ones where others have more spatial axes."""
    size = _spatial(parameter)
    return (*size, *(1 for _ in topo.kernel_size[len(size) :]))


def _to_edges(
    arch: Architecture, topo: Topology, block: EdgeBlock, parameter: Parameter, value: Array
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

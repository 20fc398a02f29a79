"""Heads on a ScaleGMN: an invariant encoder, an editor, and an autoencoder with its decoder.

Every model is written for one network; `jax.vmap` makes it one for many:

    model = autoencoder(arch, features=32)
    variables = model.init(key, params)
    decoded = jax.vmap(lambda params: model.apply(variables, params))(stack)

The symmetry that a model follows is that of its architecture. With `architecture.restrict(arch,
Scaling.PERMUTATION)` it is the permutation-only metanetwork of the literature.
"""

import enum
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models import graph
from jax_scalegmn.models._layers import MLP, PUBLISHED_NORM_EPSILON, Groups, ScaleInvariant
from jax_scalegmn.models._message_passing import Nodes, by_rule, join, rules
from jax_scalegmn.models._scalegmn import Output, ScaleGMN
from jax_scalegmn.models.graph import Bucket, Mask, Readable, Topology
from jax_scalegmn.types import Params


class Readout(enum.Enum):
    """How an encoder turns node features into one vector (arXiv 2406.10685, section 5).

    >>> import jax_scalegmn as sg
    >>> gmn = sg.ScaleGMN(sg.siren((2, 8, 8, 1)), features=16)
    >>> sg.Encoder(gmn, readout=sg.models.Readout.LAST_LAYER).readout.value
    'last_layer'
    """

    FULL_GRAPH = "full_graph"
    """mlp([sum over hidden neurons of ScaleInv(h), h of every input and output neuron])."""
    LAST_LAYER = "last_layer"
    """mlp of the output neurons' features; if bidirectional, of linear maps of theirs and of the inputs'."""
    DEEP_SET = "deep_set"
    """mlp(sum over all neurons of mlp(h)): for networks with permutations only."""


class Encoder(nn.Module):
    """An invariant embedding of a network: all members of an orbit have the same one (arXiv 2511.12601, section 3).

        z = mlp([sum over hidden neurons of ScaleInv(h), h of every input and output neuron])

    With `latent` classes it is a classifier, with `latent=1` a regressor.

    Attributes:
      gmn: The model that reads the network.
      latent: The number of entries of the embedding; None for the features of `gmn`.
      readout: How node features become the embedding.
      scales: The usual size of every parameter's entries, in the order of `arch.parameters` (`zoo.scales`), divided
        out before the graph is built; all are positive, so no symmetry is lost. None: weights unchanged.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.Encoder(sg.ScaleGMN(arch, features=4, num_layers=1), latent=3)
    >>> params = sg.architecture.abstract_params(arch)
    >>> z, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), params)
    >>> z.shape
    (3,)
    """

    gmn: ScaleGMN
    latent: int | None = None
    readout: Readout = Readout.FULL_GRAPH
    scales: tuple[float, ...] | None = None

    @property
    def arch(self) -> Readable:
        """The architecture, or the bucket of several, whose networks it reads."""
        return self.gmn.arch

    def __call__(self, params: Params, *, train: bool = False) -> Float[Array, " latent"]:
        """The embedding of one network of `arch`; training with dropout needs `rngs={"dropout": key}`."""
        arch = _one_architecture(self.arch, "Encoder reads params of one architecture: call method='read' on a graph")
        return self._read(graph.from_params(arch, divided(arch, params, self.scales)), train=train)

    def read(self, graph_in: jraph.GraphsTuple, *, train: bool = False) -> Float[Array, " latent"]:
        """The embedding of one network's graph, of `graph.from_params` with the encoder's bucket if it has one.

        Raises:
          ValueError: If the encoder has scales, which are for params: divide them out before the graph is built.
        """
        if self.scales is not None:
            raise ValueError("An Encoder with scales reads params, not graphs: call it, or make it with scales=None.")
        return self._read(graph_in, train=train)

    @nn.compact
    def _read(self, graph_in: jraph.GraphsTuple, *, train: bool) -> Float[Array, " latent"]:
        gmn, topo = self.gmn, graph.topology(self.arch)
        output = Output.ENDS if self.readout is Readout.LAST_LAYER else Output.FEATURES
        features = gmn(graph_in, train=train, output=output)
        nodes = {name: features.nodes[where] for name, where in topo.nodes.items()}
        mask: Mask | None = graph_in.globals
        match self.readout:
            case Readout.LAST_LAYER:
                joint = self._ends(topo, nodes)
            case Readout.DEEP_SET:
                joint = self._deep_set(topo, features.nodes, mask)
            case Readout.FULL_GRAPH:
                joint = self._full_graph(topo, nodes, mask)
        latent = self.latent or gmn.features
        return MLP(joint.shape[0], gmn.hidden or gmn.features, latent, dtype=gmn.dtype, name="mlp")(joint)

    def _ends(self, topo: Topology, nodes: Nodes) -> Array:
        """The features of the output neurons; if bidirectional, linear maps of theirs and of the input neurons'."""
        outputs = _flat(nodes, topo.outputs)
        if not self.gmn.bidirectional:
            return outputs
        parts = {"outputs": outputs, "inputs": _flat(nodes, topo.inputs)}
        maps = {name: nn.Dense(self.gmn.features, dtype=self.gmn.dtype, name=name) for name in parts}
        return jnp.concatenate([maps[name](part) for name, part in parts.items()])

    def _deep_set(self, topo: Topology, nodes: Array, mask: Mask | None) -> Array:
        """The sum over all neurons of an mlp of their features."""
        if topo.has_scales:
            raise ValueError(
                f"The DEEP_SET readout is for permutations only; {self.arch.name!r} has scale symmetries. Use "
                "FULL_GRAPH, or restrict the architecture to Scaling.PERMUTATION."
            )
        features, hidden = self.gmn.features, self.gmn.hidden or self.gmn.features
        local = MLP(features, hidden, features, dtype=self.gmn.dtype, name="local")(nodes)
        return self._sum(local, None if mask is None else mask.nodes)

    def _full_graph(self, topo: Topology, nodes: Nodes, mask: Mask | None) -> Array:
        """The sum over hidden neurons of ScaleInv(h), followed by the features of the input and output neurons."""
        gmn = self.gmn
        sizes = gmn.features, gmn.hidden or gmn.features, gmn.features
        epsilon = PUBLISHED_NORM_EPSILON if gmn.parity else 0.0
        invariant = ScaleInvariant(*sizes, gmn.canonical, epsilon, dtype=gmn.dtype, name="invariant")
        hidden = {name: rule for name, rule in rules(topo, mask, gmn.io).items() if isinstance(rule, Groups)}
        alike = by_rule(hidden, tuple(hidden))
        inner = jnp.concatenate([invariant(join(nodes, names), hidden[names[0]]) for names in alike])
        present = None
        if mask is not None:
            present = jnp.concatenate([mask.nodes[topo.nodes[name]] for names in alike for name in names])
        return jnp.concatenate([self._sum(inner, present), _flat(nodes, topo.io)])

    def _sum(self, rows: Array, present: Array | None) -> Array:
        """The sum over the nodes that exist, over the root of their number where the model is normalized."""
        total = rows.sum(0) if present is None else jnp.where(present[:, None], rows, 0).sum(0)
        if not self.gmn.normalized:
            return total
        count = len(rows) if present is None else present.sum()
        return total / jnp.sqrt(count).astype(total.dtype)


class Editor(nn.Module):
    """An equivariant map from networks to networks: params + learned scale * delta (arXiv 2406.10685, section 5).

    A network that is permuted, flipped or rescaled has its edited network permuted, flipped or rescaled alike. With
    `networks` k, there are k edited networks, whose outputs are averaged (arXiv 2602.01083): together they can compute
    what one network of that size cannot.

        f(x) = mean over i of apply(params + learned scale_i * delta_i, x)

    Attributes:
      gmn: The model that reads the network and computes the delta.
      out_scale: The factor of the delta at initialization, one learned factor a parameter; published: 0.01.
      scales: As `Encoder.scales`; the delta is multiplied by them.
      networks: k, the number of edited networks, which are returned as a stack [k]; None for one, without that axis.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 1))
    >>> model = sg.Editor(sg.ScaleGMN(arch, features=4, num_layers=1))
    >>> params = sg.architecture.abstract_params(arch)
    >>> edited, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), params)
    >>> edited["Dense_0"]["kernel"].shape
    (2, 4)
    >>> model = sg.Editor(sg.ScaleGMN(arch, features=4, num_layers=1), networks=3)
    >>> edited, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), params)
    >>> edited["Dense_0"]["kernel"].shape
    (3, 2, 4)
    """

    gmn: ScaleGMN
    out_scale: float = 0.01
    scales: tuple[float, ...] | None = None
    networks: int | None = None

    @property
    def arch(self) -> Readable:
        """The architecture of the networks that it reads and writes."""
        return self.gmn.arch

    def __call__(self, params: Params, *, train: bool = False) -> dict[str, Any]:
        """The edited network, or the stack of them."""
        delta = self.delta(params, train=train)
        return jax.tree.map(jnp.add, dict(params), delta)

    @nn.compact
    def delta(self, params: Params, *, train: bool = False) -> dict[str, Any]:
        """The change that is added to the network, or the stack of changes."""
        arch = _one_architecture(self.arch, "Editor writes params of one architecture")
        small, scales = divided(arch, params, self.scales), _checked_scales(arch, self.scales)
        written = self.gmn(
            graph.from_params(arch, small), train=train, output=Output.PARAMETERS, networks=self.networks
        )
        several = () if self.networks is None else (self.networks,)
        factors = self.param("out_scales", nn.initializers.constant(self.out_scale), (*several, len(arch.parameters)))

        def change(nodes: Array, edges: Array, factors: Array) -> dict[str, Any]:
            return _change(arch, small, written._replace(nodes=nodes, edges=edges), factors, scales)

        change = change if self.networks is None else jax.vmap(change)
        return change(written.nodes, written.edges, factors)


class Decoder(nn.Module):
    """An mlp from an embedding to the params of a network (arXiv 2511.12601, section 3).

    Its activation is silu, and it has no normalization.

    Attributes:
      arch: The architecture of the networks that it writes.
      hidden: The widths of the hidden layers.
      scales: Multiplied onto every parameter, as `Encoder.scales`. With them, the last bias starts as a random
        network of that size, since a network of zeros is a saddle point of the loss. None: not multiplied.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> model = sg.Decoder(sg.siren((2, 4, 1)), hidden=(8,))
    >>> params, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones(3))
    >>> params["Dense_0"]["kernel"].shape
    (2, 4)
    """

    arch: Architecture
    hidden: tuple[int, ...]
    scales: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, z: Float[Array, " latent"]) -> dict[str, Any]:
        """The params that an embedding decodes to."""
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
    """Encoder and decoder: maps all members of an orbit to one canonical network (arXiv 2511.12601).

        decoded = decoder(encoder(params))

    Attributes:
      encoder: From a network to its embedding.
      decoder: From an embedding to a network.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.autoencoder(arch, features=4, num_layers=1)
    >>> params = sg.architecture.abstract_params(arch)
    >>> decoded, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), params)
    >>> decoded["Dense_1"]["kernel"].shape
    (4, 1)
    """

    encoder: Encoder
    decoder: Decoder

    @property
    def arch(self) -> Architecture:
        """The architecture of the networks that it reads and writes."""
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
    """The autoencoder of one architecture, as published (arXiv 2511.12601) unless options say otherwise.

    Args:
      arch: The networks' architecture.
      features: d, the number of features of the ScaleGMN.
      latent, readout: As `Encoder`.
      decoder_hidden: As `Decoder.hidden`; None for the published widths (2 d, 4 d).
      scales: As `Encoder.scales`, for encoder and decoder.
      options: Further attributes of `ScaleGMN`.

    Returns:
      The linen module; `init` and `apply` take one network's params.

    >>> import jax_scalegmn as sg
    >>> model = sg.autoencoder(sg.siren((2, 32, 32, 1)), features=64, num_layers=3)
    >>> model.decoder.hidden, model.encoder.gmn.num_layers
    ((128, 256), 3)
    """
    hidden = (2 * features, 4 * features) if decoder_hidden is None else tuple(decoder_hidden)
    return Autoencoder(
        Encoder(ScaleGMN(arch, features, **options), latent, readout, scales), Decoder(arch, hidden, scales)
    )


# --- private ------------------------------------------------------------------------------------------------------


def _change(
    arch: Architecture, small: Params, written: jraph.GraphsTuple, factors: Array, scales: tuple[float, ...]
) -> dict[str, Any]:
    """The change of a network, divided by its scales, from what a model wrote for it."""
    values = []
    for parameter, delta, own, factor, scale in zip(
        arch.parameters,
        architecture.unpack(arch, graph.to_params(arch, written)),
        architecture.unpack(arch, small),
        factors,
        scales,
        strict=True,
    ):
        # The delta follows a rescaling; a vector that goes against it needs a delta that goes against it, too.
        along = -1 if graph.is_turned(arch) else 1
        against = len(parameter.neuron_axes) == 1 and along * parameter.neuron_axes[0].power < 0
        values.append((jnp.square(own) * delta if against else delta) * factor * scale)
    return architecture.pack(arch, values)


def _flat(nodes: Nodes, names: frozenset[str]) -> Array:
    """The features of some neuron layers as one vector."""
    return jnp.concatenate([h for name, h in nodes.items() if name in names]).reshape(-1)


def _one_architecture(arch: Readable, what: str) -> Architecture:
    if isinstance(arch, Bucket):
        raise ValueError(f"{what}; this one is for a {arch.name}.")
    return arch


def divided(arch: Architecture, params: Params, scales: tuple[float, ...] | None) -> Params:
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

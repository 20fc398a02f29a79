"""Networks that read networks: the ScaleGMN, and on it an invariant encoder, a decoder and an autoencoder.

Every model is written for one network; `jax.vmap` makes it one for many:

    model = Autoencoder(arch, features=32)
    variables = model.init(key, params)
    decoded = jax.vmap(lambda p: model.apply(variables, p))(stack)
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import jraph
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jax_scalegmn import architecture, graph
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.layers import MLP, Edges, Factored, MessagePassing, SignInvariant
from jax_scalegmn.types import Params


class ScaleGMN(nn.Module):
    """A scale equivariant graph metanetwork for sign symmetries, forward direction (arXiv 2406.10685).

    Permuting or flipping hidden neurons of the network that it reads permutes or flips the node and edge features.

    Attributes:
      arch: of the networks that it reads; every hidden layer's group must be SIGN.
      features: d, entries of a node or edge feature.
      num_layers: message passing layers.
      hidden: width of the hidden layer of every mlp inside; None for `features`.
      dropout: rate on the node features behind every layer during training.
      normalized: whether sums over neurons are divided by the square root of their number; False as published.
    """

    arch: Architecture
    features: int
    num_layers: int = 4
    hidden: int | None = None
    dropout: float = 0.0
    normalized: bool = True

    @nn.compact
    def __call__(self, graph_in: jraph.GraphsTuple, *, train: bool = False) -> jraph.GraphsTuple:
        """Node features [nodes, d] and edge features [edges, d] of a graph of `graph.from_params`.

        Training with dropout needs `rngs={"dropout": key}`.
        """
        _require_sign(self.arch)
        topo, d = graph.topology(self.arch), self.features
        lecun, normal = nn.initializers.lecun_normal(), nn.initializers.normal(1.0)
        node_kernel = self.param("node_kernel", lecun, (topo.node_features, d))
        edge_kernel = self.param("edge_kernel", lecun, (topo.edge_features, d))
        node_encoding = self.param("node_encoding", normal, (topo.num_node_types, d))
        edge_encoding = self.param("edge_encoding", normal, (topo.num_edge_types, d))

        encoding = node_encoding[topo.node_types]
        nodes = {}
        for name, where in topo.nodes.items():
            h = graph_in.nodes[where] @ node_kernel
            nodes[name] = h + encoding[where] if name in topo.io else h * encoding[where]
        edges: list[Edges] = [
            Factored(
                graph_in.edges[block.edges].reshape(*block.shape, -1),
                edge_kernel * edge_encoding[block.types][..., None, :],
            )
            for block in topo.blocks
        ]
        for index in range(self.num_layers):
            nodes, edges = MessagePassing(
                topology=topo,
                features=d,
                hidden=self.hidden or d,
                normalized=self.normalized,
                update_edges=index + 1 < self.num_layers,
                name=f"layer_{index}",
            )(nodes, edges)
            dropout = nn.Dropout(self.dropout, deterministic=not train)
            nodes = {name: dropout(h) for name, h in nodes.items()}
        flat = [(e.value() if isinstance(e, Factored) else e).reshape(-1, d) for e in edges]
        return graph_in._replace(nodes=jnp.concatenate(list(nodes.values())), edges=jnp.concatenate(flat))


class Encoder(nn.Module):
    """An invariant embedding of a network: every member of an orbit has the same one.

    z = mlp([sum over hidden neurons of ScaleInv(h), h of every input and output neuron]) (arXiv 2511.12601, section 3).

    Attributes:
      latent: entries of the embedding; None for `features`.
      scales: the usual size of every parameter's entries, in the order of `arch.parameters` (`zoo.scales`), divided
        out before the graph is built; a positive number each, so no symmetry is lost. None: weights as they come.
      Others: as `ScaleGMN`.
    """

    arch: Architecture
    features: int
    latent: int | None = None
    num_layers: int = 4
    hidden: int | None = None
    dropout: float = 0.0
    normalized: bool = True
    scales: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, params: Params, *, train: bool = False) -> Float[Array, " latent"]:
        hidden = self.hidden or self.features
        scaled = [
            value / scale
            for value, scale in zip(
                architecture.unpack(self.arch, params), _checked_scales(self.arch, self.scales), strict=True
            )
        ]
        read = ScaleGMN(
            self.arch, self.features, self.num_layers, self.hidden, self.dropout, self.normalized, name="gmn"
        )(graph.from_params(self.arch, architecture.pack(self.arch, scaled)), train=train)
        topo = graph.topology(self.arch)
        inner = np.concatenate([np.arange(topo.num_nodes)[w] for name, w in topo.nodes.items() if name not in topo.io])
        outer = np.setdiff1d(np.arange(topo.num_nodes), inner)
        invariant = SignInvariant(self.features, hidden, self.features, name="invariant")(read.nodes[inner]).sum(0)
        if self.normalized:
            invariant /= math.sqrt(len(inner))
        joint = jnp.concatenate([invariant, read.nodes[outer].reshape(-1)])
        return MLP(joint.shape[0], hidden, self.latent or self.features, name="readout")(joint)


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
    def __call__(self, z: Float[Array, " latent"]) -> dict[str, dict[str, Array]]:
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
    """Encoder and decoder: maps every member of an orbit to one canonical network (arXiv 2511.12601).

    Attributes:
      decoder_hidden: widths of the decoder's hidden layers; None for the published (2 d, 4 d).
      Others: as `Encoder`.
    """

    arch: Architecture
    features: int
    latent: int | None = None
    num_layers: int = 4
    hidden: int | None = None
    dropout: float = 0.0
    normalized: bool = True
    scales: tuple[float, ...] | None = None
    decoder_hidden: tuple[int, ...] | None = None

    def setup(self) -> None:
        self.encoder = Encoder(
            self.arch,
            self.features,
            self.latent,
            self.num_layers,
            self.hidden,
            self.dropout,
            self.normalized,
            self.scales,
        )
        hidden = (2 * self.features, 4 * self.features) if self.decoder_hidden is None else self.decoder_hidden
        self.decoder = Decoder(self.arch, hidden, self.scales)

    def __call__(self, params: Params, *, train: bool = False) -> dict[str, dict[str, Array]]:
        """The canonical network of the orbit of `params`."""
        return self.decode(self.encode(params, train=train))

    def encode(self, params: Params, *, train: bool = False) -> Float[Array, " latent"]:
        """The embedding of the orbit of `params`."""
        return self.encoder(params, train=train)

    def decode(self, z: Float[Array, " latent"]) -> dict[str, dict[str, Array]]:
        """The network of an embedding."""
        return self.decoder(z)


def as_json(model: nn.Module) -> dict[str, Any]:
    """A model's configuration as plain JSON values, for checkpoints; `from_json` reads it."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name")}
    return {"type": type(model).__name__, **fields, "arch": model.arch.as_json()}


def from_json(description: Mapping[str, Any]) -> nn.Module:
    """The model that `as_json` described.

    Raises:
      ValueError: if the description is not one of a model of this module.
    """
    kinds = {kind.__name__: kind for kind in (ScaleGMN, Encoder, Decoder, Autoencoder)}
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items()}
    try:
        kind = kinds[fields.pop("type")]
        return kind(**fields | {"arch": architecture.from_json(fields["arch"])})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"This is no description of a model ({error!r}): expected the JSON of models.as_json for one of "
            f"{sorted(kinds)}, got {str(description)[:200]!r}. The checkpoint is foreign or of another version."
        ) from error


# --- private ------------------------------------------------------------------------------------------------------


def _require_sign(arch: Architecture) -> None:
    other = {neurons.name: neurons.scaling.value for neurons in arch.hidden if neurons.scaling is not Scaling.SIGN}
    if other or not arch.hidden:
        raise ValueError(
            f"ScaleGMN reads networks with sign symmetries (sine, tanh); {arch.name!r} has hidden layers "
            f"{other or 'none'}. symmetry, matching and merge serve the other groups."
        )


def _checked_scales(arch: Architecture, scales: tuple[float, ...] | None) -> tuple[float, ...]:
    if scales is None:
        return (1.0,) * len(arch.parameters)
    if len(scales) != len(arch.parameters) or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(
            f"scales are {scales}; expected {len(arch.parameters)} finite numbers > 0, one for each parameter of "
            f"{arch.name!r}. Use zoo.scales."
        )
    return scales

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

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models import graph
from jax_scalegmn.models._layers import IO, MLP, PUBLISHED_NORM_EPSILON, Canonical, Groups, ScaleInvariant
from jax_scalegmn.models._message_passing import by_rule, join, rules
from jax_scalegmn.models._scalegmn import Output, ScaleGMN
from jax_scalegmn.models.graph import Bucket, Readable
from jax_scalegmn.types import Params


class Readout(enum.Enum):
    """How an encoder comes from node features to one vector (arXiv 2406.10685, section 5)."""

    FULL_GRAPH = "full_graph"
    """mlp([sum over hidden neurons of ScaleInv(h), h of every input and output neuron])."""
    LAST_LAYER = "last_layer"
    """mlp of the outputs' features; if bidirectional, of linear maps of the outputs' and of the inputs'."""
    DEEP_SET = "deep_set"
    """mlp(sum over all neurons of mlp(h)): for networks with permutations only."""


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
        """The sum over the nodes that are there, over the root of their number where the model is normalized."""
        total = rows.sum(0) if present is None else jnp.where(present[:, None], rows, 0).sum(0)
        if not self.gmn.normalized:
            return total
        count = len(rows) if present is None else present.sum()
        return total / jnp.sqrt(count).astype(total.dtype)


class Editor(nn.Module):
    """An equivariant map from networks to networks: params + learned scale * delta (arXiv 2406.10685, section 5).

    Attributes:
      gmn: reads the network and writes the delta.
      out_scale: of the delta at initialization, one learned factor a parameter; published: 0.01.
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
    """An mlp from an embedding to the params of a network: silu, no normalization (arXiv 2511.12601, section 3).

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


def _one_architecture(arch: Readable, what: str) -> Architecture:
    if isinstance(arch, Bucket):
        raise ValueError(f"{what}; this one is for a {arch.name}.")
    return arch


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

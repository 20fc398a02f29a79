"""Networks that read networks: graphs, ScaleGMN, its heads, and baselines."""

from jax_scalegmn.models import baselines, graph, published, reference
from jax_scalegmn.models._heads import (
    Autoencoder,
    Decoder,
    Editor,
    Encoder,
    Readout,
    abstract_variables,
    as_json,
    autoencoder,
    from_json,
)
from jax_scalegmn.models._layers import IO, Canonical
from jax_scalegmn.models._scalegmn import ScaleGMN

__all__ = [
    "IO",
    "Autoencoder",
    "Canonical",
    "Decoder",
    "Editor",
    "Encoder",
    "Readout",
    "ScaleGMN",
    "abstract_variables",
    "as_json",
    "autoencoder",
    "baselines",
    "from_json",
    "graph",
    "published",
    "reference",
]

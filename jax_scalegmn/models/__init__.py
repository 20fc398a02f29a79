"""Networks that read networks: graphs, ScaleGMN, its heads, and baselines."""

from jax_scalegmn.models import baselines, graph, published, reference
from jax_scalegmn.models._alignment import Frame, Matcher, alignment_encoder
from jax_scalegmn.models._descriptions import abstract_variables, as_json, from_json, match_size, num_parameters
from jax_scalegmn.models._embedding import embed
from jax_scalegmn.models._heads import Autoencoder, Decoder, Editor, Encoder, Readout, autoencoder
from jax_scalegmn.models._initialization import init
from jax_scalegmn.models._layers import IO, Canonical
from jax_scalegmn.models._lean import LeanGMN
from jax_scalegmn.models._scalegmn import Output, ScaleGMN

__all__ = [
    "IO",
    "Autoencoder",
    "Canonical",
    "Decoder",
    "Editor",
    "Encoder",
    "Frame",
    "LeanGMN",
    "Matcher",
    "Output",
    "Readout",
    "ScaleGMN",
    "abstract_variables",
    "alignment_encoder",
    "as_json",
    "autoencoder",
    "baselines",
    "embed",
    "from_json",
    "graph",
    "init",
    "match_size",
    "num_parameters",
    "published",
    "reference",
]

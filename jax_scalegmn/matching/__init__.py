"""Matchers: from two or more networks to the group elements that align them."""

from jax_scalegmn.matching import assignment, relaxation
from jax_scalegmn.matching._activations import activation_matching
from jax_scalegmn.matching._choice import Choice, best_of
from jax_scalegmn.matching._differentiable import sinkhorn_matching, straight_through_matching
from jax_scalegmn.matching._frames import (
    Consistency,
    Frame,
    Reference,
    align_all,
    align_to,
    cycle_consistency,
    framed,
    pairwise,
    relative,
)
from jax_scalegmn.matching._functions import cross_entropy, squared_error
from jax_scalegmn.matching._many import many
from jax_scalegmn.matching._scales import fit_scales
from jax_scalegmn.matching._search import search_matching
from jax_scalegmn.matching._weights import (
    Matching,
    Start,
    align,
    canonical_matching,
    orbit_distance,
    similarity,
    unmatched,
    weight_matching,
)

__all__ = [
    "Choice",
    "Consistency",
    "Frame",
    "Matching",
    "Reference",
    "Start",
    "activation_matching",
    "align",
    "align_all",
    "align_to",
    "assignment",
    "best_of",
    "canonical_matching",
    "cross_entropy",
    "cycle_consistency",
    "fit_scales",
    "framed",
    "many",
    "orbit_distance",
    "pairwise",
    "relative",
    "relaxation",
    "search_matching",
    "similarity",
    "sinkhorn_matching",
    "squared_error",
    "straight_through_matching",
    "unmatched",
    "weight_matching",
]

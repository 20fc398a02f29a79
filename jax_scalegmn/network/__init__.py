"""Computes the networks that an `Architecture` describes: initialize them, apply them, look inside."""

from jax_scalegmn.network import moments
from jax_scalegmn.network._forward import (
    ByPatches,
    Hook,
    activations,
    apply,
    apply_with,
    check_examples,
    coordinates,
    render,
    train_apply,
)
from jax_scalegmn.network._initialization import Initialization, init, near_zero, standard
from jax_scalegmn.network._layer_functions import ACTIVATIONS, Unit, compute
from jax_scalegmn.network._variables import STATISTICS
from jax_scalegmn.network._variables import merge as merge_variables
from jax_scalegmn.network._variables import replace as replace_variables
from jax_scalegmn.network._variables import split as split_variables

__all__ = [
    "ACTIVATIONS",
    "STATISTICS",
    "ByPatches",
    "Hook",
    "Initialization",
    "Unit",
    "activations",
    "apply",
    "apply_with",
    "check_examples",
    "compute",
    "coordinates",
    "init",
    "merge_variables",
    "moments",
    "near_zero",
    "render",
    "replace_variables",
    "split_variables",
    "standard",
    "train_apply",
]

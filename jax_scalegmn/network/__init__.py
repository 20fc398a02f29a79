"""Computes the networks that an `Architecture` describes: initialize them, apply them, look inside."""

from jax_scalegmn.network import moments
from jax_scalegmn.network._forward import Visit, activations, apply, check_examples, forward, train_apply
from jax_scalegmn.network._images import coordinates, render
from jax_scalegmn.network._initialization import Initialization, init, near_zero, standard
from jax_scalegmn.network._layer_functions import (
    ACTIVATIONS,
    Convolve,
    Unit,
    activate,
    convolve,
    convolve_by_patches,
    layer_output,
    preactivation,
)
from jax_scalegmn.network._sine import sine
from jax_scalegmn.network._traced import at_means, at_places
from jax_scalegmn.network._variables import STATISTICS
from jax_scalegmn.network._variables import merge as merge_variables
from jax_scalegmn.network._variables import replace as replace_variables
from jax_scalegmn.network._variables import split as split_variables

__all__ = [
    "ACTIVATIONS",
    "STATISTICS",
    "Convolve",
    "Initialization",
    "Unit",
    "Visit",
    "activate",
    "activations",
    "apply",
    "at_means",
    "at_places",
    "check_examples",
    "convolve",
    "convolve_by_patches",
    "coordinates",
    "forward",
    "init",
    "layer_output",
    "merge_variables",
    "moments",
    "near_zero",
    "preactivation",
    "render",
    "replace_variables",
    "sine",
    "split_variables",
    "standard",
    "train_apply",
]

"""The symmetry group of an architecture: its elements, how they act on params, and normal forms of an orbit."""

from jax_scalegmn.symmetry import canonical
from jax_scalegmn.symmetry._elements import (
    Element,
    act,
    act_on_axis,
    act_on_others,
    check,
    compose,
    identity,
    inverse,
    orbit,
    random,
)
from jax_scalegmn.symmetry._gauge import BalancedPair, balance, balanced, balanced_pair
from jax_scalegmn.symmetry._phase import wrap_phase

__all__ = [
    "BalancedPair",
    "Element",
    "act",
    "act_on_axis",
    "act_on_others",
    "balance",
    "balanced",
    "balanced_pair",
    "canonical",
    "check",
    "compose",
    "identity",
    "inverse",
    "orbit",
    "random",
    "wrap_phase",
]

"""Trains metanetworks: losses, steps over a mesh, epochs with early stopping, populations, checkpoints."""

from jax_scalegmn.training import checkpoint, losses
from jax_scalegmn.training._loop import (
    Monitor,
    State,
    Step,
    fit,
    init,
    make_evaluation,
    make_optimizer,
    make_step,
)
from jax_scalegmn.training._population import PopulationEpoch, Trials, population

__all__ = [
    "Monitor",
    "PopulationEpoch",
    "State",
    "Step",
    "Trials",
    "checkpoint",
    "fit",
    "init",
    "losses",
    "make_evaluation",
    "make_optimizer",
    "make_step",
    "population",
]

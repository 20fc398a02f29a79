"""Trains metanetworks: losses, steps over a mesh, epochs with early stopping, checkpoints."""

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
    replicate,
)

__all__ = [
    "Monitor",
    "State",
    "Step",
    "checkpoint",
    "fit",
    "init",
    "losses",
    "make_evaluation",
    "make_optimizer",
    "make_step",
    "replicate",
]

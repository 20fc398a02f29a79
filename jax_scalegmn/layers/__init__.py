"""Networks that no builder describes, as a list of layers: `sequential` turns it into an `Architecture`.

Params are PyTorch's: a dict of tensors by name, like {"0.weight": [out, in, h, w]}, and maps are [channels, h, w].
"""

from jax_scalegmn.layers._kinds import (
    Activation,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    Layer,
    MaxPool,
    PReLU,
)
from jax_scalegmn.layers._sequential import as_json, from_json, parse, sequential

__all__ = [
    "Activation",
    "AvgPool",
    "BatchNorm",
    "Conv",
    "Dense",
    "Flatten",
    "GlobalAvgPool",
    "Layer",
    "MaxPool",
    "PReLU",
    "as_json",
    "from_json",
    "parse",
    "sequential",
]

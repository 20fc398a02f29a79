"""Networks that no builder describes, as a list of layers: `sequential` turns it into an `Architecture`.

Params are PyTorch's: a dict of tensors by name, like {"0.weight": [out, in, h, w]}, and maps are [channels, h, w].
"""

from jax_scalegmn.layers._blocks import BasicBlock, Block, Bottleneck, Layer, Residual, ResNet
from jax_scalegmn.layers._kinds import (
    Activation,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    PReLU,
)
from jax_scalegmn.layers._sequential import as_json, from_json, parse, sequential

__all__ = [
    "Activation",
    "AvgPool",
    "BasicBlock",
    "BatchNorm",
    "Block",
    "Bottleneck",
    "Conv",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalAvgPool",
    "Layer",
    "MaxPool",
    "PReLU",
    "ResNet",
    "Residual",
    "as_json",
    "from_json",
    "parse",
    "sequential",
]

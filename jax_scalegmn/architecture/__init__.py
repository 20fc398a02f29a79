"""What a network is made of: neuron layers, and for every axis of every parameter the neuron layer it indexes.

From one `Architecture` follow the symmetry group, its action, the graph, the matching problem and the tests.
"""

from jax_scalegmn.architecture.description import (
    Architecture,
    Axis,
    Neurons,
    Parameter,
    describe,
    from_json,
    restrict,
)
from jax_scalegmn.architecture.inference import Inference, infer
from jax_scalegmn.architecture.layers import (
    SCALING_OF_ACTIVATION,
    Activation,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    GlobalMeanPool,
    GroupNorm,
    Layer,
    LayerNorm,
    MaxPool,
    Norm,
    Residual,
    Scaling,
    known_activation,
    walk,
)
from jax_scalegmn.architecture.packing import at_least_float32, check_stack, pack, unpack

__all__ = [
    "SCALING_OF_ACTIVATION",
    "Activation",
    "Architecture",
    "AvgPool",
    "Axis",
    "BatchNorm",
    "Conv",
    "Dense",
    "Flatten",
    "GlobalMeanPool",
    "GroupNorm",
    "Inference",
    "Layer",
    "LayerNorm",
    "MaxPool",
    "Neurons",
    "Norm",
    "Parameter",
    "Residual",
    "Scaling",
    "at_least_float32",
    "check_stack",
    "describe",
    "from_json",
    "infer",
    "known_activation",
    "pack",
    "restrict",
    "unpack",
    "walk",
]

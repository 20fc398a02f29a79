"""What a network is made of: neuron layers, and for every axis of every parameter the neuron layer it indexes.

From one `Architecture` follow the symmetry group, its action, the graph, the matching problem and the tests.
"""

from jax_scalegmn.architecture._builders import cnn, mlp, siren
from jax_scalegmn.architecture._description import (
    Architecture,
    Axis,
    NeuronLayer,
    Parameter,
    describe,
    from_json,
    restrict,
)
from jax_scalegmn.architecture._layers import (
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
from jax_scalegmn.architecture._packing import check_stack, pack, unpack
from jax_scalegmn.architecture._shorthand import EXAMPLES, parse
from jax_scalegmn.architecture._vgg_resnet import resnet, vgg

__all__ = [
    "EXAMPLES",
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
    "Layer",
    "LayerNorm",
    "MaxPool",
    "NeuronLayer",
    "Norm",
    "Parameter",
    "Residual",
    "Scaling",
    "check_stack",
    "cnn",
    "describe",
    "from_json",
    "known_activation",
    "mlp",
    "pack",
    "parse",
    "resnet",
    "restrict",
    "siren",
    "unpack",
    "vgg",
    "walk",
]

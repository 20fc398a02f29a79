"""What a network is made of: its neuron layers, and the neuron layer that each axis of each parameter indexes.

The symmetry group, its action, the graph, the matching problem and the tests follow from one `Architecture`.
"""

from jax_scalegmn.architecture._builders import cnn, mlp, siren
from jax_scalegmn.architecture._description import (
    Architecture,
    Axis,
    NeuronLayer,
    Parameter,
    describe,
    restrict,
)
from jax_scalegmn.architecture._function import Place, TracedFunction, called_program, operations
from jax_scalegmn.architecture._json import from_json
from jax_scalegmn.architecture._layers import (
    SCALED,
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
from jax_scalegmn.architecture._packing import (
    abstract_params,
    check_params,
    check_stack,
    flatten,
    pack,
    unflatten,
    unpack,
)
from jax_scalegmn.architecture._shorthand import EXAMPLES, parse
from jax_scalegmn.architecture._vgg_resnet import resnet, vgg

__all__ = [
    "EXAMPLES",
    "SCALED",
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
    "Place",
    "Residual",
    "Scaling",
    "TracedFunction",
    "abstract_params",
    "called_program",
    "check_params",
    "check_stack",
    "cnn",
    "describe",
    "flatten",
    "from_json",
    "known_activation",
    "mlp",
    "operations",
    "pack",
    "parse",
    "resnet",
    "restrict",
    "siren",
    "unflatten",
    "unpack",
    "vgg",
    "walk",
]

"""Convolutional networks with normalizations and residual streams: VGG and the ResNets of CIFAR.

Which group acts follows from where the normalizations stand. Each is behind a convolution and takes the scale off what
that gives: the kernel feeds its channels with power 0, and the normalization's scale and bias, behind which the
activation stands, follow the channel's group with power 1. Stored means and variances are of what the kernel gives,
power 0. Statistics that mix channels (LayerNorm; GroupNorm with one group) do not change when channels are permuted, so
that the activation's group acts in full. GroupNorm with more groups allows only permutations that keep channels of one
group together; those are no `Scaling`, and its layers are FIXED, which is true but less than all: a `resnet` with it
has no hidden layer left for a model to follow. With one group for each channel permutations are free again.

What may happen in front of a batch normalization is not described: a channel's kernel, mean and scale may flip their
signs together, and its kernel, mean and root of var + epsilon be rescaled together.
"""

import dataclasses
import math
from collections.abc import Sequence

from jax_scalegmn.architecture._description import Architecture, Axis, NeuronLayer, Parameter
from jax_scalegmn.architecture._layers import (
    Activation,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    GlobalMeanPool,
    GroupNorm,
    Layer,
    LayerNorm,
    MaxPool,
    Norm,
    Residual,
    Scaling,
    known_activation,
)

POOLINGS: dict[str, type[MaxPool] | type[AvgPool]] = {"max": MaxPool, "mean": AvgPool}

# Of each normalization: its name in Flax, and Flax's epsilon.
NORMS = {"batch": ("BatchNorm", 1e-5), "layer": ("LayerNorm", 1e-6), "group": ("GroupNorm", 1e-6)}


def vgg(
    channels_per_stage: Sequence[Sequence[int]],
    outputs: int,
    *,
    input_channels: int = 3,
    activation: str = "relu",
    norm: str | None = None,
    groups: int | None = None,
    epsilon: float | None = None,
    pooling: str = "max",
) -> Architecture:
    """Stages of 3x3 convolutions that each end in a pooling, a global mean and a dense head (arXiv 1409.1556).

    In the variables of this module of batches, by `network.merge_variables`:

        for channels in channels_per_stage:
            for width in channels:
                x = activation(Norm()(nn.Conv(width, (3, 3), use_bias=norm is None)(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(outputs)(x.mean((1, 2)))

    Neuron layers: "input", "hidden_0", ..., "output". Each hidden one has its activation's group, with two exceptions:
    max-pooling takes the larger of two channels' entries and not of their negatives, so that in front of it SIGN falls
    to PERMUTATION (a positive scale passes, and so does all through mean pooling); GroupNorm, above.

    Args:
      channels_per_stage: the widths of every stage's convolutions, like ((64, 64), (128, 128)).
      outputs: how many numbers the dense head gives.
      input_channels: of the images.
      activation: behind every convolution and its normalization.
      norm: "batch", "layer" (over the channels at each position), "group", or None: convolutions with biases.
      groups: of GroupNorm; it divides every width.
      epsilon: of the normalizations; None for Flax's, 1e-5 for "batch" and 1e-6 for the others.
      pooling: "max" or "mean", of 2x2 windows.

    Raises:
      ValueError: on widths or groups that fit no network, or an unknown activation, normalization or pooling.
    """
    stages = [tuple(channels) for channels in channels_per_stage]
    if not stages or not all(stages) or min(min(stage) for stage in stages) < 1:
        raise ValueError(
            f"channels_per_stage is {channels_per_stage}; expected stages of one or more widths >= 1, like "
            "((64, 64), (128, 128))."
        )
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; expected one of {sorted(POOLINGS)}.")
    widths = [width for stage in stages for width in stage]
    style = _style(activation, norm, groups, epsilon, "SAME", [input_channels, *widths, outputs], widths)
    neurons = [NeuronLayer("input", input_channels, Scaling.FIXED)]
    parameters: list[Parameter] = []
    layers: list[Layer] = []
    for stage in stages:
        for place, width in enumerate(stage, 1):
            index, scaling = len(neurons) - 1, style.scaling(width)
            if place == len(stage) and pooling == "max" and scaling is Scaling.SIGN:
                scaling = Scaling.PERMUTATION
            neurons.append(NeuronLayer(f"hidden_{index}", width, scaling))
            unit = _unit(style, (), index, neurons[-2].name, neurons[-1].name, style.activation)
            parameters += unit.parameters
            layers += unit.layers
        layers.append(POOLINGS[pooling]((2, 2), (2, 2)))
    name = f"vgg {input_channels}-{'-'.join('.'.join(map(str, stage)) for stage in stages)}-{outputs}"
    return _headed(f"{name} {style.label} {pooling}", neurons, outputs, parameters, layers)


def resnet(
    depth: int = 20,
    *,
    widths: Sequence[int] = (16, 32, 64),
    outputs: int = 10,
    input_channels: int = 3,
    norm: str | None = "batch",
    activation: str = "relu",
    groups: int | None = None,
    epsilon: float | None = None,
    padding: str | int = "SAME",
) -> Architecture:
    """The residual networks of CIFAR (He et al. 2016, arXiv 1512.03385, section 4.2), with 1x1 shortcut convolutions.

    In the variables of this module of batches, by `network.merge_variables`:

        class ResNetBlock(nn.Module):
            def __call__(self, x):
                y = activation(Norm()(nn.Conv(width, (3, 3), strides, use_bias=norm is None)(x)))
                y = Norm()(nn.Conv(width, (3, 3), use_bias=norm is None)(y))
                if x.shape != y.shape:
                    x = Norm()(nn.Conv(width, (1, 1), strides, use_bias=norm is None)(x))
                return activation(x + y)

        x = activation(Norm()(nn.Conv(widths[0], (3, 3), use_bias=norm is None)(x)))
        for stage, width in enumerate(widths):
            for block in range((depth - 2) // (2 * len(widths))):
                x = ResNetBlock(width, strides=2 if stage and not block else 1)(x)
        return nn.Dense(outputs)(x.mean((1, 2)))

    Neuron layers: "input"; of every stage s "stream_s", which all its blocks read and add to, and "inner_s_b" between
    the two convolutions of its block b; "output". The activation's group acts on all hidden ones: a stream's scale is
    put on by the last normalization of every branch, and by that of the stem or the shortcut convolution at its
    beginning; identity shortcuts carry it, and the activation behind each sum commutes with it. (GroupNorm: above.)

    Args:
      depth: 2 * stages * n + 2 for n blocks a stage, so 6n + 2 for three.
      widths: channels of every stage; all but the first begin with strides 2.
      outputs: how many numbers the dense head gives.
      input_channels: of the images.
      norm: "batch", "layer" (over the channels at each position), "group", or None: convolutions with biases.
      activation: behind the stem, inside the branches and behind their sums.
      groups: of GroupNorm; it divides every width.
      epsilon: of the normalizations; None for Flax's, 1e-5 for "batch" and 1e-6 for the others.
      padding: of the 3x3 convolutions: "SAME", or 1 for networks from PyTorch, which pads both sides where strides of 2
        over an even side need one only.

    Raises:
      ValueError: on a depth, widths or groups that fit no network, or an unknown activation or normalization.
    """
    widths = tuple(widths)
    style = _style(activation, norm, groups, epsilon, padding, [input_channels, *widths, outputs], widths)
    blocks, rest = divmod(depth - 2, 2 * max(1, len(widths)))
    if not widths or rest or blocks < 1:
        raise ValueError(
            f"depth is {depth} for {len(widths)} stages {widths}; expected one stage or more, and 2 * stages * n + 2 "
            "layers with n >= 1, like 8, 14 or 20 for three: two for each block, the stem and the head."
        )
    neurons = [NeuronLayer("input", input_channels, Scaling.FIXED)]
    stem = _unit(style, (), 0, "input", "stream_0", style.activation)
    parameters, layers = list(stem.parameters), list(stem.layers)
    for stage, width in enumerate(widths):
        neurons.append(NeuronLayer(f"stream_{stage}", width, style.scaling(width)))
        for block in range(blocks):
            path = (f"ResNetBlock_{stage * blocks + block}",)
            stream, inner = f"stream_{stage}", f"inner_{stage}_{block}"
            enters = stage > 0 and block == 0
            reads, strides = (f"stream_{stage - 1}", 2) if enters else (stream, 1)
            neurons.append(NeuronLayer(inner, width, style.scaling(width)))
            units = [
                _unit(style, path, 0, reads, inner, style.activation, strides=strides),
                _unit(style, path, 1, inner, stream, None),
            ]
            shortcut = [_unit(style, path, 2, reads, stream, None, size=1, strides=strides)] if enters else []
            parameters += [parameter for unit in units + shortcut for parameter in unit.parameters]
            branch = tuple(layer for unit in units for layer in unit.layers)
            identity = tuple(layer for unit in shortcut for layer in unit.layers)
            layers.append(Residual(path[0], branch, identity, style.activation))
    name = f"resnet {depth} {'-'.join(map(str, (input_channels, *widths, outputs)))} {style.label}"
    return _headed(name if padding == "SAME" else f"{name} padding={padding}", neurons, outputs, parameters, layers)


# --- private ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Style:
    """What all convolutions of a network have in common."""

    activation: Activation
    norm: str | None
    groups: int | None
    epsilon: float
    padding: str | int

    @property
    def label(self) -> str:
        groups = "" if self.groups is None else f"({self.groups})"
        return f"{self.activation.name} {self.norm or 'no'} norm{groups}"

    def scaling(self, width: int) -> Scaling:
        """The group that the normalization leaves of the activation's, on a layer of that width."""
        return self.activation.scaling if self.groups in (None, 1, width) else Scaling.FIXED

    def layer(self, index: int, activation: Activation | None) -> Norm:
        name = f"{NORMS[self.norm or ''][0]}_{index}"
        if self.groups is not None:
            return GroupNorm(name, self.groups, self.epsilon, activation)
        return (BatchNorm if self.norm == "batch" else LayerNorm)(name, self.epsilon, activation)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A convolution with its normalization."""

    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...]


def _style(
    activation: str,
    norm: str | None,
    groups: int | None,
    epsilon: float | None,
    padding: str | int,
    sizes: Sequence[int],
    widths: Sequence[int],
) -> _Style:
    """The options, checked."""
    if min(sizes) < 1:
        raise ValueError(f"The input channels, widths and outputs are {tuple(sizes)}; expected numbers >= 1.")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected None or one of {sorted(NORMS)}.")
    if (norm == "group") is not (groups is not None):
        raise ValueError(
            f"groups is {groups} with norm={norm!r}; expected a number with 'group' and None elsewhere. Say how many "
            "groups your GroupNorm has, like groups=1: the weights do not tell."
        )
    if groups is not None and (groups < 1 or any(width % groups for width in widths)):
        raise ValueError(f"groups is {groups}; expected a divisor of every width of {tuple(widths)}.")
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is {epsilon}; expected a small positive number, like 1e-5.")
    if padding not in ("SAME", 1):
        raise ValueError(f"padding is {padding!r}; expected 'SAME', or 1 for PyTorch's.")
    usual = NORMS[norm][1] if norm else 0.0
    return _Style(known_activation(activation), norm, groups, usual if epsilon is None else epsilon, padding)


def _unit(
    style: _Style,
    path: tuple[str, ...],
    index: int,
    reads: str,
    feeds: str,
    activation: Activation | None,
    *,
    size: int = 3,
    strides: int = 1,
) -> _Unit:
    """The convolution of that index in the module at `path`, between two neuron layers."""
    name, normed = f"Conv_{index}", style.norm is not None
    padding = style.padding if size == 3 else "SAME"
    conv = Conv(name, None if normed else activation, (strides, strides), padding)
    kernel = Parameter((*path, name, "kernel"), (size, size, Axis(reads, -1), Axis(feeds, 0 if normed else 1)))
    if not normed:
        return _Unit((kernel, Parameter((*path, name, "bias"), (Axis(feeds, 1),))), (conv,))
    norm = style.layer(index, activation)
    powers = {"scale": 1, "bias": 1} | ({"mean": 0, "var": 0} if isinstance(norm, BatchNorm) else {})
    vectors = (Parameter((*path, norm.name, vector), (Axis(feeds, power),)) for vector, power in powers.items())
    return _Unit((kernel, *vectors), (conv, norm))


def _headed(
    name: str, neurons: list[NeuronLayer], outputs: int, parameters: list[Parameter], layers: list[Layer]
) -> Architecture:
    """The network with the mean over positions and the dense head behind its last stream or hidden layer."""
    reads = next(layer.name for layer in reversed(neurons) if not layer.name.startswith("inner"))
    head = (
        Parameter(("Dense_0", "kernel"), (Axis(reads, -1), Axis("output", 1))),
        Parameter(("Dense_0", "bias"), (Axis("output", 1),)),
    )
    return Architecture(
        name,
        (*neurons, NeuronLayer("output", outputs, Scaling.FIXED)),
        (*parameters, *head),
        (*layers, GlobalMeanPool(), Dense("Dense_0", None)),
    )

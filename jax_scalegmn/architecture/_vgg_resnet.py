"""Convolutional networks with normalizations and residual streams: VGG and the ResNets of CIFAR.

A normalization follows each convolution and cancels its scale, so the kernel has power 0 on its output channels; the
normalization's scale and bias have power 1; the stored mean and var describe the kernel's output (power 0).

Which group acts depends on the statistics of the normalization. Those of a LayerNorm, or of a GroupNorm with one group,
do not change when channels are permuted, so the activation's group acts in full. A GroupNorm with several groups allows
only permutations that keep the channels of a group together. No `Scaling` describes these, so its layers are FIXED: a
valid description, but a smaller group than the true one. A `resnet` with such a GroupNorm has no hidden layer left for
a model to follow. With one group for each channel, permutations are free again.

One symmetry of batch normalizations is not described: a channel's kernel, mean and scale may flip their signs together,
and its kernel, mean and the root of var + epsilon may be rescaled together.
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

# For each normalization: its name in Flax, and Flax's epsilon.
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
    """Describes a VGG network: stages of 3x3 convolutions that each end in a pooling, a global mean and a dense head.

    (Simonyan and Zisserman 2015, arXiv 1409.1556.) Its params are those of this Flax module, whose "params" and
    "batch_stats" `network.merge_variables` merges:

        for channels in channels_per_stage:
            for width in channels:
                x = activation(Norm()(nn.Conv(width, (3, 3), use_bias=norm is None)(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(outputs)(x.mean((1, 2)))

    The neuron layers are "input", "hidden_0", ..., "output". Each hidden one has its activation's group, with two
    exceptions. Max pooling commutes with positive scales but not with sign flips, so before it SIGN is reduced to
    PERMUTATION. GroupNorm with several groups leaves FIXED.

    Args:
      channels_per_stage: The widths of every stage's convolutions, like ((64, 64), (128, 128)).
      outputs: The number of outputs of the dense head.
      input_channels: The channels of the images.
      activation: The activation after every convolution and its normalization.
      norm: "batch", "layer" (over the channels at each position), "group", or None for convolutions with biases.
      groups: The number of groups of "group", which divides every width.
      epsilon: The small constant of the normalizations; None for Flax's, 1e-5 for "batch" and 1e-6 for the others.
      pooling: "max" or "mean", over 2x2 windows.

    Returns:
      The architecture.

    Raises:
      ValueError: On widths or groups that fit no network, or an unknown activation, normalization or pooling.

    >>> import jax_scalegmn as sg
    >>> arch = sg.vgg(((4, 4), (8,)), 10, norm="batch")
    >>> [layer.width for layer in arch.neuron_layers]
    [3, 4, 4, 8, 10]
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
    return _headed(
        f"{name} {style.label} {pooling}", style.reading(neurons[-1].name), neurons, outputs, parameters, layers
    )


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
    """Describes a residual network of CIFAR (He et al. 2016, arXiv 1512.03385, section 4.2), with 1x1 shortcuts.

    Its params are those of this Flax module, whose "params" and "batch_stats" `network.merge_variables` merges:

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

    The neuron layers are "input", "output" and, for every stage s, "stream_s", which all its blocks read and add to,
    and "inner_s_b" between the two convolutions of its block b. The activation's group acts on all hidden ones. A
    stream's scale is applied by the last normalization of every branch, and by that of the stem or of the shortcut
    convolution that starts the stage; identity shortcuts carry it on, and the activation after each sum commutes with
    it: positive scales alone for abs. GroupNorm with several groups leaves FIXED.

    Args:
      depth: 2 * stages * n + 2 for n blocks a stage, so 6n + 2 for three stages.
      widths: The channels of every stage; all but the first start with strides 2.
      outputs: The number of outputs of the dense head.
      input_channels: The channels of the images.
      norm: "batch", "layer" (over the channels at each position), "group", or None for convolutions with biases.
      activation: The activation after the stem, inside the branches and after their sums.
      groups: The number of groups of "group", which divides every width.
      epsilon: The small constant of the normalizations; None for Flax's, 1e-5 for "batch" and 1e-6 for the others.
      padding: The padding of the 3x3 convolutions: "SAME", or 1 for networks from PyTorch, which pads both sides where
        "SAME" pads one side (strides of 2 over an even side).

    Returns:
      The architecture.

    Raises:
      ValueError: On a depth, widths or groups that fit no network, or an unknown activation or normalization.

    >>> import jax_scalegmn as sg
    >>> arch = sg.resnet(8, widths=(4, 8, 8))
    >>> [layer.name for layer in arch.hidden]
    ['stream_0', 'inner_0_0', 'stream_1', 'inner_1_0', 'stream_2', 'inner_2_0']
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
        neurons.append(NeuronLayer(f"stream_{stage}", width, style.stream_scaling(width)))
        for block in range(blocks):
            inner = f"inner_{stage}_{block}"
            neurons.append(NeuronLayer(inner, width, style.scaling(width)))
            enters = stage > 0 and block == 0
            reads = f"stream_{stage - 1}" if enters else f"stream_{stage}"
            unit = _residual_block(
                style, f"ResNetBlock_{stage * blocks + block}", reads, inner, f"stream_{stage}", enters=enters
            )
            parameters += unit.parameters
            layers += unit.layers
    name = f"resnet {depth} {'-'.join(map(str, (input_channels, *widths, outputs)))} {style.label}"
    name = name if padding == "SAME" else f"{name} padding={padding}"
    return _headed(name, style.reading(f"stream_{len(widths) - 1}"), neurons, outputs, parameters, layers)


# --- private ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Style:
    """The options that all convolutions of a network share."""

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

    def stream_scaling(self, width: int) -> Scaling:
        """The group on a stream: identity shortcuts carry its sizes on, past an even activation not its signs."""
        own = self.scaling(width)
        return own.common(Scaling.POSITIVE) if self.activation.is_even else own

    def reading(self, neurons: str) -> Axis:
        """The axis of a kernel that reads a neuron layer, which the activation is before unless it is the input."""
        return Axis(neurons, -1, unsigned=self.activation.is_even and neurons != "input")

    def layer(self, index: int, activation: Activation | None) -> Norm:
        name = f"{NORMS[self.norm or ''][0]}_{index}"
        if self.groups is not None:
            return GroupNorm(name, self.groups, self.epsilon, activation)
        return (BatchNorm if self.norm == "batch" else LayerNorm)(name, self.epsilon, activation)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Some layers of a network with their parameters, like a convolution with its normalization."""

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
    """Checks the options."""
    if min(sizes) < 1:
        raise ValueError(f"The input channels, widths and outputs are {tuple(sizes)}; expected numbers >= 1.")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected None or one of {sorted(NORMS)}.")
    if (norm == "group") is not (groups is not None):
        raise ValueError(
            f"groups is {groups} with norm={norm!r}; expected a number with 'group' and None elsewhere. Say how many "
            "groups your GroupNorm has, like groups=1: the weights do not tell it."
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
    kernel = Parameter((*path, name, "kernel"), (size, size, style.reading(reads), Axis(feeds, 0 if normed else 1)))
    if not normed:
        return _Unit((kernel, Parameter((*path, name, "bias"), (Axis(feeds, 1),))), (conv,))
    norm = style.layer(index, activation)
    powers = {"scale": 1, "bias": 1} | ({"mean": 0, "var": 0} if isinstance(norm, BatchNorm) else {})
    vectors = (Parameter((*path, norm.name, vector), (Axis(feeds, power),)) for vector, power in powers.items())
    return _Unit((kernel, *vectors), (conv, norm))


def _residual_block(style: _Style, name: str, reads: str, inner: str, feeds: str, *, enters: bool) -> _Unit:
    """The block of that name from one stream to another; the one that enters a stage has strides and a shortcut."""
    strides = 2 if enters else 1
    branch = [
        _unit(style, (name,), 0, reads, inner, style.activation, strides=strides),
        _unit(style, (name,), 1, inner, feeds, None),
    ]
    shortcut = [_unit(style, (name,), 2, reads, feeds, None, size=1, strides=strides)] if enters else []
    parameters = tuple(parameter for unit in branch + shortcut for parameter in unit.parameters)
    sides = [tuple(layer for unit in side for layer in unit.layers) for side in (branch, shortcut)]
    return _Unit(parameters, (Residual(name, sides[0], sides[1], style.activation),))


def _headed(
    name: str,
    reads: Axis,
    neurons: list[NeuronLayer],
    outputs: int,
    parameters: list[Parameter],
    layers: list[Layer],
) -> Architecture:
    """The network with a mean over positions and a dense head that reads that neuron layer."""
    head = (
        Parameter(("Dense_0", "kernel"), (reads, Axis("output", 1))),
        Parameter(("Dense_0", "bias"), (Axis("output", 1),)),
    )
    return Architecture(
        name,
        (*neurons, NeuronLayer("output", outputs, Scaling.FIXED)),
        (*parameters, *head),
        (*layers, GlobalMeanPool(), Dense("Dense_0", None)),
    )

"""Descriptions of the usual networks, in the params of Flax: perceptrons, SIRENs, CNNs; VGG and ResNets with norms."""

import math
from collections.abc import Sequence

from jax_scalegmn.architecture._description import Architecture, Axis, NeuronLayer, Parameter
from jax_scalegmn.architecture._layers import (
    Activation,
    Conv,
    Dense,
    Flatten,
    GlobalMeanPool,
    Layer,
    Scaling,
    known_activation,
)
from jax_scalegmn.architecture._vgg_resnet import resnet, vgg

__all__ = ["cnn", "mlp", "resnet", "siren", "vgg"]


def mlp(widths: Sequence[int], activation: str | Sequence[str] = "relu") -> Architecture:
    """A multilayer perceptron in the params of Flax: Dense_0, Dense_1, ...

    Args:
      widths: neurons of every layer, input and output included, like (784, 64, 64, 10).
      activation: the activation of all hidden layers, or one for each of them.

    Raises:
      ValueError: on fewer than two widths, or an activation whose group is unknown.
    """
    widths = _widths(widths)
    names = [activation] * (len(widths) - 2) if isinstance(activation, str) else list(activation)
    if len(names) != len(widths) - 2:
        raise ValueError(f"Got {len(names)} activations {names} for the {len(widths) - 2} hidden layers of {widths}.")
    activations = [known_activation(name) for name in names]
    label = activation if isinstance(activation, str) else ",".join(names)
    return _dense_chain(f"mlp {_dashes(widths)} {label}", widths, activations, offset=0.0)


def siren(widths: Sequence[int], *, w0: float = 30.0, offset: float = 0.5) -> Architecture:
    """An implicit neural representation with sine activations (Sitzmann et al. 2020, arXiv 2006.09661).

    h' = sin(w0 (h @ W + b)), output h @ W + b + `offset`; the published INRs of images have w0 = 30, offset 0.5.

    Args:
      widths: neurons of every layer, like (2, 32, 32, 1).
      w0: the frequency, in radians; finite and not 0.
      offset: added to the output.
    """
    widths = _widths(widths)
    if not (math.isfinite(w0) and w0 != 0):
        raise ValueError(f"w0 is {w0}; a SIREN needs a finite frequency other than 0, like 30.")
    activations = [Activation("sine", float(w0))] * (len(widths) - 2)
    return _dense_chain(f"siren {_dashes(widths)} w0={w0:g}", widths, activations, offset=float(offset))


def cnn(
    channels: Sequence[int],
    outputs: int,
    *,
    activation: str = "relu",
    kernel_size: int | Sequence[int] = 3,
    strides: int = 2,
    padding: str = "VALID",
    flatten: tuple[int, int] | None = None,
    dense: Sequence[int] = (),
) -> Architecture:
    """Convolutions, a pooling or flattening, and dense layers, in the params of Flax: Conv_0, ..., Dense_0, ...

    Args:
      channels: of the image and of every convolution, like (1, 16, 16, 16).
      outputs: how many numbers the last dense layer gives.
      activation: of every hidden layer.
      kernel_size: of all the (square) kernels, or one for each convolution.
      strides: of every convolution, along both spatial axes.
      padding: "VALID" or "SAME".
      flatten: the (height, width) of the images where the last map is flattened; None for global mean pooling, which
        takes images of any size.
      dense: neurons of the hidden dense layers in front of the last.

    Raises:
      ValueError: on widths, kernels or image sizes that fit no network, or an activation whose group is unknown.
    """
    channels = _widths(channels)
    convolutions = len(channels) - 1
    sizes = [kernel_size] * convolutions if isinstance(kernel_size, int) else list(kernel_size)
    if len(sizes) != convolutions:
        raise ValueError(f"Got {len(sizes)} kernel sizes {sizes} for {convolutions} convolutions {channels}.")
    if any(size < 1 for size in [*sizes, strides]):
        raise ValueError(f"kernel sizes are {sizes}, strides {strides}; expected numbers >= 1.")
    if padding not in ("VALID", "SAME"):
        raise ValueError(f"padding is {padding!r}; expected 'VALID' or 'SAME'.")
    act = known_activation(activation)
    dense = _widths([channels[-1], *dense])[1:] if dense else ()
    hidden = [NeuronLayer(f"hidden_{i}", width, act.scaling) for i, width in enumerate([*channels[1:], *dense])]
    neurons = (
        NeuronLayer("input", channels[0], Scaling.FIXED),
        *hidden,
        NeuronLayer("output", outputs, Scaling.FIXED),
    )
    parameters: list[Parameter] = []
    layers: list[Layer] = []
    for i, size in enumerate(sizes):
        name = f"Conv_{i}"
        kernel = (size, size, Axis(neurons[i].name, -1), Axis(neurons[i + 1].name, 1))
        parameters += [Parameter((name, "kernel"), kernel), Parameter((name, "bias"), (Axis(neurons[i + 1].name, 1),))]
        layers.append(Conv(name, act, (strides, strides), padding))
    repeat = 1
    if flatten is None:
        layers.append(GlobalMeanPool())
    else:
        layers.append(Flatten())
        repeat = math.prod(_map_size(side, sizes, strides, padding) for side in flatten)
    for i in range(len(dense) + 1):
        name, senders, receivers = f"Dense_{i}", neurons[convolutions + i].name, neurons[convolutions + i + 1].name
        reads = Axis(senders, -1, repeat if i == 0 else 1)
        parameters.append(Parameter((name, "kernel"), (reads, Axis(receivers, 1))))
        parameters.append(Parameter((name, "bias"), (Axis(receivers, 1),)))
        layers.append(Dense(name, act if i < len(dense) else None))
    name = f"cnn {_dashes([*channels, *dense, outputs])} {activation}"
    return Architecture(name, neurons, tuple(parameters), tuple(layers))


# --- private ------------------------------------------------------------------------------------------------------


def _dense_chain(
    name: str, widths: tuple[int, ...], activations: Sequence[Activation], *, offset: float
) -> Architecture:
    hidden = [
        NeuronLayer(f"hidden_{i}", w, a.scaling) for i, (w, a) in enumerate(zip(widths[1:-1], activations, strict=True))
    ]
    neurons = (
        NeuronLayer("input", widths[0], Scaling.FIXED),
        *hidden,
        NeuronLayer("output", widths[-1], Scaling.FIXED),
    )
    parameters: list[Parameter] = []
    layers: list[Layer] = []
    for i, activation in enumerate([*activations, None]):
        dense, senders, receivers = f"Dense_{i}", neurons[i].name, neurons[i + 1].name
        parameters.append(Parameter((dense, "kernel"), (Axis(senders, -1), Axis(receivers, 1))))
        parameters.append(Parameter((dense, "bias"), (Axis(receivers, 1),)))
        layers.append(Dense(dense, activation, offset if activation is None else 0.0))
    return Architecture(name, neurons, tuple(parameters), tuple(layers))


def _widths(widths: Sequence[int]) -> tuple[int, ...]:
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(f"widths are {tuple(widths)}; expected two or more numbers >= 1, like (2, 32, 32, 1).")
    return tuple(int(width) for width in widths)


def _map_size(side: int, kernel_sizes: Sequence[int], strides: int, padding: str) -> int:
    size = side
    for kernel in kernel_sizes:
        size = -(-size // strides) if padding == "SAME" else (size - kernel) // strides + 1
        if size < 1:
            raise ValueError(
                f"Images of side {side} are too small for kernels {list(kernel_sizes)}, strides {strides}."
            )
    return size


def _dashes(widths: Sequence[int]) -> str:
    return "-".join(str(width) for width in widths)

"""Descriptions of perceptrons, SIRENs and CNNs, with the params of the Flax modules that compute them."""

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


def mlp(widths: Sequence[int], activation: str | Sequence[str] = "relu") -> Architecture:
    """Describes a multilayer perceptron: h' = act(h @ kernel + bias), without the activation in the last layer.

    Its params are Flax's: {"Dense_0": {"kernel": [in, out], "bias": [out]}, "Dense_1": ...}.

    Args:
      widths: The number of neurons of every layer, input and output included, like (784, 64, 64, 10).
      activation: The activation of all hidden layers, or one for each of them: one of `SCALING_OF_ACTIVATION`,
        or leaky_relu with a slope, as "leaky_relu(0.2)".

    Returns:
      The architecture; its hidden neuron layers are "hidden_0", "hidden_1", ...

    Raises:
      ValueError: On fewer than two widths, or an activation whose group is unknown.

    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((784, 64, 10), "tanh")
    >>> arch.array_shapes["Dense_0", "kernel"], arch.num_parameters
    ((784, 64), 50890)
    """
    widths = _widths(widths)
    if isinstance(activation, Sequence) and not isinstance(activation, str):
        names = list(activation)
    else:
        names = [activation] * (len(widths) - 2)
    if len(names) != len(widths) - 2:
        raise ValueError(f"Got {len(names)} activations {names} for the {len(widths) - 2} hidden layers of {widths}.")
    activations = [known_activation(name) for name in names]
    label = activation if isinstance(activation, str) else ",".join(names)
    return _dense_chain(f"mlp {_dashes(widths)} {label}", widths, activations, offset=0.0)


def siren(widths: Sequence[int], *, w0: float | Sequence[float] = 30.0, offset: float = 0.5) -> Architecture:
    """Describes an implicit neural representation with sine activations (Sitzmann et al. 2020, arXiv 2006.09661).

    h' = sin(w0 (h @ kernel + bias)), and h @ kernel + bias + offset in the last layer. The published INRs of images
    have w0 = 30 and offset 0.5.

    Args:
      widths: The number of neurons of every layer, like (2, 32, 32, 1).
      w0: The frequency, in radians per unit of the input, or one for each hidden layer; finite and not 0.
      offset: The number that is added to the output.

    Returns:
      The architecture; sign flips and permutations act on its hidden layers.

    Raises:
      ValueError: On fewer than two widths, another number of frequencies, or one that is 0 or not finite.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 16, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> sg.network.apply(arch, params, jax.numpy.zeros(2)).shape
    (1,)
    """
    widths = _widths(widths)
    frequencies = list(w0) if isinstance(w0, Sequence) else [w0] * (len(widths) - 2)
    if len(frequencies) != len(widths) - 2:
        raise ValueError(f"w0 is {w0} for the {len(widths) - 2} hidden layers of {widths}; expected one for each.")
    for frequency in frequencies if isinstance(w0, Sequence) else [w0]:
        if not (math.isfinite(frequency) and frequency != 0):
            raise ValueError(f"w0 is {w0}; a SIREN needs a finite frequency other than 0, like 30.")
    activations = [Activation("sine", float(frequency)) for frequency in frequencies]
    label = "-".join(f"{frequency:g}" for frequency in w0) if isinstance(w0, Sequence) else f"{w0:g}"
    return _dense_chain(f"siren {_dashes(widths)} w0={label}", widths, activations, offset=float(offset))


def cnn(
    channels: Sequence[int],
    outputs: int,
    *,
    activation: str = "relu",
    kernel_size: int | Sequence[int] = 3,
    strides: int = 2,
    padding: str | int = "VALID",
    flatten: tuple[int, int] | None = None,
    dense: Sequence[int] = (),
) -> Architecture:
    """Describes a convolutional network: convolutions, a global mean or flattening, and dense layers.

    Its params are Flax's: {"Conv_0": {"kernel": [kh, kw, in, out], "bias": [out]}, ..., "Dense_0": ...}.

    Args:
      channels: The channels of the image and of every convolution, like (1, 16, 16, 16).
      outputs: The number of outputs of the last dense layer.
      activation: The activation of every hidden layer.
      kernel_size: The side of all the (square) kernels, or one for each convolution, in pixels.
      strides: The strides of every convolution, along both spatial axes.
      padding: "VALID", "SAME", or the number of zeros on every side, as PyTorch counts them.
      flatten: The (height, width) of the images where the last map is flattened; None for global mean pooling, which
        takes images of any size.
      dense: The numbers of neurons of the hidden dense layers before the last.

    Returns:
      The architecture.

    Raises:
      ValueError: On widths, kernels or image sizes that fit no network, or an activation whose group is unknown.

    >>> import jax_scalegmn as sg
    >>> arch = sg.cnn((1, 16, 16), 10)
    >>> arch.array_shapes["Conv_1", "kernel"], arch.array_shapes["Dense_0", "kernel"]
    ((3, 3, 16, 16), (16, 10))
    """
    channels = _widths(channels)
    sizes = _kernel_sizes(kernel_size, channels, strides, padding)
    act = known_activation(activation)
    dense = _widths([channels[-1], *dense])[1:] if dense else ()
    widths = [*channels[1:], *dense]
    hidden = [NeuronLayer(f"hidden_{i}", width, act.scaling) for i, width in enumerate(widths)]
    neurons = (
        NeuronLayer("input", channels[0], Scaling.FIXED),
        *hidden,
        NeuronLayer("output", outputs, Scaling.FIXED),
    )
    parameters: list[Parameter] = []
    layers: list[Layer] = []
    for i, size in enumerate(sizes):
        parameters += _affine(f"Conv_{i}", reading(neurons[i]), neurons[i + 1], (size, size))
        layers.append(Conv(f"Conv_{i}", act, (strides, strides), padding))
    repeat = 1
    if flatten is None:
        layers.append(GlobalMeanPool())
    else:
        layers.append(Flatten())
        repeat = math.prod(_map_size(side, sizes, strides, padding) for side in flatten)
    for i in range(len(dense) + 1):
        reads = reading(neurons[len(sizes) + i], repeat if i == 0 else 1)
        parameters += _affine(f"Dense_{i}", reads, neurons[len(sizes) + i + 1])
        layers.append(Dense(f"Dense_{i}", act if i < len(dense) else None))
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
        parameters += _affine(f"Dense_{i}", reading(neurons[i]), neurons[i + 1])
        layers.append(Dense(f"Dense_{i}", activation, offset if activation is None else 0.0))
    return Architecture(name, neurons, tuple(parameters), tuple(layers))


def reading(neurons: NeuronLayer, repeat: int = 1) -> Axis:
    """The axis of a kernel that reads a layer of one of the activations here; of NONZERO layers it is abs."""
    return Axis(neurons.name, -1, repeat, unsigned=neurons.scaling is Scaling.NONZERO)


def _affine(name: str, reads: Axis, feeds: NeuronLayer, window: tuple[int, ...] = ()) -> list[Parameter]:
    """The kernel [*window, in, out] and the bias [out] of one layer."""
    return [
        Parameter((name, "kernel"), (*window, reads, Axis(feeds.name, 1))),
        Parameter((name, "bias"), (Axis(feeds.name, 1),)),
    ]


def _kernel_sizes(
    kernel_size: int | Sequence[int], channels: tuple[int, ...], strides: int, padding: str | int
) -> list[int]:
    """One kernel size for each convolution, after a check of all that concerns the convolutions."""
    convolutions = len(channels) - 1
    sizes = [kernel_size] * convolutions if isinstance(kernel_size, int) else list(kernel_size)
    if len(sizes) != convolutions:
        raise ValueError(f"Got {len(sizes)} kernel sizes {sizes} for {convolutions} convolutions {channels}.")
    if any(size < 1 for size in [*sizes, strides]):
        raise ValueError(f"kernel sizes are {sizes}, strides {strides}; expected numbers >= 1.")
    if padding not in ("VALID", "SAME") and not (isinstance(padding, int) and padding >= 0):
        raise ValueError(f"padding is {padding!r}; expected 'VALID' or 'SAME', or a number of zeros >= 0.")
    return sizes


def _widths(widths: Sequence[int]) -> tuple[int, ...]:
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(f"widths are {tuple(widths)}; expected two or more numbers >= 1, like (2, 32, 32, 1).")
    return tuple(int(width) for width in widths)


def _map_size(side: int, kernel_sizes: Sequence[int], strides: int, padding: str | int) -> int:
    size, zeros = side, padding if isinstance(padding, int) else 0
    for kernel in kernel_sizes:
        size = -(-size // strides) if padding == "SAME" else (size + 2 * zeros - kernel) // strides + 1
        if size < 1:
            raise ValueError(
                f"Images of side {side} are too small for kernels {list(kernel_sizes)}, strides {strides}."
            )
    return size


def _dashes(widths: Sequence[int]) -> str:
    return "-".join(str(width) for width in widths)

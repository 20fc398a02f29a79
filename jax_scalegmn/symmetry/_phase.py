"""Phases of sines: half a turn more flips the sign of a sine, sin(u + k pi) = (-1)^k sin(u).

Such a shift adds to a bias and does not scale it, so that no group element holds it.
"""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture, stacks
from jax_scalegmn.architecture import Architecture, AvgPool, Axis, Conv, Dense, Flatten, GlobalMeanPool, Scaling
from jax_scalegmn.symmetry import _elements
from jax_scalegmn.types import Params

# To 50 digits: a float64 bias of 2^51 half turns needs 32.
PI = Fraction("3.14159265358979323846264338327950288419716939937510")


@stacks.any_container("params", returns=True)
def wrap_phase(arch: Architecture, params: Params) -> dict[str, Any]:
    """Brings the phase w0 b of every sine unit into [-pi/2, pi/2] and keeps the function.

    A unit computes sin(w0 (x @ W + b)). Its bias loses k half turns, b' = b - k pi / w0, and where k is odd everything
    that reads the unit changes its sign. The rest stays: the kernels that feed the unit, layers without sine, the
    output's bias.

    b' is within 1e-7 half turns of the exact value in float32 and within 2e-16 in float64; half precision is computed
    in float32 and rounded. The network itself is less exact: in float32 it rounds a phase of 1e4 radians by about 5e-4,
    and its outputs may differ by as much before and after; those after are more exact. Phases beyond 2^22 half turns
    (1e7 radians) in float32 and 2^51 (7e15) in float64 stay unchanged: neighboring numbers of that size are a quarter
    of a half turn apart or more, and the network computes noise.

    Source: arXiv 2406.10685, algorithm 1. Its published script, which leaves out w0, flips the kernels that feed the
    unit instead of those that read it and shifts the output's bias too, changes the function.

    Args:
      arch: The architecture. Its `layers` say which units are sines, and their w0, in radians, rounded to the dtype of
        the bias as `network.apply` does.
      params: The network; `jax.vmap` for many.

    Returns:
      The params. Two networks that differ by such shifts alone become equal up to rounding, except for units whose
      phase is a rounding error away from -pi/2 and pi/2, which are one phase with two signs. Permutations and signs
      remain, and wrapping commutes with them.

    Raises:
      ValueError: If params do not fit the architecture, if it has no `layers` or no sine among them, if it has other
        layers that no flipped sign passes or that form no chain (normalizations, MaxPool, Residual), or if a sine layer
        has no bias, an offset, neurons of `Scaling.FIXED` (an output), neurons that it shares with another layer or a
        normalization, or nothing that reads it.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {
    ...     "Dense_0": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([3 * jnp.pi])},
    ...     "Dense_1": {"kernel": jnp.array([[5.0]]), "bias": jnp.zeros(1)},
    ... }
    >>> wrapped = sg.symmetry.wrap_phase(sg.siren((1, 1, 1), w0=1.0), params)
    >>> abs(wrapped["Dense_0"]["bias"]).round(4).item(), wrapped["Dense_1"]["kernel"].item()
    (0.0, -5.0)
    """
    sines = _sines(arch)
    values = dict(zip([(p.path, p.start) for p in arch.parameters], architecture.unpack(arch, params), strict=True))
    signs = {}
    for path, (neurons, w0) in sines.items():
        values[path, ()], signs[neurons] = _wrap(jnp.asarray(values[path, ()]), w0)
    flips = _elements.Element({name: jnp.arange(sign.shape[0]) for name, sign in signs.items()}, signs)
    for parameter in arch.parameters:
        for position, axis in enumerate(parameter.axes):
            # Only the kernels that read the unit: with those that feed it this would be `symmetry.act`, which leaves
            # the contribution of the unit to the next layer unchanged.
            if isinstance(axis, Axis) and axis.neurons in signs and axis.power < 0:
                where = parameter.path, parameter.start
                values[where] = _elements.act_on_axis(flips, axis, position, values[where])
    return architecture.pack(arch, list(values.values()))


# --- private ------------------------------------------------------------------------------------------------------


def _sines(arch: Architecture) -> dict[tuple[str, ...], tuple[str, float]]:
    """For the path of every sine layer's bias: the neuron layer, and w0."""
    if not arch.layers:
        raise ValueError(
            f"{arch.name!r} does not say how to compute its function (layers is empty), so that its sines and their "
            "w0 are unknown. Give the Architecture its layers, or use a builder: architecture.siren, mlp or cnn."
        )
    every = dict.fromkeys((*arch.layers, *(layer for _, layer in architecture.walk(arch.layers))))
    activations = [getattr(layer, "activation", None) for layer in every]
    names = [activation.name for activation in activations if activation is not None]
    if "sine" not in names:
        raise ValueError(
            f"{arch.name!r} has no sine layer: expected 'sine' among its activations, got {names}. Others have no "
            "phases: use its params as they are."
        )
    passing = Dense | Conv | AvgPool | GlobalMeanPool | Flatten
    foreign = [type(layer).__name__ for layer in arch.layers if not isinstance(layer, passing)]
    if foreign:
        raise ValueError(
            f"{arch.name!r} has sines and the layers {foreign}; expected dense and convolutional layers in a chain, "
            "with mean pooling. Sums, normalizations and max-pooling have no phase to wrap: use its params as they are."
        )
    affine = [layer for layer in arch.layers if isinstance(layer, Dense | Conv)]
    activated = [(layer, layer.activation) for layer in affine if layer.activation is not None]
    sines = [(layer, activation.frequency) for layer, activation in activated if activation.name == "sine"]
    return {(layer.name, "bias"): (_neurons(arch, layer, w0), w0) for layer, w0 in sines}


def _neurons(arch: Architecture, layer: Dense | Conv, w0: float) -> str:
    """The name of a sine layer's neurons, if its bias is their phase and their signs concern only their readers.

    Raises:
      ValueError: If not.
    """
    path = (layer.name, "bias")
    where = f"{arch.name!r}: sine layer {layer.name!r}"
    axes = next(
        (parameter.axes for parameter in arch.parameters if (parameter.path, parameter.start) == (path, ())), ()
    )
    own = axes[0] if len(axes) == 1 else None
    if not (isinstance(own, Axis) and own.power == 1 and own.repeat == 1):
        raise ValueError(
            f"{where} keeps its phases in params{architecture.describe(path)}, expected as one vector with power 1 on "
            f"its neurons; got the axes {axes}. Give the layer a bias, of zeros if need be, described as in "
            "architecture.siren."
        )
    # Not only SIGN: sines described with a smaller group (`architecture.restrict`) flip their signs all the same.
    if arch.neuron_layer(own.neurons).scaling is Scaling.FIXED:
        raise ValueError(
            f"{where} feeds {own.neurons!r} with {Scaling.FIXED}; expected {Scaling.SIGN}, since it flips signs. "
            "Describe a hidden sine with SIGN; an output, which nothing reads, cannot be wrapped: describe the network "
            "without that sine."
        )
    if isinstance(layer, Dense) and layer.offset:
        raise ValueError(
            f"{where} has offset {layer.offset}, which does not flip with the sine; expected 0. Move offset @ kernel "
            "into the next layer's bias."
        )
    _check_readers(arch, layer, own.neurons, where)
    # So that pi / w0 and its parts in `_half_turn` are normal numbers of float32.
    if not 1e-20 <= abs(w0) <= 1e20:
        raise ValueError(f"{where} has frequency {w0}; expected a w0 of size 1e-20 to 1e20, like 30.")
    return own.neurons


def _check_readers(arch: Architecture, layer: Dense | Conv, neurons: str, where: str) -> None:
    """Checks that, apart from the layer's own kernel and bias, all parameters on its neurons read them."""
    powers = {
        architecture.describe(parameter.path): axis.power
        for parameter in arch.parameters
        if parameter.path not in ((layer.name, "bias"), (layer.name, "kernel"))
        for axis in parameter.neuron_axes
        if axis.neurons == neurons
    }
    if set(powers.values()) != {-1}:
        raise ValueError(
            f"{where} shares {neurons!r}, or nothing reads it: apart from the layer's own kernel and bias, parameters "
            f"have powers {powers} on it; expected one reader or more, all with power -1. Fold a normalization into "
            "the kernel and bias; the sum of several layers has no phase to wrap."
        )


def _wrap(bias: Float[Array, " n"], w0: float) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The bias without whole half turns, and the sign: -1 where their number is odd."""
    dtype = jnp.promote_types(bias.dtype, jnp.float32)
    digits = jnp.finfo(dtype).nmant + 1
    half_turn = PI / abs(Fraction(float(np.asarray(w0, dtype))))
    parts = _parts(half_turn, digits)
    most, step = 2.0 ** (digits - 2), 2.0 ** (digits // 2)
    quarter_turn = np.asarray(float(half_turn / 2), dtype)
    if Fraction(float(quarter_turn)) < half_turn / 2:
        quarter_turn = np.nextafter(quarter_turn, np.asarray(np.inf, dtype))

    rest, total = bias.astype(dtype), jnp.zeros(bias.shape, dtype)
    # Twice: the first count of many half turns can be wrong by one.
    for _ in range(2):
        size = jnp.abs(jax.lax.stop_gradient(rest))
        # A phase of at most a quarter turn, rounded up, always stays; a larger one is always wrapped. Without this rule
        # a phase at the border would change its sign with every call.
        count = jnp.maximum(jnp.round(size * float(1 / half_turn)), 1)
        count = jnp.where((size <= quarter_turn) | (count > most), 0, count) * jnp.sign(jax.lax.stop_gradient(rest))
        coarse = step * jnp.round(count / step)
        for part in parts:
            rest = rest - coarse * part
            rest = rest - (count - coarse) * part
        total = total + count
    return rest.astype(bias.dtype), 1 - 2 * jnp.mod(total, 2)


def _parts(half_turn: Fraction, digits: int) -> list[float]:
    """Three numbers whose sum is pi / w0, the first two with half of the dtype's binary digits.

    Products with integers cut likewise, k = coarse + fine, are exact, and each difference of the bias and such a
    product is a number of the dtype (Cody & Waite 1980). A product k * pi / w0 rounded as a whole would be wrong by
    k roundings.
    """
    first = _rounded(half_turn, digits // 2)
    second = _rounded(half_turn - first, digits // 2)
    return [float(part) for part in (first, second, _rounded(half_turn - first - second, digits))]


def _rounded(number: Fraction, digits: int) -> Fraction:
    """The number rounded to that number of binary digits."""
    unit = Fraction(2) ** (math.frexp(number)[1] - digits)
    return round(number / unit) * unit

"""Canonical forms: one network for all that differ by a symmetry, in closed form.

`element` and `form` take permutations, signs and positive scales off, `wrap_phase` the phases of sines: half a turn
more flips a sine's sign, sin(u + k pi) = (-1)^k sin(u). Such a shift adds to a bias instead of scaling it, so that no
element of `symmetry` holds it.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture
from jax_scalegmn.architecture import (
    Architecture,
    AvgPool,
    Axis,
    Conv,
    Dense,
    Flatten,
    GlobalMeanPool,
    Parameter,
    Scaling,
)
from jax_scalegmn.symmetry import _elements, _gauge
from jax_scalegmn.symmetry._elements import Element
from jax_scalegmn.types import Params

__all__ = ["Canonical", "element", "form", "wrap_phase"]

# To 50 digits: a float64 bias of 2^51 half turns needs 32.
PI = Fraction("3.14159265358979323846264338327950288419716939937510")


class Canonical(NamedTuple):
    """The element that brings a network to its canonical form.

    Attributes:
      element: `symmetry.act(arch, element, params)` is the canonical form.
      margin: how far the nearest tie is: the smallest gap between two neurons' keys, or between a key and a sign flip,
        over the keys' root mean square in their layer. Where it is some roundings large, so that 1e-6 in float32, the
        form is not sure; two equal neurons have margin 0.
    """

    element: Element
    margin: Float[Array, ""]


def element(arch: Architecture, params: Params) -> Canonical:
    """The element that takes every member of an orbit to one network, its canonical form.

    Positive scales: the norm-balanced gauge (`symmetry.balance`). Then, layer by layer from the inputs, each neuron has
    as key the product of its settled parameters, those whose other axis is canonical already, with one fixed random
    direction: where the group has signs the key becomes positive, and keys are sorted, the largest first.

    Where it stands is decided by single keys, so that two networks that are close need not be so in canonical form:
    `matching.weight_matching` compares networks, this identifies them.

    Args:
      arch: the architecture. NeuronLayer that no settled parameter touches keep their places, with margin 0.
      params: of one network; `jax.vmap` for many.

    Raises:
      ValueError: if params do not fit the architecture.
    """
    scales = _gauge.balance(arch, params)
    values = architecture.unpack(arch, _elements.act(arch, scales, params))
    found, settled = _elements.identity(arch), set(arch.inputs)
    margin = jnp.asarray(jnp.inf)
    for neurons in arch.hidden:
        flipping = fixed = jnp.zeros(neurons.width)
        for index, (parameter, value) in enumerate(zip(arch.parameters, values, strict=True)):
            powers = {axis.neurons: axis.power for axis in parameter.neuron_axes}
            if neurons.name in powers and powers.keys() - {neurons.name} <= settled:
                moved = _elements.act_on_others(found, parameter, neurons.name, value)
                key = _projected(parameter, neurons.name, moved, index)
                flipping, fixed = (flipping + key, fixed) if powers[neurons.name] else (flipping, fixed + key)
        signed = neurons.scaling is Scaling.SIGN
        key = fixed + (jnp.abs(flipping) if signed else flipping)
        order = jnp.argsort(-key)
        size = jnp.sqrt(jnp.square(key).mean())
        gaps = [jnp.diff(-key[order]), jnp.abs(flipping)] if signed else [jnp.diff(-key[order])]
        nearest = jnp.concatenate([*gaps, size[None]]).min() / jnp.where(size > 0, size, 1)
        margin = jnp.minimum(margin, nearest)
        found.permutation[neurons.name] = order
        if signed:
            found.scale[neurons.name] = jnp.where(flipping[order] < 0, -1.0, 1.0)
        settled = settled | {neurons.name}
    return Canonical(_elements.compose(arch, found, scales), margin)


def form(arch: Architecture, params: Params) -> dict[str, Any]:
    """The canonical form itself: one network for all members of an orbit, with the same function (see `element`)."""
    return _elements.act(arch, element(arch, params).element, params)


def wrap_phase(arch: Architecture, params: Params) -> dict[str, Any]:
    """The same function with the phase w0 b of every sine unit in [-pi/2, pi/2].

    A unit computes sin(w0 (x @ W + b)). Its bias loses k half turns, b' = b - k pi / w0, and where k is odd everything
    that reads the unit changes its sign. All else stays: the kernels that feed it, layers without sine, the output's
    bias.

    b' is within 1e-7 half turns of the exact one in float32 and within 2e-16 in float64; half precision is computed in
    float32 and rounded. The network itself is less exact: in float32 it rounds a phase of 1e4 radians by some 5e-4, and
    by so much its outputs may differ before and after, those after being the better. Phases beyond 2^22 half turns
    (1e7 radians) in float32, 2^51 (7e15) in float64, stay as they are: neighboring numbers of that size are a quarter
    of a half turn apart or more, and the network computes noise.

    Args:
      arch: the architecture. Its `layers` say which units are sines, and their w0, in radians; it counts as rounded to
        the dtype of the bias, since that is how `network.apply` multiplies by it.
      params: of one network; `jax.vmap` for many.

    Returns:
      The params. Two networks that differ by such shifts alone become equal up to rounding, save for units whose phase
      is a rounding error away from -pi/2 and pi/2, which are one phase with two signs. Permutations and signs remain,
      and wrapping commutes with them.

    Raises:
      ValueError: if params do not fit the architecture, if it has no `layers` or no sine among them, if it has layers
        beside the sines that no flipped sign passes, or that are no chain (normalizations, MaxPool, Residual), or if a
        sine layer has no bias, an offset, neurons of `Scaling.FIXED` (an output), neurons that it shares with another
        layer or a normalization, or nothing that reads it.

    Source: arXiv 2406.10685, algorithm 1. Its published script, which leaves out w0, flips the kernels that feed the
    unit instead of those that read it and shifts the output's bias too, changes the function.
    """
    sines = _sines(arch)
    values = dict(zip([(p.path, p.start) for p in arch.parameters], architecture.unpack(arch, params), strict=True))
    signs = {}
    for path, (neurons, w0) in sines.items():
        values[path, ()], signs[neurons] = _wrap(jnp.asarray(values[path, ()]), w0)
    flips = _elements.Element({name: jnp.arange(sign.shape[0]) for name, sign in signs.items()}, signs)
    for parameter in arch.parameters:
        for position, axis in enumerate(parameter.axes):
            # Only what reads the unit: with the kernels that feed it this would be `symmetry.act`, which does not
            # change what the unit gives to the next layer.
            if isinstance(axis, Axis) and axis.neurons in signs and axis.power < 0:
                where = parameter.path, parameter.start
                values[where] = _elements.act_on_axis(flips, axis, position, values[where])
    return architecture.pack(arch, list(values.values()))


# --- private ------------------------------------------------------------------------------------------------------


def _projected(parameter: Parameter, neurons: str, value: Array, index: int) -> Float[Array, " n"]:
    """The product of each neuron's entries with a fixed direction, one for the parameter of that index."""
    position, axis = next(
        (i, axis) for i, axis in enumerate(parameter.axes) if isinstance(axis, Axis) and axis.neurons == neurons
    )
    entries = jnp.moveaxis(value, position, -1).reshape(-1, value.shape[position] // axis.repeat)
    direction = np.random.default_rng(index).normal(size=len(entries))
    return jnp.asarray(direction, entries.dtype) @ entries


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
    """A sine layer's neurons, if its one bias is their phase and their signs concern their readers alone."""
    path = (layer.name, "bias")
    where = f"{arch.name!r}: sine layer {layer.name!r}"
    axes = next(
        (parameter.axes for parameter in arch.parameters if (parameter.path, parameter.start) == (path, ())), ()
    )
    own = axes[0] if len(axes) == 1 else None
    if not (isinstance(own, Axis) and own.power == 1 and own.repeat == 1):
        raise ValueError(
            f"{where} keeps its phases in params{architecture.describe(path)}, expected as one vector with power 1 on "
            f"its neurons; got the axes {axes}. Give the layer a bias (zeros do), described as in architecture.siren."
        )
    # Not only SIGN: the signs of `architecture.restrict`-ed sines flip all the same.
    if arch.neuron_layer(own.neurons).scaling is Scaling.FIXED:
        raise ValueError(
            f"{where} gives {own.neurons!r} of {Scaling.FIXED}; expected {Scaling.SIGN}, since it flips signs. "
            "Describe a hidden sine so; for one on the output, which nothing reads, describe the network without it."
        )
    if isinstance(layer, Dense) and layer.offset:
        raise ValueError(
            f"{where} has offset {layer.offset}, which does not flip with the sine; expected 0. Move offset @ kernel "
            "into the next layer's bias."
        )
    powers = {
        architecture.describe(parameter.path): axis.power
        for parameter in arch.parameters
        if parameter.path not in (path, (layer.name, "kernel"))
        for axis in parameter.neuron_axes
        if axis.neurons == own.neurons
    }
    if set(powers.values()) != {-1}:
        raise ValueError(
            f"{where} shares {own.neurons!r}, or nothing reads it: beside the layer's own kernel and bias, parameters "
            f"have powers {powers} on it; expected one reader or more, all with power -1. Fold a normalization into "
            "the kernel and bias; the sum of several layers has no phase to wrap."
        )
    # So that pi / w0 and its parts below are normal numbers of float32.
    if not 1e-20 <= abs(w0) <= 1e20:
        raise ValueError(f"{where} has frequency {w0}; expected a w0 of size 1e-20 to 1e20, like 30.")
    return own.neurons


def _wrap(bias: Float[Array, " n"], w0: float) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The bias less whole half turns, and the sign: -1 where they are an odd number."""
    dtype = jnp.promote_types(bias.dtype, jnp.float32)
    digits = jnp.finfo(dtype).nmant + 1
    half_turn = PI / abs(Fraction(float(np.asarray(w0, dtype))))
    # Three parts of pi / w0, the first two with half of the dtype's digits: by multiples cut likewise, k = coarse +
    # fine, they multiply without rounding, and what they leave of the bias is a number of the dtype each time
    # (Cody & Waite 1980). A product k * pi / w0 rounded as a whole would be wrong by k roundings.
    first = _rounded(half_turn, digits // 2)
    second = _rounded(half_turn - first, digits // 2)
    parts = [float(part) for part in (first, second, _rounded(half_turn - first - second, digits))]
    most, step = 2.0 ** (digits - 2), 2.0 ** (digits // 2)
    quarter_turn = np.asarray(float(half_turn / 2), dtype)
    if Fraction(float(quarter_turn)) < half_turn / 2:
        quarter_turn = np.nextafter(quarter_turn, np.asarray(np.inf, dtype))

    rest, total = bias.astype(dtype), jnp.zeros(bias.shape, dtype)
    # Twice: the first count of many half turns can be one off.
    for _ in range(2):
        size = jnp.abs(jax.lax.stop_gradient(rest))
        # A phase up to a quarter turn, rounded up, stays for ever; one above it goes. Without that rule a phase at the
        # border would change its sign with every call.
        count = jnp.maximum(jnp.round(size * float(1 / half_turn)), 1)
        count = jnp.where((size <= quarter_turn) | (count > most), 0, count) * jnp.sign(jax.lax.stop_gradient(rest))
        coarse = step * jnp.round(count / step)
        for part in parts:
            rest = rest - coarse * part
            rest = rest - (count - coarse) * part
        total = total + count
    return rest.astype(bias.dtype), 1 - 2 * jnp.mod(total, 2)


def _rounded(number: Fraction, digits: int) -> Fraction:
    """To so many binary digits."""
    unit = Fraction(2) ** (math.frexp(number)[1] - digits)
    return round(number / unit) * unit

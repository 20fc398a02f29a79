"""Summarizes an alignment in numbers: how it moved the neurons, and that it preserved the function."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jax_scalegmn import matching, network, stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching import Matching
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Key, Params

# Rounding changes a function far less; a wrong description of an architecture changes it by its own size.
TOLERANCE = 1e-2


def row(
    arch: Architecture,
    params: Params,
    aligned: Params,
    target: Params,
    result: Matching,
    inputs: Array | None,
) -> dict[str, Any]:
    """The summary of one network's alignment, as JSON values.

    Args:
      arch: The networks' architecture.
      params: The network before its alignment.
      aligned: The network after its alignment.
      target: What it was aligned to.
      result: The matching. Its similarity is not used, since methods may compare with another target.
      inputs: Examples on which the functions are compared; None to compare nothing.

    Returns:
      similarity_before and similarity_after: with the target, as in `matching.similarity`. sweeps and converged: as in
      `Matching`. layers: as in `moves`. function_change: as in `function_change`.

    Raises:
      ValueError: If the function changed, so the architecture is described wrongly.
    """
    change = function_change(arch, params, aligned, inputs)
    _check_preserved(arch, change)
    return {
        "similarity_before": float(_similarity(arch, params, target)),
        "similarity_after": float(_similarity(arch, aligned, target)),
        "sweeps": int(result.sweeps),
        "converged": bool(result.converged),
        "layers": moves(arch, result.element),
        "function_change": change,
    }


def moves(arch: Architecture, element: Element) -> dict[str, dict[str, Any]]:
    """What an element does to each hidden neuron layer.

    Returns:
      By neuron layer: the number of neurons, how many move to another position, how many change their sign, and the
      smallest and largest absolute scale.
    """
    layers = {}
    for layer in arch.hidden:
        order, scale = np.asarray(element.permutation[layer.name]), np.asarray(element.scale[layer.name])
        sizes = np.abs(scale)
        layers[layer.name] = {
            "neurons": layer.width,
            "moved": int((order != np.arange(layer.width)).sum()),
            "flipped": int((scale < 0).sum()),
            "scales": [float(sizes.min()), float(sizes.max())],
        }
    return layers


def function_change(arch: Architecture, params: Params, other: Params, inputs: Array | None) -> float | None:
    """The largest difference between two networks' outputs, relative to the largest output of the first.

    Returns:
      max |f(other, x) - f(params, x)| / max |f(params, x)| over the inputs x; None without inputs.

    Raises:
      ValueError: If an output is not finite.
    """
    if inputs is None:
        return None
    before, after = np.asarray(outputs(arch, params, inputs)), np.asarray(outputs(arch, other, inputs))
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError(f"The outputs of {arch.name!r} are not finite on these inputs; expected numbers. Scale them.")
    size = np.abs(before).max()
    return float(np.abs(after - before).max() / (size if size > 0 else 1))


def orbit_change(
    arch: Architecture, params: Params, key: Key, inputs: Array | None, *, samples: int = 8
) -> float | None:
    """The largest `function_change` under random elements of the group.

    Raises:
      ValueError: If the function changes, so the architecture is described wrongly.
    """
    copies = _orbit(arch, params, key, samples)
    members = [stacks.member(copies, index) for index in range(samples)]
    changes = [function_change(arch, params, member, inputs) for member in members]
    change = max((change for change in changes if change is not None), default=None)
    _check_preserved(arch, change)
    return change


@jax.jit
def outputs(arch: Architecture, params: Params, inputs: Float[Array, "examples ..."]) -> Float[Array, "examples out"]:
    """The network's function on a batch; the user's own function gets the batch."""
    if arch.function is not None:
        return network.apply(arch, params, inputs)
    return jax.vmap(lambda x: network.apply(arch, params, x))(inputs)


def table(arch: Architecture, networks: Mapping[str, Params], x: Array, y: Any) -> list[dict[str, Any]]:
    """How networks do on data, the first one first.

    Args:
      arch: Their architecture.
      networks: The networks by what they are called.
      x: The examples.
      y: Labels or values, as in `loss`; None if there are none.

    Returns:
      By network its name; `differs`, the largest difference of its outputs from the first one's, relative to the
      largest of those; and with y the `loss`, and for labels the `accuracy` in percent.
    """
    rows: list[dict[str, Any]] = []
    first = None
    for name, params in networks.items():
        out = np.concatenate([np.asarray(outputs(arch, params, some)) for some in _batches(x)])
        first = out if first is None else first
        row: dict[str, Any] = {
            "network": name,
            "differs": float(np.abs(out - first).max() / (np.abs(first).max() or 1)),
        }
        if y is not None:
            row["loss"] = float(loss(jnp.asarray(out), y))
            if np.asarray(y).dtype.kind in "iu":
                row["accuracy %"] = 100 * float((out.argmax(-1) == y).mean())
        rows.append(row)
    return rows


def loss(outputs: Float[Array, "examples ..."], y: Any) -> Array:
    """The mean cross-entropy of labels, in nats; of numbers with the outputs' shape the mean squared error."""
    if jnp.issubdtype(y.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(outputs), y).mean()
    return jnp.square(outputs - y).mean()


def check_labels(arch: Architecture, params: Params, x: Array, y: Any, *, needed: str) -> None:
    """Checks that y are labels of the network's outputs, or numbers to compare them with.

    Raises:
      ValueError: If they are not.
    """
    shape = (len(x), *jax.eval_shape(outputs, arch, params, x[:1]).shape[1:])
    got = "none" if y is None else f"{y.dtype} {y.shape}"
    labels = y is not None and y.dtype.kind in "iu" and y.shape == shape[:-1] and shape[-1] > 1
    if not labels and not (y is not None and y.dtype.kind == "f" and y.shape == shape):
        raise ValueError(
            f"{needed}: outputs of {arch.name!r} are {shape}; expected y as whole-number labels {shape[:-1]} of two "
            f"classes or more, or as numbers {shape}; got {got}. Leave y out where there are none."
        )
    if labels and not (y.min(initial=0) >= 0 and y.max(initial=0) < shape[-1]):
        raise ValueError(f"{needed}: y is from {y.min()} to {y.max()}; expected labels from 0 to {shape[-1] - 1}.")


def random_inputs(
    arch: Architecture, params: Params, key: Key, *, count: int = 16
) -> Float[Array, "examples ..."] | None:
    """Uniform inputs in [-1, 1]; for convolutional networks, square images of a size that they accept.

    Returns:
      The inputs; None if the architecture has no layers to compute, or accepts no square images of 1 to 64, 96, 128 or
      224 pixels a side.
    """
    if arch.function is not None:
        ((shape, _),) = arch.function.inputs
        return jax.random.uniform(key, (count, *shape[1:]), minval=-1, maxval=1)
    if not arch.layers:
        return None
    channels = arch.neuron_layers[0].width
    convolutional = arch.input_rank == 3
    sides = (32, 28, 64, *range(1, 64), 96, 128, 224)
    for shape in [(side, side, channels) for side in sides] if convolutional else [(channels,)]:
        example = jax.ShapeDtypeStruct(shape, jnp.zeros(()).dtype)
        try:
            jax.eval_shape(functools.partial(network.apply, arch), params, example)
        except (TypeError, ValueError):  # too small for a kernel, or another size before a dense layer
            continue
        return jax.random.uniform(key, (count, *shape), minval=-1, maxval=1)
    return None


# --- private ------------------------------------------------------------------------------------------------------

_similarity = jax.jit(matching.similarity)
_BATCH_SIZE = 1024


def _batches(x: Array) -> list[Array]:
    return [x[start : start + _BATCH_SIZE] for start in range(0, len(x), _BATCH_SIZE)]


_orbit = jax.jit(symmetry.orbit, static_argnums=3)


def _check_preserved(arch: Architecture, change: float | None) -> None:
    if change is not None and change > TOLERANCE:
        raise ValueError(
            f"An element of the group changes the function by {change:.2g} of its largest output; expected less than "
            f"{TOLERANCE}. {arch.name!r} is described wrongly: testing.assert_function_preserved names the axis."
        )

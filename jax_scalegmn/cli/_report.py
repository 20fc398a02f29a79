"""What an alignment did to a network, in numbers: how it moved the neurons, and that the function stayed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture, matching, network, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Conv
from jax_scalegmn.matching import Matching
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Key, Params

# What rounding does to a function lies far below; a wrong description of an architecture changes it by its own size.
TOLERANCE = 1e-2


def row(
    arch: Architecture,
    params: Params,
    moved: Params,
    target: Params,
    found: Matching,
    inputs: Array | None,
) -> dict[str, Any]:
    """The summary of one network's alignment, as JSON values.

    Args:
      arch: of the networks.
      params: the network before.
      moved: and behind the element.
      target: what it was moved next to.
      found: by the matching; its similarity is not used, since methods may take another target.
      inputs: examples on which the functions are compared; None for no comparison.

    Returns:
      similarity_before and similarity_after to the target (`matching.similarity`), sweeps, converged, of every hidden
      neuron layer the number of neurons, those that moved to another place, those that flipped their sign and the
      smallest and largest size of their scales, and function_change as by `function_change`.

    Raises:
      ValueError: if the function has changed: the architecture is described wrongly.
    """
    change = function_change(arch, params, moved, inputs)
    _check_preserved(arch, change)
    return {
        "similarity_before": float(_similarity(arch, params, target)),
        "similarity_after": float(_similarity(arch, moved, target)),
        "sweeps": int(found.sweeps),
        "converged": bool(found.converged),
        "layers": moves(arch, found.element),
        "function_change": change,
    }


def moves(arch: Architecture, element: Element) -> dict[str, dict[str, Any]]:
    """What an element does to every hidden neuron layer, as in `row`."""
    found = {}
    for neurons in arch.hidden:
        order, scale = np.asarray(element.permutation[neurons.name]), np.asarray(element.scale[neurons.name])
        sizes = np.abs(scale)
        found[neurons.name] = {
            "neurons": neurons.width,
            "moved": int((order != np.arange(neurons.width)).sum()),
            "flipped": int((scale < 0).sum()),
            "scales": [float(sizes.min()), float(sizes.max())],
        }
    return found


def function_change(arch: Architecture, params: Params, moved: Params, inputs: Array | None) -> float | None:
    """The largest difference between two networks' outputs, relative to the largest output of the first.

    Returns:
      The number; None without inputs.

    Raises:
      ValueError: if an output is not finite.
    """
    if inputs is None:
        return None
    before, after = (np.asarray(outputs(arch, one, inputs)) for one in (params, moved))
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError(f"The outputs of {arch.name!r} are not finite on these inputs; expected numbers. Scale them.")
    size = np.abs(before).max()
    return float(np.abs(after - before).max() / (size if size > 0 else 1))


def orbit_change(
    arch: Architecture, params: Params, key: Key, inputs: Array | None, *, samples: int = 8
) -> float | None:
    """The largest `function_change` behind random elements of the group.

    Raises:
      ValueError: if the function changes: the architecture is described wrongly.
    """
    copies = _orbit(arch, params, key, samples)
    members = [stacks.member(copies, index) for index in range(samples)]
    changes = [function_change(arch, params, member, inputs) for member in members]
    known = [change for change in changes if change is not None]
    change = max(known, default=None)
    _check_preserved(arch, change)
    return change


@jax.jit
def outputs(arch: Architecture, params: Params, inputs: Float[Array, "examples ..."]) -> Float[Array, "examples out"]:
    """The network's function on a batch."""
    return jax.vmap(lambda x: network.apply(arch, params, x))(inputs)


def random_inputs(
    arch: Architecture, params: Params, key: Key, *, count: int = 16
) -> Float[Array, "examples ..."] | None:
    """Uniform inputs in [-1, 1], for convolutional networks on square images of a size that they take.

    Returns:
      The inputs; None where the architecture does not say how to compute the function, or takes no square images of up
      to 64 or of 96, 128 or 224 pixels.
    """
    if not arch.layers:
        return None
    channels = arch.neuron_layers[0].width
    convolutional = any(isinstance(layer, Conv) for _, layer in architecture.walk(arch.layers))
    sides = (32, 28, 64, *range(1, 64), 96, 128, 224)
    for shape in [(side, side, channels) for side in sides] if convolutional else [(channels,)]:
        batch = jax.ShapeDtypeStruct((count, *shape), jnp.zeros(()).dtype)
        try:
            jax.eval_shape(outputs, arch, params, batch)
        except (TypeError, ValueError):  # too small for a kernel, or another size in front of a dense layer
            continue
        return jax.random.uniform(key, batch.shape, minval=-1, maxval=1)
    return None


# --- private ------------------------------------------------------------------------------------------------------

_similarity = jax.jit(matching.similarity)
_orbit = jax.jit(symmetry.orbit, static_argnums=3)


def _check_preserved(arch: Architecture, change: float | None) -> None:
    if change is not None and change > TOLERANCE:
        raise ValueError(
            f"An element of the group changes the function by {change:.2g} of its largest output; expected less than "
            f"{TOLERANCE}. {arch.name!r} is described wrongly: testing.assert_function_preserved names the axis."
        )

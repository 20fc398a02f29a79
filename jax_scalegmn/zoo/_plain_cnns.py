"""Plain CNNs on whole batches, in the order of memory that trains them fastest on a CPU.

The values are [channels, height, width, images]: slices of maps are long runs of memory, and a convolution is one
product of few rows and very many columns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import network
from jax_scalegmn.architecture import Architecture, Conv, Dense, Flatten, GlobalMeanPool
from jax_scalegmn.types import Params


def is_plain(arch: Architecture) -> bool:
    """Whether a network is convolutions one after the other, then dense layers, and nothing else.

    Args:
      arch: The architecture.
    """
    plain = all(isinstance(layer, Conv | Dense | Flatten | GlobalMeanPool) for layer in arch.layers)
    return plain and arch.function is None and arch.input_rank == 3


def logits(
    arch: Architecture, params: Params, x: Float[Array, "images height width channels"]
) -> Float[Array, "images outputs"]:
    """What `jax.vmap` of `network.apply` computes.

    Args:
      arch: A plain architecture.
      params: The network.
      x: The images.
    """
    x = x.transpose(3, 1, 2, 0)
    for layer in arch.layers:
        match layer:
            case Conv():
                x = network.activate(layer.activation, _convolve(layer, params[layer.name], x))
            case Dense():
                own = params[layer.name]
                y = own["kernel"].T @ x + jnp.expand_dims(own.get("bias", jnp.zeros(())), -1)
                x = network.activate(layer.activation, y) + layer.offset
            case GlobalMeanPool():
                x = x.mean((1, 2))
            case Flatten():
                x = x.transpose(1, 2, 0, 3).reshape(-1, x.shape[-1])
    return x.T


# --- private ------------------------------------------------------------------------------------------------------


def _convolve(layer: Conv, params: Params, x: Array) -> Array:
    """The convolved maps [out, height, width, images], as one product of all patches."""
    kernel, padding = params["kernel"], layer.padding
    if isinstance(padding, int):
        margins = [(padding, padding)] * 2
    else:
        margins = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], layer.strides, padding)
    x = jnp.pad(x, [(0, 0), *margins, (0, 0)])
    (rows, columns), (down, right) = kernel.shape[:2], layer.strides
    height, width = (x.shape[1] - rows) // down + 1, (x.shape[2] - columns) // right + 1
    patches = [
        x[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right]
        for i in range(rows)
        for j in range(columns)
    ]
    flat = jnp.concatenate(patches).reshape(-1, height * width * x.shape[-1])
    maps = (kernel.reshape(-1, kernel.shape[-1]).T @ flat).reshape(-1, height, width, x.shape[-1])
    return maps + params.get("bias", jnp.zeros(kernel.shape[-1]))[:, None, None, None]

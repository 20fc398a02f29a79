"""The images that implicit neural representations (INRs) draw."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.network import _forward
from jax_scalegmn.types import Params


def coordinates(height: int, width: int) -> np.ndarray:
    """Pixel positions for an INR: (column, row) in [-1, 1], columns fastest.

    As in the published INRs, both axes are linspace(-1, 1) and the column is the first input.

    Args:
      height: The number of rows.
      width: The number of columns.

    Returns:
      The positions, [height * width, 2].

    >>> import jax_scalegmn as sg
    >>> sg.network.coordinates(2, 3).tolist()
    [[-1.0, -1.0], [0.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    """
    grid = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height), indexing="xy")
    return np.stack(grid, -1).reshape(-1, 2).astype(np.float32)


@stacks.any_container("params")
def render(arch: Architecture, params: Params, size: tuple[int, int]) -> Float[Array, "height width *channels"]:
    """Draws the image of an INR: its outputs at the pixel positions of `coordinates`.

    Args:
      arch: An architecture with the inputs (column, row).
      params: The network; `jax.vmap` for many.
      size: (height, width) of the image.

    Returns:
      The image: [height, width] of an INR with one output, [height, width, channels] with more.

    Raises:
      ValueError: If the architecture does not take two coordinates, or params do not fit it.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> gray, color = sg.siren((2, 4, 1)), sg.siren((2, 4, 3))
    >>> sg.network.render(gray, sg.network.init(gray, jax.random.key(0)), (5, 6)).shape
    (5, 6)
    >>> sg.network.render(color, sg.network.init(color, jax.random.key(0)), (5, 6)).shape
    (5, 6, 3)
    """
    inputs, channels = arch.neuron_layers[0].width, arch.neuron_layers[-1].width
    if inputs != 2 or arch.input_rank != 1:
        raise ValueError(
            f"{arch.name!r} maps {inputs} inputs to {channels} outputs; an INR of an image maps 2 coordinates to the "
            "channels of a pixel. Only such networks can be drawn."
        )
    pixels = jax.vmap(lambda x: _forward.apply(arch, params, x))(jnp.asarray(coordinates(*size)))
    return pixels.reshape(size if channels == 1 else (*size, channels))

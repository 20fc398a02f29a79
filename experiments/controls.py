"""What needs no autoencoder and must be worse than one: controls of its reconstruction.

Generators of weights can do no better than noise on a checkpoint, or than repeating one of those that they were trained
on (Zeng et al. 2025, arXiv 2506.07998). What an autoencoder decodes is therefore compared with the mean image, with
mean networks, with the nearest training network, and with the network itself under noise.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from experiments import evaluation
from jax_scalegmn import architecture, zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.types import Key, Params
from jax_scalegmn.zoo import Zoo

NOISES = (0.05, 0.1, 0.2, 0.4)
LABELS = {
    "mean_image": "mean training image",
    "mean_network": "mean of the training networks",
    "mean_aligned": "mean of training networks, aligned to one",
    "nearest": "nearest training network, by what it draws",
} | {f"noise_{noise:g}": f"the network itself, with noise of {noise:.0%}" for noise in NOISES}
_ALIGNED = 1024  # the largest number of training networks in the mean of aligned ones


def score(
    draw: Callable[[Params], np.ndarray],
    align: evaluation.Align,
    train: Zoo,
    images: np.ndarray,
    stack: Params,
    original: np.ndarray,
    key: Key,
) -> dict[str, np.ndarray]:
    """What every control draws in place of the networks of a stack, [networks, height, width, ...].

    Args:
      draw: A stack of networks -> the images that they draw.
      align: Weight matching of stacks, as `evaluation.make_align` makes it.
      train: The training networks.
      images: The training images.
      stack: The networks that an autoencoder would reconstruct.
      original: What they draw.
      key: The key of the noise, whose standard deviation is a share of every parameter's root mean square.
    """
    few = jax.tree.map(lambda leaf: np.asarray(leaf)[:_ALIGNED], train.params)
    first = jax.tree.map(lambda leaf: np.broadcast_to(leaf[:1], leaf.shape), few)
    aligned = align(few, first).params
    means = {"mean_network": train.params, "mean_aligned": aligned}
    one_for_all = {"mean_image": images.mean(0)} | {
        name: draw(jax.tree.map(lambda leaf: np.asarray(leaf).mean(0, keepdims=True), networks))[0]
        for name, networks in means.items()
    }
    drawn = {name: np.broadcast_to(image, original.shape) for name, image in one_for_all.items()}
    drawn["nearest"] = _nearest(draw(train.params), original)
    noisy = _noisy(train.arch, zoo.scales(train), stack, jax.random.split(key, len(NOISES)), np.float32(NOISES))
    of_noise = (jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], noisy) for i in range(len(NOISES)))
    return drawn | {f"noise_{noise:g}": draw(params) for noise, params in zip(NOISES, of_noise, strict=True)}


def numbers(
    drawn: np.ndarray,
    original: np.ndarray,
    images: np.ndarray,
    recognize: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
) -> dict[str, float]:
    """How far images are from those that networks draw, and how many of them a classifier reads."""
    error = float(evaluation.squared_error(drawn, original).mean())
    return {
        "mse": error,
        "share_of_variance": error / float(images.var()),
        "recognized": float((recognize(drawn) == labels).mean()),
    }


# --- private ------------------------------------------------------------------------------------------------------


def _nearest(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For every wanted image the nearest of the known ones."""
    flat, goals = known.reshape(len(known), -1), wanted.reshape(len(wanted), -1)
    distance = np.square(flat).sum(1) - 2 * goals @ flat.T
    return known[distance.argmin(1)]


@jax.jit
def _noisy(
    arch: Architecture, scales: tuple[float, ...], stack: Params, keys: Key, noises: Float[Array, " noises"]
) -> Any:
    """The networks with noise on every weight, [noises, networks, ...]."""
    values = jax.vmap(lambda params: architecture.unpack(arch, params))(stack)

    def with_noise(key: Key, noise: Array) -> Any:
        moved = [
            value + noise * scale * jax.random.normal(k, value.shape)
            for value, scale, k in zip(values, scales, jax.random.split(key, len(values)), strict=True)
        ]
        return jax.vmap(lambda values: architecture.pack(arch, values))(moved)

    return jax.lax.map(lambda row: with_noise(*row), (keys, noises))

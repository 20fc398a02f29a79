"""Moves of the images that INRs draw, by the weights of their first layer: more networks to train on, at no cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.types import Key, LossFn, Params


@dataclasses.dataclass(frozen=True)
class MoveConfig:
    """How far images are moved at random in every step of a training; zeros leave them as they are."""

    turn: float = 0.0
    """The standard deviation of turns, in degrees."""
    shift: float = 0.0
    """The standard deviation of shifts in each direction; an image is 2 wide and 2 high."""
    stretch: float = 0.0
    """The standard deviation of each entry of the matrix that changes an image's size and shape."""

    def __bool__(self) -> bool:
        """Whether anything moves."""
        return any((self.turn, self.shift, self.stretch))


def moved(config: MoveConfig, arch: Architecture, loss_fn: LossFn) -> LossFn:
    """A loss of (variables, networks, key), on a network that draws a moved image, or on several, moved alike."""
    if not config:
        return loss_fn
    _first_layer(arch)

    def loss(variables: Any, networks: Any, key: Key) -> Any:
        move_key, key = jax.random.split(key)
        is_one = isinstance(networks, Mapping)
        after = [move(config, arch, one, move_key) for one in ((networks,) if is_one else networks)]
        return loss_fn(variables, after[0] if is_one else tuple(after), key)

    return loss


def move(config: MoveConfig, arch: Architecture, params: Params, key: Key) -> Params:
    """An INR that draws a moved image: its first layer sees turned, stretched and shifted coordinates."""
    keys = jax.random.split(key, 3)
    turn = jnp.deg2rad(config.turn) * jax.random.normal(keys[0])
    stretch = jnp.eye(2) + config.stretch * jax.random.normal(keys[1], (2, 2))
    matrix = jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]]) @ stretch
    shift = config.shift * jax.random.normal(keys[2], (2,))
    flat = architecture.flatten(params)
    kernel, bias = _first_layer(arch)
    return architecture.unflatten(
        flat | {kernel: matrix @ flat[kernel], bias: flat[bias] + (shift @ flat[kernel]).astype(flat[bias].dtype)}
    )


def _first_layer(arch: Architecture) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths of the first kernel, [coordinates, units], and of its bias."""
    pixels, units = (neurons.name for neurons in arch.neuron_layers[:2])
    layers = {tuple(axis.neurons for axis in p.neuron_axes): p.path for p in arch.parameters if p.axes == p.neuron_axes}
    if (pixels, units) not in layers or (units,) not in layers:
        raise ValueError(
            f"The first layer of {arch.name!r} has arrays over the neuron layers {sorted(layers)}; expected a kernel "
            f"over {(pixels, units)} and a bias over {(units,)} for images to be moved. Leave train.moves at 0."
        )
    return layers[pixels, units], layers[units,]

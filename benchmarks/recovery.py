"""How often a planted group element is found again, over noise, from the forward and the identity start.

    python -m benchmarks.recovery                  # prints one JSON line for every row

Random networks and copies of them, moved by random elements (positive scales exp(normal)) and perturbed by noise of a
given size relative to each array's root mean square. Found: all permutations and signs of all layers.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import runs
from jax_scalegmn import architecture, matching, network, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching import Start
from jax_scalegmn.types import Key


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tried."""

    networks: tuple[str, ...] = (
        "mlp:64-64-64-10,relu",
        "siren:2-32-32-1",
        "cnn:1-16-16-16,10,relu",
        "vgg:8-16+16,10,input_channels=1,norm=batch",
        "resnet:20,8-8-16,input_channels=1",
        "resnet:20,8-8-16,input_channels=1,norm=none",
    )
    """The architectures in short form, as `architecture.parse` reads it."""
    noises: tuple[float, ...] = (0.0, 0.2, 0.4, 0.8, 1.6, 3.2)
    """The standard deviations of the noise, relative to each array's root mean square."""
    pairs: int = 100
    """The number of pairs for every noise."""
    restarts: int = 0
    """The number of further random starts besides the identity."""


def main(config: Config) -> list[dict[str, Any]]:
    """Counts everything; returns the rows and prints each as one JSON line as soon as it is there."""
    rows = []
    for text in config.networks:
        arch = architecture.parse(text)
        for noise in config.noises:
            rates = recovery(arch, noise, config.pairs, jax.random.key(0), config.restarts)
            rows.append({"network": text, "noise": noise, "pairs": config.pairs, **rates} | runs.environment())
            print(json.dumps(rows[-1]), flush=True)
    return rows


def recovery(arch: Architecture, noise: float, pairs: int, key: Key, restarts: int) -> dict[str, float]:
    """For each start the share of pairs whose planted element is found, and the mean similarity."""
    keys = jax.random.split(key, (pairs, 4))
    starts = {"forward": (Start.FORWARD, 0), "identity": (Start.IDENTITY, 0)}
    if restarts:
        starts[f"identity_and_{restarts}_random"] = (Start.IDENTITY, restarts)

    def one(keys: Key) -> tuple[symmetry.Element, dict[str, Any]]:
        params = _generic(arch, keys[0])
        element = symmetry.random(arch, keys[1])
        # In the balanced gauge, so that the noise is as large for every copy.
        target = symmetry.act(arch, element, _perturbed(symmetry.balanced(arch, params), noise, keys[2]))
        return element, {
            name: matching.weight_matching(arch, params, target, keys[3], start=start, restarts=count)
            for name, (start, count) in starts.items()
        }

    elements, found = jax.jit(functools.partial(jax.lax.map, one, batch_size=25))(keys)
    rates = {}
    for name, matched in found.items():
        right = np.ones(pairs, bool)
        for layer, order in elements.permutation.items():
            right &= (np.asarray(matched.element.permutation[layer]) == order).all(-1)
            right &= (np.sign(matched.element.scale[layer]) == np.sign(elements.scale[layer])).all(-1)
        rates |= {name: float(right.mean()), f"{name}_similarity": float(matched.similarity.mean())}
    return rates


def _generic(arch: Architecture, key: Key) -> Any:
    """A random network whose biases and norms are no constants."""
    return _perturbed(network.init(arch, key), 0.3, jax.random.fold_in(key, 1), least=0.3)


def _perturbed(params: Any, noise: float, key: Key, *, least: float = 0.0) -> Any:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    sizes = [noise * jnp.maximum(jnp.sqrt(jnp.square(leaf).mean()), least) for leaf in leaves]
    return tree.unflatten(
        [leaf + size * jax.random.normal(k, leaf.shape) for leaf, size, k in zip(leaves, sizes, keys, strict=True)]
    )


if __name__ == "__main__":
    main(tyro.cli(Config))

"""Embeddings of a zoo of INRs: `models.embed`, one `jax.vmap` over all, and other micro-batches.

python -m benchmarks.embed                           # one JSON line for each encoder
python -m benchmarks.embed --networks 64 --sizes 1 8
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import tyro

import jax_scalegmn as sg
from benchmarks import timing
from experiments.runs import environment
from jax_scalegmn import models, network


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure: INRs 2-w-w-1, one width for each number of features."""

    widths: tuple[int, ...] = (16, 32, 32)
    """The widths of the hidden layers of the INRs."""
    features: tuple[int, ...] = (32, 64, 128)
    """The numbers of the encoders' features, one for each width."""
    num_layers: int = 4
    """The number of message passing layers."""
    networks: int = 256
    """The number of networks."""
    sizes: tuple[int, ...] = (1, 4, 16, 64)
    """The micro-batches to compare with the one that `models.embed` chooses."""
    repeats: int = 5
    """The number of timed repeats of a call."""


def main(config: Config) -> list[dict[str, Any]]:
    """Prints one JSON line for each encoder and returns them."""
    rows = []
    for width, features in zip(config.widths, config.features, strict=True):
        rows.append(_measure(config, width, features) | {"environment": environment()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


# --- private ------------------------------------------------------------------------------------------------------


def _measure(config: Config, width: int, features: int) -> dict[str, Any]:
    arch = sg.siren((2, width, width, 1))
    keys = jax.random.split(jax.random.key(0), config.networks)
    stack = jax.tree.map(np.asarray, jax.vmap(lambda key: network.init(arch, key))(keys))
    encoder = sg.Encoder(sg.ScaleGMN(arch, features, config.num_layers))
    variables = models.init(encoder, jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], stack))
    whole = jax.jit(jax.vmap(lambda variables, params: encoder.apply(variables, params), (None, 0)))
    embed = functools.partial(models.embed, encoder, variables, stack)
    calls = {"embed": embed, "vmap": functools.partial(whole, variables, stack)}
    calls |= {f"micro_batch_{size}": functools.partial(embed, micro_batch=size) for size in config.sizes}
    seconds = timing.in_turn(calls, repeats=config.repeats)
    return {
        "width": width,
        "features": features,
        "networks": config.networks,
        "networks_per_second": {name: config.networks / one["median_s"] for name, one in seconds.items()},
        "seconds": seconds,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))

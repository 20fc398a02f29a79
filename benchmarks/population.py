"""Trials trained as one program: `training.population` over its size, next to one training by `training.fit`.

python -m benchmarks.population                    # one JSON line for each number of trials
python -m benchmarks.population --trials 4 --networks 64
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jax_scalegmn as sg
from experiments.runs import environment
from jax_scalegmn import network, training
from jax_scalegmn.training import losses


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure: the autoencoder of INRs 2-w-w-1 of 8 x 8 images, without the orbit-distance term."""

    width: int = 16
    """The width of the hidden layers of the INRs."""
    features: int = 32
    """The number of features of the autoencoder."""
    num_layers: int = 3
    """The number of message passing layers."""
    networks: int = 128
    """The number of networks of an epoch."""
    batch_size: int = 64
    """The number of networks in a step of a trial."""
    micro_batches: tuple[int, ...] = (16,)
    """The numbers of networks of a trial that are differentiated at a time."""
    trials: tuple[int, ...] = (1, 4, 16)
    """The sizes of the populations."""
    epochs: int = 4
    """The number of epochs; the first one compiles and is not counted."""


def main(config: Config) -> list[dict[str, Any]]:
    """Prints one JSON line for one training alone and for each size of a population, and returns them."""
    rows = []
    for micro_batch in config.micro_batches:
        runs: dict[int | None, Any] = {None: _alone} | dict.fromkeys(config.trials, _together)
        for trials, run in runs.items():
            rows.append(_measure(config, micro_batch, trials, run) | {"environment": environment()})
            print(json.dumps(rows[-1]), flush=True)
    return rows


# --- private ------------------------------------------------------------------------------------------------------


def _measure(config: Config, micro_batch: int, trials: int | None, run: Any) -> dict[str, Any]:
    seconds, begin = [], time.perf_counter()
    for epoch in run(config, micro_batch, trials or 1):
        jax.block_until_ready(epoch)
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    median = statistics.median(seconds[1:])
    return {
        "trials": trials,
        "micro_batch": micro_batch,
        "features": config.features,
        "networks": config.networks,
        "networks_per_second": (trials or 1) * config.networks / median,
        "first_epoch_seconds": seconds[0],
        "epoch_seconds": {"median_s": median, "min_s": min(seconds[1:]), "max_s": max(seconds[1:])},
    }


def _subject(config: Config) -> tuple[Any, Any, Any]:
    arch = sg.siren((2, config.width, config.width, 1))
    keys = jax.random.split(jax.random.key(0), config.networks)
    stack = jax.vmap(lambda key: network.init(arch, key))(keys)
    model = sg.autoencoder(arch, features=config.features, num_layers=config.num_layers)
    return model, stack, losses.inr_reconstruction(model, size=(8, 8))


def _alone(config: Config, micro_batch: int, _: int) -> Iterator[Any]:
    model, stack, loss = _subject(config)
    tx = training.make_optimizer()
    state = training.init(model, tx, jax.tree.map(lambda leaf: leaf[0], stack), jax.random.key(0))
    step = training.make_step(loss, tx, micro_batch=micro_batch)
    yield from training.fit(step, state, stack, batch_size=config.batch_size, num_epochs=config.epochs)


def _together(config: Config, micro_batch: int, trials: int) -> Iterator[Any]:
    model, stack, loss = _subject(config)
    example = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), stack)
    yield from training.population(
        functools.partial(lambda example, key: model.init(key, example), example),
        lambda trial: loss,
        training.Trials(learning_rate=np.geomspace(1e-4, 1e-3, trials), seed=np.arange(trials)),
        stack,
        batch_size=config.batch_size,
        num_epochs=config.epochs,
        micro_batch=micro_batch,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))

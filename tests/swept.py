"""A small experiment for the tests of sweeps: a linear map, trained in milliseconds once it is compiled."""

import dataclasses
import enum
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import training

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(16, 3)).astype(np.float32), "y": RNG.normal(size=(16, 2)).astype(np.float32)}


class Kind(enum.Enum):
    SQUARE = "square"
    ABSOLUTE = "absolute"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    seed: int = 0
    epochs: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    train: TrainConfig = TrainConfig()
    kind: Kind = Kind.SQUARE
    widths: tuple[int, ...] = (3, 2)
    minutes: float | None = None
    error: str = "none"
    """What main does: "value", "exit" or "interrupt"; "population" fails there, "seeds" refuses a seed."""

    def __post_init__(self):
        if self.error == "seeds" and self.train.seed == 1:
            raise ValueError("error is 'seeds' with seed 1; expected seed 0.")


PRESETS = {"small": ("a linear map", Config(Path("runs/swept"))), "other": ("the same", Config(Path("runs/swept")))}


def main(config):
    if config.error == "value":
        raise ValueError("a bad\nvalue")
    if config.error == "exit":
        raise SystemExit("no data. Name some.")
    if config.error == "interrupt":
        raise SystemExit("Interrupted. Saved: nothing.")
    config.out.mkdir(parents=True, exist_ok=True)
    (*_, (last,)) = population([config])
    assert last["failed"] is None
    return {**last["results"], "note": {"a.b": [1.0, {"c": config.train.learning_rate}]}}


def zoo_key(config):
    return str(config.widths)


def fit_zoo(config):
    """A file that tells how often it was written."""
    (config.out / "zoo").mkdir(parents=True, exist_ok=True)
    with (config.out / "zoo" / "fits.txt").open("a") as file:
        file.write("fitted\n")


def program(config):
    return json.dumps([config.kind.value, config.widths, config.train.epochs, config.error])


def population(configs):
    config = next(one for one in configs if one is not None)
    if config.error == "population":
        raise RuntimeError("out of memory")
    filled = [config if one is None else one for one in configs]
    names = ("learning_rate", "weight_decay", "seed")
    trials = training.Trials(**{name: [getattr(one.train, name) for one in filled] for name in names}, warmup_steps=0)

    def make_loss(trial):
        def loss_fn(variables, row, key):
            gap = row["x"] @ variables - row["y"]
            return (jnp.square(gap) if config.kind is Kind.SQUARE else jnp.abs(gap)).mean(), {}

        return loss_fn

    epochs = training.population(
        lambda key: jax.random.normal(key, (3, 2)),
        make_loss,
        trials,
        DATA,
        batch_size=8,
        num_epochs=config.train.epochs,
        selection=(make_loss, DATA),
    )
    history = [[] for _ in configs]
    for epoch in epochs:
        time.sleep(float(os.environ.get("SWEPT_SECONDS", "0")))
        told = []
        for place, rows in enumerate(history):
            diverged = int(epoch.diverged[place])
            rows.append({"selection_loss": float(epoch.selection["loss"][place])})
            failed = f"diverged at step {diverged}" if diverged >= 0 else None
            told.append({"loss": rows[-1]["selection_loss"], "failed": failed, "results": {"training": rows}})
        yield told

"""The training of models that differ in numbers alone, as one program: what a sweep calls for trials of one program."""

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import autoencoders, progress, runs
from jax_scalegmn import training
from jax_scalegmn.training import PopulationEpoch, Trials

OPTIONS = ("learning_rate", "weight_decay", "clip_norm", "warmup_steps", "orbit_weight", "seed")
"""The options of a training in which the models may differ."""

# The numbers of one trial, and whether the loss is that of training -> the loss.
MakeLoss = Callable[..., Any]


def program(config: Any) -> str:
    """Configs of which this text is the same have models that can be trained together, by the options of their `train`.

    Those without an orbit-distance term have a program of their own, which computes none.
    """
    fixed = {name: value for name, value in runs.plain(config.train).items() if name not in OPTIONS}
    fixed["orbit"] = getattr(config.train, "orbit_weight", 0.0) != 0
    whole = {name: value for name, value in runs.plain(config).items() if name not in runs.HOW}
    return json.dumps(whole | {"train": fixed})


def train(
    configs: Sequence[Any],
    settings: Sequence[autoencoders.TrainConfig | None],
    model: nn.Module,
    make_loss: MakeLoss,
    rows: Mapping[str, Any],
    interruption: progress.Interruption,
    *,
    folder: str = "checkpoints",
) -> Iterator[list[dict[str, Any]]]:
    """Trains one model for every config, and leaves the checkpoints of `autoencoders.fit` in its folder.

    Args:
      configs: The configs; None for an empty place of the program, which trains a copy of another one.
      settings: Their trainings, equal but for `OPTIONS`.
      model: The model.
      make_loss: (the numbers of one trial, train=True or False) -> the loss.
      rows: What the losses of "train" and "selection" read.
      interruption: Stops the training after an epoch.
      folder: The checkpoints' folder inside of those of the configs.

    Yields:
      After every epoch, for every config its selection loss, why it failed, and its results so far.
    """
    places = [place for place, one in enumerate(settings) if one is not None]
    first = settings[places[0]]
    assert first is not None
    if first.data_parallel:
        raise ValueError("train.data_parallel is set; expected it unset in a sweep, which spreads trials over devices.")
    tracks = {place: _Track(configs[place], settings[place]) for place in places}
    epochs = _population(configs, settings, first, model, make_loss, rows)
    until = math.inf if first.minutes is None else time.perf_counter() + 60 * first.minutes
    with progress.bar(f"{len(places)} trials", first.epochs, "epochs") as advance:
        begin = time.perf_counter()
        for number, epoch in enumerate(epochs, 1):
            keys = jax.random.key_data(epoch.state.key)
            host = jax.device_get(epoch._replace(state=epoch.state._replace(key=keys)))
            for place, track in tracks.items():
                track.add(host, place, time.perf_counter() - begin)
            begin = time.perf_counter()
            advance(1, f"best selection loss {min(track.monitor.best for track in tracks.values()):.4g}")
            yield [tracks[place].told() if place in tracks else {} for place in range(len(configs))]
            interruption.stop_if_requested(f"nothing of epoch {number} of {first.epochs}")
            if not any(track.trains for track in tracks.values()) or time.perf_counter() > until:
                break
    for track in tracks.values():
        track.save(model, folder)


# --- private ------------------------------------------------------------------------------------------------------


class _Track:
    """What is kept of one trial: its epochs, and the states of the best and of the last one on the host."""

    def __init__(self, config: Any, settings: Any):
        self.config, self.settings = config, settings
        self.monitor, self.history = training.Monitor(), list[dict[str, float]]()
        self.failed: str | None = None
        self._best: tuple[Any, training.Monitor, int] | None = None
        self._last: Any = None

    @property
    def trains(self) -> bool:
        """Whether its next epoch counts: as `autoencoders.fit` alone would go on."""
        return self.failed is None and self.monitor.since_best < self.settings.patience

    def add(self, epoch: PopulationEpoch, place: int, seconds: float) -> None:
        """Takes what an epoch on the host says of this trial."""
        if not self.trains:
            return
        step = int(epoch.diverged[place])
        if step >= 0:
            self.failed = f"diverged at step {step}: loss, gradient or variables are not finite"
            return
        metrics = {f"train_{name}": float(values[place]) for name, values in epoch.metrics.items()}
        metrics |= {f"selection_{name}": float(values[place]) for name, values in epoch.selection.items()}
        if not math.isfinite(metrics["selection_loss"]):
            self.failed = f"the selection loss is {metrics['selection_loss']} after epoch {len(self.history) + 1}"
            return
        self.history.append(metrics | {"step": int(epoch.state.step[place]), "seconds": seconds})
        self.monitor = self.monitor.update(metrics["selection_loss"])
        lowest = min(row["selection_loss"] for row in self.history)
        self._last = jax.tree.map(lambda leaf: leaf[place], epoch.state)
        if metrics["selection_loss"] == lowest:
            self._best = (self._last, self.monitor, len(self.history))

    def told(self) -> dict[str, Any]:
        results = {"training": self.history}
        if self.history:
            results["best"] = min(self.history, key=lambda row: row["selection_loss"])
        loss = self.history[-1]["selection_loss"] if self.history else math.nan
        return {"loss": loss, "failed": self.failed, "results": results}

    def save(self, model: nn.Module, folder: str) -> None:
        """Writes the checkpoints that its own run would have written: of the best epoch and of the last one."""
        if self.failed is not None or self._best is None:
            return
        saved = autoencoders.checkpoints(self.config, self.settings, model, folder)
        best, monitor, epochs = self._best
        kept = [(best, monitor, epochs)]
        if epochs < len(self.history):
            kept.append((self._last, self.monitor, len(self.history)))
        for state, monitor, epochs in kept:
            history = self.history[:epochs]
            state = jax.tree.map(jnp.asarray, state._replace(key=jax.random.wrap_key_data(state.key)))
            saved.save(state, loss=history[-1]["selection_loss"], monitor=monitor, history=history)
        saved.close()


def _population(
    configs: Sequence[Any],
    settings: Sequence[autoencoders.TrainConfig | None],
    first: autoencoders.TrainConfig,
    model: nn.Module,
    make_loss: MakeLoss,
    rows: Mapping[str, Any],
) -> Iterator[PopulationEpoch]:
    """`training.population` as the options say, over all devices of this process if there are several."""
    filled = [first if one is None else one for one in settings]
    run_seed = next(config.seed for config in configs if config is not None)
    seeds = [run_seed if one.seed is None else one.seed for one in filled]
    numbers = {name: [getattr(one, name, 0.0) for one in filled] for name in OPTIONS if name != "seed"}
    example = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[0]), rows["train"])
    params = example[0] if isinstance(example, tuple) else example
    networks = len(jax.tree.leaves(rows["train"])[0])
    devices = jax.local_devices()
    mesh = None
    if len(devices) > 1:
        mesh = jax.make_mesh((len(devices),), ("trial",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    return training.population(
        lambda key: model.init(key, params),
        make_loss,
        Trials(**numbers, seed=seeds),
        rows["train"],
        batch_size=first.batch_size,
        num_epochs=first.epochs,
        decay_steps=first.decay_steps(networks),
        optimizer=first.optimizer,
        micro_batch=first.micro_batch,
        selection=(functools.partial(make_loss, train=False), rows["selection"]),
        selection_batch=first.micro_batch or first.batch_size,
        mesh=mesh,
    )

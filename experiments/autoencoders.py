"""What the experiments that train an autoencoder share: its options; and the training of a model with checkpoints."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from experiments import progress, runs
from jax_scalegmn import distributed, models, training, zoo
from jax_scalegmn.training import checkpoint
from jax_scalegmn.types import LossFn
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class ScaleGMNConfig:
    """The options of a ScaleGMN but the width of its hidden layers."""

    features: int = 32
    """The number of entries of a node or edge feature."""
    num_layers: int = 3
    """The number of message passing layers."""
    dropout: float = 0.0
    """The rate on the node features after every layer during training."""
    normalized: bool = True
    """Whether sums preserve the variance and weights are divided by their usual size; False as published."""
    bidirectional: bool = False
    """Whether messages also run from receivers to senders, with parameters of their own."""
    canonical: models.Canonical = models.Canonical.SYMMETRIZED
    """How features lose their sign or scale."""
    io: models.IO = models.IO.GATE
    """The rule for inputs and outputs."""
    node_encoding: bool = True
    """Whether neurons learn a vector for their type."""
    edge_encoding: bool = True
    """Whether weights learn a vector for their type."""
    encoding_features: bool = False
    """Whether messages and updates also read the node encodings."""
    skip: bool = True
    """Whether a linear map of the old node features is added in every node update."""
    message_layers: int = 1
    """The number of equivariant maps in sequence in a message."""
    update_layers: int = 1
    """The number of equivariant maps in sequence in a node update."""
    parity: bool = False
    """Whether positive scales are treated as in the published code, which is not quite equivariant."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of features and products; None for that of the parameters."""
    edges_at_once: int | None = None
    """The largest number of edges that are computed at once; None for one that suits the platform."""

    def options(self) -> dict[str, Any]:
        """The attributes of a ScaleGMN, by name."""
        names = {field.name for field in dataclasses.fields(models.ScaleGMN)}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}


@dataclasses.dataclass(frozen=True)
class ModelConfig(ScaleGMNConfig):
    """The autoencoder."""

    hidden: int | None = None
    """The width of the hidden layer of every mlp inside; None for the number of features."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(runs.TrainConfig):
    """The training of the autoencoder."""

    patience: int = 50
    """The number of epochs without a lower smoothed validation loss after which training stops."""
    seed: int | None = None
    """The seed of the variables, and of the order and the dropout of every step; None for that of the run."""
    data_parallel: bool = False
    """Whether every batch is divided over all devices."""
    minutes: float | None = None
    """The number of minutes after which training stops at the end of an epoch, counted anew when it is resumed; None
    for no limit."""


class Trained(NamedTuple):
    """A model, its best variables on the selection split, and the numbers of every epoch."""

    model: Any
    variables: Any
    history: list[dict[str, float]]

    @property
    def parameters(self) -> int:
        """The number of learned numbers."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables))


def make_model(config: ModelConfig, networks: Zoo) -> models.Autoencoder:
    """Makes the autoencoder of the networks of a zoo."""
    scales = zoo.scales(networks) if config.normalized else None
    return models.autoencoder(networks.arch, scales=scales, **config.options())


def fit(
    config: runs.RunConfig,
    settings: TrainConfig,
    model: nn.Module,
    losses: Mapping[str, LossFn],
    rows: Mapping[str, Any],
    interruption: progress.Interruption,
    *,
    note: Callable[[dict[str, float]], str],
    title: str = "Autoencoder",
    folder: str = "checkpoints",
    method: str | None = None,
    start: Any = None,
) -> Trained:
    """Trains an autoencoder or another model, or continues with it.

    Args:
      config: The run's options; its folder receives the checkpoints.
      settings: The training's options.
      model: The model.
      losses: The losses of "train" and of "selection", as `training.losses` makes them.
      rows: What these losses read, for each a pytree whose arrays have a leading axis [networks].
      interruption: Stops the training after an epoch.
      note: The metrics after an epoch -> what the progress bar tells of them.
      title: The name in the progress bar.
      folder: The checkpoints' folder inside of the run's.
      method: The method of the model that reads one network, by which it is initialized; None for `__call__`.
      start: The variables to start from; None to draw them.
    """
    state, like = _first_state(config, settings, model, rows["train"], method, start)
    saved = checkpoints(config, settings, model, folder)
    monitor, history = training.Monitor(), []
    if not saved.is_empty:
        state, monitor, history = saved.restore_last(like)
    mesh = _mesh(config, settings)
    epochs = _epochs(settings, losses["train"], state, rows["train"], mesh)
    validate = _validation(settings, losses["selection"], rows["selection"], mesh)
    selection_rows = rows["selection"] if mesh is None else distributed.shard_rows(rows["selection"], mesh)
    schedule = _Schedule(config.every_minutes, settings)
    trained = _networks(rows["train"]) // settings.batch_size * settings.batch_size
    until = math.inf if settings.minutes is None else time.perf_counter() + 60 * settings.minutes
    with progress.bar(title, settings.epochs, "epochs") as advance:
        advance(len(history))
        while monitor.since_best < settings.patience and (not history or not _any(time.perf_counter() >= until)):
            begin = time.perf_counter()
            epoch = next(epochs, None)
            if epoch is None:
                break
            state, metrics = jax.block_until_ready(epoch)
            seconds = time.perf_counter() - begin
            selection = validate(state.variables, selection_rows)
            monitor = monitor.update(float(selection["loss"]))
            history.append(
                {f"train_{metric}": float(value) for metric, value in metrics.items()}
                | {f"selection_{metric}": float(value) for metric, value in selection.items()}
                | {"step": int(state.step), "seconds": seconds}
            )
            stops = interruption.due() or _any(time.perf_counter() >= until)
            saves = stops or schedule.is_due(history, monitor)
            if saves:
                saved.save(state, loss=float(selection["loss"]), monitor=monitor, history=history)
            advance(1, f"{note(history[-1])}, {trained / seconds:.0f} examples/s")
            if stops:
                saved.wait()
            if saves:  # or the epochs since the last checkpoint would be lost
                try:
                    interruption.stop_if_requested(f"a checkpoint after epoch {len(history)} of {settings.epochs}")
                except progress.Interrupted:  # by a signal that came after `stops`
                    saved.wait()
                    raise
    best = saved.restore_best(like).state
    saved.close()
    # Not bound to the device that orbax chose: programs of a mesh take them as constants.
    return Trained(model, jax.device_put(distributed.gather(best.variables)), history)


def checkpoints(
    config: runs.RunConfig, settings: TrainConfig, model: nn.Module, folder: str = "checkpoints"
) -> checkpoint.Checkpoints:
    """The checkpoints of the training of a model in the folder of a run."""
    described = {"model": models.as_json(model), "train": runs.plain(settings), "seed": config.seed}
    return checkpoint.Checkpoints(config.out / folder, described, asynchronous=True)


# --- private ------------------------------------------------------------------------------------------------------


def _networks(data: Any) -> int:
    return len(jax.tree.leaves(data)[0])


def _first_state(
    config: runs.RunConfig, settings: TrainConfig, model: nn.Module, data: Any, method: str | None, start: Any
) -> tuple[training.State, Any]:
    """The state before the first step, and its shapes."""
    example = jax.tree.map(lambda leaf: np.asarray(leaf)[0], data)
    params = example[0] if isinstance(example, tuple) else example
    tx = settings.make_optimizer(_networks(data))
    seed = config.seed if settings.seed is None else settings.seed
    state = training.init(model, tx, params, jax.random.key(seed), method=method, variables=start)
    return state, jax.eval_shape(lambda: state)


class _Schedule:
    """When a checkpoint is due: after every epoch, or after some minutes, at the best epochs and at the end."""

    def __init__(self, every_minutes: float | None, settings: TrainConfig):
        self._every, self._settings = every_minutes, settings
        self._last = time.perf_counter()

    def is_due(self, history: list[dict[str, float]], monitor: training.Monitor) -> bool:
        if self._every is None:
            return True
        losses = [epoch["selection_loss"] for epoch in history]
        ends = len(history) >= self._settings.epochs or monitor.since_best >= self._settings.patience
        due = ends or losses[-1] <= min(losses) or _any(time.perf_counter() - self._last >= 60 * self._every)
        if due:
            self._last = time.perf_counter()
        return due


def _any(value: bool) -> bool:
    """What all processes do, if one of them has a reason: their clocks differ."""
    return distributed.any_process(value)


def _mesh(config: runs.RunConfig, settings: TrainConfig) -> Mesh | None:
    mesh = runs.device_mesh(config)
    return distributed.mesh({"data": -1}) if mesh is None and settings.data_parallel else mesh


def _epochs(settings: TrainConfig, loss: LossFn, state: training.State, data: Any, mesh: Mesh | None) -> Any:
    """The epochs of `training.fit`, on one device or on all."""
    tx = settings.make_optimizer(_networks(data))
    step = training.make_step(loss, tx, micro_batch=settings.micro_batch, mesh=mesh)
    return training.fit(step, state, data, batch_size=settings.batch_size, num_epochs=settings.epochs, mesh=mesh)


def _validation(settings: TrainConfig, loss: LossFn, data: Any, mesh: Mesh | None) -> Any:
    """The mean losses over the selection networks; batches divide their number, or a remainder would compile too."""
    most, count = settings.micro_batch or settings.batch_size, -(-_networks(data) // distributed.num_devices(mesh))
    size = max(size for size in range(1, min(most, count) + 1) if count % size == 0)
    return training.make_evaluation(loss, batch_size=size if 2 * size > most else most, mesh=mesh)

"""What the experiments share that train an autoencoder: its options, and the training with its checkpoints."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments import progress, runs
from jax_scalegmn import models, training, zoo
from jax_scalegmn.training import checkpoint
from jax_scalegmn.types import LossFn
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The autoencoder."""

    features: int = 32
    num_layers: int = 3
    dropout: float = 0.0
    normalized: bool = True
    """Variance-preserving sums and weights divided by their usual size; False as published."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(runs.TrainConfig):
    """The training of the autoencoder."""

    patience: int = 50
    """Epochs without a lower smoothed validation loss until training stops."""
    data_parallel: bool = False
    """Whether every batch is shared out over all devices."""


def make_model(config: ModelConfig, networks: Zoo, **options: Any) -> models.Autoencoder:
    """The autoencoder of the networks of a zoo; `options` are further attributes of the ScaleGMN."""
    return models.autoencoder(
        networks.arch,
        config.features,
        num_layers=config.num_layers,
        dropout=config.dropout,
        normalized=config.normalized,
        scales=zoo.scales(networks) if config.normalized else None,
        **options,
    )


def fit(
    config: runs.RunConfig,
    settings: TrainConfig,
    model: models.Autoencoder,
    losses: Mapping[str, LossFn],
    rows: Mapping[str, Any],
    interruption: progress.Interruption,
    *,
    name: str = "",
    note: Callable[[dict[str, float]], str],
) -> dict[str, Any]:
    """Trains the autoencoder, or goes on with it: the best variables on the selection split, and the history.

    Args:
      config: of the run, in whose folder the checkpoints stand.
      settings: of the training.
      model: the autoencoder.
      losses: of "train" and of "selection", as `losses` makes them.
      rows: what these losses read, for each a pytree whose arrays have a leading axis [networks].
      interruption: stops the training behind an epoch.
      name: of the checkpoints' folder, where a run has several.
      note: the metrics behind an epoch -> what the progress bar tells of them.
    """
    data = rows["train"]
    networks = len(jax.tree.leaves(data)[0])
    trained = networks // settings.batch_size * settings.batch_size
    tx = settings.make_optimizer(networks)
    example = jax.tree.map(lambda leaf: leaf[0], data)
    state = training.init(model, tx, example[0] if isinstance(example, tuple) else example, jax.random.key(config.seed))
    like = jax.eval_shape(lambda: state)
    saved = checkpoint.Checkpoints(
        config.out / "checkpoints" / name,
        {"model": models.as_json(model), "train": runs.plain(settings), "seed": config.seed},
    )
    monitor, history = training.Monitor(), []
    if not saved.is_empty:
        state, monitor, history = saved.restore_last(like)
    mesh = None
    if settings.data_parallel:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        state, data = training.replicate((state, data), mesh)
    validate = training.make_evaluation(losses["selection"], batch_size=settings.micro_batch or settings.batch_size)
    epochs = training.fit(
        training.make_step(losses["train"], tx, micro_batch=settings.micro_batch, mesh=mesh),
        state,
        data,
        batch_size=settings.batch_size,
        num_epochs=settings.epochs,
    )
    with progress.bar(f"Autoencoder {name}".strip(), settings.epochs, "epochs") as advance:
        advance(len(history))
        while monitor.since_best < settings.patience:
            begin = time.perf_counter()
            epoch = next(epochs, None)
            if epoch is None:
                break
            state, metrics = jax.block_until_ready(epoch)
            seconds = time.perf_counter() - begin
            selection = validate(state.variables, rows["selection"])
            monitor = monitor.update(float(selection["loss"]))
            history.append(
                {f"train_{metric}": float(value) for metric, value in metrics.items()}
                | {f"selection_{metric}": float(value) for metric, value in selection.items()}
                | {"step": int(state.step), "seconds": seconds}
            )
            saved.save(state, loss=float(selection["loss"]), monitor=monitor, history=history)
            advance(1, f"{note(history[-1])}, {trained / seconds:.0f} networks/s")
            interruption.stop_if_requested(f"a checkpoint behind epoch {len(history)} of {settings.epochs}")
    best = saved.restore_best(like).state
    saved.close()
    return {"model": model, "variables": best.variables, "history": history}

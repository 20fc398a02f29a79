"""Checkpoints of training, by orbax: the best and the last, each with the configuration it belongs to.

A checkpoint is only ever loaded into the model it was made for; a missing, damaged or foreign one is an error.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jax_scalegmn import models
from jax_scalegmn.training._loop import Monitor, State

__all__ = ["Checkpoints", "Restored", "load"]


class Restored(NamedTuple):
    """A training state with what belongs to it."""

    state: State
    monitor: Monitor
    history: list[dict[str, float]]


class Checkpoints:
    """The checkpoints of one run, in one directory: the last, and the one with the lowest validation loss.

    Args:
      directory: made where it is absent.
      config: JSON values that say what was trained and how; "model" holds `models.as_json` of it.
    """

    def __init__(self, directory: str | os.PathLike[str], config: Mapping[str, Any]):
        self.directory = Path(directory).absolute()
        self.config = json.loads(json.dumps(config))
        policies = checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(1), policies.BestN(get_metric_fn=_loss, reverse=True, n=1)]
                ),
                best_fn=_loss,
                best_mode="min",
                enable_async_checkpointing=False,
            ),
        )

    def save(
        self,
        state: State,
        *,
        loss: float,
        monitor: Monitor | None = None,
        history: list[dict[str, float]] | None = None,
    ) -> None:
        """Writes a checkpoint, atomically; older ones that are neither the last nor the best are removed."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        info = {"config": self.config, "monitor": (monitor or Monitor())._asdict(), "history": history or []}
        self._manager.save(
            step,
            metrics={"loss": loss},
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(state.variables),
                training=ocp.args.StandardSave(_training(state)),
                info=ocp.args.JsonSave(info),
            ),
        )

    def restore_last(self, like: State) -> Restored:
        """The newest state. `like` is a state of the same model and optimizer, or its shapes."""
        return self._restore(like, self._manager.latest_step())

    def restore_best(self, like: State) -> Restored:
        """The state with the lowest validation loss."""
        return self._restore(like, self._manager.best_step())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to restore."""
        return self._manager.latest_step() is None

    def close(self) -> None:
        self._manager.close()

    def _restore(self, like: State, step: int | None) -> Restored:
        if step is None:
            raise FileNotFoundError(f"{self.directory}: no checkpoint there. Train first, without resuming.")
        info = _info(self._manager, self.directory, step)
        _check_config(self.directory / str(step), info["config"], self.config)
        wanted = jax.eval_shape(lambda state: (state.variables, _training(state)), like)
        items = _read(
            self._manager,
            self.directory,
            step,
            variables=ocp.args.StandardRestore(wanted[0]),
            training=ocp.args.StandardRestore(wanted[1]),
        )
        training = items["training"]
        key = jax.random.wrap_key_data(training["key"])
        state = State(items["variables"], training["opt_state"], key, training["step"])
        return Restored(state, Monitor(**info["monitor"]), info["history"])


def load(directory: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The model of a run and its best variables: (model, variables).

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if it is damaged or foreign.
    """
    directory = Path(directory).absolute()
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = manager.all_steps()
        if not steps:
            raise FileNotFoundError(f"{directory}: no checkpoint there. Name the folder given to Checkpoints.")
        best = min(steps, key=lambda step: ((manager.metrics(step) or {}).get("loss", math.inf), step))
        info = _info(manager, directory, best)
        try:
            model = models.from_json(info["config"].get("model", {}))
        except ValueError as error:
            raise ValueError(f"{directory / str(best)}: {error}") from error
        wanted = models.abstract_variables(model)
        items = _read(manager, directory, best, variables=ocp.args.StandardRestore(wanted))
        return model, items["variables"]


# --- private ------------------------------------------------------------------------------------------------------


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


def _training(state: State) -> dict[str, Any]:
    """All of a state but the variables, the key as plain numbers."""
    return {"opt_state": state.opt_state, "key": jax.random.key_data(state.key), "step": state.step}


def _info(manager: ocp.CheckpointManager, directory: Path, step: int) -> dict[str, Any]:
    """Configuration, monitor and history of a checkpoint."""
    info = _read(manager, directory, step, info=ocp.args.JsonRestore())["info"]
    if not {"config", "monitor", "history"} <= info.keys():
        raise ValueError(f"{directory / str(step)}: info holds {sorted(info)}; expected config, monitor and history.")
    return info


def _read(manager: ocp.CheckpointManager, directory: Path, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise ValueError(
            f"{directory / str(step)}: {', '.join(items)} of this checkpoint cannot be read ({error}). It is damaged "
            "or of another program; go on from another one, or train again."
        ) from error


def _check_config(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    differences = [
        f"{name} is {stored.get(name)!r} in the checkpoint and {expected.get(name)!r} here"
        for name in sorted({*stored, *expected})
        if stored.get(name) != expected.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path}: this checkpoint was made with another configuration: {'; '.join(differences)}. Use the same "
            "options as then, or another folder."
        )

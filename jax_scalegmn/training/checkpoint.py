"""Checkpoints of training, by orbax: the best and the last, each with the configuration it belongs to.

A checkpoint is only ever loaded into the model that it was made for; a missing, damaged or foreign one is an error.
Orbax is an extra, `pip install "jax-scalegmn[checkpoint]"`, and imported when checkpoints are first used.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from jax_scalegmn import models
from jax_scalegmn.training._loop import Monitor, State

__all__ = ["Checkpoints", "Restored", "load"]


class Restored(NamedTuple):
    """A training state that was saved, with its monitor and history.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> state = sg.training.State({}, (), jax.random.key(0), jnp.asarray(7))
    >>> restored = sg.training.checkpoint.Restored(state, sg.training.Monitor(), history=[{"loss": 0.5}])
    >>> int(restored.state.step), restored.history[-1]["loss"]
    (7, 0.5)
    """

    state: State
    monitor: Monitor
    history: list[dict[str, float]]


class Checkpoints:
    """The checkpoints of one run, in one directory: the last, and the one with the lowest validation loss.

    Args:
      directory: The folder; made where it is absent.
      config: JSON values that say what was trained and how; "model" holds `models.as_json` of it.

    Raises:
      ImportError: Without orbax-checkpoint.

    >>> import tempfile
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> folder = tempfile.TemporaryDirectory()
    >>> run = sg.training.checkpoint.Checkpoints(folder.name, {"learning_rate": 0.1})
    >>> run.is_empty
    True
    >>> state = sg.training.State({"w": jnp.ones(3)}, (), jax.random.key(0), jnp.asarray(1))
    >>> run.save(state, loss=0.5)
    >>> run.restore_last(state).state.variables["w"].tolist()
    [1.0, 1.0, 1.0]
    >>> run.close()
    >>> folder.cleanup()
    """

    def __init__(self, directory: str | os.PathLike[str], config: Mapping[str, Any]):
        ocp = _orbax()
        self.directory = Path(directory).absolute()
        self.config = json.loads(json.dumps(config))
        policies = ocp.checkpoint_managers
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
        """Writes a checkpoint, atomically; older ones that are neither the last nor the best are removed.

        Args:
          state: The state after some step.
          loss: The validation loss, by which the best checkpoint is chosen.
          monitor: The early stopping so far; None for a new one.
          history: The metrics so far, to be restored with the state.

        Raises:
          ValueError: If the folder has a checkpoint of that step: continue from it, or use another folder.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            raise ValueError(
                f"{self.directory / str(step)}: the folder has a checkpoint of step {step}; expected a new step. "
                "Continue from restore_last, or use another folder."
            )
        ocp = _orbax()
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
        """The newest state.

        Args:
          like: A state of the same model and optimizer, or its shapes.

        Returns:
          The state with its monitor and history.

        Raises:
          FileNotFoundError: If there is no checkpoint.
          ValueError: If it is damaged, or was made with another configuration, model or optimizer.
        """
        return self._restore(like, self._manager.latest_step())

    def restore_best(self, like: State) -> Restored:
        """The state with the lowest validation loss; arguments, result and errors as `restore_last`."""
        return self._restore(like, self._manager.best_step())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to restore."""
        return self._manager.latest_step() is None

    def close(self) -> None:
        """Ends orbax's threads; the checkpoints are on disk."""
        self._manager.close()

    def _restore(self, like: State, step: int | None) -> Restored:
        if step is None:
            raise FileNotFoundError(f"{self.directory}: no checkpoint there. Train first, without resuming.")
        info = _info(self._manager, self.directory, step)
        _check_config(self.directory / str(step), info["config"], self.config)
        ocp = _orbax()
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
    """The model of a run and its best variables.

    Args:
      directory: The folder that was given to `Checkpoints`.

    Returns:
      (model, variables), for `model.apply(variables, ...)`.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      ImportError: Without orbax-checkpoint.
      ValueError: If it is damaged or foreign.

    >>> import jax_scalegmn as sg
    >>> sg.training.checkpoint.load("no/such/run")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...no checkpoint there. Name the folder given to Checkpoints.
    """
    ocp = _orbax()
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


def _orbax() -> ModuleType:
    try:
        import orbax.checkpoint as ocp
        import orbax.checkpoint.checkpoint_managers  # noqa: F401 (an attribute of ocp from here on)
    except ImportError as error:
        raise ImportError('Checkpoints need orbax-checkpoint: pip install "jax-scalegmn[checkpoint]"') from error
    module: ModuleType = ocp
    return module


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


def _training(state: State) -> dict[str, Any]:
    """Everything in a state but the variables, the key as plain numbers."""
    return {"opt_state": state.opt_state, "key": jax.random.key_data(state.key), "step": state.step}


def _info(manager: Any, directory: Path, step: int) -> dict[str, Any]:
    """Configuration, monitor and history of a checkpoint."""
    info = _read(manager, directory, step, info=_orbax().args.JsonRestore())["info"]
    if not {"config", "monitor", "history"} <= info.keys():
        raise ValueError(f"{directory / str(step)}: info holds {sorted(info)}; expected config, monitor and history.")
    return info


def _read(manager: Any, directory: Path, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=_orbax().args.Composite(**items))
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

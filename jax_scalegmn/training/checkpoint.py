"""Checkpoints of training, by orbax: the best and the last two, each with the configuration it belongs to.

A checkpoint is only ever loaded into the model that it was made for; a missing or foreign one is an error. Each carries
checksums. In place of a damaged one the newest whole one is read, with a warning that names the damaged one.
Orbax is an extra, `pip install "jax-scalegmn[checkpoint]"`, and imported when checkpoints are first used.
"""

import contextlib
import errno
import gc
import inspect
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import _bounded, distributed, io, models
from jax_scalegmn.training._loop import Monitor, State

__all__ = ["Checkpoints", "Restored", "load"]

_T = TypeVar("_T")
_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_REMOVED = "removed.orbax-checkpoint-tmp"  # folder of the checkpoints that are no longer wanted


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
    """The checkpoints of one run, in one directory: the last two, and the one with the lowest validation loss.

    Over several processes all save and restore together, and one of them writes. A state is saved whole, and restored
    on any number of devices and processes: `distributed.replicate` stores it on a mesh again.

    Where a checkpoint is damaged, an older one that is whole is restored, and a warning names the damaged one. Once the
    next one is saved, the damaged one is found under the name damaged-STEP.

    Args:
      directory: The folder; made where it is absent.
      config: JSON values that say what was trained and how; "model" holds `models.as_json` of it.
      asynchronous: Whether `save` returns once the state is copied, and a thread writes it while the training goes on.
        A program that is killed meanwhile leaves the checkpoints before it. `wait` returns when all is written.

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

    def __init__(self, directory: str | os.PathLike[str], config: Mapping[str, Any], *, asynchronous: bool = False):
        ocp = _orbax()
        self._asynchronous = asynchronous
        self._writing = contextlib.ExitStack()
        self.directory = Path(directory).absolute()
        self.config = json.loads(json.dumps(config))
        self._damaged: set[int] = set()
        if distributed.is_writer():
            _remove_leftovers(self.directory)
            _rebuild_metrics(self.directory)
        distributed.every_process(None)  # before the others read the folder
        policies = ocp.checkpoint_managers
        self._manager = _manager(
            self.directory,
            ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(2), policies.BestN(get_metric_fn=_loss, reverse=True, n=1)]
                ),
                best_fn=_loss,
                best_mode="min",
                enable_async_checkpointing=asynchronous,
                todelete_subdir=_REMOVED,  # or a program that is killed leaves a part of a checkpoint
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
        """Writes a checkpoint, atomically; older ones that are neither the last two nor the best are removed.

        Args:
          state: The state after some step.
          loss: The validation loss, by which the best checkpoint is chosen.
          monitor: The early stopping so far; None for a new one.
          history: The metrics so far, to be restored with the state.

        Raises:
          OSError: If it cannot be written, as on a full disk. An asynchronous save raises it in the next call.
          ValueError: If the folder has a checkpoint of that step: continue from it, or use another folder.
        """
        step = int(state.step)
        self.wait()
        self._set_damaged_aside()
        if step in self._manager.all_steps():
            raise ValueError(
                f"{self.directory / str(step)}: the folder has a checkpoint of step {step}; expected a new step. "
                "Continue from restore_last, or use another folder."
            )
        ocp = _orbax()
        variables, training = state.variables, _training(state)
        if jax.process_count() > 1:  # orbax saves what is whole in every process from NumPy arrays alone
            variables, training = distributed.gather((variables, training))
        if self._asynchronous:  # copied, since the next step takes the buffers
            variables, training = jax.tree.map(np.array, (variables, training))
        info = {
            "config": self.config,
            "monitor": (monitor or Monitor())._asdict(),
            "history": history or [],
            "loss": loss,
            "checksums": {"variables": io.checksum(variables), "training": io.checksum(training)},
        }
        info = _signed(json.loads(json.dumps(info)))  # a copy, since the caller's history goes on
        items = ocp.args.Composite(
            variables=ocp.args.StandardSave(variables),
            training=ocp.args.StandardSave(training),
            info=ocp.args.JsonSave(info),
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(io.in_use(self.directory))
            with self._written():
                self._manager.save(step, metrics={"loss": loss}, args=items)
            if self._asynchronous:
                self._writing = stack.pop_all()
            else:
                self._remove_old()

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:
          OSError: If a save failed, as on a full disk.
        """
        with self._writing:
            with self._written():
                self._manager.wait_until_finished()
            self._remove_old()

    def restore_last(self, like: State) -> Restored:
        """The newest state that is whole.

        Args:
          like: A state of the same model and optimizer, or its shapes.

        Returns:
          The state with its monitor and history.

        Raises:
          FileNotFoundError: If there is no checkpoint.
          ValueError: If all are damaged, or it was made with another configuration, model or optimizer.
        """
        self.wait()
        return self._restore(like, sorted(self._manager.all_steps(), reverse=True))

    def restore_best(self, like: State) -> Restored:
        """The state with the lowest validation loss; arguments, result and errors as `restore_last`."""
        self.wait()
        return self._restore(like, _best_first(self.directory, self._manager.all_steps()))

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to restore."""
        return self._manager.latest_step() is None

    def close(self) -> None:
        """Ends orbax's threads; the checkpoints are on disk."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Names the folder where a checkpoint cannot be written: orbax and tensorstore raise many types."""
        try:
            with _quiet():
                yield
        except Exception as error:
            known = (reason for number in _NO_ROOM if (reason := os.strerror(number)) in str(error))
            raise OSError(
                f"{self.directory}: a checkpoint cannot be written ({next(known, _bounded.one_line(error))}). Those "
                "before it are whole: make room, and continue from them."
            ) from error

    def _restore(self, like: State, steps: Sequence[int]) -> Restored:
        if not steps:
            raise FileNotFoundError(f"{self.directory}: no checkpoint there. Train first, without resuming.")
        steps = [step for step in steps if step not in self._damaged] or steps
        restored, damaged = _first_whole(self.directory, steps, lambda step: self._restore_step(like, step))
        self._damaged |= damaged
        return restored

    def _restore_step(self, like: State, step: int) -> Restored:
        info = _info(self._manager, self.directory, step)
        _check_config(self.directory / str(step), info["config"], self.config)
        ocp = _orbax()
        wanted = jax.eval_shape(lambda state: (state.variables, _training(state)), like)
        if jax.process_count() > 1:
            wanted = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
        items = _read(
            self._manager,
            self.directory,
            step,
            variables=ocp.args.StandardRestore(wanted[0]),
            training=ocp.args.StandardRestore(wanted[1]),
        )
        variables, training = items["variables"], items["training"]
        _check_sums(self.directory / str(step), info, {"variables": variables, "training": training})
        if jax.process_count() > 1:
            variables, training = jax.tree.map(jnp.asarray, (variables, training))
        key = jax.random.wrap_key_data(training["key"])
        state = State(variables, training["opt_state"], key, training["step"])
        try:
            monitor = Monitor(**info["monitor"])
        except TypeError as error:
            raise _DamagedError(f"{self.directory / str(step)}: info has another monitor ({error}).") from error
        return Restored(state, monitor, info["history"])

    def _remove_old(self) -> None:
        if distributed.is_writer():
            shutil.rmtree(self.directory / _REMOVED, ignore_errors=True)

    def _set_damaged_aside(self) -> None:
        """Gives the steps that could not be restored another name, since training comes to them again."""
        for step in self._damaged & set(self._manager.all_steps()) if distributed.is_writer() else ():
            aside = self.directory / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
        if self._damaged:
            distributed.every_process(None)
            self._manager.reload()
        self._damaged.clear()


def load(directory: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The model of a run and its best variables.

    Args:
      directory: The folder that was given to `Checkpoints`.

    Returns:
      (model, variables), for `model.apply(variables, ...)`.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      ImportError: Without orbax-checkpoint.
      ValueError: If all checkpoints are damaged, or the best is foreign.

    >>> import jax_scalegmn as sg
    >>> sg.training.checkpoint.load("no/such/run")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...no checkpoint there. Name the folder given to Checkpoints.
    """
    ocp = _orbax()
    directory = Path(directory).absolute()
    with _manager(directory, ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = manager.all_steps()
        if not steps:
            raise FileNotFoundError(f"{directory}: no checkpoint there. Name the folder given to Checkpoints.")

        def read(step: int) -> tuple[Any, Any]:
            info = _info(manager, directory, step)
            try:
                model = models.from_json(info["config"].get("model", {}))
            except ValueError as error:
                raise ValueError(f"{directory / str(step)}: {error}") from error
            wanted = models.abstract_variables(model)
            items = _read(manager, directory, step, variables=ocp.args.StandardRestore(wanted))
            _check_sums(directory / str(step), info, items)
            return model, items["variables"]

        return _first_whole(directory, _best_first(directory, steps), read)[0]


# --- private ------------------------------------------------------------------------------------------------------


def _orbax() -> ModuleType:
    try:
        import orbax.checkpoint as ocp
        import orbax.checkpoint.checkpoint_managers  # noqa: F401 (an attribute of ocp from here on)
    except ImportError as error:
        raise ImportError('Checkpoints need orbax-checkpoint: pip install "jax-scalegmn[checkpoint]"') from error
    module: ModuleType = ocp
    return module


def _manager(directory: Path, options: Any) -> Any:
    """Orbax's manager of a folder, which reads the metrics of all checkpoints."""
    if directory.is_dir():
        _bounded.check_folder(directory)
    try:
        with _quiet():
            return _orbax().CheckpointManager(directory, options=options)
    except Exception as error:  # orbax raises many types for damaged files
        raise ValueError(
            f"{directory}: the checkpoints in this folder cannot be read ({_bounded.one_line(error)}). A metrics file "
            "may be damaged, which Checkpoints of this folder write again."
        ) from error


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


def _training(state: State) -> dict[str, Any]:
    """Everything in a state but the variables, the key as plain numbers."""
    return {"opt_state": state.opt_state, "key": jax.random.key_data(state.key), "step": state.step}


class _DamagedError(ValueError):
    """A checkpoint that cannot be read, or does not hold what was saved."""


def _first_whole(directory: Path, steps: Sequence[int], read: Callable[[int], _T]) -> tuple[_T, set[int]]:
    """What is read from the first step that is whole, with a warning about the damaged ones, and those."""
    errors: dict[int, _DamagedError] = {}
    for step in steps:
        try:
            found = read(step)
        except _DamagedError as error:
            errors[step] = error
            continue
        if errors:
            causes = " ".join(f"{error}"[:1000] for error in errors.values())
            warnings.warn(f"{causes} Step {step} is restored instead: {directory / str(step)}.", stacklevel=4)
        return found, set(errors)
    raise errors[steps[0]]


def _info(manager: Any, directory: Path, step: int) -> dict[str, Any]:
    """Configuration, monitor, history, loss and checksums of a checkpoint."""
    path = directory / str(step)
    try:
        _bounded.read_json(path / "info" / "metadata")  # of a size and nesting that orbax may read
    except (OSError, ValueError) as error:
        raise _DamagedError(f"{path}: info cannot be read ({_bounded.one_line(error)}).") from error
    info = _read(manager, directory, step, info=_orbax().args.JsonRestore())["info"]
    if not isinstance(info, dict) or not {"config", "monitor", "history"} <= info.keys():
        found = _bounded.short(sorted(info) if isinstance(info, dict) else info)
        raise _DamagedError(f"{path}: info holds {found}; expected config, monitor and history.")
    kinds = {"config": dict, "monitor": dict, "history": list, "checksums": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(info.get(name, kind()), kind)]
    if wrong or not isinstance(info["config"].get("model", {}), dict):
        raise _DamagedError(f"{path}: info holds {_bounded.short(info)}; expected dicts and a list as history.")
    if not _is_as_signed(info):
        raise _DamagedError(f"{path}: info is not what was saved, by its checksum. It is damaged.")
    return info


def _read(manager: Any, directory: Path, step: int, **items: Any) -> Any:
    try:
        _bounded.check_folder(directory / str(step))
        with _quiet():
            return manager.restore(step, args=_orbax().args.Composite(**items))
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise _DamagedError(
            f"{directory / str(step)}: {', '.join(items)} of this checkpoint cannot be read "
            f"({_bounded.one_line(error)}). It is damaged or of another program; go on from another one, or train "
            "again."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what Python shows of the tasks that orbax leaves where it fails: the error itself is raised."""
    hook, print_error = sys.unraisablehook, sys.excepthook

    def without_orbax(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def without_loops(kind: Any, error: Any, trace: Any) -> None:  # of threads of tensorstore
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            print_error(kind, error, trace)

    try:
        sys.unraisablehook, sys.excepthook = without_orbax, without_loops
        try:
            yield
        except Exception:
            gc.collect()  # the tasks end here, and not later
            time.sleep(0.1)  # and so do the threads that would report to them
            raise
    finally:
        sys.unraisablehook, sys.excepthook = hook, print_error


def _signed(info: dict[str, Any]) -> dict[str, Any]:
    return info | {"checksum": io.checksum((), json.dumps(info, sort_keys=True))}


def _is_as_signed(info: Mapping[str, Any]) -> bool:
    """Whether a description is what was saved; those of older versions have no checksum."""
    return "checksum" not in info or info == _signed({k: v for k, v in info.items() if k != "checksum"})


def _check_sums(path: Path, info: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    """Compares what was restored with what was saved; checkpoints of older versions have no checksums."""
    expected = info.get("checksums", {})
    wrong = [name for name, tree in items.items() if name in expected and io.checksum(tree) != expected[name]]
    if wrong:
        raise _DamagedError(
            f"{path}: {', '.join(wrong)} of this checkpoint are not what was saved, by their checksums. It is damaged, "
            "or read in another precision; go on from another one, or train again."
        )


def _stored_loss(folder: Path) -> tuple[float | None, float | None]:
    """The loss of a checkpoint by its info, which has a checksum, and by the metrics file of orbax; None if damaged."""
    found: list[float | None] = []
    for name in ("info/metadata", "metrics/metrics"):
        try:
            content = _bounded.read_json(folder / name)
            if not isinstance(content, dict) or not _is_as_signed(content):
                raise ValueError
            found.append(float(content["loss"]))
        except (OSError, ValueError, TypeError, KeyError):
            found.append(None)
    return found[0], found[1]


def _best_first(directory: Path, steps: Sequence[int]) -> list[int]:
    def order(step: int) -> tuple[float, int]:
        by_info, by_metrics = _stored_loss(directory / str(step))
        loss = by_metrics if by_info is None else by_info
        return math.inf if loss is None or math.isnan(loss) else loss, step

    return sorted(steps, key=order)


def _remove_leftovers(directory: Path) -> None:
    """Removes the temporary folders of programs that were killed while they saved; not while one is saving."""
    with io.is_unused(directory) as unused:
        for path in directory.glob("*.orbax-checkpoint-tmp*") if unused else ():
            shutil.rmtree(path, ignore_errors=True)


def _rebuild_metrics(directory: Path) -> None:
    """Writes metrics files that orbax could not read again, from the info of their checkpoints."""
    for folder in directory.glob("[0-9]*"):
        by_info, by_metrics = _stored_loss(folder)
        if by_metrics is not None and by_info in (None, by_metrics):
            continue
        if not (folder / "info").is_dir():
            continue  # no checkpoint of ours
        path = folder / "metrics" / "metrics"
        path.parent.mkdir(exist_ok=True)
        with io.atomic_path(path, overwrite=True) as scratch:
            scratch.write_text(json.dumps({"loss": math.inf if by_info is None else by_info}), encoding="utf-8")
        warnings.warn(f"{path}: this file of the validation loss was damaged. It is written again.", stacklevel=3)


def _check_config(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    differences = [
        f"{name} is {_bounded.short(stored.get(name))} in the checkpoint and {_bounded.short(expected.get(name))} here"
        for name in sorted({*stored, *expected})
        if stored.get(name) != expected.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path}: this checkpoint was made with another configuration: {'; '.join(differences)}. Use the same "
            "options as then, or another folder."
        )

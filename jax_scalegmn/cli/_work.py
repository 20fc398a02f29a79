"""A worker of a sweep: claims trials, runs those of one program together, and tells what came of them."""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_scalegmn import io
from jax_scalegmn.cli import _interruption, _study
from jax_scalegmn.cli._study import Experiment
from jax_scalegmn.cli._sweep_options import Work
from jax_scalegmn.cli._trials import Claimed, Queue

_RUN_AGAIN = 75  # the status of a program that was interrupted, EX_TEMPFAIL


def work(options: Work) -> dict[str, int]:
    """Runs trials until none waits or runs, in this worker or another one.

    Returns:
      How many trials this worker ended, by what became of them.

    Raises:
      SystemExit: With status 75, when it is interrupted.
      ImportError: Without Optuna, or what the experiment needs.
      ValueError: If the study or an option does not fit.
    """
    _check(options)
    queue = Queue(options.storage, options.study, heartbeat=options.heartbeat, retries=options.retries)
    experiment = _study.load(queue.study)
    if options.pruner == "median":
        if not experiment.trains_together:
            raise ValueError(
                f"--pruner is median, but {queue.study.experiment} tells nothing before its end; expected a module "
                "with population(configs). Leave --pruner out."
            )
        import optuna

        queue.optuna.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    runner = _Runner(queue, experiment, options)
    try:
        with _interruption.raised():
            while not queue.finished():
                with _held_back() as interruptions:
                    claimed = queue.claim(options.trials_per_program, runner.program)
                if interruptions:
                    for one in claimed:
                        queue.give_back(one)
                    raise KeyboardInterrupt
                if not claimed:
                    time.sleep(min(5.0, options.heartbeat / 2))
                    continue
                with queue.alive(claimed):
                    runner.run(claimed)
    except KeyboardInterrupt:
        print("Interrupted. Its trials wait for another worker; the same command goes on with them.", file=sys.stderr)
        raise SystemExit(_RUN_AGAIN) from None
    return runner.ended


# --- private ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held_back() -> Iterator[list[int]]:
    """Collects interruptions as long as a `with` lasts: nobody would give back a trial that is half taken."""
    collected: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: collected.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield collected
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Runner:
    """Runs claimed trials."""

    def __init__(self, queue: Queue, experiment: Experiment, options: Work):
        self.queue, self.experiment, self.options = queue, experiment, options
        self.ended = {"complete": 0, "failed": 0, "pruned": 0}
        self._zoos: dict[str, Path] = {}

    def program(self, options: Mapping[str, Any]) -> str:
        """What trials have in common that share one program."""
        if not self.experiment.trains_together:
            return ""
        try:
            return str(self.experiment.module.program(self.experiment.configure(options)))
        except Exception as error:  # which fails the trial once it runs
            return _reason(error)

    def run(self, claimed: Sequence[Claimed]) -> None:
        """Runs trials, those of one program together; when it is interrupted, it gives back those that did not end."""
        left = {one.trial.number: one for one in claimed}
        try:
            groups: dict[str, list[Claimed]] = {}
            for one in claimed:
                groups.setdefault(self.program(one.options), []).append(one)
            for group in groups.values():
                for one in self._run_group(group):
                    del left[one.trial.number]
        except KeyboardInterrupt:
            for one in left.values():
                self.queue.give_back(one)
            raise

    def _run_group(self, group: Sequence[Claimed]) -> Iterator[Claimed]:
        """Runs trials of one program, and yields each that has ended."""
        configs = {}
        for one in group:
            try:
                with _told_apart():
                    configs[one.trial.number] = self._config(one)
            except Exception as error:
                self._fail(one, _reason(error))
                yield one
        ready = [one for one in group if one.trial.number in configs]
        if not self.experiment.trains_together:
            for one in ready:
                self._score(one, configs[one.trial.number])
                yield one
        elif ready:
            yield from self._train(ready, configs)

    def _config(self, one: Claimed) -> Any:
        """The config of a trial, its zoo fitted or linked."""
        config = dataclasses.replace(self.experiment.configure(one.options), out=one.folder)
        zoo = self._shared_zoo(config)
        one.folder.mkdir(parents=True, exist_ok=True)
        if zoo is not None and not (one.folder / "zoo").exists():
            (one.folder / "zoo").symlink_to(zoo.absolute(), target_is_directory=True)
        return config

    def _shared_zoo(self, config: Any) -> Path | None:
        """The zoo that a config reads, fitted once for all trials; None where the experiment fits one for each."""
        module = self.experiment.module
        if not hasattr(module, "fit_zoo"):
            return None
        text = module.zoo_key(config)
        if text not in self._zoos:
            shared = Path(self.queue.study.out) / "zoos" / hashlib.sha256(text.encode()).hexdigest()[:12]
            shared.mkdir(parents=True, exist_ok=True)
            with _alone(shared):
                module.fit_zoo(dataclasses.replace(config, out=shared))
            self._zoos[text] = shared / "zoo"
        return self._zoos[text] if self._zoos[text].exists() else None

    def _train(self, group: Sequence[Claimed], configs: Mapping[int, Any]) -> Iterator[Claimed]:
        """Trains trials as one program, and scores those that come to the end."""
        size = self.options.trials_per_program
        places: list[Any] = [None] * size  # each trial in a place of its own, so that its numbers are always the same
        active = {one.identity % size: one for one in group}
        for place, one in active.items():
            places[place] = configs[one.trial.number]
        results: dict[int, Any] = {}
        try:
            with _told_apart(), contextlib.closing(self.experiment.module.population(places)) as epochs:
                for step, epoch in enumerate(epochs):
                    results = {place: epoch[place]["results"] for place in active}
                    for place, one in list(active.items()):
                        if self._ends(one, epoch[place], step):
                            yield active.pop(place)
                    if not active:
                        return
        except Exception as error:
            for one in active.values():
                self._fail(one, _reason(error))
                yield one
            return
        for place, one in active.items():
            if self.queue.study.score:
                self._score(one, configs[one.trial.number])
            else:
                self._complete(one, results[place])
            yield one

    def _ends(self, one: Claimed, epoch: Mapping[str, Any], step: int) -> bool:
        """Fails or prunes a trial after an epoch; whether it did."""
        if epoch["failed"] is not None:
            self._fail(one, epoch["failed"])
            return True
        if self.options.pruner == "none":
            return False
        # Pruners compare what is reported in the direction of the study.
        loss = epoch["loss"] if self.queue.study.direction == "minimize" else -epoch["loss"]
        one.trial.report(loss, step)
        if not one.trial.should_prune():
            return False
        self.ended["pruned"] += self.queue.prune(one)
        return True

    def _score(self, one: Claimed, config: Any) -> None:
        try:
            with _told_apart():
                results = self.experiment.module.main(config)
        except Exception as error:
            self._fail(one, _reason(error))
            return
        self._complete(one, results)

    def _complete(self, one: Claimed, results: Mapping[str, Any]) -> None:
        study = self.queue.study
        try:
            results = _with_best(results)
            columns = {name: _study.pick(results, name) for name in (study.objective, *study.columns)}
        except ValueError as error:
            self._fail(one, str(error))
            return
        with io.atomic_path(one.folder / "trial.json", overwrite=True) as scratch:
            scratch.write_text(json.dumps({"options": one.options, "results": columns}, indent=1) + "\n")
        if self.queue.complete(one, columns[study.objective], columns):
            self.ended["complete"] += 1

    def _fail(self, one: Claimed, reason: str) -> None:
        self.ended["failed"] += self.queue.fail(one, reason)


def _check(options: Work) -> None:
    for name in ("trials_per_program", "heartbeat"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected a number >= 1.")
    if options.retries < 0:
        raise ValueError(f"--retries is {options.retries}; expected a number >= 0.")


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Tells an experiment that was interrupted, which says so by SystemExit, from one that refuses its options."""
    try:
        yield
    except SystemExit as error:
        if error.code == _RUN_AGAIN or str(error.code).startswith("Interrupted"):
            raise KeyboardInterrupt from error
        raise RuntimeError(str(error.code)) from error


def _reason(error: Exception) -> str:
    if not isinstance(error, ValueError | FloatingPointError | RuntimeError | OSError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error)[:4000].split())}"[:1000]


def _with_best(results: Any) -> Any:
    """The results with the epoch of the lowest selection loss as "best", wherever they tell of epochs."""
    if not isinstance(results, Mapping):
        return results
    whole = {name: _with_best(value) for name, value in results.items()}
    epochs = whole.get("training")
    if "best" in whole or not isinstance(epochs, list) or not epochs or "selection_loss" not in epochs[0]:
        return whole
    return {**whole, "best": min(epochs, key=lambda epoch: epoch["selection_loss"])}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the system lets the next one in when a process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: two workers may fit the same zoo, and write the same files
        yield
        return
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        yield

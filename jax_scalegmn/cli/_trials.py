"""The trials of a study in Optuna's storage: each is claimed by one worker, and given to another if that one dies.

All trials are put into the storage when a study is made. A worker says that it lives by heartbeats; Optuna fails trials
without one, and puts a copy of each back. The first of several copies counts, so that each trial is complete at most
once; and a worker that was taken for dead cannot finish what another one has.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_scalegmn.cli import _study
from jax_scalegmn.cli._study import Study

# File systems over a network, on which SQLite's locks do not hold.
_NETWORK = re.compile(
    r"nfs|cifs|smb|sshfs|lustre|gpfs|beegfs|ceph|afs|9p|glusterfs|pvfs|orangefs|davfs|s3fs|gcsfuse|panfs|wekafs|"
    r"juicefs|moosefs|rclone|blobfuse|vboxsf"
)

_BY_ANOTHER = re.compile("already exists|unique constraint|duplicate key", re.IGNORECASE)  # while it makes the tables
_LOCKED = " (being made)"  # after the name of a study: the name of its lock
_LOCK_SECONDS = 60.0  # after which its owner is dead; making the largest studies takes seconds

_DRIVERS = {"postgresql": "psycopg2-binary", "mysql": "PyMySQL, and write mysql+pymysql://"}


class Claimed(NamedTuple):
    """A trial that this worker runs.

    Attributes:
      trial: Optuna's.
      identity: The number that the trial had when the study was made; copies have others.
      options: The values of the options that vary.
      folder: Where it writes.
    """

    trial: Any
    identity: int
    options: dict[str, Any]
    folder: Path


class Attempts(NamedTuple):
    """What the storage says of a trial: the number that it began with, the number of its runs, and the last one."""

    identity: int
    number: int
    last: Any

    @property
    def state(self) -> str:
        """Optuna's name of its state."""
        return str(self.last.state.name)

    @property
    def reason(self) -> str | None:
        """Why it failed."""
        if self.state != "FAIL":
            return None
        return self.last.user_attrs.get("reason") or f"its worker ended without a word, at attempt {self.number}"


class Made(NamedTuple):
    """What `make` did.

    Attributes:
      new: How many trials it put into the storage.
      before: How many the study had there.
      others: How many other studies are there.
    """

    new: int
    before: int
    others: int


class Queue:
    """The trials of a study.

    Raises:
      ImportError: Without Optuna.
      ValueError: If the storage holds no such study, or may not be used.
    """

    def __init__(self, url: str, name: str | None, *, heartbeat: int = 15, retries: int = 5):
        optuna = _optuna()
        self.storage = _storage(url, heartbeat, retries, may_exist=True)
        name = _only_study(optuna, self.storage, url, name)
        self.optuna = optuna.load_study(study_name=name, storage=self.storage)
        self.study = Study(**self.optuna.user_attrs["study"])
        self._heartbeat = heartbeat

    def attempts(self) -> list[Attempts]:
        """What has become of every trial."""
        groups: dict[int, list[Any]] = {}
        for frozen in self.optuna.get_trials(deepcopy=False):
            if not frozen.user_attrs.get("copy"):
                groups.setdefault(_identity(frozen), []).append(frozen)
        return [Attempts(identity, len(several), several[-1]) for identity, several in sorted(groups.items())]

    def finished(self) -> bool:
        """Whether no trial waits or runs."""
        return all(frozen.state.is_finished() for frozen in self.optuna.get_trials(deepcopy=False))

    def claim(self, most: int, program: Callable[[Mapping[str, Any]], str]) -> list[Claimed]:
        """Takes trials that wait, of one program as far as their options are drawn, each with a place of its own."""
        self._put_back()
        claimed: list[Claimed] = []
        first, places = None, set[int]()
        for frozen in self.optuna.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.WAITING,)):
            text = program(self._options(frozen.params)) if frozen.params else None
            place = _identity(frozen) % most
            if place in places or (first is not None and text is not None and text != first):
                continue
            taken = self._take(frozen)
            if taken is not None:
                claimed.append(taken)
                places.add(place)
                first = first or text
            if len(claimed) == most:
                break
        return claimed

    @contextlib.contextmanager
    def alive(self, claimed: Sequence[Claimed]) -> Iterator[None]:
        """Says in the storage, as long as a `with` lasts, that the worker of these trials lives."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._heartbeat):
                for one in claimed:
                    with contextlib.suppress(_optuna().exceptions.StorageInternalError):  # busy: the next one counts
                        self.storage.record_heartbeat(one.trial._trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def complete(self, one: Claimed, value: Any, results: Mapping[str, Any]) -> bool:
        """Tells the objective and the results of a trial; False if the trial is no longer this worker's."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return self.fail(one, f"{self.study.objective} is {value!r}; expected a finite number")
        return self._tell(one, {"results": dict(results)}, values=float(value))

    def fail(self, one: Claimed, reason: str) -> bool:
        """Tells why a trial failed."""
        return self._tell(one, {"reason": reason}, state=_optuna().trial.TrialState.FAIL)

    def prune(self, one: Claimed) -> bool:
        """Tells that a trial was ended early."""
        return self._tell(one, {}, state=_optuna().trial.TrialState.PRUNED)

    def give_back(self, one: Claimed) -> None:
        """Lets another worker run a trial."""
        if self._tell(one, {}, state=_optuna().trial.TrialState.FAIL):
            self._put_back()

    def _options(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _study.decoded(self.study, name, value) for name, value in params.items()}

    def _take(self, frozen: Any) -> Claimed | None:
        """Makes a waiting trial this worker's; None if another one was faster."""
        states = _optuna().trial.TrialState
        self.storage.record_heartbeat(frozen._trial_id)  # before it runs: one without a heartbeat is never taken back
        try:
            if not self.storage.set_trial_state_values(frozen._trial_id, state=states.RUNNING):
                return None
        except _optuna().exceptions.UpdateFinishedTrialError:
            return None
        identity, number = _identity(frozen), frozen.number
        self.optuna.sampler = _sampler(self.study, number)
        trial = _optuna().trial.Trial(self.optuna, frozen._trial_id)
        folder = Path(self.study.out) / "trials" / f"{number:05d}"
        for earlier in self.optuna.get_trials(deepcopy=False):
            if earlier.number < number and _identity(earlier) == identity and earlier.state != states.FAIL:
                trial.set_user_attr("copy", True)
                self.fail(Claimed(trial, identity, {}, folder), f"a copy of trial {earlier.number}")
                return None
        params = {name: _suggest(trial, name, entry) for name, entry in self.study.space.items()}
        about = {"reason": None, "folder": str(folder), "host": socket.gethostname(), "pid": os.getpid()}
        for name, value in about.items():
            trial.set_user_attr(name, value)
        return Claimed(trial, identity, self._options(params), folder)

    def _tell(self, one: Claimed, attributes: Mapping[str, Any], **told: Any) -> bool:
        try:
            for name, value in attributes.items():
                one.trial.set_user_attr(name, value)
            state = self.storage.get_trial(one.trial._trial_id).state
            if state.is_finished():
                return False
            self.optuna.tell(one.trial, **told)
        except _optuna().exceptions.UpdateFinishedTrialError:
            return False
        return True

    def _put_back(self) -> None:
        """Fails trials whose worker died and puts a copy of each back, also where a worker died while it did so."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls heartbeats experimental
            _optuna().storages.fail_stale_trials(self.optuna)
        trials = self.optuna.get_trials(deepcopy=False)
        copied = {number for frozen in trials for number in frozen.system_attrs.get("retry_history", ())}
        for frozen in trials:
            lost = frozen.state.name == "FAIL" and frozen.user_attrs.get("reason") is None
            if lost and frozen.number not in copied:
                self.storage.get_heartbeat_stale_trial_callback()(self.optuna, copy.deepcopy(frozen))


def make(study: Study, url: str) -> Made:
    """Puts a study with all of its trials into a storage, or those that one there lacks.

    Returns:
      How many trials are new there, and what there was.

    Raises:
      ImportError: Without Optuna.
      ValueError: If another study has the name, or the storage may not be used.
    """
    storage = _storage(url, 15, 0, may_exist=False)
    with _lock(storage, study.name):
        return _make(study, url, storage)


def check_place(url: str, mounts: str | None = None) -> None:
    """Refuses SQLite on a file system over a network.

    Args:
      url: The storage.
      mounts: The text of /proc/self/mounts; None for that file, if there is one.

    Raises:
      ValueError: If the database is on such a file system.
    """
    if not url.startswith("sqlite") or ":memory:" in url:
        return
    path = Path(url.partition("///")[2].partition("?")[0]).absolute()
    table = Path("/proc/self/mounts")
    mounts = (table.read_text(errors="replace") if table.exists() else "") if mounts is None else mounts
    entries = [
        (Path(_unescaped(line.split()[1])), line.split()[2]) for line in mounts.splitlines() if line.count(" ") > 1
    ]
    resolved = path.resolve()
    above = [
        (len(place.parts), number, kind)
        for number, (place, kind) in enumerate(entries)
        if resolved.is_relative_to(place)
    ]
    kind = max(above, default=(0, 0, ""))[2]  # of several on one place, as automount makes them, the last one counts
    if _NETWORK.search(kind):
        raise ValueError(
            f"{path} is on a {kind} file system, on which SQLite's locks do not hold; expected a local disk, or a "
            "server for several machines, like postgresql://user@host/name."
        )


# --- private ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(storage: Any, name: str) -> Iterator[None]:
    """Held by one process at a time: an empty study, whose name the database takes once.

    One that stays for a minute was left by a process that was killed.
    """
    optuna = _optuna()
    held, since = None, time.monotonic()
    while True:
        try:
            optuna.create_study(study_name=name + _LOCKED, storage=storage)
            break
        except optuna.exceptions.DuplicatedStudyError:
            with contextlib.suppress(KeyError):  # let go in between
                found = storage.get_study_id_from_name(name + _LOCKED)
                held, since = (held, since) if found == held else (found, time.monotonic())
                if time.monotonic() - since > _LOCK_SECONDS:
                    storage.delete_study(found)
            time.sleep(0.2)
    try:
        yield
    finally:
        with contextlib.suppress(KeyError):  # taken over by one who thought this process dead
            optuna.delete_study(study_name=name + _LOCKED, storage=storage)


def _make(study: Study, url: str, storage: Any) -> Made:
    optuna = _optuna()
    wanted = json.loads(json.dumps(dataclasses.asdict(study)))
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    names = {summary.study_name for summary in summaries if not summary.study_name.endswith(_LOCKED)}
    stored = optuna.load_study(study_name=study.name, storage=storage).user_attrs if study.name in names else {}
    if "study" in stored:
        found = _study.differences(stored["study"] | {"trials": wanted["trials"]}, wanted)
        fewer = (wanted["trials"] or 0) < (stored["study"]["trials"] or 0)
        if found or fewer:
            found = _study.differences(stored["study"], wanted)
            advice = "Give the new one another name" if found[1:] or not fewer else "Name as many trials, or more"
            raise ValueError(f"{url} holds another study {study.name!r}: {'; '.join(found)}. {advice}.")
        before, new = _add(optuna.load_study(study_name=study.name, storage=storage), study, wanted)
        return Made(new, before, len(names) - 1)
    if study.name in names:  # left by one that was killed here
        optuna.delete_study(study_name=study.name, storage=storage)
    made = optuna.create_study(study_name=study.name, storage=storage, direction=study.direction)
    trials = _new_trials(study)
    made.add_trials(trials)
    made.set_user_attr("study", wanted)  # at last: workers take a study without it for one that is not made yet
    return Made(len(trials), 0, len(names - {study.name}))


def _unescaped(place: str) -> str:
    """A path of /proc/self/mounts, where blanks are written as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "Sweeps need Optuna, which is not installed; expected the extra 'sweep'. Run pip install "
            '"jax-scalegmn[sweep]".'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(url: str, heartbeat: int, retries: int, *, may_exist: bool) -> Any:
    """Optuna's storage with heartbeats, every transaction of SQLite whole."""
    optuna = _optuna()
    import sqlalchemy

    check_place(url)
    path = Path(url.partition("///")[2].partition("?")[0]) if url.startswith("sqlite") else None
    if path is not None and may_exist and not path.exists():
        raise ValueError(f"There is no {path}; expected a storage with a study. Make it with jax-scalegmn sweep make.")
    if path is not None and not may_exist:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = _open(
            url,
            engine_kwargs={"connect_args": {"timeout": 120}} if path is not None else None,
            heartbeat_interval=heartbeat,
            grace_period=4 * heartbeat,
            max_retry=retries,
        )
    except ImportError as error:
        kind = url.partition(":")[0]
        raise ValueError(
            f"--storage is a {kind} database, whose driver is not installed; expected one that SQLAlchemy knows. Run "
            f"pip install {_DRIVERS.get(kind, 'with its name')}."
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise ValueError(f"--storage is {_shown(url)!r}; expected a URL like sqlite:///s.db ({error}).") from error
    if path is not None:
        # Python's sqlite3 begins a transaction at its first change, after what it depends on was read.
        sqlalchemy.event.listen(storage.engine, "connect", _no_transactions_of_its_own)
        sqlalchemy.event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
        storage.engine.dispose()
    return storage


def _open(url: str, *, max_retry: int, **options: Any) -> Any:
    """Optuna's storage, whose tables are made if there are none; tried again where another process is making them."""
    optuna = _optuna()
    for last in (False,) * 20 + (True,):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna calls heartbeats experimental
                retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry)
                return optuna.storages.RDBStorage(url, heartbeat_stale_trial_callback=retry, **options)
        except Exception as error:
            if last or not _BY_ANOTHER.search(str(error)):
                raise
            time.sleep(0.2)
    return None


def _shown(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _no_transactions_of_its_own(connection: Any, _: Any) -> None:
    connection.isolation_level = None


def _only_study(optuna: Any, storage: Any, url: str, name: str | None) -> str:
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    names = sorted(summary.study_name for summary in summaries if "study" in summary.user_attrs)
    if name is None and len(names) == 1:
        return str(names[0])
    if name not in names:
        advice = f"it has {', '.join(names)}" if names else "it has none. Make one with jax-scalegmn sweep make"
        raise ValueError(f"--study is {name!r}; expected the name of a study in {url}: {advice}.")
    return str(name)


def _add(stored: Any, study: Study, wanted: dict[str, Any]) -> tuple[int, int]:
    """Adds the trials that one of this number would have had, too: how many there were, and how many are new."""
    there = sum("failed_trial" not in frozen.system_attrs for frozen in stored.get_trials(deepcopy=False))
    trials = _new_trials(study)[there:]
    stored.add_trials(trials)
    if stored.user_attrs["study"] != wanted:
        stored.set_user_attr("study", wanted)
    return there, len(trials)


def _identity(frozen: Any) -> int:
    return int(frozen.system_attrs.get("failed_trial", frozen.number))


def _distributions(study: Study) -> dict[str, Any]:
    kinds = _optuna().distributions
    made: dict[str, Any] = {}
    for name, entry in study.space.items():
        if isinstance(entry, list):
            made[name] = kinds.CategoricalDistribution([_study.encoded(value) for value in entry])
            continue
        whole = all(isinstance(entry.get(end, 0), int) for end in ("low", "high", "step"))
        options = {"log": entry.get("log", False), "step": entry.get("step", 1 if whole else None)}
        made[name] = (kinds.IntDistribution if whole else kinds.FloatDistribution)(
            entry["low"], entry["high"], **options
        )
    return made


def _suggest(trial: Any, name: str, entry: Any) -> Any:
    if isinstance(entry, list):
        return trial.suggest_categorical(name, [_study.encoded(value) for value in entry])
    whole = all(isinstance(entry.get(end, 0), int) for end in ("low", "high", "step"))
    options = {"log": entry.get("log", False), "step": entry.get("step", 1 if whole else None)}
    return (trial.suggest_int if whole else trial.suggest_float)(name, entry["low"], entry["high"], **options)


def _sampler(study: Study, number: int) -> Any:
    """What draws the options of a trial that has none yet."""
    samplers = _optuna().samplers
    if study.sampler != "tpe":
        return samplers.RandomSampler(seed=study.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls constant_liar experimental
        return samplers.TPESampler(seed=study.seed + number, constant_liar=True)


def _new_trials(study: Study) -> list[Any]:
    """All trials, waiting; those of a grid and of random search with their options."""
    optuna = _optuna()
    waiting, distributions = optuna.trial.TrialState.WAITING, _distributions(study)
    if study.sampler == "grid":
        drawn = [{name: _study.encoded(value) for name, value in point.items()} for point in _study.points(study)]
    elif study.sampler == "random":
        alone = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=study.seed))
        drawn = [alone.ask(distributions).params for _ in range(study.trials or 0)]
    else:
        return [optuna.create_trial(state=waiting) for _ in range(study.trials or 0)]
    return [optuna.create_trial(state=waiting, params=params, distributions=distributions) for params in drawn]

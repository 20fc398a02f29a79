"""What `jax-scalegmn sweep` does once its options are parsed."""

import collections
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from jax_scalegmn import io
from jax_scalegmn.cli import _interruption, _study, _trials
from jax_scalegmn.cli._study import Study
from jax_scalegmn.cli._sweep_options import Launch, Make, Report, Status, SweepCommand, Work
from jax_scalegmn.cli._trials import Queue


def run(options: SweepCommand) -> int:
    """Runs one command, and returns its exit status.

    Raises:
      OSError, ValueError: On bad input.
      ImportError: If a package is not installed.
    """
    match options:
        case Make():
            _make(options)
        case Work():
            from jax_scalegmn.cli import _work  # imports the experiment, and with it JAX

            ended = _work.work(options)
            told = ", ".join(f"{count} {name}" for name, count in ended.items())
            print(told if any(ended.values()) else "No trial was left for this worker.")
        case Status():
            _status(Queue(options.storage, options.study))
        case Report():
            _report(options)
        case Launch():
            return _launch(options)
    return 0


def worker_words(options: Launch, name: str) -> list[str]:
    """The command of a worker."""
    words = [sys.executable, "-m", "jax_scalegmn", "sweep", "work", "--storage", options.storage]
    words += ["--study", name, "--trials-per-program", str(options.trials_per_program)]
    return [
        *words,
        "--pruner",
        options.pruner,
        "--heartbeat",
        str(options.heartbeat),
        "--retries",
        str(options.retries),
    ]


def submit(words: list[str], logs: Path, options: Launch, cluster: str) -> list[Any]:
    """Submits the workers as jobs of a cluster that submitit knows.

    Raises:
      ImportError: Without submitit.
      ValueError: If --slurm is no list of options, or this machine cannot submit jobs.
    """
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # else its import closes the handlers of all loggers
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            "--executor slurm needs submitit, which is not installed; expected the extra 'slurm'. Run pip install "
            '"jax-scalegmn[slurm]".'
        ) from error
    pairs = [text.partition("=") for text in options.slurm]
    if not all(name and value for name, _, value in pairs):
        raise ValueError(f"--slurm is {' '.join(options.slurm)!r}; expected name=value, like partition=gpu.")
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
    except RuntimeError as error:
        raise ValueError(
            f"--executor is slurm, but this machine cannot submit jobs ({error}). Run it where sbatch is."
        ) from error
    further = {name: int(value) if value.isdecimal() else value for name, _, value in pairs}
    executor.update_parameters(name="sweep", timeout_min=options.minutes, slurm_additional_parameters=further)
    command = submitit.helpers.CommandFunction(words, verbose=True)
    with executor.batch():
        jobs = [executor.submit(command) for _ in range(options.workers)]
    print(f"{len(jobs)} jobs: {' '.join(job.job_id for job in jobs)}; they write to {logs}: {shlex.join(words)}")
    return jobs


# --- private: the commands ------------------------------------------------------------------------------------------


def _make(options: Make) -> None:
    study = _study.read(options.file)
    _trials.check_place(options.storage)
    try:
        _study.load(study)
    except ValueError as error:
        raise ValueError(f"{options.file}: {error}") from error
    new, before, others = _trials.make(study, options.storage)
    more = f"{new} more, {_trials_of(before + new)} in all" if new else f"is there already, with {_trials_of(before)}"
    made = more if before else _trials_of(new)
    named = f" --study {shlex.quote(study.name)}" if others else ""
    print(f"study {study.name}: {made}. Run them: jax-scalegmn sweep work --storage {options.storage}{named}")


def _status(queue: Queue) -> None:
    attempts = queue.attempts()
    states = collections.Counter(one.state for one in attempts)
    print(f"{queue.study.name}: {_trials_of(len(attempts))} of {queue.study.experiment} {queue.study.preset}")
    for state in ("WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL"):
        print(f"  {state:<9} {states[state]}")
    for one in attempts:
        about = one.last.user_attrs
        if one.state == "RUNNING" and "host" in about:
            print(f"trial {one.identity} runs on {about['host']}, process {about['pid']}, attempt {one.number}")
        if one.reason is not None:
            print(f"trial {one.identity} failed: {one.reason}")


def _report(options: Report) -> None:
    from jax_scalegmn import report

    queue = Queue(options.storage, options.study)
    study, rows = queue.study, _rows(queue)
    head, cells = _table(study, rows)
    _print_table([head, *cells])
    done = [row for row in rows if row["state"] == "COMPLETE"]
    page = options.out or Path(study.out) / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    sections = [_page_table(head, cells)]
    if done:
        names = [*study.space, *_numeric(study, done)]
        axes = {name: [_value(row, name) for row in done] for name in names}
        log = [name for name, entry in study.space.items() if isinstance(entry, dict) and entry.get("log")]
        labels = [f"trial {row['trial']}" for row in done]
        figure = report.parallel_coordinates(axes, labels=labels, log=log, best=study.direction)
        sections.insert(0, figure)
    report.document(f"Sweep {study.name}", sections).save(page)
    print(f"Report: {page}")
    if options.json is not None:
        environment = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "optuna")}
        values = {"study": queue.optuna.user_attrs["study"], "environment": environment, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with io.atomic_path(options.json, overwrite=True) as scratch:
            scratch.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"Numbers: {options.json}")


def _launch(options: Launch) -> int:
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; expected a number >= 1.")
    queue = Queue(options.storage, options.study)
    logs = Path(queue.study.out) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    words = worker_words(options, queue.study.name)
    if options.executor == "slurm":
        submit(words, logs, options, "slurm")
        return 0
    status = _start(words, logs, options.workers)
    _status(queue)
    return status


def _start(words: list[str], logs: Path, count: int) -> int:
    """Starts workers here and waits for them: 0 if all ended well, else 1."""
    paths = [logs / f"worker-{number}.log" for number in range(count)]
    workers = []
    for path in paths:
        with path.open("ab") as log:
            workers.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
    print(f"{count} workers: {' '.join(str(worker.pid) for worker in workers)}; they write to {logs}")
    try:
        with _interruption.raised():
            statuses = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()
        statuses = [worker.wait() for worker in workers]
    for status, path in zip(statuses, paths, strict=True):
        if status:
            print(f"A worker ended with status {status}: see {path}")
    return int(any(statuses))


def _trials_of(number: int) -> str:
    return f"{number} trial{'s' * (number != 1)}"


# --- private: tables ------------------------------------------------------------------------------------------------


def _rows(queue: Queue) -> list[dict[str, Any]]:
    """All trials, complete ones first, the best of them at the top."""
    rows = []
    for one in queue.attempts():
        last: Any = one.last
        options = {name: _study.decoded(queue.study, name, value) for name, value in last.params.items()}
        whole = last.datetime_start is not None and last.datetime_complete is not None
        seconds = (last.datetime_complete - last.datetime_start).total_seconds() if whole else None
        row = {"trial": one.identity, "state": one.state, "attempts": one.number, "options": options}
        row |= {"results": last.user_attrs.get("results", {}) if one.state == "COMPLETE" else {}}
        rows.append(row | {"reason": one.reason, "folder": last.user_attrs.get("folder"), "seconds": seconds})
    sign = 1 if queue.study.direction == "minimize" else -1
    objective = queue.study.objective

    def rank(row: dict[str, Any]) -> tuple[bool, float]:
        done = row["state"] == "COMPLETE"
        return not done, sign * row["results"][objective] if done else 0.0

    return sorted(rows, key=rank)


def _table(study: Study, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    shown = [*study.columns, study.objective]
    head = ["trial", *study.space, *shown, "state"]
    cells = []
    for row in rows:
        state = row["state"] if row["reason"] is None else f"{row['state']}: {row['reason'][:200]}"
        values = [row["options"].get(name, "") for name in study.space]
        values += [row["results"].get(name, "") for name in shown]
        cells.append([str(row["trial"]), *map(_text, values), state])
    return head, cells


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(row: dict[str, Any], name: str) -> Any:
    value = row["options"][name] if name in row["options"] else row["results"][name]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _numeric(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    """The results that are numbers in all rows, the objective last."""
    names = [name for name in study.columns if name != study.objective]
    return [*(n for n in names if all(isinstance(row["results"][n], int | float) for row in rows)), study.objective]


def _print_table(lines: list[list[str]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False)), "", line[-1])


def _page_table(head: list[str], cells: list[list[str]]) -> str:
    import html

    def line(tag: str, values: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    return "<table>" + "\n".join([line("th", head), *(line("td", values) for values in cells)]) + "</table>"

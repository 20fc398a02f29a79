"""Every reader of files, given files that are not what it expects: a few thousand mutations in a worker with limits.

    python tests/fuzzing.py --cases 10000 --seed 1                    # a table of counts by reader
    python tests/fuzzing.py --seed 1 --reader "zoo" --case 17         # one case again, with its traceback

A case is decided by seed, reader and number. It passes if the reader returns, or raises ValueError or OSError with a
message of bounded length, which names the file. Anything else fails: other errors, more than 5 s of CPU time or 2 GiB
of memory, files that appear or change, code that runs, a crash. The files of a case that failed are kept.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import json
import logging
import os
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import mutations  # noqa: E402 (after the path)
from fuzzed_readers import Reader, cases_by_reader  # noqa: E402

START_SECONDS = 300  # after which a worker is killed before its first case, or between readers
LONGEST = 2000  # letters of a message, without the name of the folder


class Limits(NamedTuple):
    """What one case may take: seconds of CPU time, seconds after which the worker is killed, bytes above the start."""

    cpu: float = 5
    wall: float = 20
    memory: int = 2 * 2**30


LIMITS = Limits()

# --- one case -----------------------------------------------------------------------------------------------------


def _mutated(rng: Random, sample: Path, folder: Path) -> None:
    """Copies a sample, and changes one file of it or a few."""
    shutil.copytree(sample, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 1, 1, 2, 4)))):
        how = rng.random()
        if how < 0.92:
            path.write_bytes(mutations.mutate(rng, mutations.kind_of(str(path.relative_to(folder))), path.read_bytes()))
        elif how < 0.95:
            path.write_bytes(rng.choice(files).read_bytes())
        else:
            path.unlink()
            replacement = rng.choice((None, os.mkfifo, Path.mkdir, _zeros_for_ever, _itself, Path.touch))
            if replacement is not None:
                replacement(path)
                files = [other for other in files if other != path]


def _zeros_for_ever(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _itself(path: Path) -> None:
    path.symlink_to(path.name)


def _listing(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        whole = () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
        found[str(path.relative_to(folder))] = (status.st_mode, *whole)
    return found


class _TooLongError(BaseException):
    """Not an Exception: no reader takes it for a damaged file."""


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _Watch:
    """What happens while a reader runs: Python's audit events that write, start programs or load pickles."""

    _CHANGES = ("mkdir", "rename", "remove", "rmdir", "link", "symlink", "truncate", "chmod", "chown", "utime")
    _IN_FOLDERS = ("os.mkdir", "os.remove", "os.rmdir")  # whose last argument may be the descriptor of a folder
    _RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
    _RUNS += ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo")

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        self.allowed: tuple[str, ...] = ("/dev/null",)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if event in self._RUNS:
            self.seen.append(f"{event} {arguments!r}"[:200])
        elif writes or (event.startswith("os.") and event[3:] in self._CHANGES):
            path = arguments[0]
            folder = arguments[-1] if event in self._IN_FOLDERS else -1
            if isinstance(path, str | bytes | os.PathLike) and not _absolute(path, folder).startswith(self.allowed):
                self.seen.append(f"{event} {os.fsdecode(path)}"[:200])


def _absolute(path: str | bytes | os.PathLike[str], folder: int) -> str:
    start = os.getcwd()
    with contextlib.suppress(OSError):
        start = os.readlink(f"/proc/self/fd/{folder}")
    return os.path.join(start, os.fsdecode(path))


def _run_case(
    watch: _Watch, reader: Reader, name: str, seed: int, case: int, root: Path, limits: Limits
) -> dict[str, Any]:
    """Reads one mutated sample, and says what came of it; the folder stays if the case failed."""
    rng = Random(f"{seed} {name} {case}")
    sample, folder = rng.choice(sorted((root / "samples" / name).iterdir())), root / "work" / "case"
    _mutated(rng, sample, folder)
    before, start, begin = _listing(folder), _memory("VmRSS"), time.process_time()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory counts from here
    watch.allowed = ("/dev/null", str(root / "cache"), *((str(folder),) if reader.rewrites else ()))
    watch.seen, error = [], None
    signal.setitimer(signal.ITIMER_PROF, limits.cpu, 1)
    try:
        reader.read(folder)
    except (_TooLongError, SystemExit, KeyboardInterrupt, Exception) as caught:
        error = caught
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seen, watch.seen = watch.seen, None
    seconds, memory = time.process_time() - begin, _memory("VmHWM") - start
    verdict, detail = _verdict(error, reader, folder)
    if memory > limits.memory:
        verdict, detail = "memory", f"{memory} bytes; {detail}"
    if mutations.marks or seen or (folder / mutations.MARKER).exists() or Path(mutations.MARKER).exists():
        verdict, detail = "code or files", f"{mutations.marks} {seen[:3]}"
        mutations.marks.clear()
    elif not reader.rewrites and _listing(folder) != before:
        verdict, detail = "files", f"{sorted(_listing(folder).items() ^ before.items())[:3]}"
    traced = "".join(traceback.format_exception(error))[-4000:] if error else ""
    return {
        "verdict": verdict,
        "detail": detail,
        "seconds": seconds,
        "memory": memory,
        "trace": traced,
        "sample": sample.name,
    }


def _verdict(error: BaseException | None, reader: Reader, folder: Path) -> tuple[str, str]:
    """("returned", "ValueError" or "OSError", or what is wrong; the error's first line)."""
    if error is None:
        return "returned", ""
    message = str(error).replace(str(folder), ".")
    detail = f"{type(error).__name__}: {message.splitlines()[0] if message else ''}"[:300]
    if isinstance(error, _TooLongError):
        return "time", "too much CPU time"
    if not isinstance(error, ValueError | OSError):
        return "error", detail
    if any(isinstance(cause, MemoryError) and not _of_a_parser(cause) for cause in _causes(error)):
        return "memory", detail
    if len(message) > LONGEST:
        return "long message", f"{len(message)} letters: {detail}"
    if isinstance(error, ValueError) and reader.names_path and str(folder) not in str(error):
        return "no path", detail
    return "OSError" if isinstance(error, OSError) else "ValueError", detail


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def _of_a_parser(error: BaseException) -> bool:
    """Whether it is the MemoryError of Python's parser, which means deep nesting."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith("ast.py")


# --- the worker ---------------------------------------------------------------------------------------------------


def _work(
    root: Path,
    seed: int,
    jobs: Sequence[tuple[str, int, int]],
    out: int,
    readers: Mapping[str, Reader],
    limits: Limits,
) -> None:
    """Runs the cases of all jobs, and writes a line before and after each."""
    faulthandler.enable()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the program that started it
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ |= {  # JAX is imported by the readers that need it
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    } | dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(root / "work"))
    watch = _Watch()
    signal.signal(signal.SIGPROF, _stop)

    def say(**line: Any) -> None:
        os.write(out, json.dumps(line).encode() + b"\n")

    os.chdir(root / "work")
    for name, first, last in jobs:
        reader = readers[name]
        _prepare(reader, name, root, limits.memory)
        for case in range(first, last):
            say(begins=case, reader=name)
            result = _run_case(watch, reader, name, seed, case, root, limits)
            say(case=case, reader=name, **result)
            if result["verdict"] not in ("returned", "ValueError", "OSError"):
                (root / "work" / "case").rename(root / "failed" / f"{_file_name(name)}-{seed}-{case}")
            _remove(root / "work" / "case")
            if result["verdict"] in ("memory", "time"):
                os._exit(0)  # what is left of it would count for the next case


def _prepare(reader: Reader, name: str, root: Path, memory: int) -> None:
    """Builds and reads the samples of a reader, and limits the memory."""
    samples = root / "samples" / name
    if not samples.exists():
        reader.build(samples)
    refused = []
    for sample in sorted(samples.iterdir()):
        shutil.copytree(sample, root / "work" / "case")
        try:
            reader.read(root / "work" / "case")
        except ValueError as error:  # a few fixtures ask for a choice
            refused.append(error)
        _remove(root / "work" / "case")
    if 2 * len(refused) >= len(list(samples.iterdir())):
        raise refused[0]
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + memory + 2**29, resource.RLIM_INFINITY))


def _memory(kind: str) -> int:
    """A number of bytes that Linux knows of this process: VmRSS, VmHWM, the highest of these so far, or VmSize."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def _stop(*_: Any) -> None:
    raise _TooLongError


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _file_name(reader: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in reader)


# --- all cases ----------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """A case that failed: of which reader and number, how, the error's first line, its files and traceback."""

    reader: str
    case: int
    verdict: str
    detail: str
    sample: str = ""
    trace: str = ""


class Report(NamedTuple):
    """What came of the cases of one reader.

    Attributes:
      counts: The cases by verdict.
      seconds: The longest CPU time of a case.
      memory: The most memory above the start, in bytes.
      failures: The cases that failed.
    """

    counts: dict[str, int]
    seconds: float
    memory: int
    failures: list[Failure]


def campaign(
    cases: Mapping[str, tuple[int, int]],
    seed: int,
    root: Path,
    *,
    readers: str = "fuzzed_readers",
    limits: Limits = LIMITS,
    log: Any = None,
) -> dict[str, Report]:
    """Runs cases of several readers in a worker, which is started again after a crash.

    Args:
      cases: The first case and the one after the last, by reader.
      seed: The seed.
      root: A folder for samples, work and the files of cases that failed.
      readers: The module with the table READERS.
      limits: What one case may take.
      log: Where failures are printed once they happen.
    """
    for name in ("samples", "work", "failed", "cache"):
        (root / name).mkdir(parents=True, exist_ok=True)
    reports = {name: Report({}, 0.0, 0, []) for name in cases}
    jobs = [(name, first, last) for name, (first, last) in cases.items()]
    while jobs:
        for line in _lines_of_a_worker(root, seed, jobs, readers, limits):
            name, case = line["reader"], line["case"]
            while jobs[0][0] != name:
                jobs.pop(0)
            jobs[0] = (name, case + 1, jobs[0][2])
            _count(reports, line, log)
        while jobs and jobs[0][1] >= jobs[0][2]:
            jobs.pop(0)
    return reports


def _count(reports: dict[str, Report], line: Mapping[str, Any], log: Any) -> None:
    counts, seconds, memory, failures = reports[line["reader"]]
    verdict = line["verdict"]
    counts[verdict] = counts.get(verdict, 0) + 1
    if verdict not in ("returned", "ValueError", "OSError"):
        kept = (line.get(key, "") for key in ("sample", "trace"))
        failures.append(Failure(line["reader"], line["case"], verdict, line["detail"], *kept))
        if log is not None:
            print(*failures[-1][:4], sep=" | ", file=log, flush=True)
    longest, most = max(seconds, line.get("seconds", 0)), max(memory, line.get("memory", 0))
    reports[line["reader"]] = Report(counts, longest, most, failures)


def _lines_of_a_worker(
    root: Path, seed: int, jobs: Sequence[tuple[str, int, int]], readers: str, limits: Limits
) -> Iterable[dict[str, Any]]:
    """The results of a worker until it ends; a case in which it died or hung is a result, too."""
    _remove(root / "work")
    (root / "work").mkdir()
    read, write = os.pipe()
    words = {"jobs": json.dumps(jobs), "limits": json.dumps(limits)}
    worker = _start_worker(write, folder=root, seed=seed, readers=readers, **words)
    os.close(write)
    begun: dict[str, Any] | None = None
    waits = False
    try:
        for line in _lines(read, limits.wall):
            if line is None:
                waits = True
                worker.send_signal(signal.SIGABRT)  # faulthandler says where
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(5)
                worker.kill()
            elif "begins" in line:
                begun = line
            else:
                begun = None
                yield line
        status = worker.wait()
    finally:
        worker.kill()
        worker.wait()
        os.close(read)
    tail = (root / "errors.txt").read_text(errors="replace")[-2000:]
    if begun is not None:
        reader, case, files = begun["reader"], begun["begins"], root / "work" / "case"
        if files.exists():
            files.rename(root / "failed" / f"{_file_name(reader)}-{seed}-{case}")
        verdict = "time" if waits else "crash"
        yield {"case": case, "reader": reader, "verdict": verdict, "detail": f"status {status}", "trace": tail}
    elif status != 0:
        raise RuntimeError(f"The worker ended with status {status} outside of a case: {tail}")


def _start_worker(out: int, **options: Any) -> subprocess.Popen[bytes]:
    words = [sys.executable, __file__, "--worker", str(out)]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    environment.pop("XLA_FLAGS", None)  # eight devices, for other tests
    with (options["folder"] / "errors.txt").open("wb") as errors:
        return subprocess.Popen(words, pass_fds=[out], stdout=errors, stderr=errors, env=environment)


def _lines(read: int, seconds: float) -> Iterable[dict[str, Any] | None]:
    """The lines of JSON that come through a pipe; None, and no more, where none comes in time."""
    rest, in_case = b"", False
    while True:
        if not select.select([read], [], [], seconds if in_case else START_SECONDS)[0]:
            yield None
            return
        chunk = os.read(read, 65536)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in map(json.loads, lines):
            in_case = "begins" in line
            yield line


def summary(reports: Mapping[str, Report], seed: int) -> list[dict[str, Any]]:
    """A row of numbers for every reader."""
    rows = []
    for name, report in reports.items():
        passed = {kind: report.counts.get(kind, 0) for kind in ("returned", "ValueError", "OSError")}
        rows.append(
            {"reader": name, "seed": seed, "cases": sum(report.counts.values()), **passed}
            | {"failures": len(report.failures), "seconds": round(report.seconds, 2)}
            | {"mebibytes": round(report.memory / 2**20)}
        )
    return rows


def failures_in_words(reports: Mapping[str, Report], seed: int) -> str:
    """One line for every failure, with what runs it again."""
    return "\n".join(
        f"{f.reader}, case {f.case}, seed {seed}: {f.verdict}: {f.detail}\n"
        f"    python tests/fuzzing.py --seed {seed} --reader {f.reader!r} --case {f.case}"
        for report in reports.values()
        for f in report.failures
    )


# --- the command --------------------------------------------------------------------------------------------------


def main() -> int:
    """Runs cases and prints counts; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many, over all readers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", help="only readers whose name has this in it")
    parser.add_argument("--case", type=int, help="only this case of them")
    parser.add_argument("--folder", type=Path, help="for samples and the files of failures")
    parser.add_argument("--results", type=Path, help="a file that the numbers are added to, as JSON lines")
    parser.add_argument("--readers", default="fuzzed_readers", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--limits", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        readers = importlib.import_module(options.readers).READERS
        _work(options.folder, options.seed, options.jobs, options.worker, readers, Limits(*options.limits))
        return 0
    cases = {name: (0, count) for name, count in cases_by_reader(options.cases).items()}
    if options.reader is not None:
        cases = {name: some for name, some in cases.items() if options.reader in name}
    if options.case is not None:
        cases = dict.fromkeys(cases, (options.case, options.case + 1))
    root = (options.folder or Path(tempfile.mkdtemp(prefix="fuzzing-"))).absolute()
    begin = time.perf_counter()
    reports = campaign(cases, options.seed, root, log=sys.stderr)
    rows = summary(reports, options.seed)
    for row in rows:
        print(json.dumps(row))
    if options.case is not None:
        print(*(f.trace for report in reports.values() for f in report.failures), sep="\n")
    failures = sum(row["failures"] for row in rows)
    seconds = time.perf_counter() - begin
    print(f"{sum(row['cases'] for row in rows)} cases, {failures} failures, {seconds:.0f} s; files in {root}")
    if options.results is not None:
        with options.results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

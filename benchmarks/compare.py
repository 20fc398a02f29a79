"""Is this checkout faster or slower than another one? The main benchmarks of both, in turn, with ratios.

    python -m benchmarks.compare HEAD~1               # against a revision of this repository
    python -m benchmarks.compare ../other --jobs inr  # against a folder

Each round runs a benchmark in both checkouts, one after the other, in processes of their own. A ratio is the base's
time over this checkout's in the same round: above 1, this checkout is faster. It is printed with its lowest and highest
value over the rounds: where 1 is between them, neither is shown to be faster.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

HERE = Path(__file__).parents[1]
JOBS = {
    "inr": (
        *("benchmarks.inr", "--batch-sizes", "16", "--micro-batches", "2", "--repeats", "3", "--matmul-size", "512"),
        *("--zoo-networks", "32", "--zoo-steps", "20", "--zoo-chunks", "32"),
    ),
    "cnn": (
        *("benchmarks.cnn", "--activations", "relu", "--batch-sizes", "8", "--micro-batches", "2", "--repeats", "3"),
        *("--networks", "4", "--chunks", "1", "--examples", "512", "--features", "64", "--matmul-size", "512"),
    ),
    "matching": (
        *("benchmarks.matching", "--widths", "64", "1024", "--depths", "4", "--batches", "1", "256", "--numbers", "4"),
        *("--solver-widths", "16", "256", "--solver-batches", "1"),
    ),
    "embed": ("benchmarks.embed", "--widths", "16", "--features", "32", "--sizes", "4"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    base: Annotated[str, tyro.conf.Positional]
    """A revision of this repository, like HEAD~1 or a tag, or the folder of another checkout."""
    jobs: tuple[str, ...] = tuple(JOBS)
    """The benchmarks to run."""
    rounds: int = 3
    """How often each is run in both checkouts."""


def main(config: Config) -> list[dict[str, Any]]:
    """Prints a line for each measurement with its ratio, and returns them.

    Raises:
      ValueError: If there is no such checkout or benchmark, or one of them fails in a checkout.
    """
    if strange := [job for job in config.jobs if job not in JOBS]:
        raise ValueError(f"--jobs names {strange[0]!r}; expected some of {', '.join(JOBS)}.")
    if config.rounds < 1:
        raise ValueError(f"--rounds is {config.rounds}; expected 1 or more.")
    rows = []
    with checkout(config.base) as base, tempfile.TemporaryDirectory() as cache:
        for job in config.jobs:
            rounds = [[times(folder, job, cache) for folder in (base, HERE)] for _ in range(config.rounds)]
            for row in ratios(rounds):
                rows.append({"job": job, **row})
                print(_line(rows[-1]), flush=True)
    return rows


@contextlib.contextmanager
def checkout(base: str) -> Iterator[Path]:
    """The folder of a checkout; of a revision a temporary one.

    Raises:
      ValueError: If there is neither such a folder nor such a revision.
    """
    if (Path(base) / "benchmarks").is_dir():
        yield Path(base).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "base"
        made.mkdir()
        packed = subprocess.run(["git", "-C", str(HERE), "archive", base], capture_output=True)
        if packed.returncode:
            cause = packed.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise ValueError(
                f"{base}: expected a revision of {HERE} or the folder of a checkout with benchmarks/; git says "
                f"{cause}. Fetch the revision, or name a folder."
            )
        subprocess.run(["tar", "-x", "-C", str(made)], input=packed.stdout, check=True)
        yield made


def times(folder: Path, job: str, cache: str) -> dict[str, float]:
    """The median seconds of each measurement of a benchmark, run in a checkout.

    Raises:
      ValueError: If the benchmark fails there.
    """
    module, *options = JOBS[job]
    given = {"PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": cache}
    run = subprocess.run(
        [sys.executable, "-m", module, *options], cwd=folder, env=os.environ | given, capture_output=True, text=True
    )
    if run.returncode:
        cause = (run.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ValueError(
            f"{folder}: the benchmark {module} failed; it says: {cause[:500]}. If this checkout lacks it or one of its "
            f"options, compare others with --jobs: {', '.join(name for name in JOBS if name != job)}."
        )
    return dict(
        pair for line in run.stdout.splitlines() if line.startswith("{") for pair in _medians(json.loads(line), "")
    )


def ratios(rounds: list[list[dict[str, float]]]) -> list[dict[str, Any]]:
    """For each measurement that both checkouts have: seconds of both, and the ratio with its spread over rounds."""
    common = [name for name in rounds[0][1] if all(name in side for both in rounds for side in both)]
    rows = []
    for name in common:
        each = [base[name] / mine[name] for base, mine in rounds]
        rows.append(
            {
                "measurement": name,
                "base_s": statistics.median(base[name] for base, _ in rounds),
                "this_s": statistics.median(mine[name] for _, mine in rounds),
                "ratio": statistics.median(each),
                "lowest": min(each),
                "highest": max(each),
            }
        )
    return rows


# --- private ------------------------------------------------------------------------------------------------------

# What tells the lines of a benchmark apart.
_NAMED_BY = (
    *("benchmark", "job", "implementation", "network", "activation", "dtype", "width", "depth", "features"),
    *("batch", "batch_size", "micro_batch", "chunk", "number", "networks"),
)


def _medians(row: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The measurements of one line with their names: where the line has several, each by its own key."""
    name = " ".join([prefix, *(f"{key}={row[key]}" for key in _NAMED_BY if key in row)]).strip()
    if "median_s" in row:
        yield name, row["median_s"]
    for key, value in row.items():
        if isinstance(value, Mapping) and key != "environment":
            yield from _medians(value, f"{name} {key}".removesuffix(" seconds"))


def _line(row: Mapping[str, Any]) -> str:
    spread = f"{row['ratio']:5.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]"
    return f"{spread}  {row['base_s']:.4g} s -> {row['this_s']:.4g} s  {row['job']}: {row['measurement']}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        sys.exit(str(error))

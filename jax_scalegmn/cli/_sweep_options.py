"""The options of `jax-scalegmn sweep`."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """The options of every command."""

    storage: str
    """The database that holds the state of sweeps, as a URL, like sqlite:///s.db on one machine or
    postgresql://user@host/name for several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Make(Stored):
    """Put a study with all of its trials into a storage."""

    file: Positional[Path]
    """The study file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named(Stored):
    """The options of the commands on a study in a storage."""

    study: str | None = None
    """The name of the study. It is needed if the storage holds several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Working(Named):
    """The options of workers."""

    trials_per_program: int = 16
    """The number of trials that are trained at once, as one program. It is the size of the program: trials that are
    fewer leave places empty. Numbers that are to be the same to the last bit need the same size."""
    pruner: Literal["none", "median"] = "none"
    """Whether a trial ends early. median ends one whose selection loss is above the median of those before it."""
    heartbeat: int = 15
    """The number of seconds between two signs of life. After four times as many without one, another worker takes the
    trials of a worker that died."""
    retries: int = 5
    """The number of times that a trial is given to another worker; a trial that kills every worker fails then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work(Working):
    """Run trials until none is left; start it as often as there are machines or devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status(Named):
    """Say how many trials wait, run, are complete, pruned or failed, and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Named):
    """Show all trials as a table, best first, and write a page with parallel coordinates."""

    out: Path | None = None
    """The HTML file. The default is report.html in the folder of the study."""
    json: Path | None = None
    """The JSON file that the table is written to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch(Working):
    """Start workers, on this machine or as jobs of Slurm."""

    workers: int
    """The number of workers."""
    executor: Literal["local", "slurm"] = "local"
    """Where they run. local starts processes here and waits for them; slurm submits jobs, and returns."""
    minutes: int = 60
    """The time limit of a Slurm job."""
    slurm: tuple[str, ...] = ()
    """Further options of Slurm jobs as name=value, by sbatch's names, like partition=gpu gres=gpu:1 cpus-per-task=8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Search over the options of an experiment, with workers that may die: make, work, status, report, launch."""

    command: OmitSubcommandPrefixes[OmitArgPrefixes[Make | Work | Status | Report | Launch]]


SweepCommand: TypeAlias = Make | Work | Status | Report | Launch

"""What a person sees while an experiment runs: progress bars, and a clean way out."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import rich.console
import rich.progress
from jax.experimental import multihost_utils

from jax_scalegmn import distributed

WIDTH = 120  # characters of a line in a file or a pipe, where the widest table needs 110 and rich would take 80


def make_console() -> rich.console.Console:
    """A console as wide as the terminal, or as the variable COLUMNS says, or `WIDTH` where there is neither."""
    made = rich.console.Console()
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDTH
    return made


console = make_console()


@contextlib.contextmanager
def bar(description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar with rate and remaining time; yields `advance(amount, note="")`."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(f"{unit}, {{task.fields[rate]}}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, rate="", note="")

        def advance(amount: int, note: str = "") -> None:
            progress.advance(task, amount)
            shown = progress.tasks[0]
            rate = shown.completed / shown.elapsed if shown.elapsed else 0.0
            progress.update(task, rate=f"{rate:.1f}/s", note=note)

        yield advance


AGAIN = 75  # the exit status that asks for another call, EX_TEMPFAIL of sysexits.h


class Interrupted(SystemExit):
    """The end of a run that has saved its state and waits to be resumed, with exit status 75."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = AGAIN


# Schedulers say by these that a program is about to be ended: most by SIGTERM, Slurm and submitit by the last two.
NOTICES = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Interruption:
    """Turns SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 into a flag for the length of a `with`; a second SIGINT stops at once.

    A signal to one of several processes stops all of them at the same place, and so does a notice that JAX's preemption
    service has, like a SIGTERM of the time between `jax.distributed.initialize` and the `with`. SIGUSR1 and SIGUSR2 are
    left to those who handle them already.
    """

    requested = False
    _places = itertools.count()  # JAX's service agrees on one of them, so they go on where a `with` ends

    def __enter__(self) -> "Interruption":
        users = NOTICES[2:]
        mine = [number for number in NOTICES if number not in users or signal.getsignal(number) == signal.SIG_DFL]
        self._before = {number: signal.signal(number, self._handle) for number in mine}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self) -> bool:
        """Whether a signal or a notice came to any process; all have to ask, at the same places."""
        if _told_by_jax(next(self._places)) and not self.requested:
            self._stop("JAX's preemption service")
        return distributed.any_process(self.requested)

    def stop_if_requested(self, saved: str) -> None:
        """Ends the program, with what was saved and how to continue, if it is due."""
        if self.due():
            message = f"Interrupted. Saved: {saved}. Continue with the same command and --resume."
            console.print(message, soft_wrap=True)
            raise Interrupted(message)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop(signal.Signals(number).name)

    def _stop(self, reason: str) -> None:
        self.requested = True
        console.print(f"{reason}: stopping after the current piece of work ...")


def _told_by_jax(place: int) -> bool:
    """Whether the processes agreed, by JAX's preemption service, to stop at this place."""
    try:
        return multihost_utils.reached_preemption_sync_point(place)
    except RuntimeError:  # jax_enable_preemption_service is off
        return False

"""What a person sees while an experiment runs: progress bars, and a clean way out."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import rich.console
import rich.progress

from jax_scalegmn import distributed

console = rich.console.Console()


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


class Interruption:
    """Turns SIGINT and SIGTERM into a flag for the length of a `with`; a second SIGINT stops at once.

    A signal to one of several processes stops all of them at the same place.
    """

    requested = False

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_if_requested(self, saved: str) -> None:
        """Ends the program, with what was saved and how to continue, if a signal came to any process."""
        if distributed.any_process(self.requested):
            message = f"Interrupted. Saved: {saved}. Continue with the same command and --resume."
            console.print(message, soft_wrap=True)
            raise Interrupted(message)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        console.print(f"{signal.Signals(number).name}: stopping after the current piece of work ...")

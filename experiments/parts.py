"""The parts of a zoo: fitted in pieces of a few minutes, so that a run that is killed loses one of them at most."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments import progress, runs
from jax_scalegmn import distributed
from jax_scalegmn.zoo import Zoo

MINUTES = 10.0  # what may be lost where `--every-minutes` says nothing
_QUICK = 1e7  # a part that sees fewer pixels, over all networks and steps, is one piece: seconds on two cores


class Plan(NamedTuple):
    """What is fitted of a part, and how much.

    Attributes:
      path: The file of the part; those of its pieces are named like it.
      count: The networks of the part.
      group: The networks that are fitted together, on all devices. A piece has a whole number of groups, so that its
        networks are the same as in any other pieces, to the last bit.
      pixels: The pixels that a network sees in its training.
      unit: What is fitted, in messages.
    """

    path: Path
    count: int
    group: int
    pixels: float
    unit: str


def fit(
    config: runs.RunConfig,
    plan: Plan,
    fit_rows: Callable[[int, int], Zoo],
    join: Callable[[list[Zoo]], Zoo],
    interruption: progress.Interruption,
    advance: Callable[..., None],
) -> Zoo:
    """Fits the networks of a part and saves it, or reads what a former run saved of it and fits the others.

    Args:
      config: The run's options.
      plan: The part.
      fit_rows: (the first network, how many) -> these networks.
      join: Zoos of pieces -> one zoo.
      interruption: Stops the run after a piece.
      advance: Is told of pieces that were read.
    """
    saved = runs.read_part(plan.path)
    if saved is not None:
        advance(plan.count, "read")
        return saved
    pieces, done = _saved_pieces(plan)
    if done:
        advance(done, "read")
    pace = _Pace(MINUTES if config.every_minutes is None else config.every_minutes, plan)
    while done < plan.count:
        size = distributed.every_process(pace.size(plan.count - done))[0]
        begin = time.perf_counter()
        piece = runs.on_host(fit_rows(done, size))
        pace.took(size, time.perf_counter() - begin)
        pieces.append(piece)
        done += size
        if done < plan.count:
            runs.save_zoo(piece, _piece_path(plan.path, done - size, done))
            interruption.stop_if_requested(f"{done} of {plan.count} {plan.unit} of {plan.path.stem}")
    whole = join(pieces) if len(pieces) > 1 else pieces[0]
    runs.save_zoo(whole, plan.path)
    if distributed.is_writer():
        for path in _piece_files(plan.path):
            path.unlink(missing_ok=True)
    return whole


# --- private ------------------------------------------------------------------------------------------------------


class _Pace:
    """How many networks are fitted in the minutes after which a piece is saved."""

    def __init__(self, minutes: float, plan: Plan):
        self._seconds, self._plan = 60 * minutes, plan
        quick = minutes >= 1 and plan.count * plan.pixels <= _QUICK
        self._size = plan.count if quick else plan.group  # the first piece measures the time of a group

    def size(self, left: int) -> int:
        """The networks of the next piece. The last one has a whole group at least."""
        return left if left - self._size < self._plan.group else self._size

    def took(self, size: int, seconds: float) -> None:
        """Learns how long a piece took."""
        each = seconds / size
        self._size = max(1, int(0.8 * self._seconds / each / self._plan.group)) * self._plan.group


def _saved_pieces(plan: Plan) -> tuple[list[Zoo], int]:
    """The pieces that a former run saved, one after the other from the first network on, and how many networks."""
    pieces, ends = [], [0]
    for path, (first, last) in _piece_files(plan.path).items():
        piece = runs.read_part(path) if first == ends[-1] and last < plan.count else None
        if piece is None:
            break
        pieces.append(piece)
        ends.append(last)
    # All processes go on from where all of them can, and have read what is removed after the last piece.
    agreed = min(distributed.every_process(len(pieces)))
    return pieces[:agreed], ends[agreed]


def _piece_path(path: Path, first: int, last: int) -> Path:
    return path.with_name(f"{path.stem}.{first:08d}-{last:08d}.piece")


def _piece_files(path: Path) -> dict[Path, tuple[int, int]]:
    """The files of the pieces of a part, with their first network and the one after their last, in order."""
    found = {}
    for file in sorted(path.parent.glob(f"{path.stem}.*.piece")):
        match = re.fullmatch(r".*\.(\d+)-(\d+)\.piece", file.name)
        if match:
            found[file] = (int(match[1]), int(match[2]))
    return found

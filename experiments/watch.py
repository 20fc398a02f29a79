"""The command line of an experiment. Of several processes each is watched, since JAX aborts those that lose process 0.

JAX's coordination service runs in process 0. Where it dies, JAX aborts the other processes, which can neither say why
nor choose their exit status. So the command goes on in a child, and its parent says it, and ends with status 75.
"""

import contextlib
import ctypes
import gc
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

import tyro

from experiments import progress

# What JAX says before it aborts a process that has lost another one.
_LOST = b"JAX distributed service detected fatal errors"
_PR_SET_PDEATHSIG = 1  # of Linux
_BAD_INPUT = 2  # the exit status, that of an unknown option
_OURS = ("jax_scalegmn", "experiments", "__main__")
_COLLECTED_AFTER = 100_000  # new objects; at Python's 700, looking for garbage is a tenth of a short run


def command(main: Callable[[Any], Any], presets: Mapping[str, tuple[str, Any]]) -> None:
    """Runs an experiment by the options of the command line, watched where there may be other processes."""
    config = tyro.extras.overridable_config_cli(presets)
    if config.compile_only is None and may_have_peers(config.coordinator):
        who = "This process" if config.process is None else f"Process {config.process} of {config.processes}"
        go_on_in_child(who)
    with told_in_one_line(), _rare_collections():
        main(config)


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Ends the program with one line and status 2 where the experiment refuses what it was given.

    Errors of other packages keep their traceback: nobody worded them for the user.

    Raises:
      SystemExit: With status 2 after bad input, or that of the experiment.
    """
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        _refuse(error, error.code)
    except (ImportError, ValueError, OSError, FloatingPointError) as error:
        if not (isinstance(error, OSError) or _is_ours(error)):
            raise
        _refuse(error, str(error))


def may_have_peers(coordinator: str | None) -> bool:
    """Whether this may be one of several processes: they are named, or it runs on a cluster or a TPU."""
    tasks = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    named = [coordinator, os.environ.get("JAX_COORDINATOR_ADDRESS"), os.environ.get("KUBERNETES_SERVICE_HOST")]
    return any(named) or tasks != ["1", "1"] or importlib.util.find_spec("libtpu") is not None


def farewell(who: str, reason: str) -> str:
    """What a process says that ends since it has lost another one."""
    cure = "Start all of them again by the same command and --resume."
    return f"{who} ends, since another one is lost ({reason}). {cure}"


def go_on_in_child(who: str) -> None:
    """Returns in a child of this process, which passes signals on to it and ends as it ends.

    Where JAX aborts the child since another process is lost, this one says so and ends with status 75.

    Args:
      who: What the sentence calls this process.
    """
    if not hasattr(os, "fork"):  # Windows
        return
    sys.stdout.flush()
    sys.stderr.flush()
    parent, (reader, writer) = os.getpid(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, sys.stderr.fileno())
        os.close(writer)
        os.setpgid(0, 0)  # so that Ctrl-C comes to the parent alone, which passes it on
        _end_with(parent)
        return
    os.close(writer)

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (*progress.NOTICES, signal.SIGHUP):
        signal.signal(number, pass_on)
    lost = _copy_errors(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT and lost:
        print(farewell(who, "JAX's own message is above"), file=sys.stderr, flush=True)
        os._exit(progress.AGAIN)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# --- private ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Looks for cyclic garbage less often, and never in what was imported or is left when the program ends.

    Tracing makes hundreds of thousands of objects, nearly all of which stay.
    """
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(max(usual[0], _COLLECTED_AFTER))
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.freeze()


def _is_ours(error: BaseException) -> bool:
    """Whether the library or an experiment raised an error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").split(".")[0] in _OURS


def _refuse(error: BaseException, message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    if isinstance(error.__cause__, TimeoutError):
        os._exit(_BAD_INPUT)  # JAX still waits for the missing processes, and would complain at an orderly end
    raise SystemExit(_BAD_INPUT) from error


def _copy_errors(reader: int) -> bool:
    """Copies what the child writes to stderr until it ends; whether JAX said that another process is lost."""
    tail, lost = b"", False
    while chunk := os.read(reader, 1 << 16):
        os.write(sys.stderr.fileno(), chunk)
        tail = (tail + chunk)[-(1 << 17) :]
        lost = lost or _LOST in tail
    os.close(reader)
    return lost


def _end_with(parent: int) -> None:
    """Has this process killed when its parent is, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

"""Signals that end a program like an interruption from the keyboard, wherever they arrive."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_AGAIN_SECONDS = 0.02


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Turns SIGTERM and SIGINT into KeyboardInterrupt as long as a `with` lasts.

    Python drops what is raised in a destructor or in a callback of its garbage collector, JAX's for one: a signal that
    arrives there is sent again a moment later. One that was ignored before stays so.
    """
    numbers = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _is_dropped(frame):
        raise KeyboardInterrupt
    again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _is_dropped(frame: FrameType | None) -> bool:
    """Whether Python drops what is raised in a frame."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code in callbacks:
            return True
        frame = frame.f_back
    return False

"""Signals that end a program like an interruption from the keyboard, wherever they arrive."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_AGAIN_SECONDS = 0.02


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Turns SIGTERM and SIGINT into KeyboardInterrupt as long as a `with` lasts; one that was ignored stays so.

    Python drops what is raised in a destructor, in a callback of a weak reference, or in one of its garbage collector,
    of which JAX has one: what would be dropped there is sent again a moment later.
    """
    numbers = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) != signal.SIG_IGN]
    report = sys.unraisablehook

    def dropped(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt or not numbers:
            report(unraisable)
            return
        again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), numbers[0]))
        again.daemon = True
        again.start()

    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)

"""One run has a folder to itself: who owns it is in owner.json, and a second launcher is refused."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_FILE = "owner.json"
_REFRESHED = 15.0  # seconds between two signs of life
_STALE = 120.0  # seconds without one after which the owner on another machine is dead


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Owns a folder, which is made where it is absent, until the block or the program ends.

    The owner holds a lock on owner.json, which says its host, its process and when it began, and refreshes the file.
    What a killed run left is taken over: at once on the same machine, where the lock is free, and after two minutes
    from another one, whose lock a network file system may not show.

    Raises:
      SystemExit: If another run owns the folder.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    descriptor = _locked(path)
    done = threading.Event()
    try:
        me = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        os.fsync(descriptor)  # other machines see it, too
        threading.Thread(target=_refresh, args=(path, done), daemon=True).start()
        yield
    finally:
        done.set()
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # a folder that got no files


def written(folder: Path) -> str | None:
    """What the owner of a folder wrote there, as this process sees it; None if it sees none."""
    try:
        return (folder / _FILE).read_text()
    except OSError:
        return None


def _locked(path: Path) -> int:
    """The open and locked file of the owner."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor) or _lives_elsewhere(path):
                raise SystemExit(_refusal(path))
            if os.path.exists(path) and os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner ended in between, and removed it


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _owner(path: Path) -> dict[str, object]:
    try:
        owner = json.loads(path.read_text() or "{}")
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _lives_elsewhere(path: Path) -> bool:
    """Whether a run on another machine gave a sign of life lately."""
    owner = _owner(path)
    return bool(owner) and owner.get("host") != socket.gethostname() and time.time() - path.stat().st_mtime < _STALE


def _refusal(path: Path) -> str:
    owner = _owner(path)
    who = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('time')}" if owner else "another process"
    return (
        f"{path.parent} belongs to a run that goes on ({who}); expected a folder that no other run uses. Wait for it, "
        "or name another folder by --out."
    )


def _refresh(path: Path, done: threading.Event) -> None:
    while not done.wait(_REFRESHED):
        with contextlib.suppress(OSError):
            os.utime(path)

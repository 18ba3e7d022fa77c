"""Locks on files that a run writes, which end with its process: what is not locked is of a run that is over."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(descriptor: int) -> bool:
    """Lock a file. Returns False where another run holds it; True too where nothing can be locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def unlock(descriptor: int) -> None:
    """Unlock a file, in forked copies of the process too."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_locked(path: Path) -> bool:
    """Return whether a run that is under way, in this process or another, writes a file."""
    try:
        descriptor = os.open(path, os.O_WRONLY)  # not to read only: NFS locks what may be written
    except OSError:
        return False
    try:
        return not lock(descriptor)
    finally:
        os.close(descriptor)

"""Writes out what is left when a process ends: at interpreter exit, and on SIGTERM."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import threading
from types import FrameType
from typing import Protocol

TERMINATE_SECONDS = 10.0


class Closable(Protocol):
    """Something with work left to write."""

    def close(self, seconds: float | None = None) -> None:
        """Write it out, in at most so many seconds."""


_open: set[Closable] = set()
_lock = threading.Lock()
_ending = threading.Lock()
_installed = False
_wakeup = -1
_held = threading.local()


def register(closable: Closable) -> None:
    """Have something closed when the process ends. Call it on the main thread for SIGTERM to be watched too."""
    global _installed
    _open.add(closable)
    with _lock:
        if not _installed:
            _installed = True
            atexit.register(_close_all)
            if hasattr(os, "register_at_fork"):
                # A forked child has no thread that could write anything: it must not wait for one when it exits.
                os.register_at_fork(after_in_child=_open.clear)
            _watch_sigterm()


def unregister(closable: Closable) -> None:
    """It has been closed."""
    _open.discard(closable)


def close_before_others() -> None:
    """At the interpreter's exit, close what is open before anything that has been registered since runs its own hook.

    A client of another library, opened after telemetry, would else be shut down before telemetry has written to it.
    """
    with _lock:
        if _installed:
            atexit.unregister(_close_all)
            atexit.register(_close_all)


def _close_all(seconds: float | None = None) -> None:
    for closable in list(_open):
        closable.close(seconds)


def _watch_sigterm() -> None:
    """Close what is open when SIGTERM would end the process, then let it end as it would have.

    A Python handler alone would wait for the main thread, which may sit in a collective for ranks that are gone. The
    interpreter's wake-up pipe is written at once, and read by a thread. Where the program handles SIGTERM or uses the
    pipe itself, now or later, both are left alone.
    """
    global _wakeup
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    try:
        reader, writer = os.pipe()
    except OSError:  # no descriptors are left
        return
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    reads = threading.Thread(target=_wait_for_sigterm, args=(reader,), name="telemetry-sigterm", daemon=True)
    if previous != -1 or not _has_started(reads):
        signal.set_wakeup_fd(previous)
        os.close(writer)
        os.close(reader)
        return
    _wakeup = writer
    signal.signal(signal.SIGTERM, _on_sigterm)
    os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_forget_in_child)


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    """The thread that reads the pipe ends the process sooner, where nobody has taken the pipe (asyncio does)."""
    if not _has_started(threading.Thread(target=_close_and_end, name="telemetry-sigterm", daemon=True)):
        _end()


def _has_started(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # no threads are left
        return False
    return True


def _wait_for_sigterm(reader: int) -> None:
    while signal.SIGTERM not in os.read(reader, 64) or signal.getsignal(signal.SIGTERM) is not _on_sigterm:
        pass
    _close_and_end()


def _close_and_end() -> None:
    if not _ending.acquire(blocking=False):
        return
    with contextlib.suppress(Exception):
        _close_all(TERMINATE_SECONDS)
    _end()


def _end() -> None:
    """End the process as SIGTERM does where nobody handles it."""
    # Python sets dispositions on the main thread only; C does so on any.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGTERM), None)
    os.kill(os.getpid(), signal.SIGTERM)


def _hold_sigterm() -> None:
    """Until a forked child has forgotten: one that is ended at once must not lose the signal, or tell its parent."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _forget_in_child() -> None:
    """A forked child (a data-loader worker) ends by SIGTERM as it always did, and tells its parent nothing."""
    current = signal.set_wakeup_fd(-1)
    if current != _wakeup:
        signal.set_wakeup_fd(current)
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release_sigterm()

"""Backends that keep what they are given, and in which something goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Sequence
from typing import Any

from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Record

AT_MOST = 20.0  # seconds, on a machine with much else to do


def no_space() -> None:
    raise OSError("no space left on device")


class Faulty(MemoryBackend):
    """Has a fault at some calls of one of its methods.

    Args:
        verb: open, write or close.
        fault: what happens before anything is kept.
        at: which calls of the method, counted from 1; all where it is None.
        name: what it is called.

    Attributes:
        calls: of its methods, by name, in their order.
    """

    def __init__(
        self,
        verb: str = "write",
        fault: Callable[[], Any] = no_space,
        at: Container[int] | None = None,
        name: str = "faulty",
    ) -> None:
        super().__init__()
        self.name = name
        self.calls: list[str] = []
        self._verb, self._fault, self._at = verb, fault, at

    def open(self, run: Run) -> None:
        self._called("open")
        super().open(run)

    def write(self, step: int, records: Sequence[Record]) -> None:
        self._called("write")
        super().write(step, records)

    def close(self) -> None:
        self._called("close")
        super().close()

    def _called(self, verb: str) -> None:
        self.calls.append(verb)
        if verb == self._verb and (self._at is None or self.calls.count(verb) in self._at):
            self._fault()


class Blocking(Faulty):
    """Blocks in the n-th call of one of its methods until it is let go; raises then, if it is told to."""

    def __init__(self, verb: str = "write", call: int = 1, raises: bool = False) -> None:
        super().__init__(verb, self._block, {call}, "blocking")
        self.stuck, self.gate, self.woken = threading.Event(), threading.Event(), threading.Event()
        self._raises = raises

    def _block(self) -> None:
        self.stuck.set()
        self.gate.wait(AT_MOST)
        self.woken.set()
        if self._raises:
            raise OSError("connection timed out")

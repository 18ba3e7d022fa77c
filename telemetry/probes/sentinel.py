"""Keeps what every step shows, its losses and its pace, until a due step looks at them. Nothing is waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from telemetry.probes.pace import Pace

KEPT = 10_000  # microbatches

Names: TypeAlias = Sequence[Any]
"""What samples are called; None for one without a name."""


class Sentinel:
    """The losses that a trainer has trained on, from step to step, and what steps took.

    Attributes:
        pace: what steps took.
        watches: whether a trainer shows them.
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self._names: Names = ()
        self._seen: deque[tuple[int, Any, Names]] = deque(maxlen=KEPT)
        self._end: Callable[[], None] | None = None

    @property
    def watches(self) -> bool:
        """Whether a trainer shows its losses."""
        return self._end is not None

    def watch(self, begin: Callable[[Sentinel], Callable[[], None] | None]) -> None:
        """Have ``begin(self)`` see to it that every step is shown, unless another does; it returns what ends that."""
        if self._end is None:
            self._end = begin(self)

    def announce(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Say what the next microbatch's samples are: see :class:`telemetry.probes.forward.Microbatch`.

        Their names alone are kept: their sound may be large.
        """
        self._names = [one.get("sample_id") if isinstance(one, Mapping) else None for one in metadata or ()]

    def note(self, step: int, loss: Any) -> None:
        """Keep what a microbatch of a step, counted as after its update, has been trained on. Costs a list's entry."""
        if isinstance(loss, Tensor):
            self._seen.append((step, loss.detach() if loss.requires_grad else loss, self._names))
            if self._names:
                self._names = ()

    def take(self) -> list[tuple[int, Tensor, Names]]:
        """Hand over all that was kept: step, loss (0-d), and what its samples are called."""
        seen = [*self._seen]
        self._seen.clear()
        return seen

    def end(self) -> None:
        """Watch no more."""
        if self._end is not None:
            self._end()
            self._end = None

"""How long steps take, and how much of that waits for data: looked at on every step, and nothing waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T", int, float)
_KEPT = 1000  # steps that are not yet added up


@dataclass
class Steps:
    """What some steps took.

    Attributes:
        count: how many.
        seconds: from waiting for their data to the end of their update; what stands between steps is not in it.
        loading: of these, seconds of waiting for data; None where nobody shows that.
        tokens: positions of their batches, padding included; None where a batch has no ids.
        audio: seconds of their target audio; None where a batch does not say how long that is.
    """

    count: int = 0
    seconds: float = 0.0
    loading: float | None = 0.0
    tokens: int | None = 0
    audio: float | None = 0.0


class Pace:
    """Times steps for :meth:`take`. The first is not counted: it warms up."""

    def __init__(self) -> None:
        self._steps = Steps()
        self._ended: list[tuple[float, float | None, int | None, float | None]] = []  # steps, of which they are the sum
        self._began = 0.0  # 0 where no step is under way
        self._loading: float | None = None
        self._tokens: int | None = None
        self._audio: float | None = None
        self._warm = False

    def begin(self) -> None:
        """Begin a step of which nothing is known but when it begins and ends."""
        self._began, self._loading, self._tokens, self._audio = perf_counter(), None, None, None

    def load(self, began: float, batches: Sequence[Any], ids: str) -> None:
        """Take in what has just been loaded for a step, since a moment of ``time.perf_counter``.

        Args:
            began: when loading began, and the step with it.
            batches: the step's microbatches.
            ids: the name of what a batch is counted by.
        """
        if not batches:  # a stream has ended, and no step begins
            self._began = 0.0
            return
        self._began = began
        self._loading = perf_counter() - began
        if len(batches) == 1:
            self._tokens, self._audio = _known(batches[0], ids)
            return
        whole: int | None = 0
        heard: float | None = 0.0
        for batch in batches:
            tokens, audio = _known(batch, ids)
            whole = None if whole is None or tokens is None else whole + tokens
            heard = None if heard is None or audio is None else heard + audio
        self._tokens, self._audio = whole, heard

    def end(self) -> None:
        """End the step that is under way, where there is one."""
        began = self._began
        if not began:
            return
        self._began = 0.0
        if not self._warm:
            self._warm = True
            return
        ended = self._ended
        ended.append((perf_counter() - began, self._loading, self._tokens, self._audio))
        if len(ended) == _KEPT:
            self._add_up()

    def each(self) -> list[float]:
        """Return the seconds of each step that :meth:`take` hands over next; none where these are very many."""
        return [] if self._steps.count else [ended[0] for ended in self._ended]

    def take(self) -> Steps:
        """Hand over what the steps took that have ended since this was last asked."""
        self._add_up()
        steps, self._steps = self._steps, Steps()
        return steps

    def _add_up(self) -> None:
        """Add up what has been kept of steps, which on every step would take longer than to keep it."""
        ended, self._ended = self._ended, []
        if ended:
            steps, (seconds, loading, tokens, audio) = self._steps, zip(*ended, strict=True)
            steps.count += len(ended)
            steps.seconds += sum(seconds)
            steps.loading = _sum((steps.loading, *loading))
            steps.tokens = _sum((steps.tokens, *tokens))
            steps.audio = _sum((steps.audio, *audio))


def _sum(parts: Sequence[T | None]) -> T | None:
    """Return the sum of numbers; None where one is missing."""
    return None if None in parts else sum(parts)  # type: ignore[return-value, arg-type]


def _known(batch: Any, ids: str) -> tuple[int | None, float | None]:
    """Return a batch's positions, of ids ``[samples, positions, ...]`` or of one packed row, and its target's seconds.

    By shapes alone, and by lengths that clips hold as a number: a property may read a file. A batch is what a user
    makes it: nothing that it does ends training.
    """
    try:
        held, metadata, audio = batch.get(ids), batch.get("metadata"), None
        if metadata:
            clips = [clip for one in metadata for clip in one.get("target") or ()]
            lengths: list[Any] = [getattr(clip, "__dict__", {}).get("seconds") for clip in clips]
            audio = float(sum(lengths)) if lengths and None not in lengths else None
        if not isinstance(held, Tensor) or held.is_floating_point():
            return None, audio
        return (held.numel() if held.dim() < 3 else held.shape[0] * held.shape[1]), audio
    except Exception:  # noqa: BLE001  (there is nothing to be known of it)
        return None, None

"""Inputs: are transcripts as long as their clips are? Over all due steps, from what travels beside the batch."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np

from telemetry.delivery.recorder import Recorder
from telemetry.instruments.base import Instrument, Step
from telemetry.probes.forward import Microbatch
from telemetry.records import Metric

FEWEST = 12
LEAST_SPREAD = 0.25  # of either length, over its mean: of clips that are all as long, nothing can be told
_KINDS = (("target", "target_transcript"), ("reference", "ref_transcript"))


class Correlation(Metric):
    """Pearson's correlation of pairs, from their number and sums. Absent of few pairs, or of some that hardly vary."""

    ops = ("sum",) * 6

    def _result(self, n: np.ndarray, *sums: np.ndarray) -> float | None:  # type: ignore[override]
        count = float(n)
        x, y, xx, yy, xy = map(float, sums)
        if count < FEWEST:
            return None
        spreads = [math.sqrt(max(0.0, squares / count - (total / count) ** 2)) for total, squares in ((x, xx), (y, yy))]
        if spreads[0] < LEAST_SPREAD * x / count or spreads[1] < LEAST_SPREAD * y / count:
            return None
        return (xy / count - x * y / count**2) / (spreads[0] * spreads[1])


class TranscriptInstrument(Instrument):
    """Correlates the lengths of transcripts and clips; host numbers alone."""

    def __init__(self) -> None:
        self._run: weakref.ref[Recorder] | None = None
        self._pairs: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen no training."""
        return vars(self) | {"_run": None}

    def begin(self, step: Step) -> None:
        """Begin anew in another training."""
        if self._run is None or self._run() is not step.recorder:
            self._run, self._pairs = weakref.ref(step.recorder), {}

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Add the samples of a microbatch."""
        for metadata in microbatch.metadata:
            for kind, name in _KINDS:
                clips, text = metadata.get(kind) or (), metadata.get(name)
                seconds = sum(float(getattr(clip, "seconds", 0) or 0) for clip in clips)
                if isinstance(text, str) and text and seconds > 0:
                    x, y = float(len(text)), seconds
                    pair = np.array([1, x, y, x * x, y * y, x * y])
                    self._pairs[kind] = self._pairs.get(kind, np.zeros(6)) + pair

    def finish(self, step: Step) -> None:
        """Show what all due steps so far say."""
        for kind, sums in self._pairs.items():
            step.recorder.metric(f"inputs/length_correlation/{kind}", Correlation(*map(float, sums)))

"""What the set-up checks add to the first due step, and to later ones: trainings with and without them, in turn."""

from __future__ import annotations

import statistics
import tempfile

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.instruments.asked import AskedLabels
from telemetry.instruments.causality import CausalityInstrument
from telemetry.instruments.setup import SetupInstrument
from tests.benchmarks.step_time import Stopwatch, SyntheticSpeech, make_model, train

CHECKS = (AskedLabels, CausalityInstrument, SetupInstrument)
STEPS = 4


def report(rounds: int) -> list[tuple[str, ...]]:
    """Rows of a due step's number, its seconds with and without the checks, and the median of the ratios."""
    if rounds > 1:
        _seconds(checks=True)  # what is loaded once
    taken = [(_seconds(checks=True), _seconds(checks=False)) for _ in range(rounds)]
    rows = []
    for name, at in (("first", 0), ("third", 2)):
        ratios = [ours[at] / plain[at] for ours, plain in taken]
        medians = [
            statistics.median(column) for column in zip(*((one[at], two[at]) for one, two in taken), strict=True)
        ]
        rows.append((name, *(f"{seconds:.3f}" for seconds in medians), f"{statistics.median(ratios):.3f}"))
    return rows


def _seconds(checks: bool) -> list[float]:
    """Of every step of a short training, all of them due."""
    watch, watching = Stopwatch(), StrategicTelemetry(logging_steps=1, backends=[MemoryBackend()])
    if not checks:
        watching.instruments = [one for one in watching.instruments if not isinstance(one, CHECKS)]
    with tempfile.TemporaryDirectory() as directory:
        train(make_model(), SyntheticSpeech(8), [watching, watch], STEPS, directory)
    return watch.seconds

"""Which samples of the training data are hardest: their losses on due steps, of all ranks, in a bounded ledger."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter, Recorder
from telemetry.families.base import Stream
from telemetry.instruments.base import Step
from telemetry.measures.token_stats import TokenStats
from telemetry.probes.forward import Microbatch
from telemetry.records import Audio, Cell, Clip, Metric, Record, Table

TAG = "inputs/hardest"
FILE = "hardest.csv"
KEPT, SHOWN, HEARD = 1000, 10, 5  # samples
TEXT = 200  # characters of a transcript
NUMBERS = ("loss", "above its step's mean", "times seen", "last step")
COLUMNS = ("sample", "speaker", *NUMBERS, "transcript", "sound")
NO_NAMES = "the batch does not name its samples (sample_id)"


@dataclass(frozen=True)
class Sample:
    """A sample in a step: its mean loss over supervised tokens, in nats, and what its batch says of it."""

    name: str
    speaker: str
    transcript: str
    loss: float


class Samples(Metric):
    """The samples of a step, on all ranks. Shows nothing of its own."""

    shown = False

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__()
        self.samples = tuple(samples)

    def merge(self, other: Metric) -> Samples:
        """Both ranks' samples."""
        if not isinstance(other, Samples):
            raise TypeError(f"cannot merge Samples with {type(other).__name__}")
        return Samples((*self.samples, *other.samples))


@dataclass(frozen=True)
class _Line:
    """What is known of a sample: the sum over ``seen`` of its loss above its step's mean, and the last time."""

    last: Sample
    above: float
    seen: int
    step: int

    @property
    def hardness(self) -> float:
        return self.above / self.seen

    def cells(self) -> tuple[Cell, ...]:
        return self.last.name, self.last.speaker, self.last.loss, self.hardness, self.seen, self.step


class Ledger:
    """The hardest samples of a run, on rank 0. A sample's loss counts by how far it is above that of its step.

    Losses fall while a model learns: those of different steps cannot be compared themselves. Of more than
    :data:`KEPT` samples the easiest are forgotten.

    Args:
        directory: where :data:`FILE` is kept up to date.
        resumed: whether it goes on with the file that is there.
    """

    def __init__(self, directory: Path, resumed: bool = False) -> None:
        self._path = directory / FILE
        self._lines = _read_lines(self._path) if resumed else {}
        self._sounds: dict[str, Any] = {}
        self._shown: tuple[str, ...] = ()

    def add(self, step: int, samples: Sequence[Sample], sounds: Mapping[str, Any]) -> list[Record]:
        """Add the samples of a step; the hardest as a table, with their sound, where they are not those of before.

        Args:
            step: the optimizer step.
            samples: of all ranks.
            sounds: of this rank's samples, by name, not yet read; those of the hardest are kept.
        """
        mean = sum(one.loss for one in samples) / len(samples)
        for one in samples:
            held = self._lines.get(one.name, _Line(one, 0.0, 0, step))
            self._lines[one.name] = _Line(one, held.above + one.loss - mean, held.seen + 1, step)
        ordered = sorted(self._lines.values(), key=lambda line: -line.hardness)[:KEPT]
        self._lines = {line.last.name: line for line in ordered}
        first = ordered[:SHOWN]
        known = {**self._sounds, **sounds}
        self._sounds = {name: known[name] for line in first if (name := line.last.name) in known}
        self._write(ordered)
        names = tuple(line.last.name for line in first)
        if names == self._shown:
            return []
        self._shown = names
        media = [self._heard(at, name) for at, name in enumerate(names[:HEARD])] if self._sounds else []
        cells = [*media, *[None] * SHOWN]
        rows = tuple((*one.cells(), one.last.transcript[:TEXT] or None, cells[at]) for at, one in enumerate(first))
        return [*media, Table(TAG, COLUMNS, rows)]

    def _heard(self, at: int, name: str) -> Audio:
        """One clip, an empty one where there is none: TensorBoard fails on a tag whose number of clips changes."""
        source, clip = self._sounds.get(name), Clip(np.zeros(0, np.float32), 16000, name)
        if source is not None:
            with contextlib.suppress(OSError, ValueError):  # a file that is gone: the data set says so itself
                clip = Clip(source.samples, source.sampling_rate, name)
        return Audio(f"{TAG}/{at}", (clip,))

    def _write(self, ordered: Sequence[_Line]) -> None:
        """Write all lines; whoever reads meanwhile sees the file of before."""
        beside = self._path.with_name(f".{FILE}.{os.getpid()}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("sample", "speaker", *NUMBERS, "transcript"))
            writer.writerows((*line.cells(), line.last.transcript) for line in ordered)
        beside.replace(self._path)


class SampleLosses:
    """Adds up the losses of a microbatch's samples while its streams are measured; keeps one ledger a run."""

    def __init__(self) -> None:
        self._run: weakref.ref[Recorder] | None = None
        self._ledger: Ledger | None = None
        self._sums: Tensor | None = None
        self._unnamed = False
        self._sounds: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen no training."""
        return vars(SampleLosses())

    def begin(self) -> None:
        """Begin a step."""
        self._sums, self._unnamed, self._sounds = None, False, {}

    def stream(self, stream: Stream, stats: TokenStats, microbatch: Microbatch) -> None:
        """Add a stream's losses, where its tokens are laid out by samples that have names. Waits for nothing."""
        block = not isinstance(stream.name, str)
        if stream.labels.dim() - block < 2:
            return
        self._unnamed = not any(one.get("sample_id") is not None for one in microbatch.metadata)
        if self._unnamed:
            return
        batch, length = stream.labels.shape[:2]
        counted = (stream.predicted >= 0) & (stream.predicted < stream.logits.shape[-1])
        losses = torch.stack([torch.where(counted, stats.nll, 0.0), counted.to(stats.nll.dtype)])
        if stream.rows is None:
            own = losses.reshape(2, batch, -1).sum(dim=-1)
        else:
            of_row = losses.reshape(2, len(stream.rows), -1).sum(dim=-1)
            own = losses.new_zeros(2, batch).index_add_(1, stream.rows // length, of_row)
        if self._sums is None:
            self._sums = own
        elif self._sums.shape == own.shape:
            self._sums = self._sums + own.to(self._sums)

    def microbatch(self, step: Step, microbatch: Microbatch) -> None:
        """Send the samples of a microbatch on their way."""
        sums, self._sums = self._sums, None
        if self._unnamed:
            step.recorder.absent(TAG, NO_NAMES)
        if sums is None:
            return
        known = [dict(one) for one in microbatch.metadata[: sums.shape[1]]]
        if step.is_main and step.sound.enabled:
            self._sounds.update(_sounds(known))

        def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
            losses = zip(known, *host["sums"].tolist(), strict=False)
            named = [(one, total / count) for one, total, count in losses if count and one.get("sample_id") is not None]
            emit.metric(TAG, Samples([_sample(one, loss) for one, loss in named if math.isfinite(loss)]))

        step.recorder.defer({"sums": sums}, build)

    def finish(self, step: Step) -> None:
        """Have the step's samples entered, and the hardest shown."""
        if self._ledger is None or self._run is None or self._run() is not step.recorder:  # another training
            self._run, self._ledger = weakref.ref(step.recorder), Ledger(step.output_dir, resumed=step.number > 1)
        ledger, sounds = self._ledger, self._sounds

        def build(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            found = emit.merged(TAG)
            if isinstance(found, Samples) and found.samples:
                for record in ledger.add(step.number, found.samples, sounds):
                    emit.record(record)

        step.recorder.show({}, build)


def _read_lines(path: Path) -> dict[str, _Line]:
    """What a ledger has written, of a run that goes on."""
    if not path.exists():
        return {}
    lines = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            loss, hardness, seen, step = (float(row[name]) for name in NUMBERS)
            last = Sample(row["sample"], row["speaker"], row["transcript"], loss)
            lines[last.name] = _Line(last, hardness * seen, int(seen), int(step))
    return lines


def _sample(known: Mapping[str, Any], loss: float) -> Sample:
    text = known.get("target_transcript")
    return Sample(str(known["sample_id"]), str(known.get("speaker") or ""), text if isinstance(text, str) else "", loss)


def _sounds(known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The targets' sound of samples that have one, by name."""
    named = [(one.get("sample_id"), next(iter(one.get("target") or ()), None)) for one in known]
    return {str(name): sound for name, sound in named if not (name is None or sound is None)}

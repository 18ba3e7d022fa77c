"""The reference voice: is there one in every sample, and what is it like?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter, Recorder
from telemetry.families.base import NO_LABELS, AudioView
from telemetry.instruments.base import Instrument, Step
from telemetry.measures.audio import clipping_fraction, level_db, silence_fraction
from telemetry.measures.tensor_stats import TensorStats, tensor_statistics
from telemetry.probes.forward import Microbatch
from telemetry.records import Mean, Min, Spread, Sum

# Files are read in the background, where other things wait meanwhile.
READ_CLIPS = 16
READ_SECONDS = 2.0
FLOOR_DB = -120.0  # of digital silence, whose level is minus infinity
SIGNAL = ("level_db", "clipping_fraction", "silence_fraction")
NO_METADATA = "the batch does not say how long the reference audio is"
NO_ENCODER = "the model has no audio encoder (Whisper) that reference audio goes through"


class ReferenceInstrument(Instrument):
    """Presence, length and signal of reference audio, and what an audio encoder is given of it."""

    def __init__(self) -> None:
        self._budget = _Budget()

    def begin(self, step: Step) -> None:
        """A due step begins."""
        self._budget = _Budget()

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Measure one microbatch: tensors here, files in the background."""
        recorder = step.recorder
        if microbatch.view is None or microbatch.view.audio is None:
            recorder.absent("zero_shot/reference/present_fraction", "the batch has no audio")
            return
        audio = microbatch.view.audio
        if not audio.labelled:
            recorder.absent("zero_shot/reference/present_fraction", NO_LABELS)
            return
        present = audio.reference.any(dim=1)
        if step.says("zero_shot/reference/present_fraction"):
            recorder.metric("zero_shot/reference/present_fraction", Mean(present.sum(), present.numel()))
        if audio.features is None:
            recorder.absent("zero_shot/reference/features_present", NO_ENCODER)
        _measure_features(recorder, audio)
        if microbatch.metadata:
            self._measure_clips(recorder, microbatch)
        else:
            recorder.absent("zero_shot/reference/seconds", NO_METADATA)

    def _measure_clips(self, recorder: Recorder, microbatch: Microbatch) -> None:
        named = [
            (microbatch.sample_id(row), list(sample.get("reference") or ()))
            for row, sample in enumerate(microbatch.metadata)
        ]
        budget = self._budget

        def build(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            lengths = [sum(clip.seconds for clip in clips) for _, clips in named]
            present = [length for length in lengths if length > 0]
            emit.metric("zero_shot/reference/seconds", Mean(sum(present), len(present)))
            measured = list(_measured(named, budget, recorder))
            note = f"Over the first {budget.read} clips of a rank." if budget.spent else ""
            for index, name in enumerate(SIGNAL):
                values = [signal[index] for signal, _ in measured]
                emit.metric(f"zero_shot/reference/{name}", Mean(sum(values), len(values)), note)
            for _, rate in measured:
                emit.metric("zero_shot/reference/sampling_rate", Min(rate), note)

        recorder.defer({}, build)


class _Budget:
    """How much of a step's reference audio is read: so many clips, and for so long."""

    def __init__(self) -> None:
        self.read = 0
        self.spent = False
        self._seconds = READ_SECONDS

    def take(self) -> bool:
        """Whether one more clip may be read."""
        self.spent = self.read >= READ_CLIPS or self._seconds <= 0
        self.read += not self.spent
        return not self.spent

    def pay(self, seconds: float) -> None:
        """Reading one took so long."""
        self._seconds -= seconds


def _measured(
    named: Sequence[tuple[str, Sequence[Any]]], budget: _Budget, recorder: Recorder
) -> Iterator[tuple[tuple[float, float, float], int]]:
    """Signal measures and the file's sampling rate of every clip that can be read within the budget."""
    for sample, clip in ((sample, clip) for sample, clips in named for clip in clips):
        if not budget.take():
            return
        began = time.monotonic()
        try:
            yield _signal(clip), int(getattr(clip, "file_sampling_rate", clip.sampling_rate))
        except Exception as error:  # noqa: BLE001  (one file must not hide the others)
            recorder.say_once(
                "reference", "the reference audio of sample %s cannot be measured, and is left out: %s", sample, error
            )
        budget.pay(time.monotonic() - began)


def _signal(clip: Any) -> tuple[float, float, float]:
    samples = np.asarray(clip.samples)
    clipped, silent = clipping_fraction(samples), silence_fraction(samples, clip.sampling_rate)
    if clipped is None or silent is None:
        raise ValueError("it has no samples")
    return float(np.maximum(level_db(samples), FLOOR_DB)), clipped, silent


def _measure_features(recorder: Recorder, audio: AudioView) -> None:
    """Measure what reaches the model through its audio encoder; padding of the features left out."""
    features, real = audio.features, audio.features_real
    if features is None or real is None or audio.embedded is None:
        return
    present = Mean(audio.embedded.any(dim=1).sum(), audio.reference.any(dim=1).sum())
    recorder.metric("zero_shot/reference/features_present", present)
    if features.shape[0]:
        # NaN is what the statistics leave out; what was NaN before is counted apart from the padding.
        statistics = tensor_statistics(features.float().masked_fill(~real[:, None, :], torch.nan))
        recorder.defer({"statistics": statistics, "padding": (~real).sum() * features.shape[1]}, _add_features)


def _add_features(host: Mapping[str, Tensor], emit: Emitter) -> None:
    stats = TensorStats(*host["statistics"].tolist())
    emit.metric("zero_shot/reference/features_mean", Mean(stats.total, stats.finite))
    emit.metric("zero_shot/reference/features_std", Spread(stats.finite, stats.mean, stats.deviations))
    emit.metric("zero_shot/reference/features_nonfinite", Sum(stats.nonfinite - float(host["padding"])))

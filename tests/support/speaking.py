"""Trainings of a tiny model that speaks at every evaluation, with codec, samples and listeners of the tests' own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import ZeroShotVerificationLoggerCallback
from telemetry.records import Audio, Table
from trainer.higgs_trainer import HiggsAudioTrainer

from . import steps
from .batches import Sample, Voices

RATE = 1000
FRAME = 40  # samples


class ToneCodec(nn.Module):
    """Turns every frame of codes into 40 ms of a tone whose pitch the codes choose."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_rate=RATE)
        self.device = torch.device("cpu")

    def decode(self, codes: Tensor) -> SimpleNamespace:
        pitch = (codes.float().mean(dim=1) + 1) * 20
        phase = 2 * torch.pi * pitch.repeat_interleave(FRAME, dim=1).cumsum(1) / RATE
        return SimpleNamespace(audio_values=0.5 * phase.sin()[:, None])


@dataclass(frozen=True)
class Waveform:
    """What metadata says of a clip."""

    samples: np.ndarray
    sampling_rate: int = RATE

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / self.sampling_rate


class DrawingEncoder:
    """Draws random numbers wherever it can, as WavLM does, and tells nothing of voices."""

    def embed(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        return np.asarray([1.0, float(np.abs(samples).mean())])


class FixedTranscriber:
    """Hears the same words in everything."""

    def __init__(self, words: str = "a ship sails") -> None:
        self.words = words
        self.languages: list[str | None] = []

    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> str:
        torch.rand(1)
        self.languages.append(language)
        return self.words


@dataclass(frozen=True)
class Row:
    """One sample of a data set, with what it says beside its tensors."""

    sample: Sample
    metadata: Mapping[str, Any]


def rows(voices: Voices, count: int, waveforms: bool = True) -> list[Row]:
    """Samples of two speakers and languages."""
    made = []
    for index in range(count):
        lengths = 3 + index % 3, 4 + index % 4
        tones = [Waveform(np.sin(np.arange(length * FRAME) * (1 + index)).astype(np.float32) / 2) for length in lengths]
        metadata: dict[str, Any] = {
            "sample_id": f"sample {index}/é",
            "speaker": f"speaker {index % 2}",
            "language": ("en", "pt-BR")[index % 2],
            "target_transcript": f"A ship sails {index}.",
            "ref_transcript": "The wind blows.",
        }
        if waveforms:
            metadata |= {"reference": [tones[0]], "target": [tones[1]]}
        made.append(Row(voices.conversation(*lengths, seed=index), metadata))
    return made


class Collator:
    """Batches rows, padded on the right."""

    def __init__(self, voices: Voices) -> None:
        self._voices = voices

    def __call__(self, chosen: Sequence[Row]) -> dict[str, Any]:
        batch = self._voices.batch(self._voices.pad([row.sample for row in chosen]))
        return {**batch, "metadata": [dict(row.metadata) for row in chosen]}


def speaking_callback(backend: MemoryBackend, **options: Any) -> ZeroShotVerificationLoggerCallback:
    return ZeroShotVerificationLoggerCallback(
        logging_steps=1, backends=[backend], **{"conditioning_every": 0, "clips": 2, **options}
    )


def make_trainer(
    model: Any,
    voices: Voices,
    directory: Path,
    callbacks: Sequence[TrainerCallback],
    evaluation: Any = None,
    codec: Any = None,
    kind: Callable[..., Any] = HiggsAudioTrainer,
    **arguments: Any,
) -> Any:
    """One step, an evaluation before and after, on the CPU."""
    quiet = {"max_steps": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    quiet |= {"eval_strategy": "steps", "eval_steps": 1}
    return steps.make_trainer(
        model,
        rows(voices, 6),
        Collator(voices),
        directory,
        callbacks,
        kind,
        eval_dataset=rows(voices, 5) if evaluation is None else evaluation,
        processing_class=Processor(voices.tokenizer, ToneCodec() if codec is None else codec),
        **{**quiet, **arguments},
    )


class Processor:
    """What telemetry needs of a processor."""

    def __init__(self, tokenizer: Any, audio_tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.audio_tokenizer = audio_tokenizer

    def save_pretrained(self, directory: str) -> None:
        """Nothing that a checkpoint would need."""


def table(backend: MemoryBackend, step: int, tag: str = "zero_shot/clips") -> list[dict[str, Any]]:
    """The rows of the table at a step, by column."""
    [found] = [record for at, record in backend.records.get(tag, []) if at == step and isinstance(record, Table)]
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def sounds(backend: MemoryBackend, step: int) -> dict[str, Audio]:
    """Every sound of the clips at a step, by tag."""
    return {
        tag: record
        for tag, held in backend.records.items()
        for at, record in held
        if at == step and isinstance(record, Audio) and tag.startswith("zero_shot/clip_")
    }

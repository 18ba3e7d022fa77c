"""How much longer a training step takes when it is due, against the steps around it in the same training."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from telemetry import COMPONENTS, StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from trainer.collator import VoiceCloningCollator
from trainer.dataset import IGNORE_INDEX, Example
from trainer.higgs_trainer import HiggsAudioTrainer

STREAM_BOS, STREAM_EOS = 1024, 1025
AUDIO, DELAY, PAD = 19_000, 19_001, 19_002
TEXT, REFERENCE, TARGET = 64, 200, 248  # positions of one sample


ON_GPU = torch.cuda.is_available()
SMALL = {
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
}
REAL_WIDTH = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def describe() -> str:
    """What is trained here."""
    size = "the real model's width, 4 layers, bfloat16" if ON_GPU else "about 100 M parameters"
    return f"{size}, batch 2, {TEXT + REFERENCE + TARGET} positions"


def make_model() -> HiggsAudioV2ForConditionalGeneration:
    """The structure and codebooks of the real model; its width where there is a GPU."""
    config = HiggsAudioV2Config(
        vocab_size=20_000,
        **(REAL_WIDTH if ON_GPU else SMALL),
        codebook_size=1026,
        audio_token_id=AUDIO,
        audio_bos_token_id=PAD + 1,
        audio_delay_token_id=DELAY,
        pad_token_id=PAD,
        eos_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    torch.manual_seed(0)
    return HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)


class SyntheticSpeech(Dataset[Example]):
    """Random samples of about 512 positions: text, a reference clip, a target clip."""

    def __init__(self, size: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._examples = [self._make() for _ in range(size)]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def _make(self) -> Example:
        text = torch.randint(0, AUDIO, (TEXT,), generator=self._generator)
        clips = [self._clip(frames) for frames in (REFERENCE, TARGET)]
        ids = torch.cat([text[: TEXT // 2], clips[0][0], text[TEXT // 2 :], clips[1][0]])
        labels = torch.full_like(ids, IGNORE_INDEX)
        supervised = slice(TEXT // 2 + REFERENCE, TEXT + REFERENCE)
        labels[supervised] = ids[supervised]
        frames = torch.cat([codes for _, codes in clips])
        audio_labels = frames.clone()
        audio_labels[:REFERENCE] = IGNORE_INDEX
        return Example(ids, labels, frames, audio_labels)

    def _clip(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, STREAM_BOS, (frames, 8), generator=self._generator)
        codes[-1] = STREAM_EOS
        placeholders = torch.full((frames,), AUDIO)
        placeholders[-7:] = DELAY
        return placeholders, codes


class Stopwatch(TrainerCallback):
    """Seconds of every optimizer step, from its beginning to the beginning of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._began is not None:
            self.seconds.append(now - self._began)
        self._began = now


def modes() -> Iterator[tuple[str, list[str] | None]]:
    """Name and components."""
    yield from ((name, [name]) for name in COMPONENTS)
    yield "all", None


def telemetry(components: list[str] | None, every: int) -> StrategicTelemetry:
    """Telemetry into memory: what a backend costs is measured on its own."""
    return StrategicTelemetry(components, logging_steps=every, backends=[MemoryBackend()])


def measure(components: list[str] | None, pairs: int, directory: str) -> list[tuple[float, float]]:
    """Seconds of a due step, and the mean of the two steps around it, which are not due: every other step is due.

    The machine's speed drifts from minute to minute; neighbours share it.
    """
    watch = Stopwatch()
    train(make_model(), SyntheticSpeech(8), [telemetry(components, 2), watch], 2 * pairs + 4, directory)
    seconds = watch.seconds  # of step 1, 2, ...; even steps are due, and the first two warm up
    return [(seconds[at], (seconds[at - 1] + seconds[at + 1]) / 2) for at in range(3, 2 * pairs + 2, 2)]


def train(
    model: HiggsAudioV2ForConditionalGeneration,
    data: SyntheticSpeech,
    callbacks: list[TrainerCallback],
    steps: int,
    directory: str,
) -> None:
    """A short real training, without logging or checkpoints."""
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-5,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not ON_GPU,
        bf16=ON_GPU,
    )
    trainer = HiggsAudioTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=VoiceCloningCollator(PAD, STREAM_EOS),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def report(pairs: int, brief: bool = False) -> list[tuple[str, ...]]:
    """Rows of components, median seconds of a due and of another step, median ratio and its quartiles.

    ``brief``: of all components together only.
    """
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, components in modes():
            if brief and components is not None:
                continue
            measured = measure(components, pairs, directory)
            ratios = [due / other for due, other in measured]
            low, middle, high = statistics.quantiles(ratios, n=4)
            due, other = (statistics.median(seconds) for seconds in zip(*measured, strict=True))
            rows.append((name, f"{due:.3f}", f"{other:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"))
    return rows

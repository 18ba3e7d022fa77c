"""What telemetry costs a small model's whole training, and whether ``telemetry/overhead_fraction`` says so.

Against the same training without it, in turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from telemetry import StrategicTelemetry, TensorBoardBackend
from telemetry.backends.memory import MemoryBackend

WARM_UP = 10
TIMED = {1: 50, 10: 100, 100: 300}  # due every so many steps → steps that are timed
SIZES = {"small": (128, 2, 40), "larger": (256, 4, 64)}  # hidden size, layers, positions
TRAININGS = [("small", 1), ("small", 10), ("small", 100), ("larger", 10)]


class Steps(TrainerCallback):
    """When every step began."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step, on average, after the warm-up."""
        return (self.times[-1] - self.times[WARM_UP]) / (len(self.times) - 1 - WARM_UP)


def report(pairs: int) -> list[tuple[str, ...]]:
    """Rows of model, due steps, milliseconds without and with, ratio, quartiles, share by that and recorded."""
    rows = []
    for name, every in TRAININGS:
        found = [_pair(SIZES[name], every) for _ in range(pairs)]
        plain, watched, recorded = (statistics.median(column) for column in zip(*found, strict=True))
        low, ratio, high = statistics.quantiles((one[1] / one[0] for one in found), n=4)
        times = f"{1000 * plain:.2f}", f"{1000 * watched:.2f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"
        rows.append((name, f"every {every}", *times, f"{1 - 1 / ratio:.3f}", f"{recorded:.3f}"))
    return rows


def _pair(size: tuple[int, int, int], every: int) -> tuple[float, float, float]:
    steps = WARM_UP + TIMED[every]
    plain = _train(size, [], steps).seconds
    memory = MemoryBackend()
    callbacks = [StrategicTelemetry(logging_steps=every, backends=[TensorBoardBackend(), memory])]
    watched = _train(size, callbacks, steps).seconds
    recorded = memory.scalars("telemetry/overhead_fraction")
    return plain, watched, statistics.fmean(share for step, share in recorded.items() if step > WARM_UP)


def _train(size: tuple[int, int, int], callbacks: Sequence[TrainerCallback], number: int) -> Steps:
    hidden, layers, positions = size
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=256, max_position_embeddings=128,
        )
    )  # fmt: skip
    data = [{"input_ids": (ids := torch.randint(0, 256, (positions,))), "labels": ids} for _ in range(8)]
    steps = Steps()
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, max_steps=number,
            per_device_train_batch_size=2, logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[*callbacks, steps])  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return steps

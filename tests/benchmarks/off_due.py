"""What telemetry adds to a step that is not due, against an empty ``TrainerCallback``, its loss and pace included."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from telemetry import COMPONENTS, StrategicTelemetry
from telemetry.callbacks.prepared import every_step
from telemetry.probes.sentinel import Sentinel

STEPS = 20_000
ROUNDS = 7
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
KWARGS = dict.fromkeys(
    ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"), None
)


def report() -> list[tuple[str, ...]]:
    """Rows of callback, microseconds a step, and the median ratio to the empty callback, measured in turn."""
    callbacks: dict[str, TrainerCallback] = {
        "empty TrainerCallback": TrainerCallback(),
        **{name: COMPONENTS[name](logging_steps=10**9) for name in COMPONENTS},
        "StrategicTelemetry": StrategicTelemetry(logging_steps=10**9),
    }
    seconds: dict[str, list[float]] = {name: [] for name in callbacks}
    for _ in range(ROUNDS):
        for name, callback in callbacks.items():
            seconds[name].append(_time(callback, watched=callback is not callbacks["empty TrainerCallback"]))
    empty = seconds["empty TrainerCallback"]
    rows = []
    for name, values in seconds.items():
        ratio = statistics.median(mine / base for mine, base in zip(values, empty, strict=True))
        rows.append((name, f"{statistics.median(values) / STEPS * 1e6:.2f}", f"{ratio:.2f}"))
    return rows


def _time(callback: TrainerCallback, watched: bool) -> float:
    """Seconds of the events of many steps, as the Trainer fires them, and of a step of its that does nothing."""
    args: Any = None
    state, control = TrainerState(global_step=7), TrainerControl()
    trainer: Any = _Trainer(state)
    sentinel = Sentinel()
    end = every_step(trainer, sentinel) if watched else None
    began = time.perf_counter()
    for _ in range(STEPS):
        for event in EVENTS:
            getattr(callback, event)(args, state, control, **KWARGS)
        trainer.get_batch_samples(None, 1, None)
        trainer.training_step(None, None)
        trainer._maybe_log_save_evaluate()
    spent = time.perf_counter() - began
    if end is not None:
        end()
    return spent


class _Trainer(SimpleNamespace):
    LOSS = torch.tensor(1.0)
    BATCHES = ([{"input_ids": torch.ones(2, 8, dtype=torch.long)}], None)

    def __init__(self, state: TrainerState) -> None:
        super().__init__(state=state, model=None)

    def get_batch_samples(self, *_args: Any) -> Any:
        return self.BATCHES

    def _maybe_log_save_evaluate(self) -> None:
        pass

    def training_step(self, model: Any, inputs: Any) -> torch.Tensor:
        return self.LOSS

"""What telemetry adds to a step that is not due, against an empty ``TrainerCallback``."""

from __future__ import annotations

import statistics
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from telemetry import COMPONENTS, StrategicTelemetry

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
            seconds[name].append(_time(callback))
    empty = seconds["empty TrainerCallback"]
    rows = []
    for name, values in seconds.items():
        ratio = statistics.median(mine / base for mine, base in zip(values, empty, strict=True))
        rows.append((name, f"{statistics.median(values) / STEPS * 1e6:.2f}", f"{ratio:.2f}"))
    return rows


def _time(callback: TrainerCallback) -> float:
    """Seconds of the events of many steps, as the Trainer fires them."""
    args: Any = None
    state, control = TrainerState(global_step=7), TrainerControl()
    began = time.perf_counter()
    for _ in range(STEPS):
        for event in EVENTS:
            getattr(callback, event)(args, state, control, **KWARGS)
    return time.perf_counter() - began

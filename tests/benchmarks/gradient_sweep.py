"""All statistics of all gradients in one sweep, against reading the same bytes once and against ``wandb.watch``.

On a GPU also against copying all gradients once, and against the sweep without Triton.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from telemetry.measures.gradients import device_rows, gradient_statistics

ROUNDS = 5
READ, WANDB = "read once (sum of a flat buffer)", "wandb.watch's histograms"
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, AUDIO_VOCABULARY = 12, 544, 1472, 20_000, 8 * 1026
KEY_WIDTH = HIDDEN // 2


def shapes() -> list[tuple[int, ...]]:
    """Of a Higgs Audio v2 of about 100 M parameters in 173 tensors."""
    attention = [(HIDDEN, HIDDEN), (KEY_WIDTH, HIDDEN), (KEY_WIDTH, HIDDEN), (HIDDEN, HIDDEN)]
    networks = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)] * 2
    layer = [*attention, *networks, *[(HIDDEN,)] * 4]
    ends = [(VOCABULARY, HIDDEN), (AUDIO_VOCABULARY, HIDDEN)] * 2
    return [*layer * LAYERS, *ends, (HIDDEN,)]


def report() -> list[tuple[str, ...]]:
    """Rows of way, median milliseconds, ratio to one read of a flat buffer of as many bytes, and to wandb's time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    gradients = [torch.randn(shape, generator=generator, device=device) for shape in shapes()]
    flat = torch.randn(sum(map(math.prod, shapes())), generator=generator, device=device)
    ways: dict[str, Callable[[], object]] = {
        READ: flat.sum,
        "one sweep, four statistics": lambda: gradient_statistics(gradients),
    }
    if device == "cuda":
        copies = [torch.empty_like(gradient) for gradient in gradients]
        ways["copied once"] = lambda: torch._foreach_copy_(copies, gradients)
        ways["the same without Triton"] = lambda: device_rows(gradients)
    with tempfile.TemporaryDirectory() as directory, _WandbHistograms(directory, gradients) as histograms:
        ways[WANDB] = histograms.log
        medians = {name: statistics.median(values) for name, values in _in_turns(ways).items()}
    return [
        (name, f"{median * 1e3:,.2f}", f"{median / medians[READ]:,.2f}", f"{medians[WANDB] / median:,.1f}")
        for name, median in medians.items()
    ]


def describe() -> str:
    """What is swept over."""
    return f"Gradients of {sum(map(math.prod, shapes())) / 1e6:.0f} M parameters in {len(shapes())} tensors, float32"


class _WandbHistograms:
    """The code that ``wandb.watch(log="gradients")`` calls from a hook on each parameter, in an offline run."""

    def __init__(self, directory: str, gradients: Sequence[Tensor]) -> None:
        self._directory = directory
        self._gradients = gradients

    def __enter__(self) -> _WandbHistograms:
        import wandb
        from wandb.integration.torch.wandb_torch import TorchHistory

        os.environ.setdefault("WANDB_SILENT", "true")
        self._run = wandb.init(mode="offline", dir=self._directory, project="benchmark")
        self._history = TorchHistory()
        return self

    def __exit__(self, *_error: object) -> None:
        self._run.finish()

    def log(self) -> None:
        for index, gradient in enumerate(self._gradients):
            self._history.log_tensor_stats(gradient, f"gradients/{index}")


def _in_turns(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of every way, one after the other in each round: the machine's speed drifts."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seconds[name].append(_time(way))
    return seconds


def _time(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

"""What looking at attention costs, against a model that gives its whole attention away, and how far both agree."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)

# isort: split
import torch
from torch import Tensor

from telemetry.families import HiggsAudioV2Family
from telemetry.instruments.attention import DEFAULT_QUERIES, AttendedBatch
from telemetry.measures.attention import QuerySample, attention_rows, sample_queries
from telemetry.measures.attention_masks import sequence_starts
from telemetry.probes.attention import AttentionCall, watch_attention
from telemetry.probes.watch import Watch
from tests.benchmarks import step_time

LAYERS, POSITIONS = 3, 1024
TEXT, REFERENCE = 128, 400
PLAIN, PROBE, WHOLE = "sdpa", "sdpa, probe", "eager, output_attentions"
MODES = (PLAIN, PROBE, WHOLE)
DEVICE = "cuda" if step_time.ON_GPU else "cpu"


class Forward:
    """One way of running a model of three layers, all of them looked at."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.model: Any = step_time.make_model().train()
        self.model.model.layers = self.model.model.layers[:LAYERS]
        self.model.config.num_hidden_layers = LAYERS
        self.model.set_attn_implementation("eager" if mode == WHOLE else "sdpa")
        self.model.to(DEVICE, torch.bfloat16 if step_time.ON_GPU else torch.float32)
        self.inputs = _inputs()
        self.sample, self.kinds, self.starts = _looked_at()
        self.batch = AttendedBatch(self.sample, self.kinds, self.kinds, self.starts)
        self.outputs: Any = None

    def run(self, sink: Callable[[AttentionCall], Any] | None = None) -> None:
        """A forward pass of training; attention is looked at on the way."""
        if self.mode != PROBE:
            self.outputs = self.model(**self.inputs, use_cache=False, output_attentions=self.mode == WHOLE)
            return
        family = HiggsAudioV2Family(self.model)
        watch = Watch(self.model, lambda _owner, action, *args: action(*args))
        watch.open()
        watch_attention(watch, self, family.layers(), sink or self.batch.rows)
        self.model(**self.inputs, use_cache=False)
        watch.close()


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, step_time.AUDIO, (1, POSITIONS), generator=generator)
    ids[:, TEXT:] = step_time.AUDIO
    ids[:, TEXT + REFERENCE - 1] = step_time.DELAY
    codes = torch.randint(0, step_time.STREAM_BOS, (1, POSITIONS - TEXT, 8), generator=generator)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "audio_input_ids": codes,
        "audio_input_ids_mask": torch.ones(1, POSITIONS - TEXT, dtype=torch.bool),
    }
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def _looked_at() -> tuple[QuerySample, Tensor, Tensor]:
    at = torch.arange(POSITIONS, device=DEVICE)
    kinds = torch.stack([at < TEXT, (at >= TEXT) & (at < TEXT + REFERENCE), at >= TEXT + REFERENCE], dim=-1)[None]
    sample = sample_queries(kinds, DEFAULT_QUERIES, torch.Generator(DEVICE).manual_seed(1))
    starts = sequence_starts(kinds.any(dim=-1)).gather(1, sample.rows)
    return sample, kinds, starts


def _seconds(forward: Forward) -> float:
    _wait()
    began = time.perf_counter()
    forward.run()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if step_time.ON_GPU:
        torch.cuda.synchronize()


def _peak_megabytes(mode: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.attention_probe", mode], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def report(repeats: int) -> list[tuple[str, ...]]:
    """Rows of mode, seconds, extra seconds, peak MB, extra MB, and extras over those of the whole attention."""
    forwards = [Forward(mode) for mode in MODES]
    for forward in forwards:
        forward.run()
    rounds = [[_seconds(forward) for forward in forwards] for _ in range(repeats)]
    seconds = dict(zip(MODES, map(statistics.median, zip(*rounds, strict=True)), strict=True))
    # Round by round: the machine's speed drifts, and neighbours share it.
    extra_seconds = {mode: statistics.median(r[at] - r[0] for r in rounds) for at, mode in enumerate(MODES)}
    peaks = {mode: statistics.median(_peak_megabytes(mode) for _ in range(1 + repeats // 4)) for mode in MODES}
    extra_peaks = {mode: peaks[mode] - peaks[PLAIN] for mode in MODES}
    return [
        (
            mode,
            f"{seconds[mode]:.3f}",
            f"{extra_seconds[mode]:+.4f}",
            f"{extra_seconds[mode] / extra_seconds[WHOLE]:.3f}",
            f"{peaks[mode]:,.0f}",
            f"{extra_peaks[mode]:+,.0f}",
            f"{extra_peaks[mode] / extra_peaks[WHOLE]:.3f}",
        )
        for mode in MODES
    ]


def agreement() -> list[tuple[str, ...]]:
    """Rows of measure and largest difference from the whole attention of the same forward pass."""
    whole, probed = Forward(WHOLE), Forward(PROBE)
    with torch.no_grad():
        whole.run()
    largest = {"mass": 0.0, "entropy": 0.0, "max_logit": 0.0}

    def compare(call: AttentionCall) -> None:
        rows = probed.sample.rows
        mask = call.row_mask(rows)
        values = attention_rows(call.query, call.key, rows, mask, probed.kinds, probed.starts, call.scaling)
        weights = whole.outputs.attentions[call.layer][:, :, rows[0]].double()
        mass = torch.einsum("bhrk,bkc->bhrc", weights, probed.kinds.double())
        logits = torch.einsum("bhqd,bhkd->bhqk", call.query, _repeated(call)).double() * call.scaling
        highest = logits[:, :, rows[0]].masked_fill(~mask.allowed, -torch.inf).amax(dim=-1)
        entropy = torch.special.entr(weights).sum(dim=-1)
        for name, found, expected in (
            ("mass", values.mass, mass),
            ("entropy", values.entropy, entropy),
            ("max_logit", values.max_logit, highest),
        ):
            largest[name] = max(largest[name], float((found - expected).abs().max()))

    probed.run(compare)
    return [(name, f"{difference:.1e}") for name, difference in largest.items()]


def _repeated(call: AttentionCall) -> Tensor:
    return call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)


def main(mode: str) -> None:
    """Run one way and print the peak."""
    forward = Forward(mode)
    if step_time.ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of making the model
    forward.run()
    peak = torch.cuda.max_memory_allocated() / 2**20 if step_time.ON_GPU else _resident()
    sys.stdout.write(f"\n{peak}\n")


def _resident() -> float:
    """Peak resident MB since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(sys.argv[1])

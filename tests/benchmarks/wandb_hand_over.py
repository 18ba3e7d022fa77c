"""What handing a due step to W&B costs the training thread, whatever the server does, and how soon it is there."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.backends.wandb import WandbBackend
from telemetry.delivery.recorder import Recorder
from telemetry.records import Audio, Clip, Image, Record, Scalar, Table
from tests.support.wandb_server import Fault, serve

SERVERS = ("no W&B", "up", "slow (5 s)", "killed meanwhile", "never there")
STEPS, KILLED_AT = 30, 15
SCALARS = 200
MEASURED = "outputs/loss/total"


def report(step_seconds: float) -> list[tuple[str, ...]]:
    """Rows of server, µs of the training thread a due step (median, largest), ratio, seconds to the server."""
    rows = []
    base = 0.0
    for server in SERVERS:
        with tempfile.TemporaryDirectory() as directory:
            micros, latencies = _measured(server, Path(directory), step_seconds)
        median = statistics.median(micros)
        base = base or median
        arrived = f"{statistics.median(latencies):.2f} / {max(latencies):.2f}" if latencies else "-"
        rows.append((server, f"{median:.0f}", f"{max(micros):.0f}", f"{median / base:.2f}", arrived))
    return rows


def _measured(condition: str, directory: Path, step_seconds: float) -> tuple[list[float], list[float]]:
    """Microseconds of every due step, and seconds from a step to the server for those after the run was opened."""
    with serve(directory) as server:
        environment = {**os.environ, **server.environment(directory / "client")}
        if condition == "never there":
            server.kill()
        if condition.startswith("slow"):
            server.fail(Fault(delay=5))
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.wandb_hand_over", condition, str(directory), str(step_seconds)],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        if condition == "killed meanwhile":
            while not (directory / "killed").exists() and program.poll() is None:
                time.sleep(0.05)
            server.kill()
        if program.wait(120) != 0:
            raise RuntimeError(f"the training with the server {condition} failed")
        took = json.loads((directory / "took.json").read_text())
        latencies = _latencies(server.state(), took["written"]) if condition == "up" else []
    return took["micros"], latencies


def _latencies(state: Any, written: dict[str, float]) -> list[float]:
    """Of the steps that were written when the first had arrived."""
    lines = [line for line in state.run().stream("wandb-history.jsonl") if MEASURED in line.values]
    first = min(line.arrived for line in lines)
    found = [(written[str(line.values["train/global_step"])], line.arrived) for line in lines]
    return [arrived - began for began, arrived in found if began > first]


def _records(step: int) -> list[Record]:
    """Numbers, and a table with a sound of a second and a picture in every row."""
    samples = np.random.default_rng(step).normal(0, 0.1, 24_000).astype(np.float32)
    sound, picture = (
        Audio("zero_shot/clip_0/generated", (Clip(samples, 24_000),)),
        Image("zero_shot/clip_0/mel", np.full((80, 200, 3), step, np.uint8)),
    )
    return [
        Scalar(MEASURED, 1 / step),
        *(Scalar(f"gradients/layer_{at}/norm", float(at)) for at in range(SCALARS)),
        *(sound, picture),
        Table("zero_shot/clips", ("sample", "sound", "mel"), (("a", sound, picture), ("b", sound, picture))),
    ]


def train(condition: str, directory: Path, step_seconds: float) -> None:
    """Steps of a training that does nothing else."""
    recorder = Recorder([MemoryBackend() if condition == "no W&B" else WandbBackend()])
    recorder.open(Run(directory / "logs"))
    micros, written = [], {}
    for step in range(1, STEPS + 1):
        records = _records(step)
        written[step] = time.time()
        began = time.perf_counter()
        for record in records:
            recorder.record(record)
        recorder.flush(step)
        micros.append((time.perf_counter() - began) * 1e6)
        time.sleep(step_seconds)
        if step == KILLED_AT:
            (directory / "killed").touch()
    recorder.close()
    (directory / "took.json").write_text(json.dumps({"micros": micros, "written": written}))


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))

"""A run that is shown in Trackio, as a program: ``trackio_run.py DIRECTORY``. ``TRACKIO_DIR`` says where it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import trackio

from telemetry import TrackioBackend
from telemetry.backends.base import Run
from telemetry.delivery.recorder import Recorder
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table

STEPS, CHECKPOINT = (1, 2, 3), 2


def records(step: int) -> list[Record]:
    """Every kind of record, one that cannot be shown among them."""
    clip = Clip(np.sin(np.arange(8000, dtype=np.float32) * 0.2 * step), 8000, f"speaker {step}")
    picture = np.random.default_rng(step).integers(0, 255, (32, 48, 3), np.uint8)
    return [
        *(Scalar("outputs/loss/total", 1 / step), Scalar("train/loss", 0.5), Scalar("odd", float("nan"))),
        *(Audio("inputs/reference", (clip, clip)), Image("attention/mass", picture)),
        Table("zero_shot/clips", ("sample", "cer", "mel"), (("a", 0.5, Image("mel", picture)), ("b", None, None))),
        Alert("health/eos", "no end of stream", f"at step {step}", "error"),
        Image("broken", np.zeros((2, 2), np.float32)),
    ]


def attempt(directory: Path, start: int) -> None:
    """One attempt of the run."""
    backend = TrackioBackend()
    recorder = Recorder([backend])
    recorder.open(Run(directory / "logs", start, "voices", {"lr": 0.1}))
    for step in STEPS[start:]:
        recorder.write(step, records(step))
    recorder.close()
    assert recorder.dropped_records == 0
    assert backend.unshown_records == len(STEPS[start:])


def joined(directory: Path) -> None:
    """The user's own run, with rows of the user's before, between and after telemetry's; the user ends it."""
    run = trackio.init("mine", "guests", embed=False, auto_log_cpu=False, config={"own": 1})
    trackio.log({"user": 0.0})
    recorder = Recorder([TrackioBackend()])
    recorder.open(Run(directory / "logs", 0, "voices", {"lr": 0.1}))
    for step in STEPS:
        recorder.write(step, [Scalar("outputs/loss/total", 1 / step)])
        assert recorder.drain()
        trackio.log({"user": float(step)}, step=step)
    recorder.close()
    assert trackio.context_vars.current_run.get() is run
    trackio.log({"user": 4.0})
    trackio.finish()


def ended_early(directory: Path) -> None:
    """The Trainer's own callback ends its run before telemetry has written everything."""
    trackio.init("mine", "ended", embed=False, auto_log_cpu=False)
    recorder = Recorder([TrackioBackend()])
    recorder.open(Run(directory / "logs"))
    recorder.write(1, [Scalar("outputs/loss/total", 1.0)])
    assert recorder.drain()
    trackio.finish()
    recorder.write(2, [Scalar("outputs/loss/total", 0.5)])
    recorder.close()


if __name__ == "__main__":
    attempt(Path(sys.argv[1]), 0)
    attempt(Path(sys.argv[1]), CHECKPOINT)
    joined(Path(sys.argv[1]))
    ended_early(Path(sys.argv[1]))

"""What the real client does for the tests of the stand-in: ``python wandb_clients.py NAME DIRECTORY [ARGUMENT]``."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import wandb

PROJECT = "voices"
STEP = "train/global_step"
RATE = 16_000
EDGES, COUNTS = [0.0, 1.0, 2.0], [3, 4]
SAID = "said"
GO = "go"


def tone(hertz: float) -> Any:
    """A tenth of a second."""
    return wandb.Audio(0.5 * np.sin(2 * np.pi * hertz * np.arange(RATE // 10) / RATE), sample_rate=RATE)


def square(gray: int) -> Any:
    return wandb.Image(np.full((4, 4, 3), gray, np.uint8))


def opened(run_id: str, **arguments: Any) -> Any:
    """A run that sends every second."""
    settings = {"x_file_stream_transmit_interval": 1, "x_transaction_log_flush_interval": 0.2}
    settings |= arguments.pop("settings", {})
    return wandb.init(project=PROJECT, id=run_id, settings=wandb.Settings(**settings), **arguments)


def wait_for_go(directory: Path) -> None:
    """Say that this is the place, and wait there."""
    (directory / SAID).touch()
    while not (directory / GO).exists():
        time.sleep(0.02)


def everything(directory: Path) -> None:
    """Every kind of thing, and then the same run again twice: resumed, and rewound to its second row."""
    run = opened(
        "whole", name="first attempt", group="pair", tags=["a", "b"], config={"lr": 0.1, "model": {"layers": 2}}
    )
    run.define_metric("*", step_metric=STEP)
    for step in range(3):
        run.log({STEP: step, "loss": 1 / (step + 1), "odd": [float("nan"), float("inf"), -1.0][step]})
    wait_for_go(directory)
    clips = wandb.Table(columns=["step", "sound", "picture"], log_mode="INCREMENTAL")
    for step in (3, 4):
        clips.add_data(step, tone(220 * step), square(50 * step))
        whole = wandb.Table(columns=["name", "value"], data=[["a", step], ["b", step + 1]])
        histogram = wandb.Histogram(np_histogram=(COUNTS, EDGES))
        run.log({STEP: step, "clips": clips, "whole": whole, "shape": histogram, "sound": tone(440), "face": square(9)})
    run.alert("loss is not finite", "at step 1", level=wandb.AlertLevel.ERROR, wait_duration=2)
    run.summary["best"] = 0.25
    run.finish(exit_code=3)
    resumed = opened("whole", resume="must")
    resumed.log({STEP: 5, "loss": 0.125})
    resumed.finish()
    rewound = opened("whole", resume_from="whole?_step=1")
    rewound.log({STEP: 2, "loss": 9.0})
    rewound.finish()


def shared(directory: Path, label: str) -> None:
    """One of two writers of a run."""
    primary = label == "rank_0"
    settings = {"mode": "shared", "x_primary": primary, "x_label": label, "x_update_finish_state": primary}
    run = opened("shared", settings=settings)
    for step in range(4):
        run.log({STEP: step, label: step})
    run.finish()


def outage(directory: Path) -> None:
    """Rows before, during and after a time in which the server is gone."""
    run = opened("outage")
    rows: Iterator[int] = iter(range(1000))
    run.log({"row": next(rows)})
    (directory / SAID).touch()
    while not (directory / GO).exists():
        run.log({"row": next(rows), "sound": tone(100)})
        time.sleep(0.1)
    last = next(rows)
    run.log({"row": last})
    run.finish()
    (directory / "rows").write_text(str(last + 1))


def offline(directory: Path) -> None:
    """A run without the server, synced afterwards; and a workspace."""
    run = opened("offline", mode="offline")
    table = wandb.Table(columns=["sound"], log_mode="INCREMENTAL")
    for step in range(3):
        table.add_data(tone(100 * (step + 1)))
        run.log({STEP: step, "loss": step, "clips": table})
    path = Path(run.dir).parent
    run.finish()
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(path)], check=True, stdout=subprocess.DEVNULL)


def workspace(directory: Path) -> None:
    """Saved, and read again from its address."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2 import LinePlot

    section = ws.Section(name="Loss", panels=[LinePlot(x=STEP, y=["outputs/loss/total"])])
    saved = ws.Workspace(entity="stand-in", project=PROJECT, name="What to look at", sections=[section]).save()
    again = ws.Workspace.from_url(saved.url)
    (directory / SAID).write_text(again.sections[0].panels[0].y[0].name)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])

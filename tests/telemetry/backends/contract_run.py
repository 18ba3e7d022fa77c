"""A run with every kind of record on every registered backend, as a program: ``contract_run.py DIRECTORY``."""

from __future__ import annotations

import logging
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from telemetry.backends.base import Run
from telemetry.backends.registry import BACKENDS, make_backend
from telemetry.delivery.recorder import Recorder
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table
from telemetry.setting import run_config

MARKS = ("scalar-mark", "table-mark", "alert-mark")
# Nobody's: put together, so that no file of the project holds what looks like a secret.
SECRETS = {"token": "hf" + "_Zq8xK2mN7pLw4VtR9bYc3Hd6", "password": "Jf5" + "Sp1Xr8Gk"}


def every_kind(step: int) -> Sequence[Record]:
    """One record of every kind, sound and picture also as cells."""
    sound = Audio("inputs/reference", (Clip(np.sin(np.arange(800, dtype=np.float32) * step), 8000, "a voice"),))
    picture = Image("attention/mass", np.full((8, 12, 3), step, np.uint8), "by layer", voice=True)
    table = Table(
        "zero_shot/clips", ("sample", "cer", "sound", "mel"), ((MARKS[1], 0.5, sound, picture), ("b", *[None] * 3))
    )
    return [
        Scalar(f"outputs/loss/{MARKS[0]}", 1 / step, "a note"),
        sound,
        picture,
        table,
        Alert("health/alerts", MARKS[2], f"do so: https://me:{SECRETS['password']}@host, {SECRETS['token']}", "error"),
    ]


def run(name: str, directory: Path) -> int:
    """Open, write and close, as the recorder does; returns how many records were lost or could not be shown."""
    backend = make_backend(name)
    recorder = Recorder([backend])
    given = {
        "lr": 0.1,
        "hub_token": SECRETS["token"],
        "url": f"mysql://u:p@{SECRETS['password']}@h/x",
        "nested": [SECRETS],
    }
    config = run_config(given, torch.nn.Linear(1, 1), {})
    recorder.open(Run(directory / "logs", name="contract", config=config, output_dir=directory))
    recorder.absent("outputs/loss/text", f"no answer from https://me:{SECRETS['password']}@host")
    for step in (1, 1, 2):  # a step may be written more than once
        recorder.write(step, every_kind(step))
    recorder.close()
    (directory / "memory").write_text(str(getattr(backend, "records", "")))
    return recorder.dropped_records + getattr(backend, "unshown_records", 0)


def main(root: Path) -> None:
    """Run every registered backend in a directory of its own."""
    assert {type(record) for record in every_kind(1)} == set(typing.get_args(Record)), "a kind of record is missing"
    for name in BACKENDS:
        (root / name).mkdir(exist_ok=True)
        logging.basicConfig(level=logging.INFO, filename=root / name / "log", force=True)
        (root / name / "lost").write_text(str(run(name, root / name)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Event files to make reports of, written by the real backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from telemetry.backends.base import Run
from telemetry.backends.tensorboard import TensorBoardBackend
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"' {{7*7}} \u202egnp.exe %{y} &amp;"
)
ARABIC = "نحن نحب القراءة."
RATE = 16000


def tone(seconds: float = 0.5, hertz: float = 220.0) -> Clip:
    """A clip with a label that is markup."""
    times = np.arange(int(seconds * RATE)) / RATE
    return Clip(0.5 * np.sin(2 * np.pi * hertz * times).astype(np.float32), RATE, f"speaker {HOSTILE}")


def rich_records(step: int) -> list[Record]:
    """One of everything that telemetry records, with text that is markup wherever text can be."""
    pixels = np.full((12, 20, 3), step % 255, np.uint8)
    return [
        Scalar("outputs/loss/total", 9.0 / step),
        Scalar("outputs/loss/text", 3.0 / step),
        *(Scalar(f"outputs/accuracy/codebook_{k}", 0.1 * k + 0.001 * step) for k in range(8)),
        *(Scalar(f"attention/layer_{layer}/target_to_reference", 0.01 * layer) for layer in range(12)),
        Scalar("gradients/total_norm", float("nan") if step == 20 else 1.5, note=HOSTILE),
        Scalar("inputs/tensor/labels/nonfinite", float(step == 30)),
        Scalar("telemetry/dropped_records", 0.0 if step < 30 else 4.0),
        Scalar("health/not_learning", 2.0),
        Scalar("health/leak", 0.0),
        Scalar(f"own/{HOSTILE.replace('/', '')}", 1.0),
        Table("health/checks", ("finding", "verdict", "evidence"), (("loss does not fall", "failing", HOSTILE),)),
        Table("inputs/sequence", ("sample", "text"), (("a|b", HOSTILE), ("ar", ARABIC), ("", "two\nlines"))),
        Table(
            "zero_shot/clips",
            ("sample", "generated"),
            (("1", Audio("zero_shot/clip_0/generated", (tone(),))),),
        ),
        Alert("health/alerts", f"not learning {HOSTILE}", f"Step {step}: {HOSTILE}", "error"),
        *(Audio(f"zero_shot/clip_0/{kind}", (tone(),)) for kind in ("generated", "reference", "target")),
        Image("zero_shot/clip_0/generated", pixels, HOSTILE),
        Image("attention/mass", pixels),
    ]


def write_run(
    directory: Path,
    steps: dict[int, list[Record]],
    starting_step: int = 0,
    config: dict | None = None,
    defaults: frozenset[str] = frozenset(),
) -> Path:
    """One attempt of a run; returns its event file."""
    backend = TensorBoardBackend()
    backend.open(Run(directory, starting_step, config=config or {}, defaults=defaults))
    for step, records in steps.items():
        backend.write(step, records)
    backend.close()
    assert backend.path is not None
    return backend.path


def rich_run(directory: Path) -> None:
    """A run with one of everything at three steps, under a name that is markup, and a text of somebody else's."""
    config = {"learning_rate": 1e-4, "bf16": True, "prompt": HOSTILE}
    write_run(directory, {step: rich_records(step) for step in (10, 20, 30)}, config=config)
    with SummaryWriter(directory, filename_suffix=".other") as writer:
        writer.add_text("inputs/note", HOSTILE, 30)

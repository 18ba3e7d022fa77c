"""DeepSpeed's ZeRO on two ranks of CPUs: what is shown is what the Trainer logs, and what DDP shows.

DeepSpeed is no dependency of the tests; where it is installed they run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.programs import run

PROGRAM = Path(__file__).parent / "zero_program.py"


ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
GRADIENTS = ("/norm", "total_norm", "/update_ratio", "/zero_fraction", "/nonfinite")


def shown(stage: int, directory: Path) -> Any:
    """What two ranks have shown under a stage, 0 for DDP."""
    directory.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # Fresh: importing DeepSpeed starts threads, which no fork survives.
    ended = run([*torchrun, str(PROGRAM), str(directory), str(stage)], directory, fresh=True, **ENVIRONMENT)
    assert ended.status == 0, ended.said
    return json.loads((directory / "shown").read_text())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("deepspeed")
    return shown(0, tmp_path_factory.mktemp("ddp") / "0")["values"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks(stage: int, ddp: Any, tmp_path: Path) -> None:
    found = shown(stage, tmp_path / str(stage))
    values = found["values"]
    assert found["engine"] == "DeepSpeedEngine"
    assert values["outputs/loss/total"] == pytest.approx(values["outputs/loss/model"], rel=1e-5)
    assert values["outputs/loss/total"] == pytest.approx(values["train/loss"], rel=1e-5)
    # Seen before clipping, and said to be.
    assert values["gradients/total_norm"] == pytest.approx(values["train/grad_norm"], rel=1e-4)
    assert min(values["train/grad_norm"].values()) > 0.5
    assert set(found["notes"]) == {""}
    wanted = {tag: each for tag, each in ddp.items() if tag.startswith("gradients/") and tag.endswith(GRADIENTS)}
    assert len(wanted) > 20
    for tag, each in wanted.items():
        assert values[tag] == pytest.approx(each, rel=1e-4, abs=1e-9), tag

"""DeepSpeed's ZeRO on two ranks of CPUs: what is shown is what the Trainer logs, and what is not says why.

DeepSpeed is no dependency of the tests; where it is installed they run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.programs import finish

PROGRAM = Path(__file__).parent / "zero_program.py"


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    finish([str(PROGRAM), str(tmp_path), str(stage)], tmp_path, ranks=2)
    shown = json.loads((tmp_path / "shown").read_text())
    values, absent = shown["values"], shown["absent"]
    assert shown["engine"] == "DeepSpeedEngine"
    assert values["outputs/loss/total"] == pytest.approx(values["outputs/loss/model"], rel=1e-5)
    assert values["outputs/loss/total"] == pytest.approx(values["train/loss"], rel=1e-5)
    if stage == 3:  # seen before clipping, and said to be
        assert values["gradients/total_norm"] == pytest.approx(values["train/grad_norm"], rel=1e-4)
        assert min(values["train/grad_norm"].values()) > 0.5
        assert set(shown["notes"]) == {""}
    else:
        assert "gradients/total_norm" not in values
        assert "DeepSpeed's optimizer has stepped" in absent["gradients/total_norm"]

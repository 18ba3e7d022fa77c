"""DeepSpeed's ZeRO on two ranks of CPUs: what is shown is what the Trainer logs, and what DDP shows.

DeepSpeed is no dependency of the tests; where it is installed they run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.programs import run

from telemetry.instruments.gradients import OFFLOADED
from telemetry.instruments.setup import OTHERS, PARTS

PROGRAM = Path(__file__).parent / "zero_program.py"


ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
SECTIONS = ("inputs/", "outputs/", "attention/", "activations/", "gradients/", "setup/", "health/", "steps/")
NORMS = ("/norm", "total_norm")
COUNTS = ("/zero_fraction", "/nonfinite")
UPDATES = ("/update_ratio",)
SUMMED = "bf16-1-summed-in-float32"
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])

# A value of bfloat16 has 8 bits: each rounding is off by up to 0.2 %, and a gradient of three layers has been through
# tens. Seen: 4.2 % of a norm. Adam's step is that of the learning rate whatever the gradient's size, of weights kept in
# float32. Seen: 1.1 %. float16 has 11 bits. Seen: 1.0 % and 0.1 %. A factor left in would be of 2 at least, and a part
# left out shows in the total, which is that of the Trainer to 0.01 %.
TOLERANCES = {"bf16": (0.08, 0.025), "fp16": (0.02, 0.004)}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a training → what two ranks have shown of it."""
    pytest.importorskip("deepspeed")
    directory = tmp_path_factory.mktemp("zero")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # Fresh: importing DeepSpeed starts threads, which no fork survives.
    ended = run([*torchrun, str(PROGRAM), str(directory)], directory, fresh=True, **ENVIRONMENT)
    assert ended.status == 0, ended.said
    return json.loads((directory / "shown").read_text())


def of(values: Mapping[str, Any], ends: tuple[str, ...]) -> dict[str, Any]:
    """The gradients' values whose tags end so."""
    return {tag: each for tag, each in values.items() if tag.startswith("gradients/") and tag.endswith(ends)}


def agrees(found: Any, ddp: Any, norms: float, updates: float, steps: tuple[str, ...] = ("1", "2", "3", "4")) -> None:
    """What is shown of some steps is what the Trainer logs, and, within so much, what DDP shows."""
    values = found["values"]
    assert found["engine"] == "DeepSpeedEngine"
    assert values["outputs/loss/total"] == pytest.approx(values["outputs/loss/model"], rel=1e-5)
    assert values["outputs/loss/total"] == pytest.approx(values["train/loss"], rel=1e-5)
    for step in steps:
        # Seen before clipping, and said to be.
        assert values["gradients/total_norm"][step] == pytest.approx(values["train/grad_norm"][step], rel=1e-4)
        assert values["train/grad_norm"][step] > 0.5
    assert set(found["notes"]) == {""}
    wanted = of(ddp["values"], NORMS + UPDATES)
    assert len(wanted) > 15
    for tag, each in wanted.items():
        expected = {step: each[step] for step in steps}
        within = updates if tag.endswith(UPDATES) else norms
        assert {step: values[tag][step] for step in steps} == pytest.approx(expected, rel=within, abs=1e-9), tag


def absences(found: Any) -> dict[str, str]:
    """Tag → why, but for the one that names the precision."""
    return {tag: why for tag, why in found["absent"].items() if tag != "throughput/model_flops_utilization"}


def of_zero(stage: int) -> dict[str, str]:
    """What no stage shows, or the third."""
    return {"setup/optimizer": OTHERS, **({"setup/ranks/weights_apart": PARTS} if stage == 3 else {})}


def no_more_alarms(found: Any, ddp: Any) -> None:
    """No rule finds more than of DDP."""
    verdicts = [tag for tag in found["values"] if tag.startswith(("health/", "setup/")) and tag.count("/") == 1]
    assert len(verdicts) > 12
    for tag in verdicts:
        assert found["values"][tag] == ddp["values"][tag], tag


@STAGES
def test_float32(stage: int, shown: Any) -> None:
    found, ddp = shown[f"float32-{stage}"], shown["ddp"]
    agrees(found, ddp, 1e-4, 1e-4)
    no_more_alarms(found, ddp)
    assert absences(found) == absences(ddp) | of_zero(stage)
    wanted = {tag: each for tag, each in ddp["values"].items() if tag.startswith(SECTIONS)}
    missing = {tag for tag in wanted if tag not in found["values"]}
    assert missing == {tag for tag in wanted if tag.startswith(("setup/optimizer", *["setup/ranks"] * (stage == 3)))}
    assert {tag.split("/")[0] + "/" for tag in wanted.keys() - missing} == set(SECTIONS)
    for tag in wanted.keys() - missing:
        assert found["values"][tag] == pytest.approx(wanted[tag], rel=1e-4, abs=1e-7), tag


@STAGES
def test_sizes_that_no_two_ranks_share_evenly(stage: int, shown: Any) -> None:
    """What DeepSpeed fills parts up with is not counted."""
    found, ddp = shown[f"odd-{stage}"], shown["odd-0"]
    agrees(found, ddp, 1e-4, 1e-4)
    for tag, each in of(ddp["values"], COUNTS).items():
        assert found["values"][tag] == pytest.approx(each, abs=1e-9), tag


@STAGES
def test_training_is_the_same_without_telemetry(stage: int, shown: Any) -> None:
    assert shown[f"float32-{stage}"]["parameters"] == shown[f"unwatched-{stage}"]["parameters"]


@pytest.mark.parametrize("name", [*(f"{dtype}-{stage}" for dtype in TOLERANCES for stage in (1, 2, 3)), SUMMED])
def test_half_precision(name: str, shown: Any) -> None:
    found, ddp = shown[name], shown["ddp"]
    agrees(found, ddp, *TOLERANCES[name[:4]])
    assert not any(value for each in of(found["values"], ("/nonfinite",)).values() for value in each.values())
    no_more_alarms(found, ddp)
    assert absences(found) == absences(ddp) | of_zero(int(name.split("-")[1]))


def test_sums_in_float32_are_of_another_optimizer(shown: Any) -> None:
    assert shown["bf16-1"]["optimizer"] == "DeepSpeedZeroOptimizer"
    assert shown[SUMMED]["optimizer"] == "BF16_Optimizer"


@STAGES
def test_steps_that_overflow(stage: int, shown: Any) -> None:
    """They move nothing and show no number of their own; those after them are as if these had been left out."""
    found = shown[f"overflowing-{stage}"]
    values, left_out = found["values"], found["overflowed"]
    steps = [str(step + 1) for step in range(6)]
    assert 0 < left_out < 5
    for step in steps[:left_out]:
        assert values["gradients/total_norm"][step] == values["train/grad_norm"][step] == math.inf
        assert sum(each[step] for each in of(values, ("/nonfinite",)).values()) > 0
        assert [each[step] for each in of(values, UPDATES).values()] == [0.0] * 5
        assert step not in values["gradients/clip_coefficient"]
        assert values["health/nonfinite"][step] == 2.0
        assert step not in values["health/clipping"]
    agrees(found, shown[f"ddp-passing-over-{left_out}"], *TOLERANCES["fp16"], tuple(steps[left_out:]))
    for step in steps[left_out:]:
        by = 0.5 / values["train/grad_norm"][step]
        assert values["gradients/clip_coefficient"][step] == pytest.approx(by, rel=1e-4)
        assert values["health/nonfinite"][step] == values["health/updates_arrive"][step] == 0.0


@STAGES
def test_offloaded(stage: int, shown: Any) -> None:
    """What lies on the host is not looked for there, and the reason says so; all else is there."""
    found, ddp = shown[f"offloaded-{stage}"], shown["ddp"]
    values = found["values"]
    assert found["parameters"] == shown[f"float32-{stage}"]["parameters"]
    assert not any(tag.startswith("gradients/") for tag in found["tags"])
    reasons = {"gradients/total_norm": OFFLOADED, "gradients/<group>/update_ratio": OFFLOADED}
    assert absences(found) == absences(ddp) | of_zero(stage) | reasons
    assert values["outputs/loss/total"] == pytest.approx(values["train/loss"], rel=1e-5)
    assert values["train/loss"] == pytest.approx(ddp["values"]["train/loss"], rel=1e-5)
    no_more_alarms(found, ddp)

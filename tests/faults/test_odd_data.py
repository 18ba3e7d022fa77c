"""Numbers that are not finite are shown where they come up; odd batches end training as they would have."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fault_runs import LOGGED, run, scalars, steps_of
from scenarios import ODD_BATCHES, POISONED
from support.programs import Ended
from support.tiny_training import outcome

STEPS = [1, 2, 3, 4]


def test_nan_is_shown_at_its_step_though_the_trainer_hides_it(tmp_path: Path) -> None:
    ended = run("logits_are_nan", tmp_path)
    assert ended.status == 0, ended.said
    found = {tag: dict(points) for tag, points in scalars(tmp_path).items()}
    assert all(math.isfinite(value) for value in found[LOGGED].values())  # the Trainer's filter
    for tag in ("outputs/loss/text", "outputs/loss/total", "gradients/total_norm", "gradients/text_head/norm"):
        finite = {step: math.isfinite(value) for step, value in found[tag].items()}
        assert finite == {step: step < POISONED for step in range(1, 21)}, tag
    said = [line for line in ended.said.splitlines() if "not finite on rank 0" in line]
    assert len(said) == 1
    assert f"step {POISONED}: " in said[0]
    assert "outputs/loss/text" in said[0]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Trainings on odd batches, each with telemetry and without."""
    directory = tmp_path_factory.mktemp("odd")
    return directory, run("odd_batches", directory)


@pytest.mark.parametrize("name", ODD_BATCHES)
def test_odd_batches_end_training_as_without_telemetry(name: str, odd: tuple[Path, Ended]) -> None:
    directory, ended = odd
    assert ended.status == 0, ended.said
    without, with_telemetry = outcome(directory / name / "without"), outcome(directory / name / "with")
    assert with_telemetry == without
    if not without.error:
        assert list(without.losses) == STEPS
        assert steps_of(directory / name / "with")["inputs/tokens/total"] == STEPS

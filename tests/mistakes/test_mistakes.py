"""A tenth of the benchmark: mistakes that are named at step 1, and trainings in which nothing is."""

from __future__ import annotations

import dataclasses

import pytest
from mistakes.planted import HEALTHY, MISTAKES
from mistakes.trainings import Planted, observe

AT_ONCE = (
    "labels shifted twice in an own loss",
    "codebook 0 alone in the loss",
    "bidirectional attention",
)
WELL = ("as it should be", "LoRA", "bfloat16 by autocast")


def shortly(planted: Planted) -> Planted:
    """The same with a few steps and no evaluation."""
    return dataclasses.replace(planted, arguments={**planted.arguments, "max_steps": 3, "eval_strategy": "no"})


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_mistake_is_named_at_step_1(name: str) -> None:
    planted = next(one for one in MISTAKES if one.name == name)
    found = observe(shortly(planted), clips=0, listened=False).named(planted)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("name", WELL)
def test_a_healthy_training_is_not_blamed(name: str) -> None:
    planted = next(one for one in HEALTHY if one.name == name)
    outcome = observe(shortly(planted), clips=0, listened=False)
    assert outcome.error == ""
    assert outcome.findings == []

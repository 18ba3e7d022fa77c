"""Measuring everything at every step leaves every bit of training as it is without telemetry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_program import make_model
from rank_scenarios import Batch, Outcome, Scenario, launch
from support.references import differing

RANKS = 2
STEPS = 20
FEWER_STEPS = 10
ACCUMULATION = 2
DROPOUT = 0.2

ALL_ON = {"shared_attention": {"text_audio_cosine": True}, "zero_shot": {"conditioning_every": 1}}
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}

ON_RANKS: dict[str, dict[str, Any]] = {
    "copied": {},
    "bf16": {"arguments": {"bf16": True}, "steps": FEWER_STEPS},
    "checkpointing": {"arguments": CHECKPOINTING, "steps": FEWER_STEPS},
    "sharded": {"sharded": True, "steps": FEWER_STEPS},
}
ALONE: dict[str, dict[str, Any]] = {"alone": {}, "compiled": {"arguments": COMPILED}}


def pair(name: str, batches: list[Batch], changes: dict[str, Any]) -> list[Scenario]:
    """A training without telemetry, and the same with it."""
    given: dict[str, Any] = {"steps": STEPS, **changes}
    measured = Scenario(name, batches, accumulation=ACCUMULATION, dropout=DROPOUT, options=ALL_ON, **given)
    return [replace(measured, name=f"{name}, unmeasured", telemetry=False), measured]


@pytest.fixture(scope="module")
def batches(make_batch: Callable[..., Batch]) -> list[Batch]:
    return [make_batch(seed, 1 + seed % 3 % 2) for seed in range(2 * RANKS * ACCUMULATION)]


@pytest.fixture(scope="module")
def on_ranks(batches: list[Batch], scratch: Callable[[], Path]) -> dict[str, list[Outcome]]:
    scenarios = [scenario for name, changes in ON_RANKS.items() for scenario in pair(name, batches, changes)]
    without_dropout = Scenario("without dropout", batches, STEPS, ACCUMULATION, telemetry=False)
    return launch([*scenarios, without_dropout], scratch(), RANKS)


@pytest.fixture(scope="module")
def alone(batches: list[Batch], scratch: Callable[[], Path]) -> dict[str, list[Outcome]]:
    alike = [batches[1]] * len(batches)  # one shape: a compiled model is traced once
    return launch(
        [scenario for name, changes in ALONE.items() for scenario in pair(name, alike, changes)], scratch(), 1
    )


def assert_same_bits(outcomes: dict[str, list[Outcome]], name: str, steps: int = STEPS) -> None:
    for measured, unmeasured in zip(outcomes[name], outcomes[f"{name}, unmeasured"], strict=True):
        assert differing(measured.state, unmeasured.state) == []
        assert not unmeasured.backend.records
        assert sum(key.startswith("optimizer ") for key in measured.state) > sum(
            key.startswith("parameter ") for key in measured.state
        )
    backend = outcomes[name][0].backend
    for tag in ("inputs/tokens/total", "outputs/loss/audio", "gradients/total_norm", "zero_shot/chatml/compliance"):
        assert list(backend.scalars(tag)) == list(range(1, steps + 1))
    assert "zero_shot/conditioning/gain" in backend.tags()
    spread_or_compiled = name in ("sharded", "compiled")
    assert ("gradients/text_audio_cosine" in backend.tags()) != spread_or_compiled


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks(on_ranks: dict[str, list[Outcome]], name: str) -> None:
    assert_same_bits(on_ranks, name, ON_RANKS[name].get("steps", STEPS))


@pytest.mark.parametrize("name", ALONE)
def test_one_process(alone: dict[str, list[Outcome]], name: str) -> None:
    assert_same_bits(alone, name)


def test_telemetry_has_nothing_compiled(alone: dict[str, list[Outcome]]) -> None:
    """The model compiled without it is the one that is measured."""
    [before], [after] = alone["compiled, unmeasured"], alone["compiled"]
    assert alone["alone"][0].graphs == 0
    assert before.graphs > 0
    assert after.graphs == before.graphs


def test_the_trainings_are_what_they_are_called(on_ranks: dict[str, list[Outcome]], batches: list[Batch]) -> None:
    """Options change the numbers, training changes every parameter, and both ranks keep the same ones."""
    first, second = (outcome.state for outcome in on_ranks["copied"])
    parameters = [name for name in first if name.startswith("parameter ")]
    assert [name for name in parameters if not torch.equal(first[name], second[name])] == []
    for other, same in (("bf16", "checkpointing"), ("without dropout", "copied")):
        changed = differing(on_ranks[other][0].state, on_ranks[same][0].state)
        assert set(parameters) <= set(changed), other
    initial = dict(make_model(Scenario("", batches, 0, dropout=DROPOUT)).named_parameters())
    assert [name for name in parameters if torch.equal(first[name], initial[name.removeprefix("parameter ")])] == []

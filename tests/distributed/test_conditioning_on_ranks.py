"""The conditioning gain on two ranks: of all ranks' samples, with forward passes that need every rank or do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_faults import FAULTY_RANK
from rank_program import make_model
from rank_scenarios import Batch, Outcome, Scenario, launch
from support.references import differing
from support.steps import Steps

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import ZeroShotVerificationLoggerCallback

RANKS = 2
STEPS = 4
EVERY_STEP = list(range(1, STEPS + 1))
GAIN = "zero_shot/conditioning/gain"
GAINS = {"zero_shot": {"conditioning_every": 1}}
STILL = {"optim": "sgd", "learning_rate": 0.0}
TRAINED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@pytest.fixture(scope="module")
def batches(make_batch: Callable[..., Batch]) -> list[Batch]:
    """Of step 2 rank 1 has a single sample, which cannot be swapped."""
    return [make_batch(seed, 1 if seed == RANKS + 1 else 2 + seed % 2) for seed in range(RANKS * STEPS)]


@pytest.fixture(scope="module")
def outcomes(batches: list[Batch], scratch: Callable[[], Path]) -> dict[str, list[Outcome]]:
    still = Scenario("copied", batches, STEPS, options=GAINS, arguments=STILL)
    trained = Scenario("trained", batches, STEPS, accumulation=2, dropout=0.2, options=GAINS, arguments=TRAINED)
    scenarios = [
        still,
        replace(still, name="sharded", sharded=True),
        replace(still, name="copied, broken", fault="broken_gain"),
        replace(still, name="sharded, broken", fault="broken_gain", sharded=True),
        trained,
        replace(trained, name="trained, unmeasured", telemetry=False),
    ]
    return launch(scenarios, scratch(), RANKS)


def gain_and_codes(batch: Batch, directory: Path) -> tuple[float, int]:
    """The gain of one batch in one process, and the number of codes that it is the mean of."""
    backend = MemoryBackend()
    model: Any = make_model(Scenario("", [], 0))
    with Steps(model, [ZeroShotVerificationLoggerCallback(1, [backend], conditioning_every=1)], directory) as run:
        run.step([batch])
    supervised = (batch["audio_labels"] >= 0) & batch["audio_input_ids_mask"].unsqueeze(-1)
    return backend.scalars(GAIN).get(1, 0.0), int(supervised.sum()) * (len(batch["metadata"]) > 1)


@pytest.mark.parametrize("name", ["copied", "sharded"])
def test_all_ranks_samples_count(
    outcomes: dict[str, list[Outcome]], batches: list[Batch], name: str, tmp_path: Path
) -> None:
    measured = outcomes[name][0].backend.scalars(GAIN)
    assert list(measured) == EVERY_STEP
    for step in (1, 2):
        pair = [gain_and_codes(batch, tmp_path) for batch in batches[RANKS * (step - 1) : RANKS * step]]
        expected = sum(gain * codes for gain, codes in pair) / sum(codes for _, codes in pair)
        assert measured[step] == pytest.approx(expected, rel=1e-3, abs=1e-6), step
        assert all(codes > 0 for _, codes in pair) == (step == 1)
        assert abs(expected) > 1e-4


def test_evaluations_are_of_all_ranks_too(outcomes: dict[str, list[Outcome]]) -> None:
    backend = outcomes["trained"][0].backend
    assert list(backend.scalars("zero_shot/conditioning/eval/gain")) == [0, 2, 4]
    assert list(backend.scalars(GAIN)) == EVERY_STEP


def test_nothing_of_training_is_changed(outcomes: dict[str, list[Outcome]]) -> None:
    """With dropout, gradient checkpointing, accumulation, evaluation; random numbers included."""
    for measured, unmeasured in zip(outcomes["trained"], outcomes["trained, unmeasured"], strict=True):
        assert differing(unmeasured.state, measured.state) == []
        assert "random numbers" in measured.state


@pytest.mark.parametrize("kind", ["copied", "sharded"])
def test_a_rank_that_raises_between_forward_passes_keeps_nobody_waiting(
    outcomes: dict[str, list[Outcome]], kind: str
) -> None:
    sound, broken = outcomes[kind], outcomes[f"{kind}, broken"]
    for ours, theirs in zip(sound, broken, strict=True):
        assert differing(ours.state, theirs.state) == []
    assert list(broken[0].backend.scalars("outputs/loss/total")) == EVERY_STEP
    [said] = [line for line in broken[FAULTY_RANK].log if "ConditioningInstrument failed; training goes on" in line]
    assert "this measure is broken" in said
    alone = "ranks could not all run the model together"
    assert sum(alone in line for line in broken[0].log) == (kind == "sharded")
    assert not any("cannot run the model together" in line for outcome in broken for line in outcome.log)

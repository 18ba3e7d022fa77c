"""What goes wrong on one rank alone is seen, named, and in nobody's way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_faults import FAULTY_RANK, POISONED_STEP
from rank_scenarios import Batch, Outcome, Scenario, launch
from support.batches import Voices
from support.references import differing

from telemetry.backends.memory import MemoryBackend
from telemetry.records import Table

RANKS = 2
STEPS = 9
EVERY_STEP = list(range(1, STEPS + 1))
LONE_TOKEN_STEP = 2
UNUSED = {"ddp_find_unused_parameters": True}  # a text token has no use for the audio's parameters


@pytest.fixture(scope="module")
def batches(make_batch: Callable[..., Batch]) -> list[Batch]:
    return [make_batch(seed, 1 + seed % 2) for seed in range(RANKS * STEPS)]


@pytest.fixture(scope="module")
def with_lone_token(batches: list[Batch], voices: Voices) -> list[Batch]:
    """Rank 1's batch of step 2 is one token of text, without any audio."""
    token = torch.tensor([[voices.tokenizer.bos_token_id]])
    lone = {"input_ids": token, "attention_mask": torch.ones_like(token), "labels": token, "metadata": []}
    at = RANKS * (LONE_TOKEN_STEP - 1) + FAULTY_RANK
    return [*batches[:at], lone, *batches[at + 1 :]]


@pytest.fixture(scope="module")
def outcomes(
    batches: list[Batch], with_lone_token: list[Batch], scratch: Callable[[], Path]
) -> dict[str, list[Outcome]]:
    faults = ("poisoned_step", "broken_input_measure", "broken_check")
    scenarios = [
        Scenario("sound", batches, STEPS),
        *(Scenario(fault, batches, STEPS, fault=fault) for fault in faults),
        *(Scenario(fault, batches, 2, fault=fault) for fault in ("bypassed_wrapper", "unlike_seeds")),
        Scenario("lone token", with_lone_token, STEPS, arguments=UNUSED),
        Scenario("lone token, unmeasured", with_lone_token, STEPS, telemetry=False, arguments=UNUSED),
    ]
    return launch(scenarios, scratch(), RANKS)


def nonfinite_steps(backend: MemoryBackend, tag: str) -> list[int]:
    return [step for step, value in backend.scalars(tag).items() if not math.isfinite(value)]


def prediction_samples(backend: MemoryBackend) -> dict[int, list[str]]:
    """Step → first cell of each row."""
    return {
        step: [str(row[0]) for row in record.rows]
        for step, record in backend.records["outputs/predictions"]
        if isinstance(record, Table)
    }


def lines_with(outcome: Outcome, *parts: str) -> list[str]:
    return [line for line in outcome.log if all(part in line for part in parts)]


def measured_tags(backend: MemoryBackend) -> list[str]:
    """Tags of scalars of every due step, without those of the Trainer and of telemetry itself."""
    others = (
        "telemetry/",
        "throughput/",
        "steps/",
        "train/",
        "health/",
        "setup/",
        "zero_shot/conditioning/",
        "zero_shot/text_gain",
    )
    return [tag for tag in backend.tags() if backend.scalars(tag) and not tag.startswith(others)]


# -- NaN on rank 1 -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_on_one_rank_is_seen_at_its_step(outcomes: dict[str, list[Outcome]]) -> None:
    backend = outcomes["poisoned_step"][0].backend
    losses = [tag for tag in backend.tags() if tag.startswith("outputs/loss/")]
    assert {"outputs/loss/total", "outputs/loss/text", "outputs/loss/audio", "outputs/loss/codebook_7"} <= set(losses)
    for tag in losses:
        assert list(backend.scalars(tag)) == EVERY_STEP
        assert nonfinite_steps(backend, tag) == [POISONED_STEP], tag
    assert nonfinite_steps(backend, "gradients/total_norm") == [POISONED_STEP]


def test_the_trainers_own_loss_hides_it(outcomes: dict[str, list[Outcome]]) -> None:
    backend = outcomes["poisoned_step"][0].backend
    assert set(EVERY_STEP) <= set(backend.scalars("train/loss"))
    assert nonfinite_steps(backend, "train/loss") == []


def test_the_log_names_step_and_rank(outcomes: dict[str, list[Outcome]]) -> None:
    first = outcomes["poisoned_step"][0]
    [named] = lines_with(first, f"not finite on rank {FAULTY_RANK}")
    assert f"step {POISONED_STEP}:" in named
    assert "outputs/loss/" in named
    assert not lines_with(first, "outputs/loss/", "not finite on rank 0")
    assert not lines_with(outcomes["sound"][0], "not finite")


def test_the_tables_show_its_rows(outcomes: dict[str, list[Outcome]]) -> None:
    samples = prediction_samples(outcomes["poisoned_step"][0].backend)
    other = {step: sorted({name for name in names if name.startswith("rank ")}) for step, names in samples.items()}
    at = RANKS * (POISONED_STEP - 1) + FAULTY_RANK
    assert list(samples) == EVERY_STEP
    assert other.pop(POISONED_STEP) == [f"rank {FAULTY_RANK}: sample-{10 * at + row}" for row in range(1 + at % 2)]
    assert not any(other.values())
    own = {name for name in samples[POISONED_STEP] if not name.startswith("rank ")}
    assert own == {f"sample-{10 * (at - FAULTY_RANK)}"}


def test_the_ranks_with_the_highest_and_lowest_losses_are_named(outcomes: dict[str, list[Outcome]]) -> None:
    tags = "steps/highest_rank/median_loss", "steps/lowest_rank/median_loss", "steps/median_loss"
    for name, left_out in (("sound", set()), ("poisoned_step", {POISONED_STEP})):
        backend = outcomes[name][0].backend
        high, low, mean = map(backend.scalars, tags)
        assert high.keys() == low.keys() == set(EVERY_STEP) - left_out  # of one rank's number none is the highest
        assert all(high[step] > low[step] for step in high)
        assert {step: mean[step] for step in high} == pytest.approx({s: (high[s] + low[s]) / 2 for s in high})
        named = [{record.note for _, record in both} for both in zip(*map(backend.records.get, tags[:2]), strict=True)]
        assert named == [{"rank 0", "rank 1"}] * len(high)
        shown = {"throughput/slowest_loader/loader_fraction", "throughput/slowest_rank/seconds_per_step"}
        assert shown <= set(backend.tags())


# -- weights that come apart ------------------------------------------------------------------------------------------


def test_ranks_with_weights_of_their_own_are_named_at_step_1(outcomes: dict[str, list[Outcome]]) -> None:
    assert outcomes["sound"][0].backend.scalars("setup/ranks/weights_apart") == dict.fromkeys(EVERY_STEP, 0.0)
    assert outcomes["sound"][0].backend.scalars("setup/ranks") == {1: 0.0}
    for fault in ("bypassed_wrapper", "unlike_seeds"):
        backend = outcomes[fault][0].backend
        assert backend.scalars("setup/ranks/weights_apart")[1] > 1e-5, fault
        assert backend.scalars("setup/ranks")[1] == 2, fault


# -- a measure that raises on rank 1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "spoiled"), [("broken_input_measure", "inputs/"), ("broken_check", "zero_shot/chatml/")]
)
def test_what_others_measure_is_as_without_the_fault(
    outcomes: dict[str, list[Outcome]], fault: str, spoiled: str
) -> None:
    backend, sound = outcomes[fault][0].backend, outcomes["sound"][0].backend
    tags = [tag for tag in measured_tags(sound) if not tag.startswith(spoiled)]
    assert {tag.partition("/")[0] for tag in tags} >= {"outputs", "gradients", "zero_shot"}
    for tag in tags:
        assert list(backend.scalars(tag)) == EVERY_STEP
        assert backend.scalars(tag) == sound.scalars(tag), tag


@pytest.mark.parametrize("fault", ["broken_input_measure", "broken_check"])
def test_a_broken_measure_changes_no_training(outcomes: dict[str, list[Outcome]], fault: str) -> None:
    for broken, sound in zip(outcomes[fault], outcomes["sound"], strict=True):
        assert differing(sound.state, broken.state) == []


def test_the_broken_measure_shows_the_other_ranks_numbers(
    outcomes: dict[str, list[Outcome]], batches: list[Batch]
) -> None:
    totals = outcomes["broken_input_measure"][0].backend.scalars("inputs/tokens/total")
    assert totals == {step: batches[RANKS * (step - 1)]["input_ids"].numel() for step in EVERY_STEP}
    compliance = outcomes["broken_check"][0].backend.scalars("zero_shot/chatml/compliance")
    assert compliance == dict.fromkeys(EVERY_STEP, 1.0)


def test_a_broken_measure_is_said_where_it_broke(outcomes: dict[str, list[Outcome]]) -> None:
    first, second = outcomes["broken_input_measure"]
    [said] = lines_with(second, "InputInstrument failed; training goes on")
    assert "ValueError: this measure is broken" in said
    assert len(lines_with(second, "InputInstrument failed 3 times: switched off")) == 1
    assert sorted(first.log) == sorted(outcomes["sound"][0].log)  # two threads say it

    first, second = outcomes["broken_check"]
    [said] = lines_with(second, "could not show")
    assert "ValueError: this measure is broken" in said
    assert sorted(first.log) == sorted(outcomes["sound"][0].log)  # two threads say it


# -- one token on rank 1 -----------------------------------------------------------------------------------------------


def test_a_batch_of_one_token_on_one_rank(outcomes: dict[str, list[Outcome]], with_lone_token: list[Batch]) -> None:
    """Nothing to predict and no audio: that rank measures other tags than the other."""
    backend = outcomes["lone token"][0].backend
    sound = outcomes["sound"][0].backend
    assert measured_tags(backend) == measured_tags(sound)
    for tag in measured_tags(sound):
        assert list(backend.scalars(tag)) == EVERY_STEP, tag
        assert nonfinite_steps(backend, tag) == [], tag
    at = RANKS * (LONE_TOKEN_STEP - 1)
    pair = with_lone_token[at : at + RANKS]
    totals = backend.scalars("inputs/tokens/total")
    assert totals[LONE_TOKEN_STEP] == pair[0]["input_ids"].numel() + 1
    assert backend.scalars("outputs/loss/total")[LONE_TOKEN_STEP] == pytest.approx(
        backend.scalars("train/loss")[LONE_TOKEN_STEP], rel=1e-5
    )
    assert totals[1] == sound.scalars("inputs/tokens/total")[1]


def test_a_batch_of_one_token_trains_as_without_telemetry(outcomes: dict[str, list[Outcome]]) -> None:
    for measured, unmeasured in zip(outcomes["lone token"], outcomes["lone token, unmeasured"], strict=True):
        assert differing(measured.state, unmeasured.state) == []
    assert not lines_with(outcomes["lone token"][1], "failed")

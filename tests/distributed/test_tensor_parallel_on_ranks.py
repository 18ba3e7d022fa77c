"""Ranks that share layers out (tensor parallelism) are given one batch: what they show is what one process shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rank_scenarios import Batch, Outcome, Scenario, launch
from support import codec_tokens
from support.references import differing

from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar, Table

STEPS = 3
SPLIT = 2
# All queries: which are drawn of more depends on what a rank has drawn before.
EVERYTHING = {
    "shared_attention": {"text_audio_cosine": True, "queries": 512},
    "zero_shot": {"conditioning_every": 1},
}
# Adam would make a rounding error of a small gradient as large a step as any.
PLAIN = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.5}
OF_THE_MACHINE = ("telemetry/", "throughput/", "train/")  # of the last, what is not of every step
WITHHELD = {
    "attention/heads": "each rank has some heads of a layer, and sums over ranks do not say which",
    "gradients/text_audio_cosine": (
        "its parameters are spread over ranks: a pass of one rank alone would wait for the others"
    ),
    "setup/ranks/weights_apart": "each rank holds a part of the weights that no other has",
}
# Other words, where ranks have to run the model together: that of one sample is not told apart in advance.
WORDED_OTHERWISE = "zero_shot/conditioning/gain"
# What is not of every rank's every microbatch; and losses as trained on, two to a step, one that is twice as large.
OF_SOME_BATCHES = (
    "setup/alone",
    "setup/causality",
    "setup/references",
    "setup/targets",
    "steps/median_loss",
    "steps/highest_rank/",
    "steps/lowest_rank/",
    "zero_shot/conditioning/",
    "zero_shot/text_gain",
)


def trainings(make_batch: Callable[..., Batch]) -> list[Scenario]:
    """One of Higgs Audio v2, and one of a Llama on the Trainer as it is."""
    voices = [make_batch(seed, 1 + seed % 3 % 2) for seed in range(2 * STEPS)]
    tokens = [
        codec_tokens.batch((3, seed, 2, 3), (5, 1, 1, 4 + seed), left=seed % 2 == 1, seed=seed)
        for seed in range(2 * STEPS)
    ]
    llama = {**PLAIN, "label_names": ["labels"]}
    return [
        Scenario("higgs", voices, STEPS, 2, options=EVERYTHING, arguments=PLAIN),
        Scenario("llama", tokens, STEPS, 2, model="codec_tokens_of_2_heads", options=EVERYTHING, arguments=llama),
    ]


@pytest.fixture(scope="module")
def alone(make_batch: Callable[..., Batch], scratch: Callable[[], Path]) -> dict[str, list[Outcome]]:
    return launch(trainings(make_batch), scratch(), ranks=1)


@pytest.fixture(scope="module")
def split(make_batch: Callable[..., Batch], scratch: Callable[[], Path]) -> dict[str, list[Outcome]]:
    measured = [replace(one, split=SPLIT) for one in trainings(make_batch)]
    unmeasured = [replace(one, name=f"{one.name}, unmeasured", telemetry=False) for one in measured]
    return launch([*measured, *unmeasured, evaluated(measured[0])], scratch(), SPLIT)


@pytest.fixture(scope="module")
def split_and_sharded(make_batch: Callable[..., Batch], scratch: Callable[[], Path]) -> dict[str, list[Outcome]]:
    """On four ranks: two share a layer out, and what each has FSDP2 shards over two with batches of their own."""
    measured = [replace(one, split=SPLIT, accumulation=1) for one in trainings(make_batch)]
    return launch([*measured, evaluated(measured[0])], scratch(), 2 * SPLIT)


def evaluated(training: Scenario) -> Scenario:
    return replace(training, name="evaluated", steps=1, arguments={**PLAIN, "eval_strategy": "steps"})


def shown(backend: MemoryBackend) -> dict[tuple[str, int], float]:
    """(Tag, step) → value of all that is not of the machine."""
    return {
        (tag, step): record.value
        for tag in backend.tags()
        if not tag.startswith(OF_THE_MACHINE) or tag in ("train/loss", "train/grad_norm")
        for step, record in backend.records[tag]
        if isinstance(record, Scalar)
    }


def absent(backend: MemoryBackend) -> dict[str, str]:
    return {str(tag): str(why) for tag, why in backend.last("telemetry/absent", Table).rows}


def assert_as_alone(outcomes: list[Outcome], alone: list[Outcome], but: tuple[str, ...] = ()) -> None:
    backend, other = outcomes[0].backend, alone[0].backend
    found, expected = (
        {key: value for key, value in shown(one).items() if not key[0].startswith((*WITHHELD, *but))}
        for one in (backend, other)
    )
    assert found.keys() == expected.keys()
    apart = {
        key: (value, expected[key])
        for key, value in found.items()
        if not math.isclose(value, expected[key], rel_tol=1e-4, abs_tol=1e-5)
    }
    assert apart == {}
    assert {("inputs/tokens/total", STEPS), ("outputs/loss/total", STEPS), ("setup/optimizer/held_fraction", 1)} <= set(
        found
    )
    checks, of_one = ({row[:2] for row in one.last("setup/checks", Table).rows} for one in (backend, other))
    assert checks == of_one if not but else checks < of_one
    assert {verdict for _, verdict in checks} == {"ok"}
    reasons, others = absent(backend), absent(other)
    assert WITHHELD.items() <= reasons.items()
    of_both = {tag for tag in reasons | others if not tag.startswith((*WITHHELD, WORDED_OTHERWISE, *but))}
    assert {tag: reasons.get(tag) for tag in of_both} == {tag: others.get(tag) for tag in of_both}
    assert not any(line.startswith(("ERROR", "WARNING")) for outcome in outcomes for line in outcome.log)
    assert not any(outcome.backend.records for outcome in outcomes[1:])


@pytest.mark.parametrize("model", ["higgs", "llama"])
def test_two_ranks(split: dict[str, list[Outcome]], alone: dict[str, list[Outcome]], model: str) -> None:
    assert_as_alone(split[model], alone[model])


@pytest.mark.parametrize("model", ["higgs", "llama"])
def test_sharded_by_fsdp2_besides(
    split_and_sharded: dict[str, list[Outcome]], alone: dict[str, list[Outcome]], model: str
) -> None:
    assert_as_alone(split_and_sharded[model], alone[model], OF_SOME_BATCHES)


@pytest.mark.parametrize("model", ["higgs", "llama"])
def test_norm_and_loss_are_the_trainers(
    split: dict[str, list[Outcome]], split_and_sharded: dict[str, list[Outcome]], model: str
) -> None:
    for outcomes in (split[model], split_and_sharded[model]):
        backend = outcomes[0].backend
        norms = backend.scalars("train/grad_norm")
        assert backend.scalars("gradients/total_norm") == pytest.approx(norms, rel=1e-5)
        assert min(norms.values()) > PLAIN["max_grad_norm"]
        assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("train/loss"), rel=1e-5)


def test_the_same_batch_is_one_in_a_second(split: dict[str, list[Outcome]]) -> None:
    backend = split["llama"][0].backend
    tokens, rate, seconds = (
        backend.scalars(tag)
        for tag in (
            "inputs/tokens/total",
            "throughput/tokens_per_second",
            "throughput/slowest_rank/seconds_per_step",
        )
    )
    assert rate[STEPS] * seconds[STEPS] == pytest.approx(tokens[STEPS - 1])


@pytest.mark.parametrize("model", ["higgs", "llama"])
def test_training_is_the_same_to_the_bit(split: dict[str, list[Outcome]], model: str) -> None:
    for measured, unmeasured in zip(split[model], split[f"{model}, unmeasured"], strict=True):
        assert differing(measured.state, unmeasured.state) == []
    parts = [
        sum(one.numel() for name, one in outcome.state.items() if name.startswith("parameter "))
        for outcome in split[model]
    ]
    assert parts[0] < sum(parts)


def test_there_are_no_clips(split: dict[str, list[Outcome]], split_and_sharded: dict[str, list[Outcome]]) -> None:
    """Passes of prompts of other lengths would have ranks wait for each other, with parts of different sizes."""
    for outcomes in (split["evaluated"], split_and_sharded["evaluated"]):
        backend = outcomes[0].backend
        assert absent(backend)["zero_shot/clips"] == "ranks cannot generate side by side with this sharding"
        assert list(backend.scalars("eval/loss")) == [1]

"""Two ranks report what one process reports that sees all of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from rank_program import run
from rank_scenarios import Batch, Outcome, Scenario, launch

from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar

RANKS = 2
STEPS = 3
ACCUMULATIONS = (1, 2, 8)
MEASURED = ("inputs/", "outputs/", "zero_shot/", "gradients/")
# Adam would make a rounding error of a small gradient as large a step as any.
PLAIN = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.5}


def scenario(accumulation: int, batches: list[Batch], ranks: int, sharded: bool = False) -> Scenario:
    """The same optimizer steps on any number of ranks: fewer ranks take more microbatches each."""
    return Scenario(
        name=f"{'sharded' if sharded else 'copied'}-{accumulation}",
        batches=batches,
        steps=STEPS,
        accumulation=accumulation * RANKS // ranks,
        sharded=sharded,
        arguments=PLAIN,
    )


@pytest.fixture(scope="module")
def batches(make_batch: Callable[..., Batch]) -> dict[int, list[Batch]]:
    """Accumulation → microbatches of one or two samples; in step 2, one without reference and one without a label."""
    made = {}
    for accumulation in ACCUMULATIONS:
        each = RANKS * accumulation
        made[accumulation] = [make_batch(seed, 1 + seed % 3 % 2) for seed in range(STEPS * each)]
        made[accumulation][each + 1] = make_batch(each + 1, 2, reference=False)
        made[accumulation][2 * each - 2] = without_labels(made[accumulation][2 * each - 2])
    return made


def without_labels(batch: Batch) -> Batch:
    return {**batch, **{name: torch.full_like(batch[name], -100) for name in ("labels", "audio_labels")}}


@pytest.fixture(scope="module")
def on_ranks(batches: dict[int, list[Batch]], scratch: Callable[[], Path]) -> dict[str, list[Outcome]]:
    copied = [scenario(accumulation, batches[accumulation], RANKS) for accumulation in ACCUMULATIONS]
    return launch([*copied, scenario(2, batches[2], RANKS, sharded=True)], scratch(), RANKS)


@pytest.fixture(scope="module")
def alone(batches: dict[int, list[Batch]], scratch: Callable[[], Path]) -> dict[int, MemoryBackend]:
    return {
        accumulation: run(scenario(accumulation, batches[accumulation], ranks=1), scratch()).backend
        for accumulation in ACCUMULATIONS
    }


def measured(backend: MemoryBackend) -> dict[tuple[str, int], float]:
    """(Tag, step) → value of everything that the model and its data were measured by."""
    return {
        (tag, step): record.value
        for tag in backend.tags()
        if tag.startswith(MEASURED)
        for step, record in backend.records[tag]
        if isinstance(record, Scalar)
    }


def differing(
    ours: Mapping[tuple[str, int], float], theirs: Mapping[tuple[str, int], float], tolerance: float
) -> dict[tuple[str, int], tuple[float, float]]:
    assert ours.keys() == theirs.keys()
    return {
        key: (value, theirs[key])
        for key, value in ours.items()
        if not math.isclose(value, theirs[key], rel_tol=tolerance, abs_tol=1e-12)
    }


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_every_scalar_is_that_of_one_process(
    on_ranks: dict[str, list[Outcome]], alone: dict[int, MemoryBackend], accumulation: int
) -> None:
    first, second = on_ranks[f"copied-{accumulation}"]
    expected = measured(alone[accumulation])
    assert differing(measured(first.backend), expected, 1e-5) == {}
    assert not second.backend.records
    assert {step for _, step in expected} == set(range(1, STEPS + 1))


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_the_data_are_as_uneven_as_they_are_meant_to_be(
    alone: dict[int, MemoryBackend], batches: dict[int, list[Batch]], accumulation: int
) -> None:
    backend = alone[accumulation]
    present = backend.scalars("zero_shot/reference/present_fraction")
    assert present[1] == present[3] == 1.0
    samples = [len(batch["metadata"]) for batch in batches[accumulation]]
    each = RANKS * accumulation
    assert present[2] == pytest.approx(1 - 2 / sum(samples[each : 2 * each]))
    totals = backend.scalars("inputs/tokens/total")
    expected = [sum(batch["input_ids"].numel() for batch in batches[accumulation][at : at + each]) for at in (0, each)]
    assert [totals[1], totals[2]] == expected
    assert len({batch["input_ids"].shape for batch in batches[accumulation]}) > accumulation
    sections = {tag.partition("/")[0] + "/" for tag, _ in measured(backend)}
    assert sections == set(MEASURED)


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_loss_and_norm_are_the_trainers(on_ranks: dict[str, list[Outcome]], accumulation: int) -> None:
    backend = on_ranks[f"copied-{accumulation}"][0].backend
    for own, trainers in (("outputs/loss/total", "train/loss"), ("gradients/total_norm", "train/grad_norm")):
        logged = backend.scalars(trainers)
        assert set(logged) >= set(range(1, STEPS + 1))
        for step, value in backend.scalars(own).items():
            assert value == pytest.approx(logged[step], rel=1e-5), (own, step)
    assert min(backend.scalars("gradients/total_norm").values()) > PLAIN["max_grad_norm"]  # clipping changed something


def test_sharded_parameters_give_the_numbers_of_copied_ones(on_ranks: dict[str, list[Outcome]]) -> None:
    """FSDP2 and DDP: losses, and gradient norms in total and of every group, though each rank has parts only."""
    sharded, copied = (measured(on_ranks[f"{kind}-2"][0].backend) for kind in ("sharded", "copied"))
    assert differing(sharded, copied, 1e-4) == {}
    norms = {tag for tag, _ in sharded if tag.startswith("gradients/")}
    groups = ("shared_attention", "text_ffn", "audio_ffn", "text_embedding", "audio_embedding")
    groups += ("text_head", "audio_head", "norms")
    assert norms == {"gradients/total_norm", *(f"gradients/{group}/norm" for group in groups)}


def test_sharding_left_each_rank_a_part(on_ranks: dict[str, list[Outcome]]) -> None:
    parts, whole = (
        [
            sum(tensor.numel() for name, tensor in outcome.state.items() if name.startswith("parameter "))
            for outcome in on_ranks[f"{kind}-2"]
        ]
        for kind in ("sharded", "copied")
    )
    assert sum(parts) == whole[0] == whole[1]
    assert max(parts) < whole[0]

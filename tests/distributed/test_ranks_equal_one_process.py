"""Two ranks report what one process reports that sees all of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_program import run
from rank_scenarios import Batch, Outcome, Scenario, launch
from support import codec_tokens, speech_models
from support.speech_models import taught

from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar, Table

RANKS = 2
STEPS = 3
ACCUMULATIONS = (1, 2, 8)
MEASURED = ("inputs/", "outputs/", "attention/", "activations/", "zero_shot/", "gradients/")
# No sample of the queries but all of them; and without the conditioning gain, which is of every rank's last microbatch.
OPTIONS = {"shared_attention": {"queries": 10_000}, "zero_shot": {"conditioning_every": 0}}
# Adam would make a rounding error of a small gradient as large a step as any.
PLAIN = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.5}
UNREACHED_NORM = 1e6


def scenario(
    accumulation: int, batches: list[Batch], ranks: int, sharded: bool = False, clipping: bool = True
) -> Scenario:
    """The same optimizer steps on any number of ranks: fewer ranks take more microbatches each."""
    return Scenario(
        name=f"{'sharded' if sharded else 'copied'}-{accumulation}{'' if clipping else '-unclipped'}",
        batches=batches,
        steps=STEPS,
        accumulation=accumulation * RANKS // ranks,
        sharded=sharded,
        options=OPTIONS,
        arguments=PLAIN if clipping else {**PLAIN, "max_grad_norm": UNREACHED_NORM},
    )


def compiled(batches: list[Batch], ranks: int) -> Scenario:
    """The first step with the model compiled, which takes its time."""
    plain = scenario(1, batches, ranks)
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    return replace(plain, name="compiled", steps=1, arguments={**plain.arguments, **compiling})


def speaking(model: str, ranks: int) -> Scenario:
    """A training of another model on the Trainer itself."""
    return Scenario(
        name=model,
        batches=SPEAKING[model],
        steps=2,
        accumulation=2 * RANKS // ranks,
        model=model,
        options=OPTIONS,
        arguments={**PLAIN, "label_names": ["labels"]},
    )


SPEAKING: dict[str, list[Batch]] = {
    "csm": [
        speech_models.csm_waveforms([(3, 4, taught(4)), (2, 3, taught(3, 2))], [(5, 2, [-100] * 3), (2, 5, taught(5))]),
        speech_models.csm_waveforms([(2, 1, taught(1))]),
        speech_models.csm_waveforms([(6, 6, taught(6, 3))], [(1, 2, taught(2))]),
        speech_models.csm_waveforms([(4, 3, taught(3))]),
    ],
    "dia": [speech_models.dia_batch((4, 2, 3), (6, 0, 4 + 2 * seed), seed=seed) for seed in range(4)],
    "codec_tokens": [
        codec_tokens.batch((3, seed, 2, 3), (5, 1, 1, 4 + seed), left=seed % 2 == 1, seed=seed) for seed in range(4)
    ],
}


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
    others = [
        scenario(2, batches[2], RANKS, sharded, clipping)
        for sharded, clipping in ((True, True), (True, False), (False, False))
    ]
    others.append(compiled(batches[1], RANKS))
    return launch([*copied, *others, *(speaking(model, RANKS) for model in SPEAKING)], scratch(), RANKS)


@pytest.fixture(scope="module")
def alone(batches: dict[int, list[Batch]], scratch: Callable[[], Path]) -> dict[int, MemoryBackend]:
    return {
        accumulation: run(scenario(accumulation, batches[accumulation], ranks=1), scratch()).backend
        for accumulation in ACCUMULATIONS
    }


def measured(backend: MemoryBackend, sections: tuple[str, ...] = MEASURED) -> dict[tuple[str, int], float]:
    """(Tag, step) → value: by default of everything that the model and its data were measured by."""
    return {
        (tag, step): record.value
        for tag in backend.tags()
        if tag.startswith(sections)
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


@pytest.mark.parametrize("model", SPEAKING)
def test_every_scalar_of_other_speech_models_is_that_of_one_process(
    on_ranks: dict[str, list[Outcome]], scratch: Callable[[], Path], model: str
) -> None:
    first, second = on_ranks[model]
    expected = measured(run(speaking(model, ranks=1), scratch()).backend)
    assert differing(measured(first.backend), expected, 1e-5) == {}
    assert not second.backend.records
    assert {(tag, 2) for tag in ("outputs/loss/total", "outputs/loss/codebook_1", "outputs/eos/probability")} <= set(
        expected
    )


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
def test_the_loss_is_the_trainers(on_ranks: dict[str, list[Outcome]], accumulation: int) -> None:
    assert_same(on_ranks[f"copied-{accumulation}"][0].backend, "outputs/loss/total", "train/loss")


@pytest.mark.parametrize(
    "name", [*(f"copied-{count}" for count in ACCUMULATIONS), "copied-2-unclipped", "sharded-2", "sharded-2-unclipped"]
)
def test_the_norm_is_the_trainers(on_ranks: dict[str, list[Outcome]], name: str) -> None:
    """What clipping measures, whether it changes something or not."""
    backend = on_ranks[name][0].backend
    assert_same(backend, "gradients/total_norm", "train/grad_norm")
    norms = backend.scalars("gradients/total_norm").values()
    assert min(norms) > PLAIN["max_grad_norm"]
    assert max(norms) < UNREACHED_NORM


def assert_same(backend: MemoryBackend, own: str, trainers: str) -> None:
    logged, measured = backend.scalars(trainers), backend.scalars(own)
    assert list(measured) == list(range(1, STEPS + 1))
    for step, value in measured.items():
        assert value == pytest.approx(logged[step], rel=1e-5), step


def test_sharded_parameters_give_the_numbers_of_copied_ones(on_ranks: dict[str, list[Outcome]]) -> None:
    """FSDP2 and DDP: losses, and gradient norms in total and of every group, though each rank has parts only."""
    sharded, copied = (measured(on_ranks[f"{kind}-2"][0].backend) for kind in ("sharded", "copied"))
    assert differing(sharded, copied, 1e-4) == {}
    groups = ("shared_attention", "text_ffn", "audio_ffn", "text_embedding", "audio_embedding")
    groups += ("text_head", "audio_head", "norms")
    kinds = ("norm", "zero_fraction", "nonfinite", "update_ratio")
    assert {tag for tag, _ in sharded if tag.startswith("gradients/")} == {
        "gradients/total_norm",
        "gradients/clip_coefficient",
        *(f"gradients/{group}/{kind}" for group in groups for kind in kinds),
        *(f"gradients/layer_{layer}/{part}/norm" for layer in range(2) for part in groups[:3]),
    }


def test_a_compiled_model_gives_the_numbers_of_one_that_is_not(on_ranks: dict[str, list[Outcome]]) -> None:
    """But for what hooks see alone: Higgs Audio v2 does not return its text logits."""
    found, plain = (measured(on_ranks[name][0].backend) for name in ("compiled", "copied-1"))
    unseen = {f"outputs/{part}" for part in ("loss/text", "loss/total", "accuracy/text", "top5/text", "entropy/text")}
    seen = {
        (tag, step): value
        for (tag, step), value in plain.items()
        if step == 1 and tag not in unseen and not tag.startswith(("attention/", "activations/"))
    }
    assert differing(found, seen, 1e-5) == {}


@pytest.mark.parametrize(
    ("name", "plain", "without"),
    [
        ("compiled", "copied-1", ("asked", "loss_weight", "supervised", "recombined", "chance/text")),
        ("sharded-2", "copied-2", ("ranks", "recombined")),
    ],
)
def test_set_up_is_judged_alike(
    on_ranks: dict[str, list[Outcome]], name: str, plain: str, without: tuple[str, ...]
) -> None:
    """Without what hooks see alone, and what is said of whole weights and of what a Trainer logs."""
    found, known = (measured(on_ranks[one][0].backend, ("setup/",)) for one in (name, plain))
    left_out, steps = tuple(f"setup/{part}" for part in without), {step for _, step in found}
    compared = {key: one for key, one in known.items() if key[1] in steps and not key[0].startswith(left_out)}
    assert differing(found, compared, 1e-4) == {}
    assert len(found) > 20


def test_the_table_of_sharded_parameters_is_that_of_copied_ones(on_ranks: dict[str, list[Outcome]]) -> None:
    """Every rank has a part of each parameter; the table shows whole ones."""
    sharded, copied = (largest(on_ranks[f"{kind}-2"][0].backend) for kind in ("sharded", "copied"))
    assert sharded.keys() == copied.keys()
    for key, cells in copied.items():
        assert sharded[key] == pytest.approx(cells, rel=1e-4), key
    assert {step for step, _, _ in copied} == set(range(1, STEPS + 1))


def largest(backend: MemoryBackend) -> dict[tuple[int, str, str], list[float]]:
    """(Step, why, parameter) → norm, absmax, zero fraction, non-finite; growth orders alike ones by chance."""
    return {
        (step, str(row[0]), str(row[1])): [float(cell) for cell in row[3:7]]  # type: ignore[arg-type]
        for step, record in backend.records["gradients/largest"]
        if isinstance(record, Table)
        for row in record.rows
        if row[0] != "growth"
    }


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


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_the_hardest_samples_are_those_of_all_ranks(
    on_ranks: dict[str, list[Outcome]], alone: dict[int, MemoryBackend], accumulation: int
) -> None:
    ours, theirs = (
        {row[0]: row[1:6] for step, record in backend.records["inputs/hardest"] if step == 1 for row in record.rows}  # type: ignore[union-attr]
        for backend in (on_ranks[f"copied-{accumulation}"][0].backend, alone[accumulation])
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) > 1
    for name, row in ours.items():
        assert row[1:3] == pytest.approx(theirs[name][1:3], rel=1e-4, abs=1e-5)
        assert (row[0], row[3:]) == (theirs[name][0], theirs[name][3:])


def read_of_the_loss(backend: MemoryBackend) -> dict[str, float]:
    """What the first step's gradients say that the loss asks for."""
    tags = [tag for tag in backend.tags() if tag.startswith(("setup/asked/", "setup/loss_weight/"))]
    return {tag: backend.scalars(tag)[1] for tag in tags if backend.scalars(tag)}


@pytest.mark.parametrize("name", [*(f"copied-{accumulation}" for accumulation in ACCUMULATIONS), *SPEAKING])
def test_the_loss_is_read_from_all_ranks_gradients(
    on_ranks: dict[str, list[Outcome]], alone: dict[int, MemoryBackend], scratch: Callable[[], Path], name: str
) -> None:
    found = read_of_the_loss(on_ranks[name][0].backend)
    if name in SPEAKING:
        expected = read_of_the_loss(run(speaking(name, ranks=1), scratch()).backend)
    else:
        expected = read_of_the_loss(alone[int(name.removeprefix("copied-"))])
    assert found == pytest.approx(expected, rel=1e-3)
    weights = [value for tag, value in found.items() if tag.startswith("setup/loss_weight/")]
    assert weights == pytest.approx([1.0] * len(weights), abs=1e-4)
    following = [value for tag, value in found.items() if tag.endswith("/next")]
    assert following == [1.0] * (0 if name == "csm" else 2 if name.startswith("copied") else 1)  # it encodes waveforms

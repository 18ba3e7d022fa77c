"""Csm on the real Trainer: every stream, against codes and logits that are gone through one by one."""

from __future__ import annotations

import copy
import math
import re
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.references import group_of, setup_findings
from support.speech_models import (
    AUDIO,
    AUDIO_END,
    CODEBOOKS,
    IGNORED,
    SAMPLES,
    Batch,
    Tokens,
    csm,
    csm_codes,
    csm_waveforms,
    of_step,
    shown,
    taught,
    train,
)
from support.steps import Snapshots
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CsmForConditionalGeneration

from telemetry import OutputLoggerCallback, StrategicTelemetry, ZeroShotVerificationLoggerCallback
from telemetry.backends.memory import MemoryBackend
from telemetry.families import Absent, CsmFamily, Seen, base, find_family
from telemetry.families.base import NO_LABELS
from telemetry.families.csm import NOT_MADE
from telemetry.instruments.base import NO_POSITIONS
from telemetry.instruments.conditioning import NOTHING_PREDICTED
from telemetry.records import Table

STEPS, ACCUMULATION = 4, 2
NO_CONTEXT = [IGNORED] * 3


def waveforms(left: bool) -> list[Batch]:
    """Text and audio of unequal lengths: some frames are not for the depth decoder, one clip has no label."""
    return [
        csm_waveforms([(3, 4, taught(4)), (2, 3, taught(3, 2))], [(5, 2, NO_CONTEXT), (2, 5, taught(5))], left=left),
        csm_waveforms([(2, 1, taught(1))], [(6, 6, taught(6, 3))], left=left),
        csm_waveforms([(4, 3, taught(3)), (1, 2, taught(2))], [(2, 1, taught(1))], left=left, missing=3),
    ]


def codes(left: bool) -> list[Batch]:
    return [
        csm_codes((2, 3), (4, 1), left=left),
        csm_codes((0, 5), (3, 2), left=left, seed=3),
        csm_codes((1, 2), left=left, seed=5),
    ]


KINDS = {
    "waveforms, right": lambda: waveforms(False),
    "waveforms, left": lambda: waveforms(True),
    "codes, right": lambda: codes(False),
    "codes, left": lambda: codes(True),
}


def labels_of(model: Any, batch: Batch) -> list[list[list[int]]]:
    """What the model learns at every position and codebook: by row, waveforms encoded clip by clip."""
    if batch["labels"].dim() == 3:
        return batch["labels"].tolist()
    found = []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        given, cuts = (
            batch["labels"][row].tolist(),
            [cut for cut in batch["input_values_cutoffs"][row].tolist() if cut >= 0],
        )
        frames: list[list[int]] = []
        for begin, end in zip([0, *cuts], cuts, strict=False):
            with torch.no_grad():
                made = model.codec_model.encode(batch["input_values"][row : row + 1, :, begin:end]).audio_codes
            assert made.shape[-1] == -(-(end - begin) // SAMPLES)
            frames += made[0].t().tolist()
        labels = []
        for token, label in zip(ids, given, strict=True):
            code = frames.pop(0) if token == AUDIO else [0] * CODEBOOKS if token == AUDIO_END else [label] * CODEBOOKS
            labels.append([code[0], *[IGNORED] * (CODEBOOKS - 1)] if label == -101 else code)
        assert not frames
        found.append(labels)
    return found


def tokens_of(model: Any, batch: Batch) -> Tokens:
    """Everything that is predicted of a microbatch."""
    with torch.no_grad():
        outputs = model(**batch)
    backbone, depth = outputs.logits.double(), iter(outputs.depth_decoder_logits.double())
    found = Tokens()
    for row, labels in enumerate(labels_of(model, batch)):
        for at, frame in enumerate(labels):
            is_end = frame == [0] * CODEBOOKS
            if at > 0 and frame[0] != IGNORED:
                found.add(0, backbone[row, at - 1].tolist(), frame[0], is_end)
            if any(code != IGNORED for code in frame[1:]):
                for k, logits in enumerate(next(depth), start=1):
                    found.add(k, logits.tolist(), frame[k], is_end)
    assert next(depth, None) is None
    return found


def expected(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """What is shown of a step of several microbatches."""
    tokens = Tokens()
    for batch in batches:
        tokens.extend(tokens_of(model, batch))
    counted = sum(int((batch["labels"][..., 1:] != IGNORED).sum()) for batch in batches)  # as the Trainer counts
    return tokens.values(end=0) | {"outputs/loss/total": math.fsum(tokens.losses()) / counted}


@pytest.mark.parametrize("kind", KINDS)
def test_every_stream_is_right_and_training_is_left_alone(
    kind: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    batches, model, untouched = KINDS[kind](), csm(), csm()
    backend, snapshots = MemoryBackend(), Snapshots()
    train(model, batches, tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])])
    total = backend.scalars("outputs/loss/total")
    assert list(total) == [1, 2, 3, 4]
    assert total == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    for step in range(1, STEPS + 1):
        values = expected(snapshots.models[step].eval(), of_step(batches, step, ACCUMULATION))
        assert shown(backend, step, values) == pytest.approx(values, rel=1e-5), step
    assert setup_findings(backend) == set()
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []

    train(untouched, batches, tmp_path)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []


# -- what is said -----------------------------------------------------------------------------------------------------


def said(log: pytest.LogCaptureFixture, *parts: str) -> list[str]:
    return [one.getMessage() for one in log.records if all(part in one.getMessage() for part in parts)]


@pytest.mark.parametrize("kind", ["waveforms, left", "codes, right"])
def test_what_the_trainer_divides_by_is_said_once_with_both_numbers(
    kind: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    batches, model = KINDS[kind](), csm()
    train(model, batches, tmp_path, [OutputLoggerCallback(1, [MemoryBackend()])])
    step = of_step(batches, 1, ACCUMULATION)
    counted = sum(int((batch["labels"][..., 1:] != IGNORED).sum()) for batch in step)
    learnt = [labels for batch in step for labels in labels_of(model, batch)]
    first = sum(frame[0] != IGNORED for labels in learnt for frame in labels[1:])
    others = sum(code != IGNORED for labels in learnt for frame in labels for code in frame[1:])
    expected = [
        f"the trainer divides the loss of {part} by {counted}, where {own} of its tokens are supervised in the step: "
        f"it is {own / counted:.4g} times its mean"
        for part, own in (("codebook_0", first), ("the depth decoder", others))
        if own != counted
    ]
    assert said(telemetry_log, "the trainer divides") == expected
    assert len(expected) == (2 if "waveforms" in kind else 1)


def test_context_that_the_model_supervises_all_the_same_is_said(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    train(csm(), waveforms(False), tmp_path, [OutputLoggerCallback(1, [MemoryBackend()])], steps=2)
    assert said(telemetry_log, "-100") == [
        "positions of audio with the label -100: 3, but the model makes labels of its own for all 27 that it encodes"
    ]
    telemetry_log.clear()
    train(csm(), waveforms(False)[1:], tmp_path, [OutputLoggerCallback(1, [MemoryBackend()])], steps=2)
    assert said(telemetry_log, "-100") == []


def test_without_labels_or_hooks_nothing_is_guessed() -> None:
    model = csm()
    family = find_family(model)
    assert isinstance(family, CsmFamily)
    batch = waveforms(False)[0]
    outputs = model(**batch)
    assert list(family.streams(batch, outputs, Seen())) == [Absent("audio", NOT_MADE)]
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert list(family.streams(unlabelled, outputs, Seen())) == [Absent("audio", NO_LABELS, in_loss=False)]


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_audio_tokens", "q_proj"]},
    "embedding, whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_hide_nothing(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(csm(), LoraConfig(r=2, exclude_modules=".*codec.*", **ADAPTERS[kind]))
    backend = MemoryBackend()
    telemetry = StrategicTelemetry(["outputs", "shared_attention"], 1, [backend])
    train(model, waveforms(False), tmp_path, [telemetry], 2, ACCUMULATION)
    total = backend.scalars("outputs/loss/total")
    assert list(total) == [1, 2]
    assert total == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    assert list(backend.scalars("gradients/lora/norm")) == [1, 2]


def test_embeddings_are_read_as_far_as_labels_tell(tmp_path: Path) -> None:
    """A batch of embeddings has labels, but does not say what its positions are."""
    backend, labels = MemoryBackend(), csm_codes((2, 2), (0, 5))["labels"]
    batch = {"inputs_embeds": torch.randn(*labels.shape[:2], 16, generator=torch.Generator().manual_seed(1))}
    batch["labels"] = labels
    train(csm(), [batch], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    absent = {str(tag): str(why) for tag, why in backend.last("telemetry/absent", Table).rows}
    assert absent["attention/layer_0"] == absent["activations/layer_1/text_ffn"] == NO_POSITIONS


# -- positions, layers and groups -------------------------------------------------------------------------------------

GROUPS = {
    r"lm_head\.weight": "audio_head",
    r"embed_text_tokens\.weight": "text_embedding",
    r"backbone_model\.embed_tokens\.embed_audio_tokens\.weight": "audio_embedding",
    r"backbone_model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight": "shared_attention",
    r"backbone_model\.layers\.\d\.mlp\.(gate|up|down)_proj\.weight": "text_ffn",
    r"backbone_model\.(layers\.\d\.(input|post_attention)_layernorm|norm)\.weight": "norms",
    r"depth_decoder\..*": "depth_decoder",
    r"codec_model\..*": "other",
}


def test_every_parameter_has_its_group() -> None:
    model = csm()
    family = CsmFamily(model)
    groups = {name: family.group_of(name) for name, _ in model.named_parameters()}
    assert groups == {name: group_of(name, GROUPS) for name in groups}
    assert set(groups.values()) == set(GROUPS.values())


Place = tuple[str, list[int] | int]


def places_of(model: Any, batch: Batch) -> list[list[Place]]:
    """By row: what kind every position is, and its token of text or frame of codes; without padding."""
    learnt, found = labels_of(model, batch), []
    given = batch["labels"][..., 0] if batch["labels"].dim() == 3 else batch["labels"]
    for row, ids in enumerate(batch["input_ids"].tolist()):
        places: list[Place] = []
        for at, token in enumerate(ids):
            if not batch["attention_mask"][row, at]:
                continue
            if isinstance(token, int) and token not in (AUDIO, AUDIO_END):
                places.append(("text", token))
                continue
            codes = token if isinstance(token, list) else [0] * CODEBOOKS
            if token == AUDIO:
                depth = learnt[row][at][1:] if given[row, at] != -101 else [0] * (CODEBOOKS - 1)
                codes = [learnt[row][at][0], *depth]
            places.append(("reference" if given[row, at] == IGNORED else "target", codes))
        found.append(places)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_attention_are_those_of_a_model_gone_through_by_hand(kind: str, tmp_path: Path) -> None:
    batch, model, backend = KINDS[kind]()[0], csm(), MemoryBackend()
    kept = copy.deepcopy(model).eval()
    train(model, [batch], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    rows = places_of(model, batch)
    size = batch["attention_mask"].numel()
    kinds = [place[0] for places in rows for place in places]
    shares = {name: backend.scalars(f"inputs/tokens/{name}_fraction")[1] for name in ("text", "padding")}
    shares |= {name: backend.scalars(f"inputs/tokens/{name}_audio_fraction")[1] for name in ("reference", "target")}
    assert shares == pytest.approx(
        {name: kinds.count(name) / size for name in ("text", "reference", "target")}
        | {"padding": 1 - len(kinds) / size}
    )
    assert backend.scalars("inputs/invalid_ids")[1] == 0
    ends = sum(place == ("target", [0] * CODEBOOKS) for places in rows for place in places)
    assert ends > 0
    assert backend.scalars("outputs/eos/supervised")[1] == 1

    kept.set_attn_implementation("eager")
    with torch.no_grad():
        attended = kept(**{k: v for k, v in batch.items() if k != "labels"}, output_attentions=True).attentions
    masses: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, places in enumerate(rows):
        mask = batch["attention_mask"][row]
        real = [at for at in range(len(mask)) if mask[at]]
        for query, (query_kind, _) in zip(real, places, strict=True):
            of_kind: dict[str, float] = dict.fromkeys(("text", "reference", "target"), 0.0)
            for key, (key_kind, _) in zip(real, places, strict=True):
                of_kind[key_kind] += float(attended[0][row, :, query, key].double().mean())
            for key_kind, mass in of_kind.items():
                masses[query_kind, key_kind].append(mass)
    for (query_kind, key_kind), values in masses.items():
        if key_kind in kinds:
            tag = f"attention/layer_0/{query_kind}_to_{key_kind}"
            assert backend.scalars(tag)[1] == pytest.approx(sum(values) / len(values), abs=1e-5), tag
    assert {
        "activations/layer_1/text_ffn/rms",
        "gradients/depth_decoder/norm",
        "gradients/depth_decoder/update_ratio",
    } <= set(backend.tags())


def test_ends_that_are_not_taught_are_counted(tmp_path: Path) -> None:
    """A code of 0 in one codebook is no end."""
    batch = csm_codes((0, 3), (0, 4), seed=1)
    assert bool((batch["labels"] == 0).any(-1).sum() > (batch["labels"] == 0).all(-1).sum())
    batch["labels"][0, 3] = IGNORED
    backend = MemoryBackend()
    train(csm(), [batch], tmp_path, [StrategicTelemetry(["outputs"], 1, [backend])], 1, 1)
    assert backend.scalars("outputs/eos/supervised")[1] == 0.5


# -- conditioning -----------------------------------------------------------------------------------------------------


def spoken(model: Any, places: Sequence[Place], taught: Sequence[bool], hidden: bool) -> dict[int, list[float]]:
    """By codebook: what every taught code costs that is not predicted from a position of the reference."""
    embedded = []
    for _, what in places:
        ids = torch.tensor([[what]])
        embed = model.embed_text_tokens if isinstance(what, int) else model.backbone_model.embed_tokens
        embedded.append(embed(ids)[0])
    labels: list[Any] = [what if own else [IGNORED] * CODEBOOKS for (_, what), own in zip(places, taught, strict=True)]
    mask = [int(not (hidden and kind == "reference")) for kind, _ in places]
    outputs = model(
        inputs_embeds=torch.stack(embedded, dim=1),
        attention_mask=torch.tensor([mask]),
        position_ids=torch.arange(len(places))[None],
        labels=torch.tensor([labels]),
    )
    found: dict[int, list[float]] = defaultdict(list)
    depth = iter(outputs.depth_decoder_logits.double())
    for at, own in enumerate(taught):
        if own:
            others = next(depth)
            if at > 0 and places[at - 1][0] != "reference":
                for k, logits in enumerate([outputs.logits[0, at - 1].double(), *others]):
                    found[k].append(-float(logits.log_softmax(-1)[labels[at][k]]))
    return found


def with_last_clip_taught(places: Sequence[Place]) -> list[Place]:
    """Where all clips are taught, those before the last are what it follows."""
    if any(kind == "reference" for kind, _ in places):
        return list(places)
    ends = [at for at, (kind, what) in enumerate(places) if kind == "target" and what == [0] * CODEBOOKS]
    last = ends[-2] if len(ends) > 1 else -1
    return [("reference" if kind == "target" and at <= last else kind, what) for at, (kind, what) in enumerate(places)]


def with_reference_of(places: Sequence[Place], other: Sequence[Place]) -> list[Place]:
    codes = [what for kind, what in other if kind == "reference" and what != [0] * CODEBOOKS]
    changed, at = [], 0
    for kind, what in places:
        if kind == "reference" and what != [0] * CODEBOOKS:
            what, at = codes[at % len(codes)], at + 1
        changed.append((kind, what))
    return changed


GAINS: dict[str, tuple[Callable[[], Batch], list[int | None]]] = {
    "waveforms, right": (
        lambda: csm_waveforms(
            [(3, 4, taught(4)), (2, 3, taught(3))],
            [(5, 2, NO_CONTEXT), (2, 5, taught(5))],
            [(2, 3, taught(3))],
        ),
        [1, 0, None],
    ),
    "waveforms, left": (
        lambda: csm_waveforms(
            [(3, 1, taught(1)), (2, 3, taught(3))],
            [(2, 3, taught(3))],
            [(5, 4, taught(4)), (2, 5, taught(5))],
            left=True,
        ),
        [2, None, 0],
    ),
    "codes, right": (lambda: csm_codes((2, 3), (0, 4), (4, 1)), [2, None, 0]),
    "codes, left": (lambda: csm_codes((2, 3), (4, 1), (3, 2), left=True), [1, 2, 0]),
    "as many frames as codebooks": (lambda: csm_codes((2, 1), (3, 1)), [1, 0]),
}


@pytest.mark.parametrize("kind", GAINS)
def test_the_conditioning_gain_is_that_of_samples_run_one_by_one(kind: str, tmp_path: Path) -> None:
    make, partners = GAINS[kind]
    batch, model, backend = make(), csm(), MemoryBackend()
    telemetry = ZeroShotVerificationLoggerCallback(1, [backend], conditioning_every=1)
    train(model, [batch], tmp_path, [telemetry], 1, 1)  # with the weights after the step
    rows = [with_last_clip_taught(places) for places in places_of(model, batch)]
    means: dict[str, list[float]] = {}
    for name in ("own", "swapped", "none"):
        losses: dict[int, list[float]] = defaultdict(list)
        for row, partner in enumerate(partners):
            if partner is None:
                continue
            places = with_reference_of(rows[row], rows[partner]) if name == "swapped" else rows[row]
            with torch.no_grad():
                found = spoken(model.eval(), places, [one == "target" for one, _ in rows[row]], name == "none")
            for k, own in found.items():
                losses[k] += own
        means[name] = [sum(losses[k]) / len(losses[k]) for k in range(CODEBOOKS)]
    gain = "zero_shot/conditioning"
    for k in range(CODEBOOKS):
        expected = means["swapped"][k] - means["own"][k]
        assert backend.scalars(f"{gain}/codebook_{k}/gain")[1] == pytest.approx(expected, abs=2e-5), k
    for name, of_codebooks in means.items():
        assert backend.scalars(f"{gain}/loss_{name}")[1] == pytest.approx(sum(of_codebooks) / CODEBOOKS, abs=2e-5)
    assert abs(backend.scalars(f"{gain}/gain")[1]) > 1e-4


@pytest.mark.parametrize(
    ("kind", "labels", "why"),
    [
        ("waveforms, right", None, NO_LABELS),
        ("codes, right", None, NO_LABELS),
        ("waveforms, right", IGNORED, NOTHING_PREDICTED),
    ],
)
def test_without_labels_there_is_no_gain(
    kind: str, labels: int | None, why: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    batch, backend = GAINS[kind][0](), MemoryBackend()
    evaluated = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if labels is not None:
        evaluated["labels"] = torch.full_like(batch["labels"], labels)
    telemetry = ZeroShotVerificationLoggerCallback(1, [backend], conditioning_every=1)
    arguments: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": [evaluated]}
    train(csm(), [batch], tmp_path, [telemetry], 1, 1, **arguments)
    assert backend.scalars("zero_shot/conditioning/gain")
    assert "zero_shot/conditioning/eval/gain" not in backend.tags()
    assert said(telemetry_log, "zero_shot/conditioning/eval/gain", why)
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []


# -- what the documentation shows -------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[3] / "docs"


def test_the_family_that_the_documentation_declares_reads_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.findall(r"```python\n(.*?)```", (DOCS / "strategic_logging.md").read_text(), re.DOTALL)
    [shown] = [code for code in found if "class MyCsmFamily" in code]
    assert len(shown.strip().splitlines()) <= 30

    class MyCsm(CsmForConditionalGeneration):
        pass

    monkeypatch.setattr(base, "_READERS", dict(base._READERS))
    exec(compile(shown, "strategic_logging.md", "exec"), {})
    ours, theirs, data = csm(), csm(), codes(left=False)
    ours.__class__ = MyCsm
    read = {}
    for model in (ours, theirs):
        backend = MemoryBackend()
        telemetry = StrategicTelemetry(["outputs", "shared_attention"], 1, [backend])
        train(model, data, tmp_path, [telemetry], 2, ACCUMULATION)
        tags = [tag for tag in backend.tags() if tag.startswith(("outputs/loss/", "outputs/accuracy/"))]
        read[type(model)] = {tag: backend.scalars(tag) for tag in tags}
        assert backend.scalars("gradients/depth_decoder/norm")
        assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    assert read[MyCsm] == read[CsmForConditionalGeneration]


def test_the_example_runs_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = DOCS / "examples" / "csm_finetuning.py"
    assert len(path.read_text().splitlines()) <= 80
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", [path.name, str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    [events] = tmp_path.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events.parent))
    shown.Reload()
    assert [event.step for event in shown.Scalars("outputs/loss/total")] == [1, 5, 10, 15, 20]
    losses = [event.value for event in shown.Scalars("outputs/loss/audio")]
    assert losses[-1] < losses[0]
    assert shown.Scalars("zero_shot/conditioning/eval/gain")
    assert shown.Scalars("zero_shot/duration_ratio")

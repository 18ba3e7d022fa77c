"""Dia on the real Trainer: every codebook, against codes and logits that are gone through one by one."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.references import group_of, setup_findings
from support.speech_models import DELAY, DIA_END, IGNORED, Batch, Tokens, dia, dia_batch, of_step, shown, train
from support.steps import Snapshots

from telemetry import StrategicTelemetry, ZeroShotVerificationLoggerCallback
from telemetry.backends.memory import MemoryBackend
from telemetry.families import DiaFamily

STEPS, ACCUMULATION = 4, 2


def batches() -> list[Batch]:
    """Text padded on the right and audio on the left, as the model's processor does; with and without a prompt."""
    return [
        dia_batch((4, 2, 3), (6, 0, 4)),
        dia_batch((3, 0, 6), (5, 3, 2), (2, 1, 1), seed=3),
        dia_batch((4, 0, 2), seed=9),
    ]


def expected(model: Any, microbatches: Sequence[Batch]) -> dict[str, float]:
    tokens = Tokens()
    for batch in microbatches:
        with torch.no_grad():
            logits = model(**batch).logits.double()
        for row, labels in enumerate(batch["labels"].tolist()):  # rows: codebooks of the first sample, of the second
            for at, code in enumerate(labels):
                if code != IGNORED:
                    tokens.add(row % len(DELAY), logits[row, at].tolist(), code, code == DIA_END)
    return tokens.values(DIA_END) | {"outputs/loss/total": tokens.mean_loss()}


def test_every_stream_is_right_and_training_is_left_alone(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    model, untouched, data = dia(), dia(), batches()
    backend, snapshots = MemoryBackend(), Snapshots()
    train(model, data, tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])])
    total = backend.scalars("outputs/loss/total")
    assert list(total) == [1, 2, 3, 4]
    assert total == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    for step in range(1, STEPS + 1):
        values = expected(snapshots.models[step].eval(), of_step(data, step, ACCUMULATION))
        assert shown(backend, step, values) == pytest.approx(values, rel=1e-5), step
    assert setup_findings(backend) == set()
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []
    assert "divides the loss" not in telemetry_log.text  # by what it is the mean over

    train(untouched, data, tmp_path)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []


# -- positions, layers and groups -------------------------------------------------------------------------------------

GROUPS = {
    r"logits_dense\.weight": "audio_head",
    r"model\.encoder\.embedding\.weight": "text_embedding",
    r"model\.decoder\.embeddings\.embed\.weight": "audio_embedding",
    r"model\.encoder\.layers\.\d\.self_attention\.[qkvo]_proj\.weight": "other",
    r"model\.decoder\.layers\.\d\.(self|cross)_attention\.[qkvo]_proj\.weight": "shared_attention",
    r"model\.encoder\.layers\.\d\.mlp\..*": "text_ffn",
    r"model\.decoder\.layers\.\d\.mlp\..*": "audio_ffn",
    r"model\..*norm\.weight": "norms",
}


def test_every_parameter_has_its_group() -> None:
    model = dia()
    family = DiaFamily(model)
    groups = {name: family.group_of(name) for name, _ in model.named_parameters()}
    assert groups == {name: group_of(name, GROUPS) for name in groups}
    assert set(groups.values()) == set(GROUPS.values())


def kinds_of(batch: Batch) -> list[list[str]]:
    """What every position of the decoder is, by row."""
    found = []
    for row, mask in enumerate(batch["decoder_attention_mask"].tolist()):
        labels = batch["labels"].unflatten(0, (-1, len(DELAY)))[row].t().tolist()
        kinds, begun = [], False
        prompted = [code < DIA_END for code in batch["decoder_input_ids"][row, :, 0].tolist()]
        for at, real in enumerate(mask):
            begun = begun or (at > 0 and any(code != IGNORED for code in labels[at - 1]))
            kinds.append("padding" if not real else "target" if begun else "reference")
        has_prompt = any(own and kind == "reference" for own, kind in zip(prompted, kinds, strict=True))
        found.append([kind if has_prompt or kind == "padding" else "target" for kind in kinds])
    return found


def test_positions_and_attention_are_those_of_a_model_gone_through_by_hand(tmp_path: Path) -> None:
    batch, model, backend = batches()[0], dia(), MemoryBackend()
    kept = copy.deepcopy(model).eval()
    train(model, [batch], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    rows = kinds_of(batch)
    kinds = [kind for row in rows for kind in row]
    text = batch["attention_mask"].flatten().tolist()
    size = len(kinds) + len(text)
    expected = {f"{name}_audio": kinds.count(name) / size for name in ("reference", "target")}
    expected |= {"text": sum(text) / size, "padding": (kinds.count("padding") + text.count(0)) / size}
    assert {name: backend.scalars(f"inputs/tokens/{name}_fraction")[1] for name in expected} == pytest.approx(expected)
    assert backend.scalars("inputs/tokens/total")[1] == size
    assert backend.scalars("inputs/invalid_ids")[1] == 0
    assert kinds.count("reference") == 3  # the begin and a prompt of two frames
    assert backend.scalars("outputs/eos/supervised")[1] == 1

    kept.set_attn_implementation("eager")
    with torch.no_grad():
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        outputs = kept(**given, output_attentions=True)
    attended, across = outputs.decoder_attentions, outputs.cross_attentions
    masses: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, of_row in enumerate(rows):
        for query, query_kind in enumerate(of_row):
            for wanted in ("reference", "target"):
                keys = [key for key, kind in enumerate(of_row) if kind == wanted]
                mass = float(attended[1][row, :, query, keys].double().sum(-1).mean()) if keys else 0.0
                masses[query_kind, wanted].append(mass)
    for query_kind in ("reference", "target"):
        for wanted in ("reference", "target"):
            values = masses[query_kind, wanted]
            found = backend.scalars(f"attention/layer_1/{query_kind}_to_{wanted}")[1]
            assert found == pytest.approx(sum(values) / len(values), abs=1e-5)
    entropies, firsts = [], []
    for row, of_row in enumerate(rows):
        words = [at for at, one in enumerate(batch["attention_mask"][row].tolist()) if one]
        for query, kind in enumerate(of_row):
            weights = across[1][row, :, query].double()
            if kind != "padding":
                entropies += [-sum(w * math.log(w) for w in head if w > 0) for head in weights.tolist()]
                firsts += weights[:, words[0]].tolist()
    shown_across = {name: backend.scalars(f"attention/layer_1/cross/{name}")[1] for name in ("entropy", "sink")}
    by_hand = {"entropy": math.fsum(entropies) / len(entropies), "sink": math.fsum(firsts) / len(firsts)}
    assert shown_across == pytest.approx(by_hand, rel=1e-5)
    wanted_tags = {"activations/layer_1/audio_ffn/rms", "gradients/layer_1/audio_ffn/norm", "gradients/text_ffn/norm"}
    assert wanted_tags <= set(backend.tags())


# -- conditioning -----------------------------------------------------------------------------------------------------


def prompt_of(batch: Batch, row: int) -> list[list[int]]:
    """By codebook, without delay: the codes of a sample's prompt, which have no labels."""
    labels = batch["labels"].unflatten(0, (-1, len(DELAY)))[row]
    codes = batch["decoder_input_ids"][row]
    return [
        [
            int(codes[at, k])
            for at in range(1, len(codes))
            if int(codes[at, k]) < DIA_END and int(labels[k, at - 1]) == IGNORED
        ]
        for k in range(len(DELAY))
    ]


def test_the_conditioning_gain_is_that_of_samples_run_one_by_one(tmp_path: Path) -> None:
    batch, partners = dia_batch((4, 2, 4), (6, 0, 4), (5, 4, 3)), [2, None, 0]
    model, backend = dia(), MemoryBackend()
    telemetry = ZeroShotVerificationLoggerCallback(1, [backend], conditioning_every=1)
    train(model, [batch], tmp_path, [telemetry], 1, 1)  # with the weights after the step
    model.eval()
    losses: dict[str, list[list[float]]] = {name: [[] for _ in DELAY] for name in ("own", "swapped", "none")}
    for row, partner in enumerate(partners):
        if partner is None:
            continue
        real = batch["decoder_attention_mask"][row].bool()
        text = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        kinds = [kind for kind in kinds_of(batch)[row] if kind != "padding"]
        labels = batch["labels"].unflatten(0, (-1, len(DELAY)))[row][:, real]
        own, other = batch["decoder_input_ids"][row][real], prompt_of(batch, partner)
        swapped = own.clone()
        for k, prompt in enumerate(prompt_of(batch, row)):
            for place in range(len(prompt)):
                swapped[1 + DELAY[k] + place, k] = other[k][place % len(other[k])]
        for name, frames in (("own", own), ("swapped", swapped), ("none", own)):
            mask = [int(name != "none" or kind != "reference") for kind in kinds]
            positions = torch.arange(len(kinds))[None]
            with torch.no_grad():
                logits = model(
                    input_ids=text,
                    decoder_input_ids=frames[None],
                    decoder_attention_mask=torch.tensor([mask]),
                    decoder_position_ids=positions,
                ).logits.double()
            for k in range(len(DELAY)):
                for at in range(len(kinds) - 1):  # of the last label the frame itself is not given
                    label = int(labels[k, at])
                    if label != IGNORED and kinds[at] != "reference":
                        losses[name][k].append(-float(logits[k, at].log_softmax(-1)[label]))
    section = "zero_shot/conditioning"
    for name, of_codebooks in losses.items():
        everything = [loss for codebook in of_codebooks for loss in codebook]
        expected = sum(everything) / len(everything)
        assert backend.scalars(f"{section}/loss_{name}")[1] == pytest.approx(expected, abs=2e-5), name
    for k in range(len(DELAY)):
        gain = (sum(losses["swapped"][k]) - sum(losses["own"][k])) / len(losses["own"][k])
        assert backend.scalars(f"{section}/codebook_{k}/gain")[1] == pytest.approx(gain, abs=2e-5), k
    assert abs(backend.scalars(f"{section}/gain")[1]) > 1e-4


def test_labels_that_the_model_reads_for_one_another_are_said(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    """The model takes any shape of as many labels: the loss is right for what it reads, and what it reads is wrong."""
    batch = dia_batch((4, 2, 3), (6, 0, 4))
    given = batch["labels"].unflatten(0, (-1, len(DELAY)))
    for labels, wrong in ((given, False), (given.transpose(1, 2).contiguous(), True)):
        backend = MemoryBackend()
        train(dia(), [{**batch, "labels": labels}], tmp_path, [StrategicTelemetry(["outputs"], 1, [backend])], 1, 1)
        assert list(backend.scalars("outputs/loss/total")) == [1]
        count = int((labels != IGNORED).sum())
        said = (
            f"labels lie as [batch, frames, codebooks]: {count}, but the model reads all {count} as [batch, codebooks, "
            "frames], each for another's"
        )
        assert (said in telemetry_log.text) == wrong
        telemetry_log.clear()


def test_ends_that_are_not_taught_are_counted(tmp_path: Path) -> None:
    """Those of the last codebook stand after the last frame that the decoder is given."""
    batch = dia_batch((4, 2, 3), (6, 0, 4))
    for masked, expected in (((0,), 2 / 3), ((2,), 2 / 3), ((0, 1, 2), 0.0)):
        labels = batch["labels"].clone()
        for k in masked:
            labels[k :: len(DELAY)] = labels[k :: len(DELAY)].masked_fill(labels[k :: len(DELAY)] == DIA_END, IGNORED)
        backend = MemoryBackend()
        train(dia(), [{**batch, "labels": labels}], tmp_path, [StrategicTelemetry(["outputs"], 1, [backend])], 1, 1)
        assert backend.scalars("outputs/eos/supervised")[1] == pytest.approx(expected)

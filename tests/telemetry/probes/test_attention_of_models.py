"""Attention of real models, worked out again from sampled rows, against their whole eager attention."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.attention import AttentionSums, attention_of, real_kinds
from support.batches import Voices, text_batch
from support.references import assert_same
from support.steps import watched_step
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations import flash_attention

EVERY = 600  # queries: more than there are positions, so that every one is looked at
LAYERS = (0, 1)


def expected(
    model: Any, batches: list[dict[str, Tensor]], kinds: list[list[list[str]]], layers: Any
) -> dict[str, float]:
    attentions = [layers[index].self_attn for index in LAYERS]
    sums = [AttentionSums() for _ in LAYERS]
    for batch, of in zip(batches, kinds, strict=True):
        for one, attention in zip(sums, attention_of(model, attentions, batch), strict=True):
            one.add(attention, of)
    return {tag: value for index, one in zip(LAYERS, sums, strict=True) for tag, value in one.values(index).items()}


@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_higgs_as_its_whole_attention(
    implementation: str, left: bool, higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    higgs.set_attn_implementation(implementation)
    padded = [
        voices.pad([voices.conversation(), voices.conversation(reference=None, target=9, seed=3)], left),
        voices.pad([voices.conversation(reference=7, seed=5)], left),
    ]
    batches = [voices.batch(samples) for samples in padded]
    kinds = [[[position.kind for position in sample] for sample in samples] for samples in padded]
    measured = watched_step(higgs, batches, tmp_path, layers=LAYERS, queries=EVERY).scalars("attention")
    assert_same(measured, expected(higgs, batches, kinds, higgs.model.layers))
    for layer in LAYERS:
        for query in ("text", "reference", "target"):
            row = [measured[f"attention/layer_{layer}/{query}_to_{key}"] for key in ("text", "reference", "target")]
            assert sum(row) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*itertools.product(["llama", "qwen3", "mistral"], ["sdpa", "eager"]), ("gemma2", "eager")],
)
def test_text_models_as_their_whole_attention(kind: str, implementation: str, left: bool, tmp_path: Path) -> None:
    model = models.make(kind, implementation)
    batches = [text_batch(11, 6, left=left), text_batch(9)]
    measured = watched_step(model, batches, tmp_path, layers=LAYERS, queries=EVERY).scalars("attention")
    assert_same(measured, expected(model, batches, [real_kinds(batch) for batch in batches], model.model.layers))


def test_packed_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    model = models.make("mistral")
    lengths = (5, 7, 3)
    ids = text_batch(sum(lengths))["input_ids"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}  # a cache hides the packing
    measured = watched_step(model, [batch], tmp_path, layers=LAYERS, queries=EVERY).scalars("attention")
    apart = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(lengths, dim=1)]
    assert_same(measured, expected(model, apart, [real_kinds(part) for part in apart], model.model.layers), rel=1e-4)


def fake_flash(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_causal: bool, **options: Any
) -> Tensor:
    """Stands in for flash attention's kernel: ``[batch, sequence, heads, size]``, two loops and no mask tensor."""
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    lengths, positions = options.get("cu_seq_lens_q"), options.get("position_ids")
    gone = torch.zeros_like(value[:, :1, :1]).expand(-1, length, heads, -1)
    output = [list(row.unbind(0)) for row in gone.unbind(0)]
    for b in range(batch):
        kept = [at for at in range(length) if attention_mask is None or attention_mask[b, at]]
        starts = [0]
        if attention_mask is None and lengths is not None:
            starts = lengths.tolist()
        elif attention_mask is None and positions is not None and batch == 1:
            starts = [at for at in range(length) if positions[0, at] == positions.min()]
        for place, q in enumerate(kept):
            begin = max(start for start in starts if start <= q)
            window = options.get("sliding_window") or length
            seen = [k for other, k in enumerate(kept) if begin <= k <= q and place - other < window]
            keys = key[b, seen].repeat_interleave(group, dim=1)
            logits = torch.einsum("hd,khd->hk", query[b, q], keys) * options["softmax_scale"]
            cap = options.get("softcap")
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            values = value[b, seen].repeat_interleave(group, dim=1)
            output[b][q] = torch.einsum("hk,khd->hd", logits.softmax(-1), values)
    return torch.stack([torch.stack(row) for row in output])


@pytest.fixture
def _flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", fake_flash)


def as_flash(model: Any) -> Any:
    """The model calls transformers' flash attention function, whose kernel is :func:`fake_flash`."""
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
def test_flash_attention_as_the_eager_one(kind: str, left: bool, tmp_path: Path) -> None:
    batches = [text_batch(9, 6, left=left), text_batch(7)]
    step = watched_step(as_flash(models.make(kind, "eager")), batches, tmp_path, layers=LAYERS, queries=EVERY)
    eager = models.make(kind, "eager")
    kinds = [real_kinds(batch) for batch in batches]
    assert_same(step.scalars("attention"), expected(eager, batches, kinds, eager.model.layers), rel=1e-4)


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("told_by", ["position ids", "lengths"])
def test_flash_attention_on_packed_sequences(told_by: str, tmp_path: Path) -> None:
    lengths = (5, 7, 3)
    ids = text_batch(sum(lengths))["input_ids"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
    if told_by == "lengths":
        ends = torch.tensor([0, 5, 12, 15], dtype=torch.int32)
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    model = as_flash(models.make("mistral"))
    step = watched_step(model, [batch], tmp_path, layers=LAYERS, queries=EVERY)
    eager = models.make("mistral", "eager")
    apart = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(lengths, dim=1)]
    of = expected(eager, apart, [real_kinds(part) for part in apart], eager.model.layers)
    assert_same(step.scalars("attention"), of, rel=1e-4)


class Unusual:
    """Kinds of attention that cannot be worked out again exactly, and what is said of them."""

    @staticmethod
    def learned_sinks(_: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor], str]:
        return models.make("gpt_oss", "eager"), text_batch(6), "learned sinks"

    @staticmethod
    def own_function(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor], str]:
        def uniform(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            mean = value.mean(dim=2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            return mean.expand(-1, -1, query.shape[2], -1).transpose(1, 2), None

        monkeypatch.setitem(AttentionInterface._global_mapping, "uniform", uniform)
        model = models.make("llama")
        model.config._attn_implementation = "uniform"
        return model, text_batch(6), "not one that is known"

    @staticmethod
    def cache(_: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any], str]:
        model = models.make("llama")
        batch = text_batch(6)
        with torch.no_grad():
            past = model(**batch, use_cache=True).past_key_values
        return model, {"input_ids": batch["input_ids"], "past_key_values": past}, "other keys than those of its queries"


@pytest.mark.parametrize("case", ["learned_sinks", "own_function", "cache"])
def test_what_cannot_be_worked_out_is_absent_and_said(
    case: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, reason = getattr(Unusual, case)(monkeypatch)
    step = watched_step(model, [batch], tmp_path, layers=LAYERS)
    assert step.scalars("attention") == {}
    for layer in LAYERS:
        assert f"no attention/layer_{layer}: " in telemetry_log.text
    assert reason in telemetry_log.text
    assert "failed" not in telemetry_log.text

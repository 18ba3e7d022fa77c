"""Sampled attention rows against loops over queries and keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.waiting import Watch
from torch import Tensor

from telemetry.measures import attention
from telemetry.measures.attention import (
    AttentionRows,
    AttentionTotals,
    QuerySample,
    attention_rows,
    attention_totals,
    sample_queries,
)
from telemetry.measures.attention_masks import (
    RowMask,
    given_mask_rows,
    ruled_mask_rows,
    segments_of_lengths,
    segments_of_positions,
    sequence_starts,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kinds_of(letters: list[str]) -> Tensor:
    """bool ``[batch, sequence, 3]`` from strings of t(ext), r(eference), g (target) and padding."""
    return torch.tensor([[[letter == kind for kind in "trg"] for letter in row] for row in letters])


# What is seen ---------------------------------------------------------------------------------------------------------


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[list[bool]], bool, int | None, list[int] | None]:
    """Padding anywhere, causal or not, a window, packed sequences."""
    length = draw(st.integers(1, 7))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    real = draw(st.lists(row, min_size=1, max_size=2))
    segments = draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
    packed = None if segments is None else torch.tensor(segments).cumsum(0).tolist()
    return real, draw(st.booleans()), draw(st.none() | st.integers(1, 4)), packed


@settings(max_examples=60)
@given(sequences())
def test_rules_as_flash_attention_applies_them(
    case: tuple[list[list[bool]], bool, int | None, list[int] | None],
) -> None:
    real, causal, window, segments = case
    length = len(real[0])
    rows = torch.arange(length).expand(len(real), -1)
    mask = ruled_mask_rows(
        rows, length, causal, torch.tensor(real), window, None if segments is None else torch.tensor(segments)
    )
    for b, sample in enumerate(real):
        for q in range(length):
            for k in range(length):
                between = sum(sample[k + 1 : q + 1]) if k <= q else sum(sample[q + 1 : k + 1])
                seen = sample[k] and (k <= q or not causal) and (window is None or between < window)
                seen = seen and (segments is None or segments[k] == segments[q])
                assert mask.allowed[b, 0, q, k] == seen, (b, q, k)


def test_rows_of_a_given_mask() -> None:
    whole = random(2, 3, 5, 5)
    rows = torch.tensor([[4, 0], [2, 2]])
    for mask in (whole > 0, whole.half().masked_fill(whole > 1, torch.finfo(torch.half).min), whole[:1], whole[:, :1]):
        picked = given_mask_rows(mask, rows)
        for b in range(2):
            for at, q in enumerate(rows[b].tolist()):
                row = mask[min(b, mask.shape[0] - 1), :, q]
                hidden = ~row if row.dtype == torch.bool else row == torch.finfo(torch.half).min
                assert torch.equal(picked.allowed[b, :, at], ~hidden)
                assert picked.bias is None or torch.equal(picked.bias[b, :, at], row.float())
    hidden = given_mask_rows(torch.full((1, 1, 2, 2), -torch.inf), torch.tensor([[0]]))
    assert not hidden.allowed.any()
    for wrong in (torch.ones(2, 5), torch.ones(1, 1, 5, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match="not a mask of queries by keys"):
            given_mask_rows(wrong, rows)


def test_packed_sequences_as_they_are_told() -> None:
    assert segments_of_lengths(torch.tensor([0, 2, 5]), 5).tolist() == [1, 1, 2, 2, 2]
    assert segments_of_positions(torch.tensor([[0, 1, 0, 1, 2]])).tolist() == [1, 1, 2, 2, 2]
    real = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
    assert sequence_starts(real).tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    positions = torch.tensor([[0, 0, 1, 0, 1]])
    assert sequence_starts(real, positions)[0].tolist() == [0, 1, 1, 3, 3]


# The rows -------------------------------------------------------------------------------------------------------------


def loop_row(
    query: Tensor, keys: Tensor, allowed: list[bool], bias: list[float], kinds: Tensor, first: int, cap: float | None
) -> tuple[list[float], float, float, float]:
    """Mass, entropy, sink and largest logit of one row of one head."""
    logits = [0.5 * sum(float(a) * float(b) for a, b in zip(query, key, strict=True)) for key in keys]
    if cap is not None:
        logits = [cap * math.tanh(logit / cap) for logit in logits]
    logits = [logit + extra for logit, extra in zip(logits, bias, strict=True)]
    seen = [k for k, see in enumerate(allowed) if see]
    largest = max(logits[k] for k in seen)
    exponents = {k: math.exp(logits[k] - largest) for k in seen}
    weights = {k: exponent / sum(exponents.values()) for k, exponent in exponents.items()}
    mass = [sum(w for k, w in weights.items() if kinds[k, kind]) for kind in range(kinds.shape[1])]
    return mass, -sum(w * math.log(w) for w in weights.values() if w), weights.get(first, 0.0), largest


@pytest.mark.parametrize("limit", [1, 40, 10**6], ids=["head by head", "a few heads", "whole"])
@pytest.mark.parametrize(("key_heads", "cap"), [(4, None), (2, 1.5), (1, None)])
def test_rows_as_by_loops(key_heads: int, cap: float | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "piece_elements", lambda _device: limit)
    query, key = random(2, 4, 6, 3), random(2, key_heads, 6, 3, seed=1)
    rows, starts = torch.tensor([[5, 3], [4, 2]]), torch.tensor([[0, 0], [1, 1]])
    kinds = kinds_of(["trrggg", " ttrgg"])
    whole = torch.ones(6, 6).tril().bool().expand(2, 4, 6, 6).clone()
    whole[1, :, :, 0] = False
    whole[0, 2, 5, 1:3] = False  # one head sees less
    given_bias = random(2, 4, 6, 6, seed=2).masked_fill(~whole, torch.finfo(torch.float32).min)
    for mask in (given_mask_rows(whole, rows), given_mask_rows(given_bias, rows)):
        values = attention_rows(query, key, rows, mask, kinds, starts, 0.5, cap)
        for b in range(2):
            for h in range(4):
                for at, q in enumerate(rows[b].tolist()):
                    bias = [0.0] * 6 if mask.bias is None else given_bias[b, h, q].tolist()
                    keys = key[b, h // (4 // key_heads)]
                    allowed = whole[b, h, q].tolist()
                    row = loop_row(query[b, h, q], keys, allowed, bias, kinds[b], int(starts[b, at]), cap)
                    assert values.mass[b, h, at].tolist() == pytest.approx(row[0], abs=1e-6)
                    found = [float(value[b, h, at]) for value in (values.entropy, values.sink, values.max_logit)]
                    assert found == pytest.approx(row[1:], rel=1e-5, abs=1e-6)
                    assert values.visible[b, h, at] == sum(allowed)


# The sample -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.lists(st.text("trg ", min_size=9, max_size=9), min_size=1, max_size=3), st.integers(1, 12), st.integers(0, 99)
)
def test_a_sample_is_shared_out_and_never_padding(letters: list[str], queries: int, seed: int) -> None:
    kinds = kinds_of([list(row) for row in letters])
    before = torch.get_rng_state()
    sample = sample_queries(kinds, queries, torch.Generator().manual_seed(seed))
    again = sample_queries(kinds, queries, torch.Generator().manual_seed(seed))
    assert torch.equal(sample.rows, again.rows)
    assert torch.equal(torch.get_rng_state(), before)
    for b, row in enumerate(letters):
        for kind, letter in enumerate("trg"):
            picked = sample.rows[b][sample.kinds[b, :, kind]].tolist()
            share = queries // 3 + (kind < queries % 3)
            assert len(picked) == len(set(picked)) == min(share, row.count(letter))
            assert all(row[at] == letter for at in picked)


def test_samples_differ_from_step_to_step() -> None:
    kinds = torch.ones(1, 100, 1, dtype=torch.bool)
    rows = [sample_queries(kinds, 8, torch.Generator().manual_seed(step)).rows for step in range(2)]
    assert not torch.equal(*rows)


# The totals -----------------------------------------------------------------------------------------------------------


def rows_of(query: Tensor, key: Tensor, kinds: Tensor, mask: Tensor) -> tuple[AttentionRows, QuerySample]:
    sample = sample_queries(kinds, 99, torch.Generator().manual_seed(0))
    starts = sequence_starts(kinds.any(dim=-1)).gather(1, sample.rows)
    return attention_rows(query, key, sample.rows, given_mask_rows(mask, sample.rows), kinds, starts, 0.5), sample


def measured(query: Tensor, key: Tensor, kinds: Tensor, mask: Tensor) -> AttentionTotals:
    values, sample = rows_of(query, key, kinds, mask)
    return attention_totals(values, sample.kinds)


def packed(totals: AttentionTotals) -> Tensor:
    return torch.cat([torch.as_tensor(values, dtype=torch.float64).reshape(-1) for values in totals])


def causal(length: int) -> Tensor:
    return torch.ones(1, 1, length, length).tril().bool()


def test_totals_of_parts_merge_to_those_of_the_whole() -> None:
    query, key = random(3, 4, 6, 3), random(3, 2, 6, 3, seed=1)
    kinds = kinds_of(["trrggg", " ttrgg", "tttt  "])
    mask = causal(6) & kinds.any(dim=-1)[:, None, None, :]
    whole = measured(query, key, kinds, mask)
    parts = [measured(query[b : b + 1], key[b : b + 1], kinds[b : b + 1], mask[b : b + 1]) for b in range(3)]
    summed = AttentionTotals(*(sum(map(np.asarray, values)) for values in zip(*parts, strict=True)))
    summed = summed._replace(max_logit=max(part.max_logit for part in parts))
    torch.testing.assert_close(packed(summed), packed(whole))
    assert whole.queries.tolist() == [7, 3, 5]


def test_what_is_not_finite_is_counted_and_not_averaged_away() -> None:
    query, key = random(1, 2, 4, 3), random(1, 2, 4, 3, seed=1)
    query[0, 1, 2, 0] = torch.nan  # of one head at one reference position
    totals = measured(query, key, kinds_of(["trrg"]), causal(4))
    assert totals.nonfinite == 1
    assert np.isnan(totals.mass[1]).all()
    assert np.isfinite(totals.mass[[0, 2]]).all()
    assert np.isnan(totals.entropy)
    key[0, :, 1] = torch.inf
    assert measured(query, key, kinds_of(["trrg"]), causal(4)).nonfinite > 1


def test_padding_that_is_not_finite_harms_nothing() -> None:
    query, key = random(1, 2, 4, 3), random(1, 2, 4, 3, seed=1)
    kinds = kinds_of(["trg "])
    mask = causal(4) & kinds.any(dim=-1)[:, None, None, :]
    clean = measured(query, key, kinds, mask)
    query[0, :, 3], key[0, :, 3] = torch.nan, torch.nan
    assert torch.equal(packed(measured(query, key, kinds, mask)), packed(clean))


def test_a_row_that_sees_nothing_does_not_count() -> None:
    query, key = random(1, 2, 4, 3), random(1, 2, 4, 3, seed=1)
    mask = causal(4).clone()
    mask[:, :, 1] = False
    totals = measured(query, key, kinds_of(["trrg"]), mask)
    assert totals.queries.tolist() == [1, 1, 1]
    assert torch.isfinite(packed(totals)).all()


def test_nothing_waits_for_the_device() -> None:
    kinds = kinds_of(["trrggg", " ttrgg"])
    mask = causal(6) & kinds.any(dim=-1)[:, None, None, :]
    arguments: Any = random(2, 4, 6, 3), random(2, 2, 6, 3), kinds, mask
    with Watch() as watch:
        rows_of(*arguments)
        ruled_mask_rows(torch.tensor([[1], [2]]), 6, True, kinds.any(dim=-1), 3)
        segments_of_lengths(torch.tensor([0, 2, 6]), 6)
        sequence_starts(kinds.any(dim=-1), torch.arange(6)[None])
    assert watch.operations
    assert watch.waits == []


def test_autocast_changes_nothing() -> None:
    arguments: Any = random(1, 2, 6, 3), random(1, 2, 6, 3), kinds_of(["trrggg"]), causal(6)
    plain = packed(measured(*arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(packed(measured(*arguments)), plain)


def test_rows_of_half_precision_are_worked_out_in_float32() -> None:
    query, key = random(1, 1, 4, 3).bfloat16(), random(1, 1, 4, 3, seed=1).bfloat16()
    rows, mask = torch.tensor([[3]]), RowMask(torch.ones(1, 1, 1, 4, dtype=torch.bool))
    kinds, starts = kinds_of(["trrg"]), torch.tensor([[0]])
    low = attention_rows(query, key, rows, mask, kinds, starts, 0.5)
    high = attention_rows(query.float(), key.float(), rows, mask, kinds, starts, 0.5)
    assert torch.equal(low.mass, high.mass)

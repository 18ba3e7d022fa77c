from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from telemetry.measures import token_stats
from telemetry.measures._support import piece_elements, row_pieces
from telemetry.measures.token_stats import TokenStats, histogram_of_ids, masked_totals, token_statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Few and exact in every dtype, so that ties are common.
VALUES = st.sampled_from([-math.inf, -40.0, -3.0, -0.5, 0.0, 0.5, 1.0, 2.0, 30.0])
ODD_VALUES = st.one_of(VALUES, st.sampled_from([math.nan, math.inf]))


def reference(row: list[float], target: int, ignored: bool) -> tuple[float, float, int, int | None]:
    """nll, entropy, rank and prediction (None for any) of one row, by the definitions."""
    vocab = len(row)
    poisoned = any(math.isnan(x) or x == math.inf for x in row) or all(x == -math.inf for x in row)
    prediction = None if poisoned else row.index(max(row))
    if ignored or not 0 <= target < vocab:
        return 0.0, 0.0, vocab, prediction
    if poisoned:
        return math.nan, math.nan, vocab, prediction
    log_sum_exp = math.log(math.fsum(math.exp(x) for x in row))
    entropy = -math.fsum(math.exp(x - log_sum_exp) * (x - log_sum_exp) for x in row if x > -math.inf)
    rank = sum(x > row[target] or (x == row[target] and i < target) for i, x in enumerate(row))
    return log_sum_exp - row[target], entropy, rank, prediction


def assert_equals_reference(stats: TokenStats, logits: Tensor, targets: Tensor, ignore_index: int) -> None:
    vocab = logits.shape[-1]
    rows, labels = logits.reshape(-1, vocab).tolist(), targets.flatten().tolist()
    actual = zip(*(x.flatten().tolist() for x in (stats.nll, stats.entropy, stats.rank, stats.prediction)), strict=True)
    for row, label, (nll, entropy, rank, prediction) in zip(rows, labels, actual, strict=True):
        expected = reference(row, label, label == ignore_index)
        assert nll == pytest.approx(expected[0], rel=1e-5, abs=1e-5, nan_ok=True)
        assert entropy == pytest.approx(expected[1], rel=1e-5, abs=1e-5, nan_ok=True)
        assert rank == expected[2]
        assert 0 <= prediction < vocab
        assert expected[3] in (None, prediction)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    vocab = draw(st.integers(1, 9))
    rows = math.prod(shape)
    values = draw(st.lists(draw(st.sampled_from([VALUES, ODD_VALUES])), min_size=rows * vocab, max_size=rows * vocab))
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    labels = st.one_of(st.integers(0, vocab - 1), st.sampled_from([ignore_index, -5, vocab, 2**40]))
    targets = draw(st.lists(labels, min_size=rows, max_size=rows))
    logits = torch.tensor(values, dtype=torch.float64).reshape(*shape, vocab).to(draw(st.sampled_from(DTYPES)))
    return logits, torch.tensor(targets, dtype=torch.int64).reshape(shape), ignore_index


@settings(max_examples=300)
@given(batches(), st.sampled_from([1, 5, 16, 1000]))
@example((torch.zeros(2, 3), torch.tensor([0, 2]), -100), 1000)
@example((torch.full((1, 3), -math.inf), torch.tensor([1]), -100), 1000)
@example((torch.tensor([[0.0, math.nan]]), torch.tensor([0]), -100), 1000)
def test_equals_the_definitions_however_it_is_cut(batch: tuple[Tensor, Tensor, int], limit: int) -> None:
    logits, targets, ignore_index = batch
    with patch.object(token_stats, "piece_elements", lambda device: limit):
        stats = token_statistics(logits, targets, ignore_index=ignore_index)
    for tensor, dtype in ((stats.nll, torch.float32), (stats.entropy, torch.float32), (stats.rank, torch.int64)):
        assert tensor.shape == targets.shape
        assert tensor.dtype == dtype
    assert stats.prediction.dtype == torch.int64
    assert stats.probe_probability is None
    assert_equals_reference(stats, logits, targets, ignore_index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(300, 1026), (3, 70_001)])
def test_equals_pytorch_on_whole_vocabularies(rows: int, vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[: rows // 3] = logits[: rows // 3].double().argsort(dim=-1)[:, -3]
    stats = token_statistics(logits, targets, probe_id=vocab - 1)

    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(
        stats.nll.double(), functional.nll_loss(exact, targets, reduction="none"), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(stats.entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=1e-5)
    order = logits.double().argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(stats.rank, (order == targets[:, None]).int().argmax(-1))
    assert torch.equal(stats.prediction, order[:, 0])
    assert stats.probe_probability is not None
    torch.testing.assert_close(stats.probe_probability.double(), exact[:, -1].exp(), rtol=1e-4, atol=1e-12)


def test_the_probed_probability_is_there_without_a_target_and_nan_when_poisoned() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [math.nan, 0.0, 0.0], [0.0, math.log(3.0), -math.inf]])
    for probe_id, expected in ((1, [0.5, math.nan, 0.75]), (2, [0.0, math.nan, 0.0])):
        stats = token_statistics(logits, torch.tensor([-100, -100, 1]), probe_id=probe_id)
        assert stats.probe_probability is not None
        assert stats.probe_probability.dtype == torch.float32
        assert stats.probe_probability.tolist() == pytest.approx(expected, nan_ok=True)


def test_a_rank_of_zero_is_the_prediction_and_below_five_the_top_five() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 0.0, 3.0, -1.0]]).expand(7, 7)
    stats = token_statistics(logits, torch.arange(7))
    assert stats.rank.tolist() == [4, 0, 1, 3, 5, 2, 6]
    assert stats.prediction.tolist() == [1] * 7


def test_a_nan_is_never_a_hit() -> None:
    stats = token_statistics(torch.tensor([[math.nan, 1.0], [1.0, math.inf]]), torch.tensor([0, 1]))
    assert stats.rank.tolist() == [2, 2]
    assert stats.nll.isnan().all()
    assert stats.entropy.isnan().all()


def _views() -> dict[str, Tensor]:
    flat = torch.arange(4 * 6 * 3 * 5, dtype=torch.float32).mul(0.37).sin().bfloat16()
    return {
        "codebooks": flat.view(4, 6, 15).view(4, 6, 3, 5),
        "shifted codebooks": flat.view(4, 6, 15)[:, :-1].unflatten(-1, (3, 5)),
        "transposed": flat.view(4, 6, 3, 5).permute(2, 1, 0, 3),
        "vocabulary first": flat.view(5, 4, 6, 3).permute(1, 2, 3, 0),
        "expanded": flat[:5].expand(4, 6, 5),
    }


@pytest.mark.parametrize("name", _views())
@pytest.mark.parametrize("limit", [4, 40, 10_000])
def test_strides_do_not_matter(name: str, limit: int) -> None:
    logits = _views()[name]
    targets = torch.arange(logits[..., 0].numel()).reshape(logits.shape[:-1]) % 5
    with patch.object(token_stats, "piece_elements", lambda device: limit):
        stats = token_statistics(logits, targets)
    assert_equals_reference(stats, logits, targets, -100)


@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
def test_pieces_are_bounded_complete_and_in_order(limit: int) -> None:
    tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).transpose(0, 1)
    pieces = list(row_pieces(tensor, limit))
    assert torch.equal(torch.cat(pieces), tensor.reshape(-1, 5))
    assert all(piece.numel() <= max(limit, 5) for piece in pieces)


@pytest.mark.parametrize("shape", [(1100, 1026), (2, 550, 1, 1026)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_waits_for_nothing_and_copies_a_piece_at_a_time(
    watched: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    logits = torch.zeros(shape, dtype=dtype)
    targets = torch.zeros(shape[:-1], dtype=torch.int64)
    _, watch = watched(lambda x, y: token_statistics(x, y, probe_id=1), logits, targets)
    assert logits.numel() > 4 * piece_elements(logits.device)
    assert watch.largest <= piece_elements(logits.device)


def test_shifted_logits_are_not_copied_whole(watched: Callable[..., Any]) -> None:
    base = torch.zeros(2, 401, 3 * 700)
    logits = base[:, :-1].unflatten(-1, (3, 700))
    _, watch = watched(token_statistics, logits, torch.zeros(2, 400, 3, dtype=torch.int64))
    assert watch.largest <= piece_elements(logits.device)


def test_reads_no_value() -> None:
    """A meta tensor has none to read."""
    logits, targets = torch.empty(2, 5, 7, device="meta"), torch.empty(2, 5, dtype=torch.int64, device="meta")
    stats = token_statistics(logits, targets, probe_id=2)
    mask = targets != -100
    total, count = masked_totals(stats.nll, mask)
    assert histogram_of_ids(stats.prediction, mask, 7).shape == (5, 7)
    assert total.shape == count.shape == (5,)


def test_autocast_and_gradients_are_kept_out() -> None:
    logits = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(24).reshape(4, 6)
    outside = token_statistics(logits, targets, probe_id=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_statistics(logits, targets, probe_id=3)
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    for name in ("nll", "entropy", "rank", "prediction", "probe_probability"):
        torch.testing.assert_close(getattr(inside, name), getattr(outside, name), rtol=0, atol=0)
        assert not getattr(inside, name).requires_grad


@pytest.mark.parametrize(
    ("logits", "targets", "probe_id"),
    [
        (torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64), None),
        (torch.zeros(()), torch.zeros((), dtype=torch.int64), None),
        (torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros(0, 2**24 + 1), torch.zeros(0, dtype=torch.int64), None),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), 4),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), -1),
    ],
)
def test_what_does_not_fit_is_refused(logits: Tensor, targets: Tensor, probe_id: int | None) -> None:
    with pytest.raises(ValueError, match=r"logits|vocabulary"):
        token_statistics(logits, targets, probe_id=probe_id)


SHAPES = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@st.composite
def masked_values(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(SHAPES)
    size = math.prod(shape)
    numbers = st.one_of(st.floats(-100, 100, width=32), st.sampled_from([math.nan, math.inf]))
    values = torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size)), dtype=torch.float32)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
    return values.reshape(shape), mask.reshape(shape)


@given(masked_values())
def test_masked_totals_equal_a_loop(batch: tuple[Tensor, Tensor]) -> None:
    values, mask = batch
    total, count = masked_totals(values, mask)
    assert total.dtype == count.dtype == torch.float64
    columns = values.shape[-1]
    assert total.shape == count.shape == (columns,)
    for column in range(columns):
        pairs = zip(values[..., column].flatten().tolist(), mask[..., column].flatten().tolist(), strict=True)
        kept = [value for value, keep in pairs if keep]
        assert count[column] == len(kept)
        assert float(total[column]) == pytest.approx(sum(kept), rel=1e-12, abs=1e-9, nan_ok=True)


def test_a_masked_nan_does_not_count() -> None:
    total, count = masked_totals(
        torch.tensor([[math.nan, 1.0], [2.0, math.nan]]), torch.tensor([[False, True], [True, True]])
    )
    assert total[0] == 2
    assert total[1].isnan()
    assert count.tolist() == [1, 2]


@given(SHAPES, st.integers(0, 5), st.randoms(use_true_random=False))
def test_histogram_equals_a_loop(shape: list[int], size: int, random: Any) -> None:
    count = math.prod(shape)
    ids = torch.tensor([random.choice([*range(size), -1, size, -100, 2**40]) for _ in range(count)], dtype=torch.int64)
    mask = torch.tensor([random.random() < 0.7 for _ in range(count)], dtype=torch.bool)
    ids, mask = ids.reshape(shape), mask.reshape(shape)
    counts = histogram_of_ids(ids, mask, size)
    assert counts.dtype == torch.float64
    assert counts.shape == (shape[-1], size)
    for column in range(shape[-1]):
        pairs = zip(ids[..., column].flatten().tolist(), mask[..., column].flatten().tolist(), strict=True)
        kept = [value for value, keep in pairs if keep]
        assert counts[column].tolist() == [kept.count(value) for value in range(size)]


def test_totals_and_histograms_wait_for_nothing(watched: Callable[..., Any]) -> None:
    ids, mask = torch.arange(24).reshape(4, 6) % 5, torch.arange(24).reshape(4, 6) % 2 == 0
    watched(masked_totals, ids.float(), mask)
    watched(lambda x, y: histogram_of_ids(x, y, 4), ids, mask)

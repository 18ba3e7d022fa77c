"""Totals of activations against loops over values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.waiting import Watch
from torch import Tensor

from telemetry.measures import activations
from telemetry.measures.activations import ActivationTotals, activation_totals, counted_squares, served_rows

VALUES = st.sampled_from([0.0, -0.0, 1.5, -2.25, 1e-30, 3e20, math.inf, -math.inf, math.nan])


@st.composite
def counted(draw: st.DrawFn) -> tuple[list[list[float]], list[bool]]:
    width = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(VALUES, min_size=width, max_size=width), max_size=6))
    return rows, draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))


def totals_of(output: Tensor, counts: Tensor) -> ActivationTotals:
    return ActivationTotals(*activation_totals(output, counts).tolist())


@pytest.mark.parametrize("limit", [1, 10**6])
@settings(max_examples=60)
@given(case=counted())
def test_totals_as_by_loops(limit: int, case: tuple[list[list[float]], list[bool]]) -> None:
    rows, counts = case
    output = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1 if rows else 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "piece_elements", lambda _device: limit)
        found = totals_of(output, torch.tensor(counts, dtype=torch.bool))
        squares = counted_squares(output, torch.tensor(counts, dtype=torch.bool))
    values = [value for row, counts_too in zip(rows, counts, strict=True) if counts_too for value in row]
    expected = {
        "values": len(values),
        "squares": sum(value * value for value in values),
        "absmax": math.nan if any(map(math.isnan, values)) else max(map(abs, values), default=-math.inf),
        "zeros": values.count(0.0),
        "nonfinite": sum(not math.isfinite(value) for value in values),
    }
    assert found._asdict() == pytest.approx(expected, nan_ok=True)
    assert float(squares) == pytest.approx(expected["squares"], nan_ok=True)


def test_parts_merge_to_the_whole() -> None:
    output, counts = torch.arange(12.0).reshape(4, 3) - 5, torch.tensor([True, False, True, True])
    whole = totals_of(output, counts)
    parts = [totals_of(output[rows], counts[rows]) for rows in (slice(2), slice(2, None))]
    for name, *own in zip(whole._fields, *parts, strict=True):
        combine = max if name == "absmax" else sum
        assert combine(own) == getattr(whole, name)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_rows_of_a_part_of_the_batch_are_found_in_their_order(positions: list[tuple[bool, bool]]) -> None:
    served, real = (torch.tensor([pair[at] for pair in positions])[None] for at in (0, 1))
    expected = real[served]
    assert torch.equal(served_rows(served, real, len(expected)), expected)


def test_nothing_waits_for_the_device() -> None:
    served, real = torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]])

    def measure(output: Tensor) -> None:
        counts = served_rows(served, real, 2)
        activation_totals(output, counts)
        counted_squares(output, counts)

    with Watch() as watch:
        measure(torch.ones(2, 4))
    assert watch.operations
    assert watch.waits == []

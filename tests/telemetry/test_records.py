from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from telemetry.records import (
    Max,
    Mean,
    Means,
    Metric,
    Min,
    Norm,
    Perplexity,
    PresentMean,
    PresentSum,
    Spread,
    Std,
    Sum,
    Table,
    UsedFraction,
)

IDS = 5


def histogram(values: Sequence[float]) -> list[int]:
    return np.bincount([int(abs(value)) % IDS for value in values], minlength=IDS).tolist()


def metrics_of(values: Sequence[float]) -> dict[str, Metric]:
    """Every kind of metric, measured on one part of the data."""
    tensor = torch.tensor(values, dtype=torch.float64)
    ids = torch.tensor(histogram(values))
    return {
        "mean": Mean(tensor.sum(), len(values)),
        "sum": Sum(tensor.sum()),
        "max": Max(max(values, default=-math.inf)),
        "min": Min(min(values, default=math.inf)),
        "norm": Norm(tensor.square().sum()),
        "std": Std(tensor.sum(), tensor.square().sum(), len(values)),
        "present sum": PresentSum(tensor.sum(), len(values)),
        "used fraction": UsedFraction(ids),
        "perplexity": Perplexity(ids),
    }


def expected(values: Sequence[float]) -> dict[str, float | None]:
    """The same on the whole data, by the definitions."""
    size = len(values)
    mean = math.fsum(values) / size if size else None
    shares = [count / size for count in histogram(values) if count]
    return {
        "mean": mean,
        "sum": math.fsum(values),
        "max": max(values, default=None),
        "min": min(values, default=None),
        "norm": math.sqrt(math.fsum(value**2 for value in values)),
        "std": None if mean is None else math.sqrt(math.fsum((value - mean) ** 2 for value in values) / size),
        "present sum": math.fsum(values) if size else None,
        "used fraction": len(shares) / IDS if size else None,
        "perplexity": math.exp(-math.fsum(share * math.log(share) for share in shares)) if size else None,
    }


PARTS = st.lists(st.lists(st.floats(-100, 100), max_size=12), min_size=1, max_size=5)


@given(PARTS, st.randoms(use_true_random=False))
def test_merged_parts_equal_the_whole_in_any_order(parts: list[list[float]], random: object) -> None:
    whole = expected([value for part in parts for value in part])
    random.shuffle(parts)  # type: ignore[attr-defined]
    measured = [metrics_of(part) for part in parts]
    for name, value in whole.items():
        merged = functools.reduce(Metric.merge, [part[name] for part in measured])
        # A deviation of 0 comes out of squares as large as 1e4, to the root of their rounding.
        assert merged.result() == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-5)), name


@given(PARTS, st.integers(0, 4))
def test_merging_in_groups_is_merging_one_by_one(parts: list[list[float]], cut: int) -> None:
    measured = [metrics_of(part) for part in parts]
    for name in measured[0]:
        values = [part[name] for part in measured]
        groups = [group for group in (values[:cut], values[cut:]) if group]
        grouped = functools.reduce(Metric.merge, [functools.reduce(Metric.merge, group) for group in groups])
        one_by_one = functools.reduce(Metric.merge, values)
        for ours, theirs in zip(grouped.components, one_by_one.components, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_unequal_token_counts_weigh_what_they_are() -> None:
    assert Mean(10.0, 1).merge(Mean(0.0, 9)).result() == 1.0


@pytest.mark.parametrize(
    "metric",
    [
        Mean(0.0, 0),
        Max(-math.inf),
        Min(math.inf),
        Std(0.0, 0.0, 0),
        PresentSum(0.0, 0),
        UsedFraction(torch.zeros(4)),
        Perplexity(torch.zeros(4)),
    ],
)
def test_what_was_not_measured_is_absent(metric: Metric) -> None:
    assert metric.result() is None
    assert metric.merge(metric).result() is None


def test_what_was_measured_as_zero_is_zero() -> None:
    metrics = (Mean(0.0, 3), Sum(0.0), Max(0.0), Min(0.0), Norm(0.0), Std(0.0, 0.0, 2))
    assert [metric.result() for metric in metrics] == [0.0] * 6
    assert PresentSum(0.0, 2).result() == 0.0


@pytest.mark.parametrize(
    "metric",
    [
        Mean(math.nan, 2),
        Sum(math.nan),
        Max(math.nan),
        Min(math.nan),
        Norm(math.nan),
        Std(math.nan, 1.0, 2),
        Std(0.0, math.nan, 2),
        PresentSum(math.nan, 2),
    ],
)
def test_a_nan_stays_one_whatever_it_is_merged_with(metric: Metric) -> None:
    calm = metric.mapped(lambda part: torch.ones_like(torch.as_tensor(part)))
    for value in (metric, metric.merge(calm), calm.merge(metric)):
        result = value.result()
        assert result is not None
        assert math.isnan(result)


def test_rounding_below_zero_is_no_deviation() -> None:
    assert Std(3.0, 3.0 - 1e-12, 3).result() == 0.0


def test_a_norm_of_parts_is_the_norm_of_the_whole() -> None:
    assert Norm(9.0).merge(Norm(16.0)).result() == 5.0


def test_the_histogram_metrics_of_known_histograms() -> None:
    assert UsedFraction(torch.tensor([3, 0, 1, 0])).result() == 0.5
    assert Perplexity(torch.tensor([7, 0])).result() == pytest.approx(1.0)
    assert Perplexity(torch.full((8,), 2)).result() == pytest.approx(8.0)


def test_components_are_detached_float64_and_keep_their_kind() -> None:
    measured = torch.ones((), dtype=torch.bfloat16, requires_grad=True) * 2
    metric = Mean(measured, 4).merge(Mean(measured, measured.detach()))
    for component, value in zip(metric.components, (4, 6), strict=True):
        assert isinstance(component, torch.Tensor)
        assert component.dtype == torch.float64
        assert not component.requires_grad
        assert component == value
    assert [type(component) for component in Mean(1, 2).merge(Mean(3, 4)).components] == [float, float]
    others = iter([torch.tensor(6.0), torch.tensor(3)])
    again = metric.mapped(lambda _: next(others))
    assert type(again) is Mean
    assert again.result() == 2.0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 components, got 1"):
        Mean(1.0)
    with pytest.raises(TypeError, match="cannot merge Mean with Sum"):
        Mean(1.0, 1).merge(Sum(1.0))
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        Table("inputs/tensors", ("a", "b"), (("x", "y"), ("x",)))
    assert Table("inputs/tensors", ("a", "b"), ()).rows == ()


def test_a_mean_of_what_is_not_there_is_absent_until_a_part_has_it() -> None:
    without, with_it = PresentMean(0.0, 6, 0), PresentMean(torch.tensor(3.0), 2, 1)
    assert without.result() is None
    assert without.merge(with_it).result() == with_it.merge(without).result() == 3 / 8
    assert PresentMean(0.0, 0, 5).result() is None


def test_means_of_a_picture_merge_and_are_no_scalar() -> None:
    parts = [Means(torch.tensor([2.0, 4.0]), 2), Means(torch.tensor([1.0, 0.0]), 1)]
    merged = parts[0].merge(parts[1]).results()
    assert merged is not None
    assert merged.tolist() == [1.0, 4 / 3]
    assert Means(torch.zeros(2), 0).results() is None
    assert not Means.shown


@pytest.mark.parametrize("as_tensors", [True, False])
def test_values_far_from_zero_keep_their_spread_over_microbatches_and_ranks(as_tensors: bool) -> None:
    parts = [[1_700_000_000.0 + step for step in steps] for steps in ([0, 3, 5], [8, 2, 9], [4])]

    def spread(values: list[float]) -> Spread:
        mean = math.fsum(values) / len(values)
        components = float(len(values)), mean, math.fsum((value - mean) ** 2 for value in values)
        return Spread(*(torch.tensor(one, dtype=torch.float64) if as_tensors else one for one in components))

    merged = spread(parts[0]).merge(Spread(0.0, 0.0, 0.0)).merge(spread(parts[1])).merge(spread(parts[2]))
    every = [value for part in parts for value in part]
    assert merged.result() == pytest.approx(statistics.pstdev(every), rel=1e-6)
    assert Spread(0.0, 0.0, 0.0).result() is None
    assert math.isnan(Spread(2.0, math.nan, math.nan).result() or 0.0)

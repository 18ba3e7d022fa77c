from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from telemetry.measures import tensor_stats
from telemetry.measures._support import piece_elements
from telemetry.measures.tensor_stats import TensorStats, first_values, tensor_statistics

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
COMPLEX = (torch.complex64, torch.complex128)
ODD = (math.nan, math.inf, -math.inf)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape)
    dtype = draw(st.sampled_from(FLOATS + INTEGERS + COMPLEX))
    if dtype in INTEGERS:
        integers = draw(st.lists(st.integers(0, 100), min_size=size, max_size=size))
        return torch.tensor(integers, dtype=dtype).reshape(shape)
    numbers = st.one_of(st.floats(-100, 100), st.sampled_from([0.0, -0.0, *ODD]))
    values = draw(st.lists(numbers, min_size=size, max_size=size))
    if dtype in COMPLEX:
        imaginary = draw(st.lists(numbers, min_size=size, max_size=size))
        return torch.tensor([complex(*pair) for pair in zip(values, imaginary, strict=True)], dtype=dtype).reshape(
            shape
        )
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)


def reference(tensor: Tensor) -> dict[str, float]:
    """By the definitions, one value at a time in float64."""
    values = [float(abs(x)) if isinstance(x, complex) else float(x) for x in tensor.flatten().tolist()]
    finite = [x for x in values if math.isfinite(x)]
    return {
        "values": len(values),
        "finite": len(finite),
        "nonfinite": len(values) - len(finite),
        "zeros": finite.count(0.0),
        "total": math.fsum(finite),
        "mean": (mean := math.fsum(finite) / max(1, len(finite))),
        "deviations": math.fsum((x - mean) ** 2 for x in finite),
        "minimum": min(finite, default=math.inf),
        "maximum": max(finite, default=-math.inf),
    }


@settings(max_examples=300)
@given(tensors(), st.sampled_from([1, 3, 1000]))
def test_equals_the_definitions_however_it_is_cut(tensor: Tensor, limit: int) -> None:
    with patch.object(tensor_stats, "piece_elements", lambda device: limit):
        measured = tensor_statistics(tensor)
    assert measured.dtype == torch.float64
    stats = TensorStats(*measured.tolist())
    for name, expected in reference(tensor).items():
        assert getattr(stats, name) == pytest.approx(expected, rel=1e-12, abs=1e-9), name


@given(tensors(), st.integers(1, 10))
def test_first_values_are_the_first(tensor: Tensor, n: int) -> None:
    first = first_values(tensor, n)
    assert first.dtype == tensor.dtype
    assert first.shape == (min(n, tensor.numel()),)
    expected = tensor.flatten().tolist()[:n]
    assert [str(value) for value in first.tolist()] == [str(value) for value in expected]


def test_first_values_keep_nothing_else_alive() -> None:
    tensor = torch.arange(1000.0)
    for source in (tensor, tensor.reshape(10, 100).t(), tensor[:0], tensor[5]):
        first = first_values(source)
        assert first.untyped_storage().nbytes() == first.numel() * 4
        assert first.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_strides_do_not_matter() -> None:
    tensor = torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1)[::2]
    stats = TensorStats(*tensor_statistics(tensor).tolist())
    assert {name: float(getattr(stats, name)) for name in reference(tensor)} == reference(tensor)


def test_the_magnitude_of_a_complex_number_may_be_beyond_its_dtype() -> None:
    stats = TensorStats(*tensor_statistics(torch.tensor([complex(3e38, 3e38)])).tolist())
    assert stats.finite == 1
    assert float(stats.maximum) == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_waits_for_nothing_and_copies_a_piece_at_a_time(watched: Callable[..., Any], dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 400, 1000, dtype=dtype)
    _, watch = watched(tensor_statistics, tensor)
    assert watch.largest <= piece_elements(tensor.device) < tensor.numel()
    _, watch = watched(first_values, tensor.transpose(0, 2))
    assert watch.largest < 16


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), torch.bincount])
def test_the_watch_sees_waits(watched: Callable[..., Any], wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="waits"):
        watched(wait, torch.ones(3, dtype=torch.int64))


def test_reads_no_value() -> None:
    """A meta tensor has none to read."""
    tensor = torch.empty(3, 4, device="meta")
    assert tensor_statistics(tensor).shape == (7,)
    assert first_values(tensor).shape == (8,)


def test_autocast_and_gradients_are_kept_out() -> None:
    tensor = torch.linspace(-1, 1, 1000).requires_grad_()
    outside = tensor_statistics(tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tensor_statistics(tensor)
        first = first_values(tensor)
    assert torch.equal(inside, outside)
    assert not inside.requires_grad
    assert not first.requires_grad

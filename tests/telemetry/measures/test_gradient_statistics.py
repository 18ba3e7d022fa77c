"""One sweep's four statistics against Python loops, by the processor's way and by the accelerators'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from telemetry.measures import gradients
from telemetry.measures.gradients import cosine, device_rows, gradient_statistics

Measure = Callable[[Sequence[Tensor]], Tensor]


def swept_as_on_a_device(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one dtype at a time, as :func:`gradient_statistics` hands them over."""
    return torch.stack([device_rows([tensor])[0] for tensor in tensors]) if tensors else torch.zeros(0, 4)


WAYS: dict[str, Measure] = {"cpu": gradient_statistics, "device": swept_as_on_a_device}


def reference(tensor: Tensor) -> list[float]:
    values = [float(value) for value in tensor.double().flatten().tolist()]
    broken = [value for value in values if not math.isfinite(value)]
    squares, largest = math.nan, math.nan
    if not any(map(math.isnan, values)):
        squares = math.inf if broken else math.fsum(value * value for value in values)
        largest = max(map(abs, values), default=0.0)
    return [squares, largest, float(values.count(0.0)), float(len(broken))]


def assert_statistics(found: Tensor, tensors: Sequence[Tensor], rel: float = 1e-5) -> None:
    assert found.shape == (len(tensors), 4)
    for row, tensor in zip(found.tolist(), tensors, strict=True):
        assert row == pytest.approx(reference(tensor), rel=rel, abs=1e-12, nan_ok=True)


@st.composite
def some_gradients(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    value = st.floats(-50, 50) | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf])
    values = draw(st.lists(value, min_size=math.prod(shape), max_size=math.prod(shape)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
    return tensor.t() if tensor.dim() == 2 and draw(st.booleans()) else tensor


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(tensors=st.lists(some_gradients(), max_size=5))
def test_equals_the_definition(way: str, tensors: list[Tensor]) -> None:
    assert_statistics(WAYS[way](tensors), tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_several_pieces_with_an_odd_rest(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros and broken values on both sides of where pieces meet, and a last piece shorter than the buffer."""
    monkeypatch.setattr(gradients, "_SWEEP_ELEMENTS", 1000)
    monkeypatch.setattr(gradients, "piece_elements", lambda device: 1000)
    tensor = torch.randn(3333, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[[0, 999, 1000, 3332]] = 0
    finite = tensor.clone()
    tensor[[998, 1001, 2999, 3331]] = torch.tensor([math.inf, -math.inf, math.inf, math.inf], dtype=dtype)
    square = tensor[:3300].view(33, 100).t()
    tensors = [finite, torch.full((1234,), 0.5, dtype=dtype), tensor, square]
    assert_statistics(WAYS[way](tensors), tensors)
    assert WAYS[way](tensors)[:, 2:].tolist() == [[4, 0], [0, 0], [4, 4], [3, 3]]


def test_large_gradients_keep_their_digits() -> None:
    """A plain float32 sum over as many values is off by 1e-4."""
    tensor = torch.randn(1100, 1100, generator=torch.Generator().manual_seed(0)) * 1e-3
    squares = float(gradient_statistics([tensor])[0, 0])
    assert squares == pytest.approx(float(tensor.double().square().sum()), rel=1e-5)


def test_complex_numbers_count_as_two_values() -> None:
    assert gradient_statistics([torch.tensor([3 + 4j, 0 + 1j])]).tolist() == [[26, 4, 1, 0]]


def test_a_sparse_gradient_is_its_coalesced_values() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    assert embedding.weight.grad is not None
    assert gradient_statistics([embedding.weight.grad]).tolist() == [[3 * (2**2 + 1), 2, 0, 0]]


def test_waits_for_nothing_and_copies_little(watched: Callable[..., Any]) -> None:
    tensors = [torch.ones(700, 1000), torch.ones(2, dtype=torch.bfloat16), torch.ones(()), torch.zeros(0)]
    for measure in (lambda *given: gradient_statistics(given), lambda *given: swept_as_on_a_device(given)):
        statistics, watch = watched(measure, *tensors)
        assert statistics[:, 0].tolist() == pytest.approx([700_000, 2, 1, 0])
        assert watch.largest <= 2**18


def test_reads_no_value() -> None:
    """A meta tensor has none to read; it goes the accelerators' way."""
    assert gradient_statistics([torch.empty(3, device="meta"), torch.empty(2, 2, device="meta")]).shape == (2, 4)


def test_autocast_and_gradients_are_kept_out() -> None:
    tensor = torch.linspace(-1, 1, 1000).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradient_statistics([tensor])
    assert torch.equal(inside, gradient_statistics([tensor]))
    assert not inside.requires_grad


vectors = st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6)


@given(vectors, vectors)
def test_the_cosine_of_parts_is_that_of_the_whole(first: list[float], second: list[float]) -> None:
    def parts(values: list[float]) -> list[Tensor]:
        return [torch.tensor(values[:2]), torch.tensor(values[2:]).view(2, 2)]

    value, measured = cosine(parts(first), parts(second)).tolist()
    sizes = [math.sqrt(math.fsum(x * x for x in vector)) for vector in (first, second)]
    if min(sizes) > 1e-3:
        product = math.fsum(x * y for x, y in zip(first, second, strict=True))
        assert value == pytest.approx(product / sizes[0] / sizes[1], abs=1e-5)
        assert measured == 1


def test_parts_that_are_missing_are_zero() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([5.0])
    assert cosine([one, None], [one, other]).tolist() == pytest.approx([5 / math.sqrt(50), 1])
    assert cosine([one, None], [None, other]).tolist() == [0, 1]
    assert cosine([None], [one]).tolist() == [0, 0]
    assert cosine([None], [None]).tolist() == [0, 0]
    assert cosine([one * 0], [one]).tolist() == [0, 0]


def test_a_broken_value_makes_the_cosine_nan() -> None:
    value, measured = cosine([torch.tensor([math.nan, 1.0])], [torch.tensor([1.0, 1.0])]).tolist()
    assert math.isnan(value)
    assert measured == 1

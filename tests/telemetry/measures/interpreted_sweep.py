"""Holds the fused sweep to the definition in Triton's interpreter: a program, as that is chosen before Triton is there.

Run with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from telemetry.measures import fused_gradients, gradients
from telemetry.measures.gradients import device_rows
from tests.telemetry.measures.test_gradient_statistics import assert_statistics, reference, some_gradients

CHUNK = fused_gradients._CHUNK


def sweep(tensors: list[Tensor]) -> Tensor:
    """As on a GPU with Triton."""
    return gradients._grouped(
        tensors, lambda one: fused_gradients.fused_rows if fused_gradients.without_gaps(one) else device_rows, 4
    )


@settings(max_examples=40, database=None, deadline=None)
@given(st.lists(st.tuples(some_gradients(), st.integers(0, 9)), max_size=6))
def equals_the_definition(gradients_and_cuts: list[tuple[Tensor, int]]) -> None:
    tensors = [tensor if cut == 0 else tensor.reshape(-1)[cut:] for tensor, cut in gradients_and_cuts]
    with mock.patch.multiple(fused_gradients, _CHUNK=32, _BLOCK=16, _JOINED=2):
        assert_statistics(sweep(tensors), tensors)


def large_ones_keep_their_digits(dtype: torch.dtype) -> None:
    """In real chunks, aligned and not, with zeros and broken values on both sides of where chunks meet."""
    values = torch.randn(3 * CHUNK + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[[0, 4, 2 * CHUNK - 1, 2 * CHUNK, -1]] = 0
    broken = values.clone()
    broken[[1, CHUNK - 1, CHUNK, -2]] = torch.tensor([math.inf, -math.inf, math.inf, -math.inf], dtype=dtype)
    nan = broken.clone()
    nan[CHUNK + 1] = math.nan
    tensors = [values[:size] for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1)]
    tensors += [values, values[1:], values[: CHUNK + 64].view(-1, 64).t(), broken, broken[3:], nan, nan[CHUNK:]]
    rows = fused_gradients.fused_rows(tensors)
    assert torch.equal(rows.view(torch.int64), fused_gradients.fused_rows(tensors).view(torch.int64)), "not the same"
    for row, tensor in zip(rows.tolist(), tensors, strict=True):
        squares, *others = reference(tensor)
        assert row[0] == pytest.approx(squares, rel=2e-6, nan_ok=True)
        assert row[1:] == pytest.approx(others, rel=0, nan_ok=True)
    assert torch.equal(rows[:, 1:].nan_to_num(-1), device_rows(tensors)[:, 1:].nan_to_num(-1))


def a_squared_norm_beyond_float32_is_infinite() -> None:
    tensors = [torch.full((2 * CHUNK,), 6e16)]  # each of its chunks is not
    assert float(fused_gradients.fused_rows(tensors)[0, 0]) == math.inf == float(device_rows(tensors)[0, 0])
    assert math.isfinite(fused_gradients.fused_rows([tensors[0].double()])[0, 0])


def the_smallest_numbers_are_not_zeros() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        smallest = torch.tensor([torch.finfo(dtype).smallest_normal, 0.0, -0.0], dtype=torch.float64).to(dtype)
        smallest[0] *= torch.finfo(dtype).eps
        assert fused_gradients.fused_rows([smallest])[0, 1:].tolist() == [float(smallest[0]), 2, 0]


if __name__ == "__main__":
    equals_the_definition()
    for each in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        large_ones_keep_their_digits(each)
    a_squared_norm_beyond_float32_is_infinite()
    the_smallest_numbers_are_not_zeros()
    print("as defined")

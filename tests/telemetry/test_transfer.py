"""Host copies of many tensors at once: the values of the moment, one buffer a device, and no waiting to begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import Watch
from torch import Tensor

from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.clock import StepClock
from telemetry.delivery.recorder import Emitter, Recorder
from telemetry.delivery.transfer import Transfer
from telemetry.records import Max, Mean, Min, Norm, Perplexity, PresentSum, Std, Sum, Table, UsedFraction

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.movedim(0, -1) if tensor.dim() > 1 else tensor,
    "every other": lambda tensor: tensor[::2] if tensor.dim() else tensor,
    "backwards": lambda tensor: tensor.flip(0) if tensor.dim() else tensor,
    "expanded": lambda tensor: tensor.unsqueeze(0).expand(2, *tensor.shape),
}


def made(dtype: torch.dtype, shape: Sequence[int], layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-100, 100, tuple(shape), generator=generator)
    return LAYOUTS[layout](values.to(dtype) if dtype != torch.bool else values > 0)


TENSORS = st.builds(
    made,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(0, 99),
)


def listed(tensor: Tensor) -> tuple[torch.dtype, torch.Size, Any]:
    return tensor.dtype, tensor.shape, tensor.tolist()


@given(st.lists(TENSORS, max_size=12))
def test_any_mix_comes_back_as_it_was_when_the_copy_began(tensors: list[Tensor]) -> None:
    expected = [listed(tensor) for tensor in tensors]
    transfer = Transfer(tensors)
    for tensor in tensors:
        tensor.untyped_storage().fill_(7)
    copies = transfer.wait()
    assert [listed(copy) for copy in copies] == expected
    assert transfer.nbytes == sum(copy.numel() * copy.element_size() for copy in copies)
    assert [listed(copy) for copy in transfer.wait()] == expected  # waiting again is harmless


def test_what_is_not_finite_comes_back_bit_for_bit() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 5e-324], dtype=torch.float64)
    (copy,) = Transfer([values]).wait()
    assert torch.equal(copy.view(torch.int64), values.view(torch.int64))


def test_a_tensor_that_needs_a_gradient_is_copied_without_its_graph() -> None:
    values = torch.ones(3, requires_grad=True)
    (copy,) = Transfer([values * 2]).wait()
    assert copy.tolist() == [2.0, 2.0, 2.0]
    assert not copy.requires_grad


def test_all_tensors_of_a_device_share_one_buffer() -> None:
    tensors = [made(dtype, [3], "contiguous", seed) for seed, dtype in enumerate(DTYPES)]
    copies = Transfer(tensors).wait()
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert {copy.untyped_storage().nbytes() for copy in copies} == {sum(t.numel() * t.element_size() for t in tensors)}


def test_nothing_to_bring_is_nothing() -> None:
    transfer = Transfer([])
    assert transfer.nbytes == 0
    assert transfer.wait() == []


KINDS = [
    Mean(torch.tensor(3.0), torch.tensor(2)),
    Sum(torch.tensor(3)),
    Max(torch.tensor(3.0)),
    Min(torch.tensor(3.0)),
    Norm(torch.tensor(9.0)),
    Std(torch.tensor(2.0), torch.tensor(4.0), torch.tensor(2)),
    PresentSum(torch.tensor(3.0), torch.tensor(2)),
    UsedFraction(torch.tensor([1, 0])),
    Perplexity(torch.tensor([1, 1])),
]


@pytest.mark.parametrize("second", [torch.tensor, float], ids=["tensors", "numbers"])
def test_the_recorder_asks_the_device_for_nothing_while_it_collects_and_sends(second: Any) -> None:
    """Every kind of metric, merged over microbatches, and tensors for tables: launched, never waited for."""
    backend = MemoryBackend()
    recorder = Recorder([backend])
    recorder.open(Run(Path("nowhere")))

    def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
        emit.record(Table("table", ("values",), ((str(host["values"].tolist()),),)))

    with Watch() as watch:
        for index, metric in enumerate(KINDS):
            recorder.metric(f"kind_{index}", metric)
            recorder.metric(f"kind_{index}", metric)
        recorder.metric("mixed", Sum(torch.tensor(1)))
        recorder.metric("mixed", Sum(second(2)))
        recorder.defer(
            {"values": torch.arange(4)[::2]}, lambda host, emit: emit.metric("sum", Sum(host["values"].sum()))
        )
        recorder.show({"values": torch.tensor([True, False])}, build)
        recorder.flush(1, StepClock())
    assert watch.operations
    assert watch.waits == []
    assert recorder.drain()
    assert backend.scalars("mixed") == {1: 3.0}
    assert backend.scalars("sum") == {1: 2.0}
    assert backend.last("table", Table).rows == (("[True, False]",),)
    for index, metric in enumerate(KINDS):
        assert backend.scalars(f"kind_{index}") == {1: pytest.approx(metric.merge(metric).result())}

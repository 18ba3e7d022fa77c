"""Reading evaluation batches is seen by nobody: no rank, no generator, no count of gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from torch.utils.data import DataLoader, RandomSampler

from telemetry.probes.batches import EvaluationBatches

DATA = [{"input_ids": torch.tensor([number]), "metadata": {"sample_id": str(number)}} for number in range(7)]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": torch.stack([sample["input_ids"] for sample in samples]),
        "metadata": [sample["metadata"] for sample in samples],
    }


def make_loader(generator: torch.Generator | None = None) -> DataLoader:
    return DataLoader(DATA, batch_size=2, collate_fn=collate, generator=generator)  # type: ignore[arg-type]


@pytest.fixture
def prepared() -> Iterator[Any]:
    Accelerator(cpu=True)
    yield prepare_data_loader(make_loader(), device=torch.device("cpu"), put_on_device=True)
    GradientState._reset_state()


def test_all_batches_as_often_as_asked() -> None:
    batches = EvaluationBatches(make_loader(), "cpu")
    for _ in range(2):
        read = list(batches)
        assert [batch["input_ids"].flatten().tolist() for batch in read] == [[0, 1], [2, 3], [4, 5], [6]]
        assert read[3]["metadata"] == [{"sample_id": "6"}]


def test_tensors_go_to_the_device() -> None:
    [first, *_] = EvaluationBatches(make_loader(), "meta")
    assert first["input_ids"].device.type == "meta"


def test_what_is_no_mapping_is_left_out() -> None:
    assert list(EvaluationBatches([torch.ones(2), {"a": 1}], "cpu")) == [{"a": 1}]


def test_accelerate_does_not_take_it_for_its_active_loader(prepared: Any) -> None:
    state = GradientState()
    before = state.active_dataloader  # of an earlier test's training that was interrupted
    assert next(iter(EvaluationBatches(prepared, "cpu")))["input_ids"].tolist() == [[0], [1]]
    assert state.active_dataloader is before
    next(iter(prepared))  # it would have
    assert state.active_dataloader is prepared


def test_generators_are_put_back() -> None:
    own, of_sampler = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    loader = DataLoader(
        DATA,  # type: ignore[arg-type]
        batch_size=2,
        collate_fn=collate,
        sampler=RandomSampler(DATA, generator=of_sampler),
        generator=own,
    )
    before = own.get_state(), of_sampler.get_state()
    reading = iter(EvaluationBatches(loader, "cpu"))
    next(reading)
    assert not torch.equal(own.get_state(), before[0])
    assert not torch.equal(of_sampler.get_state(), before[1])
    del reading  # in the middle
    assert torch.equal(own.get_state(), before[0])
    assert torch.equal(of_sampler.get_state(), before[1])

"""Reading evaluation batches is seen by nobody: no rank, no generator, no count of gradient accumulation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from datasets import Dataset as Rows
from datasets import IterableDataset as Lines
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, RandomSampler, Subset

from telemetry.probes.batches import EvaluationBatches, is_stream

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
    loader: DataLoader[Any] = DataLoader(
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


class Drawing:
    """A data set that draws from generators of its own."""

    def __init__(self) -> None:
        self.python = random.Random(1)
        self.numpy = np.random.default_rng(2)
        self.old = np.random.RandomState(3)
        self.torch = torch.Generator().manual_seed(4)
        self.whole = self  # in a circle

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, float]:
        drawn = self.python.random(), self.numpy.random(), self.old.random(), torch.rand(1, generator=self.torch).item()
        return {"drawn": sum(drawn)}


class Jitter:
    """A collator that does."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(5)

    def collate(self, samples: list[dict[str, float]]) -> dict[str, Any]:
        return {"drawn": [sample["drawn"] + self.generator.random() for sample in samples]}


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: Subset(one, range(5)), lambda one: ConcatDataset([one])])
def test_what_data_sets_and_collators_draw_from_is_put_back(wrap: Any) -> None:
    def drawn(looks: int) -> list[Any]:
        loader = DataLoader(wrap(Drawing()), batch_size=2, collate_fn=Jitter().collate)
        for _ in range(looks):
            next(iter(EvaluationBatches(loader, "cpu")))
        return [batch["drawn"] for batch in loader]

    assert drawn(2) == drawn(0)


class Counting(DataLoader[Any]):
    """Begins at another sample every time."""

    times = 0

    def __iter__(self) -> Any:
        self.times += 1
        batches = list(super().__iter__())
        return iter(batches[self.times :] + batches[: self.times])


def test_what_a_loader_counts_goes_on_as_without() -> None:
    loader = Counting(DATA, collate_fn=collate)  # type: ignore[arg-type]
    assert [len(list(EvaluationBatches(loader, "cpu"))) for _ in range(3)] == [7, 7, 7]
    assert next(iter(loader))["input_ids"].tolist() == [[1]]


def test_workers_that_persist_are_left_to_the_evaluation() -> None:
    def drawn(looks: int) -> tuple[list[Any], Any]:
        torch.manual_seed(1)
        loader: DataLoader[Any] = DataLoader(DATA, collate_fn=collate, num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
        state = torch.get_rng_state()
        for _ in range(looks):
            assert next(iter(EvaluationBatches(loader, "cpu")))["input_ids"].tolist() == [[0]]
        torch.set_rng_state(state)
        return [batch["input_ids"].item() for batch in loader], torch.get_rng_state()

    (watched, then), (plain, otherwise) = drawn(1), drawn(0)
    assert watched == plain
    assert torch.equal(then, otherwise)  # workers take a seed from it when they begin


class Counts(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


class Once:
    """Keeps what it reads from."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __iter__(self) -> Iterator[Any]:
        yield from self.held


class Same:
    __slots__ = ("_batches",)

    def __init__(self) -> None:
        self._batches = iter(DATA)

    def __iter__(self) -> Iterator[Any]:
        return self._batches


def test_what_may_be_there_to_be_read_once(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("a line")
    of_lines = Lines.from_generator(lambda: iter(DATA))
    with (tmp_path / "lines").open() as file:
        for stream in (
            *(iter(DATA), (one for one in DATA), Counts(), DataLoader(Counts()), DataLoader(of_lines), of_lines),
            *(Once(iter(DATA)), Once(file), Once(Counts()), Once(DataLoader(Counts())), Same()),
            DataLoader(DATA, sampler=iter(range(3))),  # type: ignore[arg-type]
            DataLoader(DATA, batch_sampler=iter([[0, 1], [2]])),  # type: ignore[arg-type]
        ):
            assert is_stream(stream), stream
    rows = Rows.from_dict({"a": [1, 2, 3]})
    for again in (
        *(DATA, tuple(DATA), Once(DATA), Once(make_loader()), make_loader(), make_loader(torch.Generator())),
        *(rows, DataLoader(rows), DataLoader(Drawing()), DataLoader(DATA, batch_sampler=[[0, 1], [2]])),  # type: ignore[arg-type]
    ):
        assert not is_stream(again), again

"""What goes wrong on rank 1 alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from telemetry.instruments import chatml as chatml_log
from telemetry.instruments import conditioning as conditioning_log
from telemetry.instruments.inputs import InputInstrument

FAULTY_RANK = 1
POISONED_STEP = 7


class PoisonedStep(TrainerCallback):
    """One step whose text embeddings, and so all logits, are NaN on the faulty rank.

    No rank keeps the gradients of that step, so that those behind it are sound again.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._hook: RemovableHandle | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == POISONED_STEP and self._rank == FAULTY_RANK:
            self._hook = model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output * torch.nan)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == POISONED_STEP:
            _forget_gradients(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()


def _forget_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def _broken(*_args: Any, **_kwargs: Any) -> None:
    raise ValueError("this measure is broken")


@contextmanager
def poisoned_step(rank: int) -> Iterator[list[TrainerCallback]]:
    yield [PoisonedStep(rank)]


@contextmanager
def broken_input_measure(rank: int) -> Iterator[list[TrainerCallback]]:
    """A measure that raises on the training thread."""
    with patch.object(InputInstrument, "inputs", _broken if rank == FAULTY_RANK else _measure_inputs):
        yield []


@contextmanager
def broken_check(rank: int) -> Iterator[list[TrainerCallback]]:
    """A measure of host values that raises in the background."""
    with patch.object(chatml_log, "violations", _broken if rank == FAULTY_RANK else _find_violations):
        yield []


@contextmanager
def broken_gain(rank: int) -> Iterator[list[TrainerCallback]]:
    """A measure that raises between forward passes which every rank is needed for."""
    calls = itertools.count(1)

    def break_at_second(*args: Any) -> Any:
        return _broken() if rank == FAULTY_RANK and next(calls) % 2 == 0 else _statistics_of(*args)

    with patch.object(conditioning_log, "statistics_of", break_at_second):
        yield []


@contextmanager
def bypassed_wrapper(rank: int) -> Iterator[list[TrainerCallback]]:
    """DDP's wrapper only hands on to the model inside of it: nothing brings gradients together."""
    with patch.object(
        DistributedDataParallel, "forward", lambda wrapper, *args, **given: wrapper.module(*args, **given)
    ):
        yield []


class OtherWeights(TrainerCallback):
    """The faulty rank begins with weights of its own."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._rank == FAULTY_RANK:
            with torch.no_grad():
                next(model.parameters()).mul_(1.01)


@contextmanager
def unlike_seeds(rank: int) -> Iterator[list[TrainerCallback]]:
    yield [OtherWeights(rank)]


@contextmanager
def no_fault(rank: int) -> Iterator[list[TrainerCallback]]:
    yield []


_measure_inputs = InputInstrument.inputs
_statistics_of = conditioning_log.statistics_of
_find_violations = chatml_log.violations

# Name → what makes it happen on a rank, while the training runs with the callbacks that it hands over.
FAULTS: dict[str, Callable[[int], AbstractContextManager[list[TrainerCallback]]]] = {
    "": no_fault,
    "poisoned_step": poisoned_step,
    "broken_input_measure": broken_input_measure,
    "broken_check": broken_check,
    "broken_gain": broken_gain,
    "bypassed_wrapper": bypassed_wrapper,
    "unlike_seeds": unlike_seeds,
}

"""A training of a tiny text model with the unmodified Trainer that takes a second, and what is kept of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from . import models
from .steps import quiet_arguments

VOCABULARY = 13
# With dropout, so that a disturbed random state shows.
SHAPE = {**models.SMALLER, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "attention_dropout": 0.1}
RESULT = "result.pt"
PROGRESS = "progress.txt"
OVER = "over"


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        parameters: the model's, by name.
        losses: what the Trainer logged, by step.
        error: type and message of what ended it, or empty.
    """

    parameters: dict[str, Tensor]
    losses: dict[int, float]
    error: str

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Outcome)
            and self.error == other.error
            and list(map(str, self.losses.items())) == list(map(str, other.losses.items()))  # NaN equals NaN
            and self.parameters.keys() == other.parameters.keys()
            and all(_same_bits(mine, other.parameters[name]) for name, mine in self.parameters.items())
        )

    __hash__ = None  # type: ignore[assignment]


def _same_bits(mine: Tensor, other: Tensor) -> bool:
    return torch.equal(mine.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class Progress(TrainerCallback):
    """Notes when each step ended, where it is kept though the process is killed, and that all have.

    Args:
        directory: where.
        wait: called with the number of each step at its end, before it is noted.
    """

    def __init__(self, directory: Path, wait: Callable[[int], Any] = lambda step: None) -> None:
        self._descriptor = os.open(directory / PROGRESS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._over = directory / OVER
        self._wait = wait

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait(state.global_step)
        os.write(self._descriptor, f"{state.global_step} {time.monotonic()}\n".encode())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._over.touch()


def progress(directory: Path) -> dict[int, float]:
    """Step → when it ended, in the seconds of ``time.monotonic()``."""
    path = directory / PROGRESS
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(step): float(ended) for step, ended in map(str.split, lines)}


def rows(count: int = 64, length: int = 6) -> list[dict[str, Tensor]]:
    """Samples that differ."""
    ids = [[1 + (5 * row + 3 * at + row // 7) % (VOCABULARY - 1) for at in range(length)] for row in range(count)]
    return [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids]


def make_trainer(
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
    steps: int = 20,
    dataset: Sequence[dict[str, Tensor]] | None = None,
    collator: Callable[..., dict[str, Tensor]] | None = None,
    **arguments: Any,
) -> Trainer:
    """Make a Trainer of the tiny model."""
    given = {"per_device_train_batch_size": 2, **arguments}
    return Trainer(
        model=models.make("llama", **SHAPE),
        args=quiet_arguments(directory / "output", max_steps=steps, learning_rate=0.01, **given),
        train_dataset=rows() if dataset is None else dataset,  # type: ignore[arg-type]
        data_collator=collator,
        callbacks=list(callbacks),
    )


def train(
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
    steps: int = 20,
    dataset: Sequence[dict[str, Tensor]] | None = None,
    collator: Callable[..., dict[str, Tensor]] | None = None,
    **arguments: Any,
) -> Outcome:
    """Train the tiny model; how it went is kept in the directory too. An error is raised again."""
    made = make_trainer(directory, callbacks, steps, dataset, collator, **arguments)
    error = ""
    try:
        made.train()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        outcome = _outcome(made, error)
        if made.is_world_process_zero():
            torch.save(outcome, directory / RESULT)
    return outcome


def _outcome(made: Trainer, error: str) -> Outcome:
    assert made.model is not None
    losses = {entry["step"]: entry["loss"] for entry in made.state.log_history if "loss" in entry}
    return Outcome({name: tensor.clone() for name, tensor in made.model.state_dict().items()}, losses, error)


def outcome(directory: Path) -> Outcome:
    """What a training in another process has kept."""
    found = torch.load(directory / RESULT, weights_only=False)
    assert isinstance(found, Outcome)
    return found

"""Trainings to run on one process or on several, and what is left of them: shared by the tests and the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.programs import finish
from torch import Tensor

from telemetry.backends.memory import MemoryBackend

Batch = Mapping[str, Any]

PROGRAM = Path(__file__).parent / "rank_program.py"


@dataclass(frozen=True)
class Scenario:
    """One training.

    Attributes:
        name: what its outcome is found by.
        batches: microbatches in the order of training: of ``n`` ranks, rank ``r`` gets ``r``, ``r + n``, ...
        steps: optimizer steps; the batches are gone through again where they do not last.
        accumulation: microbatches of a rank in an optimizer step.
        dropout: of the attention.
        model: the name of one of :data:`rank_program.MODELS`.
        telemetry: whether everything is measured at every step, or telemetry is not there at all.
        sharded: a plain loop over a model under ``fully_shard`` (FSDP2) instead of the Trainer.
        split: ranks that are given the same batch and have a part each of the layers (tensor parallelism); where there
            are more ranks, FSDP2 shards what these have.
        fault: name of one of :data:`rank_faults.FAULTS`.
        options: of ``StrategicTelemetry``.
        arguments: of ``TrainingArguments``.
    """

    name: str
    batches: Sequence[Batch]
    steps: int
    accumulation: int = 1
    dropout: float = 0.0
    model: str = "higgs"
    telemetry: bool = True
    sharded: bool = False
    split: int = 1
    fault: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a training leaves on one rank.

    Attributes:
        backend: what telemetry wrote; nothing on ranks other than 0.
        log: what telemetry said, tracebacks included.
        state: every parameter and every tensor of the optimizer's state (of a sharded one this rank's part), and the
            state of the random numbers.
        graphs: how many graphs ``torch.compile`` has made in the process so far.
    """

    backend: MemoryBackend
    log: list[str]
    state: dict[str, Tensor]
    graphs: int


def launch(scenarios: Sequence[Scenario], directory: Path, ranks: int) -> dict[str, list[Outcome]]:
    """Run scenarios one after the other in new processes, under torchrun for several; outcomes by name and rank."""
    torch.save(list(scenarios), directory / "scenarios")
    finish([str(PROGRAM), str(directory)], directory, ranks)
    by_rank = [torch.load(directory / f"outcomes-{rank}", weights_only=False) for rank in range(ranks)]
    return {scenario.name: [outcomes[scenario.name] for outcomes in by_rank] for scenario in scenarios}

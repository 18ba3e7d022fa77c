"""Trainings to run on one process or on several, and what is left of them: shared by the tests and the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.programs import on_ranks, run
from torch import Tensor
from transformers import HiggsAudioV2Config

from telemetry.backends.memory import MemoryBackend
from trainer.demo.codec import DemonstrationCodecConfig
from trainer.demo.prepare import model_config

Batch = Mapping[str, Any]

PROGRAM = Path(__file__).parent / "rank_program.py"
LAUNCH_SECONDS = 200
RATE = 100


@dataclass(frozen=True)
class Waveform:
    """What metadata says of a clip."""

    samples: np.ndarray
    sampling_rate: int = RATE

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / self.sampling_rate


@dataclass(frozen=True)
class Scenario:
    """One training.

    Attributes:
        name: what its outcome is found by.
        batches: microbatches in the order of training: of ``n`` ranks, rank ``r`` gets ``r``, ``r + n``, ...
        steps: optimizer steps; the batches are gone through again where they do not last.
        accumulation: microbatches of a rank in an optimizer step.
        dropout: of the attention.
        telemetry: whether everything is measured at every step, or telemetry is not there at all.
        sharded: a plain loop over a model under ``fully_shard`` (FSDP2) instead of the Trainer.
        fault: name of one of :data:`rank_faults.FAULTS`.
        options: of ``StrategicTelemetry``.
        arguments: of ``TrainingArguments``.
    """

    name: str
    batches: Sequence[Batch]
    steps: int
    accumulation: int = 1
    dropout: float = 0.0
    telemetry: bool = True
    sharded: bool = False
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


def tiny_config(tokenizer: Any, dropout: float = 0.0) -> HiggsAudioV2Config:
    """A Higgs model of 2 layers, 32 wide, with 8 codebooks of 10 codes."""
    config = model_config(tokenizer, DemonstrationCodecConfig(num_quantizers=8, codebook_size=10))
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8})
    config.attention_dropout = dropout
    return config


def launch(scenarios: Sequence[Scenario], directory: Path, ranks: int) -> dict[str, list[Outcome]]:
    """Run scenarios one after the other in new processes, under torchrun for several; outcomes by name and rank."""
    torch.save(list(scenarios), directory / "scenarios")
    finish([str(PROGRAM), str(directory)], directory, ranks)
    by_rank = [torch.load(directory / f"outcomes-{rank}", weights_only=False) for rank in range(ranks)]
    return {scenario.name: [outcomes[scenario.name] for outcomes in by_rank] for scenario in scenarios}


def finish(program: Sequence[str], directory: Path, ranks: int) -> None:
    """Run a program of so many ranks to its end, which must be a good one and come in time."""
    ended = run(on_ranks(program, ranks, brief=True) if ranks > 1 else program, directory, LAUNCH_SECONDS, brief=True)
    assert ended.status == 0, ended.said

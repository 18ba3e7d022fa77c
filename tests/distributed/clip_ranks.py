"""Trainings whose model speaks at every evaluation, on every rank of a torchrun, one after the other.

torchrun --nproc_per_node=2 clip_ranks.py DIRECTORY
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rank_program import own_rank, train
from rank_scenarios import Batch, Scenario
from support import models
from support.batches import Voices
from support.programs import Keeper
from support.speaking import Processor, ToneCodec, rows, speaking_callback
from torch import Tensor
from transformers.models.higgs_audio_v2.generation_higgs_audio_v2 import HiggsAudioV2DelayPatternLogitsProcessor

from telemetry.backends.memory import MemoryBackend
from telemetry.records import Audio
from trainer.demo.prepare import train_tokenizer

RANKS = 2
STEPS = 1
SAMPLES = (3, 1)  # evaluation samples of each rank
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}


@dataclass
class Outcome:
    """What a training leaves on one rank.

    Attributes:
        numbers: tag → step → value.
        clips: what was generated before the first step, by tag.
        log: what telemetry said.
        state: parameters, optimizer and random state.
    """

    numbers: dict[str, dict[int, float]]
    clips: dict[str, Tensor]
    log: list[str]
    state: dict[str, Tensor]


def batches(voices: Voices) -> list[Batch]:
    """A batch for every sample: the samples of all ranks differ in length."""
    made = rows(voices, 8)
    return [{**voices.batch([row.sample]), "metadata": [dict(row.metadata)]} for row in made]


def evaluation(voices: Voices, rank: int) -> list[Batch]:
    """This rank's evaluation batches, fewer on the second."""
    return batches(voices)[4 * rank : 4 * rank + SAMPLES[rank]]


@contextlib.contextmanager
def failing_between_passes(rank: int) -> Iterator[None]:
    """The second rank raises while it generates, where no other rank waits for it."""
    plain = HiggsAudioV2DelayPatternLogitsProcessor.__call__
    calls = iter(range(10_000))

    def fail(self: Any, input_ids: Tensor, scores: Tensor) -> Tensor:
        if rank == 1 and next(calls) % 5 == 3:
            raise RuntimeError("out of luck")
        return plain(self, input_ids, scores)

    with patch.object(HiggsAudioV2DelayPatternLogitsProcessor, "__call__", fail):
        yield


def run(kind: str, directory: Path) -> Outcome:
    """One training on this rank: ``ddp``, ``plain`` (sharded, without telemetry), ``sharded`` or ``failing``."""
    rank, tokenizer, backend = own_rank(), train_tokenizer(), MemoryBackend()
    voices, sharded = Voices(tokenizer, models.higgs_config(tokenizer)), kind != "ddp"
    scenario = Scenario(kind, batches(voices), STEPS, sharded=sharded, arguments={} if sharded else EVALUATES)
    callbacks = [] if kind == "plain" else [speaking_callback(backend, clips=3)]
    fault = failing_between_passes(rank) if kind == "failing" else contextlib.nullcontext()
    own = [evaluation(voices, other) for other in range(RANKS)]
    evaluated = own[rank] if sharded else [batch for pair in zip(*own, strict=False) for batch in pair]
    with Keeper("telemetry", []) as log, fault:
        state = train(scenario, directory / kind, callbacks, Processor(tokenizer, ToneCodec()), evaluated)
    numbers = {tag: backend.scalars(tag) for tag in backend.records if tag.startswith("zero_shot/")}
    return Outcome(numbers, _generated(backend), log, state)


def _generated(backend: MemoryBackend) -> dict[str, Tensor]:
    return {
        tag: torch.from_numpy(record.clips[0].samples)
        for tag, held in backend.records.items()
        for step, record in held
        if step == 0 and isinstance(record, Audio) and tag.endswith("/generated")
    }


def main(directory: str) -> None:
    """Run every training on this rank and store its outcomes."""
    place = Path(directory)
    outcomes = {kind: run(kind, place) for kind in ("ddp", "plain", "sharded", "failing")}
    torch.save(outcomes, place / f"outcomes-{own_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Under its import name, so that what was stored is found again by the tests.
    import clip_ranks

    clip_ranks.main(*sys.argv[1:])

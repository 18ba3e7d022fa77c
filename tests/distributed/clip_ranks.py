"""Trainings whose model speaks at every evaluation, on every rank of a torchrun, one after the other.

torchrun --nproc_per_node=2 clip_ranks.py DIRECTORY
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rank_program import OrderedTrainer, _alone, _state, _telemetry_log, make_arguments, make_model
from rank_scenarios import Batch, Scenario, tiny_config
from sharded_training import _ShardedRun
from support.batches import Voices
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
    rank, tokenizer, backend = int(os.environ["RANK"]), train_tokenizer(), MemoryBackend()
    voices = Voices(tokenizer, tiny_config(tokenizer))
    scenario = Scenario(
        kind, batches(voices), STEPS, sharded=kind != "ddp", arguments=EVALUATES if kind == "ddp" else {}
    )
    callbacks = [] if kind == "plain" else [speaking_callback(backend, clips=3)]
    fault = failing_between_passes(rank) if kind == "failing" else contextlib.nullcontext()
    train = _train_ddp if kind == "ddp" else _train_sharded
    with _telemetry_log() as log, fault:
        model, optimizer = train(scenario, directory / kind, callbacks, voices, rank)
    numbers = {tag: backend.scalars(tag) for tag in backend.records if tag.startswith("zero_shot/")}
    return Outcome(numbers, _generated(backend), log, _state(model, optimizer))


def _train_ddp(
    scenario: Scenario, directory: Path, callbacks: Sequence[Any], voices: Voices, rank: int
) -> tuple[Any, Any]:
    model = make_model(scenario)
    every_rank = [
        batch for pair in zip(*(evaluation(voices, other) for other in range(RANKS)), strict=False) for batch in pair
    ]
    made = OrderedTrainer(
        model=model,
        args=make_arguments(scenario, directory),
        data_collator=_alone,
        train_dataset=scenario.batches,  # type: ignore[arg-type]
        eval_dataset=every_rank,  # type: ignore[arg-type]
        processing_class=Processor(voices.tokenizer, ToneCodec()),  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )
    made.train()
    return model, made.optimizer


def _train_sharded(
    scenario: Scenario, directory: Path, callbacks: Sequence[Any], voices: Voices, rank: int
) -> tuple[Any, Any]:
    arguments = make_arguments(scenario, directory)
    assert arguments.world_size == RANKS  # which also forms the process group
    made = _ShardedRun(make_model(scenario), arguments, callbacks)
    made.eval_dataloader = evaluation(voices, rank)
    made.tell("on_train_begin", processing_class=Processor(voices.tokenizer, ToneCodec()))
    own = iter(scenario.batches[rank::RANKS])
    for _ in range(scenario.steps):
        made.step([next(own)])
        made.tell("on_evaluate")
    made.tell("on_train_end")
    return made.model, made.optimizer


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
    torch.save(outcomes, place / f"outcomes-{os.environ['RANK']}")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Under its import name, so that what was stored is found again by the tests.
    import clip_ranks

    clip_ranks.main(*sys.argv[1:])

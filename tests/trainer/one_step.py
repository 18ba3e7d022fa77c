"""Trains for one step and keeps its loss and gradients; as a program, on every rank of a torchrun.

torchrun --nproc_per_node=2 one_step.py JOB RESULT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.steps import GradientKeeper, make_trainer
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from trainer.collator import VoiceCloningCollator
from trainer.dataset import Example
from trainer.higgs_trainer import HiggsAudioTrainer

TrainerFactory = Callable[..., HiggsAudioTrainer]


def train_one_step(
    model: HiggsAudioV2ForConditionalGeneration, examples: Sequence[Example], output_dir: Path, **arguments: Any
) -> tuple[float, dict[str, Tensor]]:
    """The logged loss and the gradients of one optimizer step over all examples, without clipping."""
    keeper = GradientKeeper()
    collator = VoiceCloningCollator(model.config.pad_token_id, model.config.audio_stream_eos_id)
    options = {"max_steps": 1, "max_grad_norm": 0.0, "ddp_find_unused_parameters": True, **arguments}
    made = make_trainer(model, list(examples), collator, output_dir, [keeper], **options)
    made.train()
    [loss] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return loss, keeper.gradients


@dataclass(frozen=True)
class Job:
    """What the program does; stored by ``torch.save``."""

    model_path: Path
    examples: list[Example]
    arguments: dict[str, Any]


def main(job_file: str, result_file: str) -> None:
    """Run a job on this rank; rank 0 stores loss and gradients."""
    job: Job = torch.load(job_file, weights_only=False)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(job.model_path, use_text_head=True)
    result = train_one_step(model, job.examples, Path(result_file).parent / "output", **job.arguments)
    if torch.distributed.get_rank() == 0:
        torch.save((torch.distributed.get_world_size(), *result), result_file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # Under its import name, so that what was stored by the tests is found again.
    import one_step

    one_step.main(*sys.argv[1:])

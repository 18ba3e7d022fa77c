"""Trains for one step and keeps its loss and gradients; as a program, on every rank of a torchrun.

torchrun --nproc_per_node=2 one_step.py JOB RESULT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import HiggsAudioV2ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from trainer.collator import VoiceCloningCollator
from trainer.dataset import Example
from trainer.higgs_trainer import HiggsAudioTrainer

TrainerFactory = Callable[..., HiggsAudioTrainer]


def make_trainer(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[Sequence[Example]], dict[str, Any]],
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
    kind: type[Trainer] = HiggsAudioTrainer,
    eval_dataset: Any = None,
    **arguments: Any,
) -> Any:
    """A quiet trainer on the CPU that logs every step and saves nothing unless told to."""
    quiet: dict[str, Any] = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 7,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": True,
        "label_names": ["labels", "audio_labels"],
    }
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **{**quiet, **arguments}),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )


@dataclass
class GradientKeeper(TrainerCallback):
    """Copies of the gradients of the last step."""

    gradients: dict[str, Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = {
            name.removeprefix("module."): parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def train_one_step(
    model: HiggsAudioV2ForConditionalGeneration, examples: Sequence[Example], output_dir: Path, **arguments: Any
) -> tuple[float, dict[str, Tensor]]:
    """The logged loss and the gradients of one optimizer step over all examples, without clipping."""
    keeper = GradientKeeper()
    collator = VoiceCloningCollator(model.config.pad_token_id, model.config.audio_stream_eos_id)
    options = {"max_steps": 1, "max_grad_norm": 0.0, **arguments}
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

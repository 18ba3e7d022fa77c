"""Runs scenarios one after the other; as a program, in one process or on every rank of a torchrun.

torchrun --nproc_per_node=2 rank_program.py DIRECTORY
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_faults import FAULTS
from rank_scenarios import Batch, Outcome, Scenario, tiny_config
from sharded_training import train_sharded
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import Sampler, SequentialSampler
from transformers import HiggsAudioV2ForConditionalGeneration, TrainerCallback, TrainingArguments, set_seed

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from trainer.demo.prepare import train_tokenizer
from trainer.higgs_trainer import HiggsAudioTrainer

SEED = 7
QUIET: Mapping[str, Any] = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": SEED,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "label_names": ["labels", "audio_labels"],
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
}


class OrderedTrainer(HiggsAudioTrainer):
    """Takes the batches as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def run(scenario: Scenario, directory: Path) -> Outcome:
    """One training on this rank."""
    backend = MemoryBackend()
    everything = StrategicTelemetry(logging_steps=1, backends=[backend], options=scenario.options)
    telemetry = [everything] if scenario.telemetry else []
    rank = int(os.environ.get("RANK", "0"))
    with _telemetry_log() as log, FAULTS[scenario.fault](rank) as faulty:
        train = train_sharded if scenario.sharded else _train
        model, optimizer = train(
            make_model(scenario), make_arguments(scenario, directory), scenario, [*faulty, *telemetry]
        )
    return Outcome(backend, log, _state(model, optimizer), counters["stats"]["unique_graphs"])


def make_model(scenario: Scenario) -> HiggsAudioV2ForConditionalGeneration:
    """The same weights every time, with logits that are far from uniform."""
    set_seed(SEED)
    model = HiggsAudioV2ForConditionalGeneration(tiny_config(train_tokenizer(), scenario.dropout), use_text_head=True)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_arguments(scenario: Scenario, directory: Path) -> TrainingArguments:
    steps = {"max_steps": scenario.steps, "gradient_accumulation_steps": scenario.accumulation}
    return TrainingArguments(output_dir=str(directory / "output"), **{**QUIET, **steps, **scenario.arguments})


def _train(
    model: nn.Module, arguments: TrainingArguments, scenario: Scenario, callbacks: Sequence[TrainerCallback]
) -> tuple[nn.Module, Any]:
    made = OrderedTrainer(
        model=model,
        args=arguments,
        data_collator=_alone,
        train_dataset=scenario.batches,
        eval_dataset=scenario.batches if "eval_strategy" in scenario.arguments else None,
        processing_class=train_tokenizer(),
        callbacks=list(callbacks),
    )
    made.train()
    return model, made.optimizer


def _alone(batches: Sequence[Batch]) -> Batch:
    """The samples of the data set are whole microbatches."""
    [batch] = batches
    return batch


def _state(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    state = {f"parameter {name}": _own(parameter) for name, parameter in model.named_parameters()}
    for index, values in optimizer.state_dict()["state"].items():
        state.update({f"optimizer {index} {name}": _own(value) for name, value in values.items() if value is not None})
    state["random numbers"] = torch.get_rng_state()
    return state


def _own(value: Any) -> Tensor:
    """A tensor as it is, of a ``DTensor`` this rank's part."""
    value = value.to_local() if hasattr(value, "to_local") else value
    return torch.as_tensor(value).detach().clone()


class _Kept(logging.Handler):
    """Keeps lines, tracebacks included."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))


@contextmanager
def _telemetry_log() -> Iterator[list[str]]:
    lines: list[str] = []
    logger, handler = logging.getLogger("telemetry"), _Kept(lines)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def main(directory: str) -> None:
    """Run every scenario on this rank and store its outcomes."""
    place = Path(directory)
    scenarios: list[Scenario] = torch.load(place / "scenarios", weights_only=False)
    torch.save(
        {scenario.name: run(scenario, place) for scenario in scenarios},
        place / f"outcomes-{os.environ.get('RANK', '0')}",
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

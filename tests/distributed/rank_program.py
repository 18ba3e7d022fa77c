"""Runs scenarios one after the other; as a program, in one process or on every rank of a torchrun.

torchrun --nproc_per_node=2 rank_program.py DIRECTORY
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from rank_faults import FAULTS
from rank_scenarios import Batch, Outcome, Scenario
from support import codec_tokens, models, speech_models
from support.programs import Keeper
from support.speaking import Processor, ToneCodec
from support.steps import OF_HIGGS, Steps, make_trainer, quiet_arguments
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback, set_seed
from transformers.distributed import DistributedConfig

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from trainer.demo.prepare import train_tokenizer
from trainer.higgs_trainer import HiggsAudioTrainer


class OrderedTrainer(HiggsAudioTrainer):
    """Takes the batches as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def run(scenario: Scenario, directory: Path) -> Outcome:
    """One training on this rank."""
    backend = MemoryBackend()
    family = codec_tokens.declared() if scenario.model.startswith("codec_tokens") else None
    everything = StrategicTelemetry(logging_steps=1, backends=[backend], options=scenario.options, family=family)
    telemetry = [everything] if scenario.telemetry else []
    evaluation = scenario.batches if "eval_strategy" in scenario.arguments else None
    with Keeper("telemetry", []) as log, FAULTS[scenario.fault](own_rank()) as faulty:
        processor: Any = train_tokenizer()
        if scenario.split > 1 and evaluation is not None:  # with all that clips need
            processor = Processor(processor, ToneCodec())
        state = train(scenario, directory, [*faulty, *telemetry], processor, evaluation)
    return Outcome(backend, log, state, counters["stats"]["unique_graphs"])


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def make_model(scenario: Scenario) -> Any:
    """The same weights every time, with logits that are far from uniform."""
    return MODELS[scenario.model](scenario)


def _higgs(scenario: Scenario) -> Any:
    return models.higgs(models.higgs_config(train_tokenizer(), dropout=scenario.dropout), OF_HIGGS["seed"], 0.2)


MODELS: dict[str, Callable[[Scenario], Any]] = {
    "higgs": _higgs,
    "csm": lambda _scenario: speech_models.csm(),
    "dia": lambda _scenario: speech_models.dia(),
    "codec_tokens": lambda _scenario: codec_tokens.llama(),
    "codec_tokens_of_2_heads": lambda _scenario: codec_tokens.llama(num_key_value_heads=2),
}


def train(
    scenario: Scenario, directory: Path, callbacks: Sequence[TrainerCallback], processor: Any, evaluation: Any = None
) -> dict[str, Tensor]:
    """Train on this rank's share of the batches; what is left of model, optimizer and random numbers.

    Args:
        evaluation: what the Trainer evaluates, of all ranks; of a sharded training this rank's, at every step.
    """
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_steps": scenario.steps}
    arguments = {**sizes, "gradient_accumulation_steps": scenario.accumulation, **scenario.arguments}
    set_seed(OF_HIGGS["seed"])
    model, output = make_model(scenario), directory / "output"
    if scenario.split > 1:
        model = _split(model, scenario, directory)
    if scenario.sharded:
        optimizer = _train_sharded(model, scenario, output, callbacks, processor, evaluation, arguments)
    else:
        kind = OrderedTrainer if scenario.model == "higgs" else speech_models.OrderedTrainer
        data = (scenario.batches, _alone, output, callbacks, kind, evaluation, processor)
        made = make_trainer(model, *data, **arguments)
        made.train()
        optimizer = made.optimizer
    return _state(model, optimizer)


def _split(model: Any, scenario: Scenario, directory: Path) -> Any:
    """The same weights, of every layer this rank's part, as transformers loads them for tensor parallelism."""
    arguments = quiet_arguments(directory)  # which also forms the process group
    # accelerate refuses to train so on CPUs, on which it asks for nothing else than elsewhere.
    ParallelismConfig._validate_accelerator = lambda *_: None  # type: ignore[method-assign]
    checkpoint = directory / f"{scenario.name} checkpoint"
    if own_rank() == 0:
        model.save_pretrained(checkpoint)
    dist.barrier()
    config = DistributedConfig(tp_size=scenario.split, fsdp_size=arguments.world_size // scenario.split)
    options = {"use_text_head": True} if scenario.model == "higgs" else {}
    return type(model).from_pretrained(checkpoint, distributed_config=config, **options)


def _train_sharded(
    model: Any,
    scenario: Scenario,
    directory: Path,
    callbacks: Sequence[TrainerCallback],
    processor: Any,
    evaluation: Any,
    given: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """A plain loop under FSDP2: every layer is sharded, and what is left of the model.

    The Trainer itself cannot shard here: accelerate turns to FSDP on accelerators only, and on CPUs it wraps every
    model in DDP.
    """
    arguments = quiet_arguments(directory, **{**OF_HIGGS, **given})
    assert arguments.world_size > 1  # which also forms the process group
    mesh = init_device_mesh("cpu", (arguments.world_size,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    kind = torch.optim.SGD if arguments.optim == "sgd" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=arguments.learning_rate)
    own = itertools.cycle(scenario.batches[dist.get_rank() :: arguments.world_size])
    model.train()
    with Steps(
        model, callbacks, directory, processor, optimizer, arguments=arguments, eval_dataloader=evaluation, clips=True
    ) as run:
        for _ in range(scenario.steps):
            run.step([next(own) for _ in range(scenario.accumulation)])
            if evaluation is not None:
                run.tell("on_evaluate")
    return optimizer


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


def main(directory: str) -> None:
    """Run every scenario on this rank and store its outcomes."""
    place = Path(directory)
    scenarios: list[Scenario] = torch.load(place / "scenarios", weights_only=False)
    torch.save(
        {scenario.name: run(scenario, place) for scenario in scenarios},
        place / f"outcomes-{own_rank()}",
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

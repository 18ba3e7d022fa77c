"""A plain training loop under FSDP2 (``fully_shard``), with the Trainer's events and the two that a trainer may offer.

The Trainer itself cannot shard here: accelerate turns to FSDP on accelerators only, and on CPUs it wraps every model
in DDP.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rank_scenarios import Batch, Scenario
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.demo.prepare import train_tokenizer
from trainer.loss import AccumulatedLoss, supervised_counts


def train_sharded(
    model: Any, arguments: TrainingArguments, scenario: Scenario, callbacks: Sequence[TrainerCallback]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train on this rank's share of the batches; every layer is sharded, and what is left of the model."""
    assert arguments.world_size > 1  # which also forms the process group
    run = _ShardedRun(model, arguments, callbacks)
    batches = _own_batches(scenario.batches)
    run.tell("on_train_begin", processing_class=train_tokenizer())
    for _ in range(scenario.steps):
        run.step([next(batches) for _ in range(scenario.accumulation)])
    run.tell("on_train_end")
    return run.model, run.optimizer


class _ShardedRun:
    def __init__(self, model: Any, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> None:
        self.model = model
        self._arguments = arguments
        self._callbacks = callbacks
        self._loss = model.loss_function = AccumulatedLoss(model.config)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        kind = torch.optim.SGD if arguments.optim == "sgd" else torch.optim.AdamW
        self.optimizer = kind(model.parameters(), lr=arguments.learning_rate)
        self._state = TrainerState(is_world_process_zero=dist.get_rank() == 0)
        self._control = TrainerControl()
        self.eval_dataloader: Sequence[Batch] | None = None
        model.train()

    def tell(self, event: str, **kwargs: Any) -> None:
        for callback in self._callbacks:
            if hasattr(callback, event):
                held = {"model": self.model, "eval_dataloader": self.eval_dataloader}
                getattr(callback, event)(self._arguments, self._state, self._control, **held, **kwargs)

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step, its gradients clipped."""
        self.tell("on_step_begin")
        counts = supervised_counts(batches, self.model.config.num_codebooks)
        dist.all_reduce(counts)
        for batch in batches:
            self._microbatch(batch, counts)
        self.tell("on_gradients")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._arguments.max_grad_norm)
        self.tell("on_pre_optimizer_step", optimizer=self.optimizer)
        self.optimizer.step()
        self.tell("on_optimizer_step", optimizer=self.optimizer)
        self.optimizer.zero_grad()
        self._state.global_step += 1
        self.tell("on_step_end")
        self.tell("on_log", logs={"grad_norm": norm.full_tensor().item()})

    def _microbatch(self, batch: Batch, counts: Tensor) -> None:
        inputs: Mapping[str, Any] = {name: value for name, value in batch.items() if name != "metadata"}
        self.tell("on_microbatch", metadata=batch["metadata"])
        self._loss.begin()
        # Ranks' gradients are averaged, and the loss is a sum over ranks.
        loss = self.model(**inputs, num_items_in_batch=counts).loss * dist.get_world_size()
        loss.backward()


def _own_batches(batches: Sequence[Batch]) -> Iterator[Batch]:
    return itertools.cycle(batches[dist.get_rank() :: dist.get_world_size()])

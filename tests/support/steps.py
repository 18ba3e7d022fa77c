"""Takes callbacks through steps as a trainer does, without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.trainer import StrategicCallback
from trainer.loss import AccumulatedLoss, supervised_counts

Metadata = Sequence[Mapping[str, Any]]


class StepRun:
    """A run of Higgs steps, with the Trainer's events and the two that a trainer may offer beyond them.

    Args:
        model: its loss becomes :class:`AccumulatedLoss`.
        callbacks: told of every event, in order.
        directory: output directory of the arguments.
        processing_class: what decodes token ids.
        optimizer: steps where there is one; else the weights stay as they are.
    """

    def __init__(
        self,
        model: Any,
        callbacks: Sequence[StrategicCallback],
        directory: Path,
        processing_class: Any = None,
        optimizer: Any = None,
    ) -> None:
        self._optimizer = optimizer
        self.model: nn.Module = model
        self.callbacks = callbacks
        self._codebooks = model.config.num_codebooks
        model.loss_function = AccumulatedLoss(model.config)
        arguments = TrainingArguments(output_dir=str(directory), report_to=[], use_cpu=True, max_grad_norm=1.0)
        self.state = TrainerState()
        self._event = (arguments, self.state, TrainerControl())
        self._tell("on_train_begin", model=model, processing_class=processing_class)

    def step(self, microbatches: Sequence[Mapping[str, Tensor]], metadata: Sequence[Metadata] = ()) -> float:
        """One optimizer step; the loss."""
        self._tell("on_step_begin")
        self.model.zero_grad()
        counts = supervised_counts(microbatches, self._codebooks)
        total = 0.0
        for index, inputs in enumerate(microbatches):
            if index < len(metadata):
                self._tell("on_microbatch", metadata=metadata[index])
            loss = self.model(**inputs, num_items_in_batch=counts).loss
            loss.backward()
            total += loss.item()
        self._tell("on_gradients", model=self.model)
        self._tell("on_pre_optimizer_step", model=self.model, optimizer=self._optimizer)
        if self._optimizer is not None:
            self._optimizer.step()
            self._tell("on_optimizer_step", model=self.model, optimizer=self._optimizer)
        self.state.global_step += 1
        self._tell("on_step_end", model=self.model)
        return total

    def end(self) -> None:
        """Training has ended."""
        self._tell("on_train_end", model=self.model)

    def _tell(self, event: str, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*self._event, **kwargs)


def measure(
    kind: type[StrategicCallback],
    model: Any,
    directory: Path,
    microbatches: Sequence[Mapping[str, Tensor]],
    processing_class: Any = None,
    metadata: Sequence[Metadata] = (),
) -> MemoryBackend:
    """What one kind of callback shows of one step."""
    backend = MemoryBackend()
    run = StepRun(model, [kind(1, [backend])], directory, processing_class)
    run.step(microbatches, metadata)
    run.end()
    return backend


def hand_over(
    kind: type[StrategicCallback],
    model: Any,
    directory: Path,
    inputs: Mapping[str, Any],
    outputs: Any = None,
    processing_class: Any = None,
) -> MemoryBackend:
    """What one kind of callback shows of a step whose inputs and outputs are handed to it without a forward pass."""
    backend = MemoryBackend()
    callback = kind(1, [backend])
    arguments = TrainingArguments(output_dir=str(directory), report_to=[], use_cpu=True)
    event = (arguments, TrainerState(), TrainerControl())
    callback.on_train_begin(*event, model=model, processing_class=processing_class)
    callback.on_step_begin(*event)
    event[1].global_step = 1
    callback.on_step_end(*event, inputs=inputs, outputs=outputs)
    callback.on_train_end(*event)
    return backend

"""Takes callbacks through steps as a trainer does, without one; and makes Trainers that work quietly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import SharedAttentionLoggerCallback
from telemetry.callbacks.trainer import StrategicCallback
from telemetry.probes.watch import Watch
from trainer.higgs_trainer import HiggsAudioTrainer
from trainer.loss import AccumulatedLoss, supervised_counts

OF_HIGGS: Mapping[str, Any] = {
    "seed": 7,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "remove_unused_columns": False,
    "label_names": ["labels", "audio_labels"],
}


def quiet_arguments(
    directory: Path, kind: type[TrainingArguments] = TrainingArguments, **arguments: Any
) -> TrainingArguments:
    """Of a training on the CPU that logs every step, reports to nobody and saves nothing, unless told to."""
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return kind(output_dir=str(directory), **{**quiet, "dataloader_pin_memory": False, **arguments})


def make_trainer(
    model: nn.Module,
    dataset: Any,
    collator: Callable[..., Any],
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
    kind: Callable[..., Trainer] = HiggsAudioTrainer,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **arguments: Any,
) -> Any:
    """A quiet trainer of a Higgs model, with arguments of its own."""
    return kind(
        model=model,
        args=quiet_arguments(directory, **{**OF_HIGGS, **arguments}),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        callbacks=list(callbacks),
    )


class Steps:
    """Steps of a model, with the Trainer's events and the two that a trainer may offer beyond them.

    As a context it ends the training, unless something was raised.

    Args:
        model: of one of Higgs, the loss becomes :class:`AccumulatedLoss`.
        callbacks: told of every event, in order.
        directory: output directory of the arguments.
        processing_class: what decodes token ids.
        optimizer: steps where there is one; else the weights stay as they are.
        loss: of the model and a microbatch, where it is not the model's own.
        arguments: in place of quiet ones.
        eval_dataloader: what evaluations read.
        clips: whether gradients are clipped and their norm is logged.
    """

    def __init__(
        self,
        model: Any,
        callbacks: Sequence[Any],
        directory: Path,
        processing_class: Any = None,
        optimizer: Any = None,
        loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
        arguments: TrainingArguments | None = None,
        eval_dataloader: Any = None,
        clips: bool = False,
    ) -> None:
        self.model: Any = model
        self.optimizer = optimizer
        self.callbacks = callbacks
        self.losses: list[float] = []
        self._loss = loss
        self._clips = clips
        if loss is None and hasattr(model.config, "num_codebooks"):
            model.loss_function = AccumulatedLoss(model.config)
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.state = TrainerState(is_world_process_zero=self._ranks == 1 or dist.get_rank() == 0)
        self._event = (arguments or quiet_arguments(directory, max_grad_norm=1.0), self.state, TrainerControl())
        self._held = {"model": model, "processing_class": processing_class, "eval_dataloader": eval_dataloader}
        self.tell("on_train_begin")

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.tell("on_train_end")

    def tell(self, event: str, **more: Any) -> None:
        """Tell every callback that knows the event."""
        for callback in self.callbacks:
            if hasattr(callback, event):
                getattr(callback, event)(*self._event, **self._held, optimizer=self.optimizer, **more)

    @contextmanager
    def taken(self) -> Iterator[dict[str, Any]]:
        """What happens inside is a step; what is put into the dictionary is handed over at its end."""
        handed: dict[str, Any] = {}
        self.tell("on_step_begin")
        yield handed
        self.state.global_step += 1
        self.tell("on_step_end", **handed)

    def step(self, microbatches: Sequence[Mapping[str, Any]]) -> float:
        """One optimizer step over microbatches, whose ``metadata`` is told; the loss."""
        norm: Any = None
        with self.taken():
            self.model.zero_grad()
            self.losses = []
            counts = self._counts(microbatches)
            for batch in microbatches:
                self._microbatch(dict(batch), counts)
            self.tell("on_gradients")
            if self._clips:
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._event[0].max_grad_norm)
            self.tell("on_pre_optimizer_step")
            if self.optimizer is not None:
                self.optimizer.step()
                self.tell("on_optimizer_step")
        if self._clips:
            self.tell("on_log", logs={"grad_norm": norm.full_tensor().item()})
        return sum(self.losses)

    def _counts(self, microbatches: Sequence[Mapping[str, Any]]) -> Tensor | None:
        """Supervised tokens of all ranks."""
        if self._loss is not None:
            return None
        counts = supervised_counts(microbatches, self.model.config.num_codebooks)
        if self._ranks > 1:
            dist.all_reduce(counts)
        return counts

    def _microbatch(self, inputs: dict[str, Any], counts: Tensor | None) -> None:
        if "metadata" in inputs:
            self.tell("on_microbatch", metadata=inputs.pop("metadata"))
        if self._loss is not None:
            loss = self._loss(self.model, inputs)
        else:
            self.model.loss_function.begin()
            # Ranks' gradients are averaged, and the loss is a sum over ranks.
            loss = self.model(**inputs, num_items_in_batch=counts).loss * self._ranks
        loss.backward()
        self.losses.append(loss.item())


def measure(
    kind: type[StrategicCallback],
    model: Any,
    directory: Path,
    microbatches: Sequence[Mapping[str, Any]],
    processing_class: Any = None,
    metadata: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> MemoryBackend:
    """What one kind of callback shows of one step."""
    backend = MemoryBackend()
    told = [{"metadata": rows} for rows in metadata] or [{}] * len(microbatches)
    with Steps(model, [kind(1, [backend])], directory, processing_class) as run:
        run.step([{**batch, **rows} for batch, rows in zip(microbatches, told, strict=True)])
    return backend


def hand_over(
    callback: Callable[..., Any],
    model: Any,
    directory: Path,
    inputs: Mapping[str, Any],
    outputs: Any = None,
    processing_class: Any = None,
) -> MemoryBackend:
    """What one kind of callback shows of a step whose inputs and outputs are handed to it without a forward pass."""
    backend = MemoryBackend()
    with Steps(model, [callback(1, [backend])], directory, processing_class) as run, run.taken() as handed:
        handed.update(inputs=inputs, outputs=outputs)
    return backend


@dataclass
class Watched:
    """What a step gave and what telemetry showed of it."""

    backend: MemoryBackend
    losses: list[float]
    gradients: dict[str, Tensor]

    def scalars(self, section: str) -> dict[str, float]:
        """Tag → value of the one step."""
        tags = [tag for tag in self.backend.tags() if tag.startswith(f"{section}/")]
        return {tag: value for tag in tags for value in self.backend.scalars(tag).values()}


def watched_step(
    model: Any, batches: Sequence[Mapping[str, Any]], directory: Path, watch: bool = True, step: int = 1, **options: Any
) -> Watched:
    """Forward and backward of some microbatches of any model as one due step, with layers and attention watched."""
    backend = MemoryBackend()
    callbacks = [SharedAttentionLoggerCallback(1, [backend], **options)] if watch else []
    with Steps(model, callbacks, directory, loss=lambda m, batch: m(**batch).logits.float().square().mean()) as run:
        run.state.global_step = step - 1
        run.step(batches)
    return Watched(backend, run.losses, gradients_of(model))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies by name, where there are any."""
    found = {name.removeprefix("module."): one.grad for name, one in model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def hooks_of(model: nn.Module) -> int:
    """Hooks on any of a model's modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def open_watch(model: nn.Module) -> Watch:
    """A watch of a model outside of any training that is open, and hides nothing that goes wrong."""
    watch = Watch(model, lambda _owner, action, *args: action(*args))
    watch.open()
    return watch


@dataclass
class GradientKeeper(TrainerCallback):
    """Copies of the gradients of the last step."""

    gradients: dict[str, Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = gradients_of(model)


class Snapshots(TrainerCallback):
    """Keeps a copy of the model as it is when each step begins."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.models[state.global_step + 1] = copy.deepcopy(model)

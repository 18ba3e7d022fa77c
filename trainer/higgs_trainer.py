"""The Hugging Face Trainer for Higgs Audio v2: right loss, metadata kept from the model, a view for telemetry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import HiggsAudioV2ForConditionalGeneration, Trainer
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.training_args import TrainingArguments

from trainer.loss import AccumulatedLoss, supervised_counts

METADATA = "metadata"


class StepDataHandler(CallbackHandler):
    """The Trainer's own handler, which also passes a due step's ``inputs`` and ``outputs`` to ``on_step_end``."""

    def __init__(self, handler: CallbackHandler) -> None:
        super().__init__(
            handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
        )
        self.step_data: dict[str, Any] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step_data, self.step_data = self.step_data, {}
        return cast(TrainerControl, super().on_step_end(args, state, control, **kwargs, **step_data))


class HiggsAudioTrainer(Trainer):
    """Fine-tunes ``HiggsAudioV2ForConditionalGeneration``, plain or wrapped by peft.

    Takes the arguments of ``transformers.Trainer``. Callbacks with a method ``on_microbatch`` (the strategic callbacks)
    are asked ``is_due(step)`` of every optimizer step, counted from 1. Of a due one they see every microbatch's
    ``metadata`` before it runs (``on_microbatch``), its ``inputs`` and detached ``outputs`` after (``on_outputs``), and
    the ``model`` when all gradients are there and not yet clipped (``on_gradients``).

    Raises:
        ValueError: for another model, for label smoothing, or when one process would drive several GPUs (start one per
            GPU with torchrun).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process would split its batches over {self.args.n_gpu} GPUs: start one process per GPU with "
                f"torchrun --nproc_per_node={self.args.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES"
            )
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"--label_smoothing_factor {self.args.label_smoothing_factor}: the Trainer smooths one sequence of "
                "labels, and this loss is a sum over text and every codebook. Leave it at 0"
            )
        base = find_higgs(cast(nn.Module, self.model))
        self._num_codebooks = base.config.num_codebooks
        self._loss = AccumulatedLoss(base.config)
        base.loss_function = self._loss
        self.callback_handler = self._step_data_handler = StepDataHandler(self.callback_handler)
        self._metadata: Any = None
        self._told: list[Any] = []  # of every microbatch
        self._observers: list[Any] = []

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """The Trainer's own; callbacks may look at evaluation batches from the beginning of training."""
        if self.eval_dataset is not None and self.args.eval_strategy != "no":
            sets = self.eval_dataset  # named, where there are several
            several = {name: self.get_eval_dataloader(name) for name in sets} if isinstance(sets, Mapping) else None
            self.callback_handler.eval_dataloader = cast(Any, several or self.get_eval_dataloader())
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's own step, backward included."""
        self._told = [callback for callback in self.callback_handler.callbacks if hasattr(callback, "on_microbatch")]
        self._observers = self._due_observers()
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._told = self._observers = []
            self._metadata = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The Trainer's own; on a due step the outputs are kept, detached, until its ``on_step_end``."""
        self._loss.begin()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._observers:
            counted = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            shown = {**inputs, **counted, METADATA: self._metadata}
            # What the Trainer has multiplied the model's loss by, in place: gradients are averaged over ranks.
            averaged = counted and self.args.average_tokens_across_devices
            scale = self.accelerator.num_processes // self.get_tp_size() if averaged else 1
            seen = {"inputs": shown, "outputs": _detached(outputs, scale)}
            for observer in self._observers:
                observer.on_outputs(self.args, self.state, self.control, **seen)
            self._step_data_handler.step_data = seen
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Supervised tokens of each part of the loss over the accumulated batch and all ranks."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        counts = supervised_counts(batch_samples, self._num_codebooks).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Ranks that share layers out are given the same batch.
            counts = self.accelerator.gather(counts[None]).sum(dim=0) // self.get_tp_size()
        return counts

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs on the device, without the metadata, which callbacks are told."""
        inputs = dict(inputs)
        self._metadata = inputs.pop(METADATA, None) or []
        for observer in self._told:
            observer.on_microbatch(self.args, self.state, self.control, metadata=self._metadata)
        return super()._prepare_inputs(inputs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        for observer in self._due_observers():
            observer.on_gradients(self.args, self.state, self.control, model=self.model)
        return super()._clip_grad_norm(model)

    def _due_observers(self) -> list[Any]:
        step = self.state.global_step + 1
        return [
            callback
            for callback in self.callback_handler.callbacks
            if hasattr(callback, "on_microbatch") and callback.is_due(step)
        ]


def find_higgs(model: nn.Module) -> HiggsAudioV2ForConditionalGeneration:
    """The Higgs Audio v2 model inside a model (itself, or wrapped by peft).

    Raises:
        ValueError: when there is none.
    """
    for module in model.modules():
        if isinstance(module, HiggsAudioV2ForConditionalGeneration):
            return module
    raise ValueError(f"HiggsAudioTrainer trains HiggsAudioV2ForConditionalGeneration, not {type(model).__name__}")


def _detached(outputs: Mapping[str, Any], scale: int) -> Any:
    """The output with every tensor cut from the graph, its loss unscaled; caches and other objects are left out."""
    kept = {name: value.detach() for name, value in outputs.items() if isinstance(value, Tensor)}
    return type(outputs)(**(kept | {"loss": kept["loss"] / scale} if "loss" in kept else kept))

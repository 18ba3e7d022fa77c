"""What every strategic callback shares: when a step is due, and how it hears of inputs, logits and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from telemetry.backends.base import Backend
from telemetry.families.base import Head
from telemetry.probes.forward import Microbatch
from telemetry.session import Session
from telemetry.sound import SoundPolicy

DEFAULT_LOGGING_STEPS = 100


def is_due(step: int, every: int) -> bool:
    """Whether an optimizer step, counted as the Trainer counts it after the update, is measured."""
    return step == 1 or step % every == 0


class StrategicCallback(TrainerCallback):
    """A callback for one question, at step 1 and every ``logging_steps`` optimizer steps.

    Works alone on any Trainer: ``trainer.add_callback(InputLoggerCallback())``. It watches the model with hooks that
    live for the due step only. A trainer may also hand ``inputs=`` and ``outputs=`` to :meth:`on_step_end`, and call
    :meth:`on_microbatch` before a forward pass and :meth:`on_gradients` before clipping. Off a due step it costs one
    comparison.

    Args:
        logging_steps: N, at least 1.
        backends: where to show; by default TensorBoard and the console. The callbacks of one Trainer share them.
        logging_dir: where files go; by default ``TENSORBOARD_LOGGING_DIR`` or ``<output_dir>/runs/telemetry``.
        sound: what may be heard (voice clips are personal data); by default a few clips a tag. The first callback of
            a Trainer that says it speaks for all.

    Raises:
        ValueError: when ``logging_steps`` is below 1.
    """

    def __init__(
        self,
        logging_steps: int = DEFAULT_LOGGING_STEPS,
        backends: Sequence[Backend] | None = None,
        logging_dir: str | Path | None = None,
        sound: SoundPolicy | None = None,
    ) -> None:
        if logging_steps < 1:
            raise ValueError(f"logging_steps must be at least 1, got {logging_steps}")
        self.logging_steps = logging_steps
        self.backends = backends
        self.logging_dir = logging_dir
        self.sound = sound
        self._session: Session | None = None
        self.stepping = False
        self._gradients_seen = False

    @property
    def session(self) -> Session:
        """The run being watched.

        Raises:
            RuntimeError: outside training.
        """
        if self._session is None:
            raise RuntimeError(f"{type(self).__name__} is not watching a training run")
        return self._session

    def is_due(self, step: int) -> bool:
        """Whether this callback measures a step."""
        return is_due(step, self.logging_steps)

    # -- what a question overrides ------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A due step begins: forget what one that was interrupted left behind."""

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """The model is about to run on a microbatch of a due step."""

    def observe_logits(self, microbatch: Microbatch, head: Head, logits: Tensor) -> None:
        """A head has computed its logits for a microbatch of a due step."""

    def observe_gradients(self, model: nn.Module, clipped: bool) -> None:
        """All gradients of a due step are there; ``clipped`` says whether clipping has already touched them."""

    def before_update(self, model: nn.Module, optimizer: Any) -> None:
        """The optimizer is about to step on a due step; gradients are clipped."""

    def after_update(self, model: nn.Module, optimizer: Any) -> None:
        """The optimizer has stepped on a due step; gradients are still there."""

    def release(self) -> None:
        """Watching ends, however the due step ends: take own hooks off. No more is observed of the step."""

    def finish_step(self) -> None:
        """The due step has ended: add what is shown once a step, and let go of everything."""

    def observe_evaluation(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """An evaluation has ended, or the first step of a fresh training is about to begin.

        Between steps, on every rank. What is recorded here is written at the current step.

        Args:
            batches: this rank's evaluation batches, on the model's device, metadata (:class:`Microbatch`) under
                ``metadata``. Reading them costs what loading them costs.
        """

    # -- the Trainer's events -----------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self.stepping = False  # a training that ended in an exception may have left it on
        if model is not None:
            self._session = Session.join(self, model, args, state, processing_class)
            self._session.know_data(train=kwargs.get("train_dataloader"), eval=kwargs.get("eval_dataloader"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not is_due(state.global_step + 1, self.logging_steps) or self._session is None:
            return
        if state.global_step == 0:
            self._session.baseline(kwargs.get("eval_dataloader"))
        self.stepping = True
        self._gradients_seen = False
        self._session.guard(self, self.begin_step)
        self._session.begin_step()

    def on_microbatch(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metadata: Sequence[Mapping[str, Any]] = (),
        **kwargs: Any,
    ) -> None:
        """Not an event of the Trainer's: for trainers that take metadata out of a batch before the forward pass.

        See :class:`telemetry.probes.forward.Microbatch` for the keys of ``metadata``.
        """
        if self.stepping and self._session is not None:
            self._session.announce(metadata)

    def on_outputs(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        inputs: Mapping[str, Any] | None = None,
        outputs: Any = None,
        **kwargs: Any,
    ) -> None:
        """Not an event of the Trainer's: for trainers that show every microbatch's forward pass (tensors detached).

        Used where the model is compiled, and hooks cannot watch it.
        """
        if self.stepping and self._session is not None and inputs is not None:
            self._session.hand_over(self, inputs, outputs)

    def on_gradients(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Not an event of the Trainer's: for trainers that offer the gradients before clipping."""
        if self.stepping:
            self._see_gradients(model, clipped=False)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.stepping:
            self._see_gradients(model, clipped=(args.max_grad_norm or 0) > 0)
            self._see_update(self.before_update, model, optimizer)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.stepping:
            self._see_update(self.after_update, model, optimizer)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        inputs: Mapping[str, Any] | None = None,
        outputs: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.stepping and self._session is not None:
            self._session.finish(self, state.global_step, inputs, outputs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._session is not None and logs:
            self._session.trainer_logs(self, state.global_step, logs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self.see_evaluation(state.global_step, eval_dataloader)

    def see_evaluation(self, step: int, batches: Any) -> None:
        """Look at evaluation batches, if this callback does."""
        looks = type(self).observe_evaluation is not StrategicCallback.observe_evaluation
        if looks and batches is not None and self._session is not None:
            self._session.evaluation(self, step, batches)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None:
            self._session.leave(self)
            self._session = None

    def _see_gradients(self, model: nn.Module | None, clipped: bool) -> None:
        if not self._gradients_seen and model is not None and self._session is not None:
            self._gradients_seen = True
            self._session.gradients(self, model, clipped)

    def _see_update(self, look: Callable[[nn.Module, Any], None], model: nn.Module | None, optimizer: Any) -> None:
        if model is not None and self._session is not None:
            self._session.update(self, look, model, optimizer)

"""The door for the Hugging Face Trainer: its events, handed to the run being watched."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from telemetry import catalogue
from telemetry.backends.base import Backend
from telemetry.backends.registry import default_backends
from telemetry.callbacks.prepared import PreparedBatches, calling_trainer, every_step, trainers_in, within_step
from telemetry.families.base import FamilyMaker
from telemetry.instruments.base import Instrument, Step
from telemetry.instruments.clips import ClipInstrument
from telemetry.instruments.questions import QUESTIONS
from telemetry.once import Once
from telemetry.probes.forward import Microbatch, Reading
from telemetry.probes.quiet import is_compiled
from telemetry.redaction import redact
from telemetry.session import DEFAULT_LOGGING_STEPS, Door, Session
from telemetry.setting import Setting, default_logging_dir, local_directory, model_defaults, run_config
from telemetry.sound import SoundPolicy

MAX_NAME = 120  # characters of a trial's name, which is a directory's too

logger = logging.getLogger(__name__)

_TELLING = {
    "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "optim", "weight_decay", "max_grad_norm", "seed", "bf16", "fp16",
    "model.model_type", "model.hidden_size", "model.num_hidden_layers",
}  # fmt: skip
"""Settings that say something even where nobody set them."""

_SAYING_LITTLE = {
    "accelerator_config", "command", "data.eval.dataset", "data.train.dataset", "debug", "disable_tqdm",
    "eval_batch_size", "logging_dir", "report_to", "train_batch_size", "model.architectures",
    "model.transformers_version",
}  # fmt: skip
"""What the Trainer or transformers fill in, or what other settings say."""

HEARD = "zero_shot/"


def _nothing() -> None:
    pass


_predicted: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Head:
    """What logits are of: the modality (``text`` or ``audio``), and codebooks, 1 for text."""

    modality: str
    codebooks: int = 1


class StrategicCallback(Door, TrainerCallback):
    """Passes a Trainer's events on to the run being watched, at step 1 and every ``logging_steps`` optimizer steps.

    Works alone on any Trainer: ``trainer.add_callback(InputLoggerCallback())``. It watches the model with hooks that
    live for the due step only; off a due step it costs a comparison, keeps the loss and looks at the clock. What
    measures is its ``instruments``; a subclass may also override the methods from :meth:`begin_step` to
    :meth:`observe_evaluation`.

    A trainer may also hand ``inputs=`` and ``outputs=`` to :meth:`on_step_end`, and call :meth:`on_microbatch` before a
    forward pass, :meth:`on_outputs` after one and :meth:`on_gradients` before clipping. A callback that is added while
    training runs joins at its next due step.

    Args:
        logging_steps: N, at least 1.
        backends: where to show; by default TensorBoard and the console. The callbacks of one Trainer share them.
        logging_dir: where files go; by default ``TENSORBOARD_LOGGING_DIR`` or ``<output_dir>/runs/telemetry``.
        sound: what may be heard (voice clips are personal data); by default a few clips a tag. The first callback of
            a Trainer that says it speaks for all.
        instruments: further ones of one's own.
        alert_to: Apprise addresses that alerts are sent to (``docs/alerts.md``); by default those in
            ``STRATEGIC_TELEMETRY_ALERT_TO``, separated by spaces.
        stop_on: what ends the training, with a checkpoint: ``failing``, ``warning`` or names of rules; nothing by
            default.
        health_rules: other limits for rules, and rules of one's own: a mapping, or a file of one (``docs/health.md``).
        family: what reads the model in the place of the family that is registered for its class: a class of families,
            or a declaration (:class:`telemetry.CodecTokens`). One that fits no part of it ends the training before it
            begins, with a ValueError.
        options: of a callback for one question: the arguments of that question's function.

    Attributes:
        question: of :data:`telemetry.instruments.questions.QUESTIONS`, whose instruments a subclass brings.

    Raises:
        ImportError: when there is an address, and Apprise is not installed.
        ValueError: when ``logging_steps`` is below 1, ``logging_dir`` is a URL, or ``alert_to``, ``stop_on`` or
            ``health_rules`` says something unknown.
    """

    question: ClassVar[str] = ""

    def __init__(
        self,
        logging_steps: int = DEFAULT_LOGGING_STEPS,
        backends: Sequence[Backend] | None = None,
        logging_dir: str | Path | None = None,
        sound: SoundPolicy | None = None,
        instruments: Sequence[Instrument] = (),
        alert_to: str | Sequence[str] | None = None,
        stop_on: str | Sequence[str] = (),
        health_rules: str | Path | Mapping[str, Any] | None = None,
        family: FamilyMaker | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            logging_steps, backends, logging_dir, sound, instruments, alert_to, stop_on, health_rules, family
        )
        self._once = Once(logger)
        self._unwatch: Callable[[], None] = _nothing
        self._updated = False  # inside of the backward pass of this due step
        self._around: list[Session] = []
        if any(getattr(type(self), verb) is not getattr(StrategicCallback, verb) for verb in _VERBS):
            self.instruments.append(_Overridden(self))
        if self.question:
            self.instruments += QUESTIONS[self.question](**options)
        elif options:
            raise TypeError(f"{type(self).__name__} got unexpected keyword arguments {sorted(options)}")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_around": [], "_unwatch": _nothing}

    @property
    def session(self) -> Session:
        """The run being watched.

        Raises:
            RuntimeError: outside training.
        """
        if self._session is None:
            raise RuntimeError(f"{type(self).__name__} is not watching a training run")
        return self._session

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None:  # another training's, inside of which this one runs, or that was interrupted
            self._around.append(self._session)
            self._session = self._led = None
        self.stopped = ""
        self._judge_by_ear(args)
        self._join(args, state, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        if not self.is_due(step):
            return
        if self._session is None:  # added while training runs, which what is refused before training must not end
            try:
                self._join(args, state, **kwargs)
            except ValueError as error:
                self._once.say("late", "%s cannot join: %s", type(self).__name__, error, level=logging.ERROR)
        if self._session is not None:
            self._gradients_seen = self._updated = False
            self._unwatch()
            model = kwargs.get("model")
            self._unwatch = within_step(
                model and calling_trainer(model), self._about_to_clip, self._cut_off, self._update_inside
            )
            loader = kwargs.get("eval_dataloader")
            predicted = _predicted.get(id(loader)) is loader
            self._session.begin_step(self, step, None if predicted else loader)

    def _about_to_clip(self) -> None:
        self._see_gradients(clipped=False)

    def _update_inside(self, optimizer: Any, done: bool) -> None:
        """See an update that DeepSpeed makes in the backward pass, and of which the Trainer's events come too late."""
        if (session := self._led) is not None:
            self._updated = True
            if done:
                session.tell("after_update", optimizer)
            else:  # of ZeRO before clipping, which is a part of its step
                self._see_gradients(clipped=False if hasattr(optimizer, "clip_grad") else None)
                session.tell("before_update", optimizer)

    def _cut_off(self) -> None:
        self._unwatch()
        if self._session is not None:
            self._session.abandon_step(self)
            self._session.sentinel.end()

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
        if self._session is not None:
            self._session.sentinel.announce(metadata)
        if (session := self._led) is not None:
            session.announce(metadata)

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
        if (session := self._led) is not None and inputs is not None:
            session.hand_over(inputs, outputs)

    def on_gradients(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Not an event of the Trainer's: for trainers that offer the gradients before clipping."""
        self._see_gradients(clipped=False)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if (session := self._led) is not None and not self._updated:
            # By now the Trainer has taken a loss scaler's factor out, whether it clips or not.
            self._see_gradients(clipped=(args.max_grad_norm or 0) > 0, scaled=False)
            session.tell("before_update", optimizer)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if (session := self._led) is not None and not self._updated:
            session.tell("after_update", optimizer)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        inputs: Mapping[str, Any] | None = None,
        outputs: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._unwatch is not _nothing:
            self._unwatch()
            self._unwatch = _nothing
        if (session := self._led) is not None:
            session.end_step(inputs, outputs)
        if self.stop_on and self._is_to_stop():
            logger.error("training stops, as asked: %s", self.stopped)
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._session is not None and args.output_dir:
            self._session.saved(Path(args.output_dir).expanduser() / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._session is None:
            self._outside_of_training()
        elif logs:
            self._session.log(state.global_step, logs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._session is not None and model is not None:
            self._session.predicting(state.global_step, model)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._session is None:
            self._outside_of_training()
        else:
            metrics = {} if metrics is None else metrics
            prefix, of = _evaluation_set(metrics)
            wait = _judged_by_ear(args) is not None
            numbers = self._session.evaluation(self, state.global_step, eval_dataloader, of, wait)
            if wait and isinstance(metrics, dict):  # the Trainer's own, by which it finds its best checkpoint
                metrics.update({f"{prefix}_{tag}": value for tag, value in numbers.items() if tag.startswith(HEARD)})

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Know the data that the Trainer now holds in the place of its evaluation data: they are no baseline."""
        loader = kwargs.get("eval_dataloader")
        with contextlib.suppress(TypeError):  # where nobody may hold it weakly
            _predicted[id(loader)] = loader

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave()
        while self._around and self._session is None:
            around = self._around.pop()
            if around.is_open:
                self._session, self._led = around, around if around.leads(self) else None

    def _judge_by_ear(self, args: TrainingArguments) -> None:
        """See that the best checkpoint is the one that sounds best, where a number of the clips chooses it.

        Raises:
            ValueError: for a number that there is not, or that lacks a listener.
        """
        tag = _judged_by_ear(args)
        if tag is None:
            return
        entry = catalogue.find(tag)
        if entry is None or entry.kind != "scalar":
            raise ValueError(
                f"metric_for_best_model={args.metric_for_best_model}: {tag} is no number of docs/metrics.md"
            )
        lacking = (one.lacks(tag) for one in self.instruments if isinstance(one, ClipInstrument))
        if reason := next(filter(None, lacking), ""):
            raise ValueError(f"metric_for_best_model={args.metric_for_best_model}: {reason}, and {tag} needs one")
        if entry.better and args.greater_is_better != (entry.better == "higher"):
            args.greater_is_better = entry.better == "higher"
            self._once.say("better", "the best checkpoint: %s is better in %s", entry.better, tag, level=logging.INFO)

    def _outside_of_training(self) -> None:
        said = "what the Trainer logs and evaluates outside of train() is not recorded"
        self._once.say("outside", said, level=logging.INFO)

    def _join(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module | None = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            return
        loaders = {"train": train_dataloader, "eval": eval_dataloader}
        setting = functools.partial(_setting, args, state, model, processing_class, loaders, self.logging_dir)
        self._session = Session.join(self, model, state, setting)
        self._session.sentinel.watch(functools.partial(every_step, calling_trainer(model)))

    # -- what a subclass may override ---------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A due step begins: forget what one that was interrupted left."""

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """The model is about to run on a microbatch of a due step."""

    def observe_logits(self, microbatch: Microbatch, head: Head, logits: Tensor) -> None:
        """A microbatch of a due step has its logits ``[..., codebooks × vocabulary]`` of something supervised."""

    def observe_gradients(self, model: nn.Module, clipped: bool) -> None:
        """All gradients of a due step are there; ``clipped`` says whether clipping has already touched them."""

    def before_update(self, model: nn.Module, optimizer: Any) -> None:
        """The optimizer is about to step on a due step; gradients are clipped."""

    def after_update(self, model: nn.Module, optimizer: Any) -> None:
        """The optimizer has stepped on a due step; gradients are still there."""

    def release(self) -> None:
        """Watching ends: take own hooks off. No more is observed of the step."""

    def finish_step(self) -> None:
        """The due step has ended: add what is shown once a step, and let go of everything."""

    def observe_evaluation(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """An evaluation has ended, or the first step of a fresh training is about to begin.

        See :meth:`telemetry.instruments.base.Instrument.evaluation`.
        """


_VERBS = (
    "begin_step", "observe_inputs", "observe_logits", "observe_gradients", "before_update", "after_update", "release",
    "finish_step", "observe_evaluation",
)  # fmt: skip


class _Overridden(Instrument):
    """Calls the methods that a subclass of :class:`StrategicCallback` has overridden."""

    def __init__(self, callback: StrategicCallback) -> None:
        self._callback = callback

    @property
    def name(self) -> str:
        return type(self._callback).__name__

    def begin(self, step: Step) -> None:
        self._callback.begin_step()

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        self._callback.observe_inputs(microbatch)

    def outputs(self, step: Step, microbatch: Microbatch, reading: Reading) -> None:
        for stream in reading.streams:
            logits = stream.logits if isinstance(stream.name, str) else stream.logits.flatten(-2)
            self._callback.observe_logits(microbatch, Head(stream.group, len(stream.names)), logits)

    def gradients(self, step: Step, clipped: bool | None) -> None:
        self._callback.observe_gradients(step.model, clipped is not False)

    def before_update(self, step: Step, optimizer: Any) -> None:
        self._callback.before_update(step.model, optimizer)

    def after_update(self, step: Step, optimizer: Any) -> None:
        self._callback.after_update(step.model, optimizer)

    def finish(self, step: Step) -> None:
        self._callback.release()
        self._callback.finish_step()

    def evaluation(self, step: Step, batches: Iterable[Mapping[str, Any]]) -> None:
        self._callback.observe_evaluation(batches)


def _evaluation_set(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """What the Trainer's metrics of an evaluation begin with, and the name of its set: ``eval_<name>_runtime``."""
    timed = [name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")]
    prefix = timed[-1] if timed else "eval"  # the Trainer's own comes after those of compute_metrics
    return prefix, "" if prefix == "eval" else prefix.removeprefix("eval_")


def _judged_by_ear(args: TrainingArguments) -> str | None:
    """The tag of the clips' number that chooses the best checkpoint; None where something else does."""
    _, found, name = (args.metric_for_best_model or "").partition(HEARD)
    return HEARD + name if found else None


def _defaults(args: TrainingArguments) -> frozenset[str]:
    """Names of the arguments that have their default value, and of what says little."""
    found = set()
    for argument in dataclasses.fields(args):
        made = argument.default_factory
        default = made() if made is not dataclasses.MISSING else argument.default
        if default is not dataclasses.MISSING and getattr(args, argument.name) == default:
            found.add(argument.name)
    return frozenset(found) | _SAYING_LITTLE


def _setting(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    processor: Any,
    loaders: Mapping[str, Any],
    chosen: Path | None,
) -> Setting:
    """What a Trainer says of the run; ``chosen``: where files are to go."""
    output_dir = local_directory(args.output_dir or ".", "output_dir")
    logging_dir = default_logging_dir(output_dir)
    within = _trial(state, chosen or logging_dir) if state.is_hyper_param_search else ""
    name = within or getattr(args, "run_name", None) or output_dir.name
    return Setting(
        output_dir=output_dir / within,
        logging_dir=logging_dir,
        default_backends=lambda: default_backends(args.report_to or ()),
        config=lambda: run_config(args.to_sanitized_dict(), model, loaders),
        name=redact(name),
        starting_step=state.global_step,
        rank=args.process_index,
        world_size=args.world_size,
        device=args.device,
        compiled=bool(args.torch_compile) or is_compiled(model),
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        progress=not args.disable_tqdm,
        max_grad_norm=float(args.max_grad_norm or 0),
        defaults=lambda: (_defaults(args) | model_defaults(model)) - _TELLING,
        tokens_across_ranks=bool(args.average_tokens_across_devices),
        processor=processor,
        show_batches=PreparedBatches(calling_trainer(model)),
        within=within,
        is_running=_running(state),
    )


def _trial(state: TrainerState, runs: Path) -> str:
    """The name of a trial of a hyperparameter search, which is a run of its own: the search's, or else what it tries.

    A name that an earlier trial has had is numbered.
    """
    tried = ", ".join(f"{name}={_brief(value)}" for name, value in (state.trial_params or {}).items())
    name = re.sub(r"[^\w=,.+ -]", "_", state.trial_name or tried or "trial")[:MAX_NAME]
    number = next(number for number in itertools.count(1) if not (runs / _numbered(name, number)).exists())
    return _numbered(name, number)


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def _running(state: TrainerState) -> Callable[[], bool]:
    """Return what says whether this thread is still inside of a method of the Trainer whose state this is.

    What ends a training otherwise than by its end (Ctrl-C, an exception, a trial that is pruned) tells no callback.
    Asked from another thread, it runs while this one lives: the frames of a thread that goes on meanwhile must not be
    walked, which can crash the interpreter (CPython 3.11).
    """
    thread = threading.current_thread()

    def inside() -> bool:
        return any(getattr(trainer, "state", None) is state for trainer in trainers_in(sys._getframe()))

    def is_running() -> bool:
        return inside() if threading.get_ident() == thread.ident else thread.is_alive()

    return is_running if inside() else lambda: True

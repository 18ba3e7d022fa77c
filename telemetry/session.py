"""What the callbacks of one training run share: the recorder, the model's family, the probe of the due step."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from telemetry.backends.base import Backend, Run, is_on_every_rank
from telemetry.backends.registry import default_backends
from telemetry.catalogue import TRAINER_SECTIONS
from telemetry.clock import StepClock
from telemetry.delivery.recorder import MAX_FAILURES, Recorder
from telemetry.delivery.reduction import RankGather
from telemetry.families import Family, Head, find_family
from telemetry.health import HealthMonitor
from telemetry.probes.batches import EvaluationBatches
from telemetry.probes.forward import ForwardProbe, Microbatch
from telemetry.probes.lockstep import Lockstep
from telemetry.records import Scalar
from telemetry.redaction import redact, redact_arguments
from telemetry.sound import SoundPolicy

if TYPE_CHECKING:
    from telemetry.callbacks.trainer import StrategicCallback

logger = logging.getLogger(__name__)


class Session:
    """One training run seen by the callbacks that watch it.

    Callbacks of one Trainer find the same session by its model, so that they share one probe, one recorder and one
    writer, whether they were added one by one or through ``StrategicTelemetry``.

    Args:
        model: the Trainer's model, without its DDP or FSDP wrapper.
        args: the Trainer's arguments.
        state: the Trainer's state at the beginning of training.
        processing_class: the Trainer's; decodes token ids.
    """

    _by_model: ClassVar[weakref.WeakKeyDictionary[nn.Module, Session]] = weakref.WeakKeyDictionary()

    def __init__(self, model: nn.Module, args: TrainingArguments, state: TrainerState, processing_class: Any) -> None:
        self._said: set[str] = set()
        self.family: Family | None = None
        with self._isolated("reading the model"):
            self.family = find_family(model)
        self.processing_class = processing_class
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.is_main = state.is_world_process_zero
        self._model = weakref.ref(model)
        self._args = args
        self._starting_step = state.global_step
        self._state = state
        self._members: list[StrategicCallback] = []
        self._failures: dict[object, int] = {}
        self._recorder: Recorder | None = None
        self._data: dict[str, Any] = {}
        self._lockstep: Lockstep | None = None
        self._sound: SoundPolicy | None = None
        self._probe = ForwardProbe(model, self.family, self) if self.family is not None else None
        self.hooked = not _is_compiled(model, args)
        self._stepping = False
        self._watching = False
        self._baseline_seen = False
        self._clock = StepClock()
        self.step = 0  # the due step, counted as after its update

    @classmethod
    def join(
        cls,
        member: StrategicCallback,
        model: nn.Module,
        args: TrainingArguments,
        state: TrainerState,
        processing_class: Any,
    ) -> Session:
        """The session of a model's training, made by the first callback that asks."""
        session = cls._by_model.get(model)
        if session is not None and session._state is not state:  # left over from a training that ended in an exception
            session.close()
            session = None
        if session is None:
            session = cls._by_model[model] = cls(model, args, state, processing_class)
        session._members.append(member)
        session._heed(member.sound)
        return session

    def know_data(self, **batches: Any) -> None:
        """Data loaders by their use (``train``, ``eval``), for the run's configuration."""
        for use, loader in batches.items():
            if loader is not None and use not in self._data:
                with self._isolated("reading what data there is"):
                    self._data[use] = _data_summary(loader)

    def leave(self, member: StrategicCallback) -> None:
        """Training has ended for a callback; the last one to leave closes the backends."""
        if member in self._members:
            self._members.remove(member)
        if not self._members:
            self.close()

    def close(self) -> None:
        """Let go of hooks and close the backends."""
        self._end_step()
        model = self._model()
        if model is not None:
            self._by_model.pop(model, None)
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    @property
    def sound(self) -> SoundPolicy:
        """What may be heard of this run, by the first callback that says it."""
        return self._sound or SoundPolicy()

    def _heed(self, sound: SoundPolicy | None) -> None:
        self._sound = self._sound or sound
        if self._recorder is not None:  # opened by a callback that joined earlier
            self._recorder.sound = self.sound

    @property
    def recorder(self) -> Recorder:
        """Opened at its first use, when every callback has joined and brought its backends."""
        if self._recorder is None:
            gather = RankGather.join()
            backends = [
                backend
                for backend in self._backends()
                if self.is_main or (gather is not None and is_on_every_rank(backend))
            ]
            self._recorder = Recorder(
                backends, gather, judge=HealthMonitor(), sound=self.sound, rank=self._args.process_index
            )
            self._recorder.open(self._run(gather))
            _ = self.lockstep  # every rank comes by here
        return self._recorder

    @property
    def lockstep(self) -> Lockstep:
        """How ranks agree to run the model aside together; joined when the recorder is opened."""
        if self._lockstep is None:
            self._lockstep = Lockstep.join(self.model)
        return self._lockstep

    def begin_step(self) -> None:
        """A due step begins: forget what an unfinished one left behind and watch the model."""
        if self._stepping:
            return
        self._stepping = self._watching = True
        with self._isolated("beginning a step"):
            self._begin(self.recorder)

    def _begin(self, recorder: Recorder) -> None:
        self._clock = StepClock()
        self.step = self._state.global_step + 1
        with self._clock.running():
            recorder.discard()
            if self._probe is None:
                recorder.say_once("family", "telemetry knows no family for this model: inputs and outputs are absent")
            else:
                self._probe.attach(self._clock, hooks=self.hooked)

    def announce(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """What the next microbatch's samples are, from trainers that take it out of the batch."""
        if self._stepping and self._probe is not None:
            self._probe.announce(metadata)

    def hand_over(self, member: StrategicCallback, inputs: Mapping[str, Any], outputs: Any) -> None:
        """A microbatch's forward pass, from trainers that show it: used where the model is compiled.

        Hooks on a compiled model would become part of its graph, or never run.
        """
        if self._stepping and not self.hooked and self._probe is not None and member is self._stepping_members()[0]:
            with self._clock.running(), self._isolated("reading what a trainer handed over"):
                self._probe.replay(inputs, outputs)

    def finish(self, member: StrategicCallback, step: int, inputs: Mapping[str, Any] | None, outputs: Any) -> None:
        """One callback's due step ends; the last one's writes the step."""
        if not self._stepping:
            return
        with self._clock.running():
            if self._probe is not None and self._probe.forwards == 0 and inputs is not None:
                with self._isolated("reading what a trainer handed over"):
                    self._probe.replay(inputs, outputs)
            self._unwatch()
            self.guard(member, member.finish_step)
            member.stepping = False
            last = not self._stepping_members()
            if last:
                self._end_step()
        if last:
            with self._isolated("sending a step on its way"):
                self.recorder.flush(step, self._clock)

    def gradients(self, member: StrategicCallback, model: nn.Module, clipped: bool) -> None:
        """All gradients are there: let a callback see them."""
        with self._clock.running():
            self.guard(member, member.observe_gradients, model, clipped)

    def update(
        self, member: StrategicCallback, look: Callable[[nn.Module, Any], None], model: nn.Module, optimizer: Any
    ) -> None:
        """The optimizer is about to step, or has: let a callback see it."""
        with self._clock.running():
            self.guard(member, look, model, optimizer)

    def baseline(self, batches: Any) -> None:
        """The first step is about to begin: let every callback see evaluation batches, before any watches the model."""
        if self._baseline_seen:  # with eval_on_start the Trainer has evaluated already
            return
        for member in self._members:
            member.see_evaluation(0, batches)

    def evaluation(self, member: StrategicCallback, step: int, batches: Iterable[Mapping[str, Any]]) -> None:
        """An evaluation has ended, or training begins: let a callback see its batches, and write what it records."""
        self._baseline_seen = True
        with self._isolated("watching an evaluation"):
            self.recorder.discard()
            self.guard(member, member.observe_evaluation, EvaluationBatches(batches, self._args.device))
            self.recorder.flush(step, own_state=False)

    @property
    def arguments(self) -> TrainingArguments:
        """The Trainer's arguments."""
        return self._args

    @property
    def global_step(self) -> int:
        """Optimizer steps that the Trainer has made."""
        return self._state.global_step

    @property
    def model(self) -> nn.Module:
        """The Trainer's model, without its DDP wrapper.

        Raises:
            RuntimeError: when it is gone.
        """
        model = self._model()
        if model is None:
            raise RuntimeError("the model is gone")
        return model

    def trainer_logs(self, member: StrategicCallback, step: int, logs: Mapping[str, Any]) -> None:
        """Record what the Trainer logs, once however many callbacks hear of it."""
        if not self._members or member is not self._members[0]:
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float)) and name != "step"}
        # Past the step that is being collected: a trainer may log in the middle of one.
        with self._isolated("recording what the Trainer logs"):
            self.recorder.write(step, [Scalar(_trainer_tag(name), float(value)) for name, value in numbers.items()])

    @contextlib.contextmanager
    def _isolated(self, doing: str) -> Iterator[None]:
        """Whatever goes wrong inside is said once with its traceback; training goes on."""
        try:
            yield
        except Exception:
            if doing not in self._said:
                self._said.add(doing)
                logger.exception("telemetry failed while %s; training goes on", doing)

    def measure(self, member: object, action: Callable[..., None], *args: Any) -> None:
        """Run what a hook of a callback's own does: as :meth:`guard`, and the time it takes counts as telemetry's."""
        with self._clock.running():
            self.guard(member, action, *args)

    def guard(self, member: object, action: Callable[..., None], *args: Any) -> None:
        """Run a measure of a callback, or of a part of one; one that raises is reported and, after repeated failures,
        switched off."""
        failures = self._failures.get(member, 0)
        if failures >= MAX_FAILURES:
            return
        try:
            action(*args)
        except Exception:
            self._failures[member] = failures + 1
            name = type(member).__name__
            if failures == 0:
                logger.exception("%s failed; training goes on", name)
            if failures + 1 == MAX_FAILURES:
                logger.error("%s failed %d times: switched off", name, MAX_FAILURES)

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """From the probe: pass it on to every callback whose step is due."""
        for member in self._stepping_members():
            self.guard(member, member.observe_inputs, microbatch)

    def observe_logits(self, microbatch: Microbatch, head: Head, logits: Tensor) -> None:
        """From the probe: pass it on to every callback whose step is due."""
        for member in self._stepping_members():
            self.guard(member, member.observe_logits, microbatch, head, logits)

    def _stepping_members(self) -> list[StrategicCallback]:
        return [member for member in self._members if member.stepping]

    def _unwatch(self) -> None:
        """Take all hooks off: nothing more of the step is observed, and models may be run without being watched."""
        if not self._watching:
            return
        self._watching = False
        if self._probe is not None:
            self._probe.detach()
        for member in self._members:
            with self._isolated(f"taking the hooks of {type(member).__name__} off"):
                member.release()

    def _end_step(self) -> None:
        self._stepping = False
        self._unwatch()

    def _backends(self) -> Sequence[Backend]:
        given = [backend for member in self._members for backend in member.backends or ()]
        unique = list({id(backend): backend for backend in given}.values())
        return unique or default_backends(self._args.report_to or ())

    def _run(self, gather: RankGather | None) -> Run:
        chosen = next((member.logging_dir for member in self._members if member.logging_dir), None)
        on_every_rank = gather is not None and any(map(is_on_every_rank, self._backends()))
        return Run(
            logging_dir=Path(chosen or default_logging_dir(self._args)),
            starting_step=self._starting_step,
            name=_run_name(self._args),
            config=_run_config(self._args, self._model(), self._data),
            output_dir=Path(_output_dir(self._args)),
            rank=self._args.process_index,
            launch_id=gather.launch_id() if gather is not None and on_every_rank else "",
        )


def _is_compiled(model: nn.Module, args: TrainingArguments) -> bool:
    compiled = bool(args.torch_compile) or getattr(model, "_compiled_call_impl", None) is not None
    return compiled or any(hasattr(module, "_orig_mod") for module in model.modules())


def default_logging_dir(args: TrainingArguments) -> Path:
    """``TENSORBOARD_LOGGING_DIR``, or ``runs/telemetry`` in the output directory: the same place after a resume."""
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return Path(chosen).expanduser() if chosen else Path(_output_dir(args)) / "runs" / "telemetry"


def _run_name(args: TrainingArguments) -> str:
    return redact(getattr(args, "run_name", None) or Path(_output_dir(args)).name)


def _output_dir(args: TrainingArguments) -> str:
    return args.output_dir or "."


def _run_config(args: TrainingArguments, model: nn.Module | None, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Training arguments, the command line, the model's configuration and what data there is, without secrets."""
    config: dict[str, Any] = dict(args.to_sanitized_dict())
    config["command"] = shlex.join(redact_arguments(sys.argv))
    model_config = getattr(model, "config", None)
    if model_config is not None and hasattr(model_config, "to_json_string"):
        config["model"] = json.loads(model_config.to_json_string())
    if data:
        config["data"] = dict(data)
    return redact(config)


def _data_summary(batches: Any) -> dict[str, Any]:
    """What kind of data set stands behind a data loader, and how many samples and batches a rank it has."""
    dataset = getattr(batches, "dataset", None)
    summary: dict[str, Any] = {"dataset": type(dataset).__name__}
    for name, of in (("samples", dataset), ("batches", batches)):
        with contextlib.suppress(TypeError):  # a stream has no length
            summary[name] = len(of)  # type: ignore[arg-type]
    return summary


def _trainer_tag(name: str) -> str:
    default, *prefixes = TRAINER_SECTIONS
    for prefix in prefixes:
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name[len(prefix) + 1 :]}"
    return f"{default}/{name}"

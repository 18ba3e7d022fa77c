"""One run being watched: what is due, who is told, and what has failed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from telemetry.backends.base import Backend, Run, is_on_every_rank
from telemetry.backends.registry import alert_addresses, followers
from telemetry.clock import StepClock
from telemetry.delivery.recorder import MAX_FAILURES, Recorder
from telemetry.delivery.reduction import GATHER_SECONDS, RankGather
from telemetry.delivery.word import RankWord
from telemetry.families import Family, FamilyMaker, bound_family, find_family
from telemetry.health import HealthMonitor, check_findings, rules_of
from telemetry.instruments.base import Instrument, Step
from telemetry.instruments.every_step import judged
from telemetry.instruments.setup import training_share
from telemetry.once import Once
from telemetry.probes.batches import EvaluationBatches, is_stream
from telemetry.probes.forward import PassReader
from telemetry.probes.lockstep import Lockstep
from telemetry.probes.sentinel import Sentinel
from telemetry.probes.sharding import ranks_of_a_batch
from telemetry.probes.watch import Watch
from telemetry.records import Record, Scalar
from telemetry.setting import Setting, logged_numbers, logs_directory
from telemetry.sound import SoundPolicy

logger = logging.getLogger(__name__)

DEFAULT_LOGGING_STEPS = 100
EPOCH = "train/epoch"
STREAM = "they are a stream, which may be there to be read once: no clips, and no conditioning gain of them"
_nothing: Callable[[], None] = lambda: None  # noqa: E731
NO_FAMILY = (
    "telemetry knows no family for this model: it shows tensors, gradients and the model's own loss, and no tokens"
)


class Door:
    """What brings instruments to a run, and passes the events of a training on to it.

    Args:
        logging_steps: N: step 1 and every N optimizer steps are measured.
        backends: where to show; None for the run's own.
        logging_dir: where files go; None for the run's own.
        sound: what may be heard, where it has a say.
        instruments: what measures.
        alert_to: Apprise addresses that alerts are sent to; None for those that ``STRATEGIC_TELEMETRY_ALERT_TO`` has,
            separated by spaces.
        stop_on: findings that end the training: ``failing``, ``warning`` or names of rules.
        health_rules: other limits, and rules of one's own: see :mod:`telemetry.health.own_rules`.
        family: reads the model; None for the one that is registered for its class.

    Attributes:
        stopped: why the training was ended, "" where it was not.

    Raises:
        ImportError: when there is an address, and Apprise is not installed.
        ValueError: when ``logging_steps`` is below 1, ``logging_dir`` is a URL, an address is none, a finding is
            unknown, or a rule cannot be read.
    """

    def __init__(
        self,
        logging_steps: int,
        backends: Sequence[Backend] | None,
        logging_dir: str | Path | None,
        sound: SoundPolicy | None,
        instruments: Sequence[Instrument],
        alert_to: str | Sequence[str] | None = None,
        stop_on: str | Sequence[str] = (),
        health_rules: str | Path | Mapping[str, Any] | None = None,
        family: FamilyMaker | None = None,
    ) -> None:
        if logging_steps < 1:
            raise ValueError(f"logging_steps must be at least 1, got {logging_steps}")
        self.logging_steps = logging_steps
        self.backends = backends
        self.logging_dir = None if logging_dir is None else logs_directory(logging_dir, "logging_dir")
        self.sound = sound
        self.instruments = [*instruments]
        self.alert_to = alert_addresses(alert_to)
        self.health_rules = health_rules
        self.family = family
        self.stop_on = check_findings([stop_on] if isinstance(stop_on, str) else stop_on, rules_of(health_rules))
        self.stopped = ""
        self._session: Session | None = None
        self._led: Session | None = None  # while a due step is under way that this door has opened
        self._gradients_seen = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy (for another process, say) watches nothing until a training of its own begins."""
        return vars(self) | {"_session": None, "_led": None}

    def is_due(self, step: int) -> bool:
        """Return whether an optimizer step, counted from 1 as after its update, is measured."""
        return not step % self.logging_steps or step == 1

    def _is_to_stop(self) -> bool:
        """Return whether something has been found that ends the training: on all ranks alike, once a step on each."""
        if self.stop_on and self._session is not None and not self.stopped:
            self.stopped = self._session.reason_to_stop(self.stop_on)
        return bool(self.stopped)

    def _leave(self) -> None:
        session, self._session = self._session, None
        self._led = None
        if session is not None:
            session.leave(self)

    def _see_gradients(self, clipped: bool | None, scaled: bool = True) -> None:
        """Have the gradients of a due step measured, once; ``clipped``: see :meth:`Instrument.gradients`.

        Args:
            scaled: whether a loss scaler's factor, where there is one, is still in them.
        """
        if not self._gradients_seen and (session := self._led) is not None:
            self._gradients_seen = True
            session.see_gradients(clipped, scaled)


class Session:
    """One training run seen by those that watch it: the one place that times, isolates, says once and switches off.

    Doors to one training find the same session by its model, so that they share one reader, one recorder and one
    writer. The door that opens a due step leads it: what the others hear of it comes a second time.

    Args:
        model: what is trained, without its DDP or FSDP wrapper.
        setting: what is known of the run.
    """

    _by_model: ClassVar[weakref.WeakKeyDictionary[nn.Module, Session]] = weakref.WeakKeyDictionary()

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self._once = Once(logger)
        self.family: Family | None = None
        self.setting = setting
        self.tokenizer = getattr(setting.processor, "tokenizer", setting.processor)
        self._training: object = None
        self._model = weakref.ref(model)
        self._doors: list[Door] = []
        self._failures: Counter[object] = Counter()
        self._turns: Counter[Instrument] = Counter()
        self._recorder: Recorder | None = None
        self._meeting: tuple[RankGather | None, str] | None = None
        self._lockstep: Lockstep | None = None
        self._place, self._copies = 0, 1  # of the ranks with the same batch
        self.sentinel = Sentinel()
        self._monitor = HealthMonitor()
        self._word = RankWord()
        self._sound: SoundPolicy | None = None
        self._watch = Watch(model, self._measure, not setting.compiled, setting.is_running)
        with self._isolated("reading the model"):
            self.family = find_family(model)
        self._reader = self._read_by(self.family)
        self._given_family: FamilyMaker | None = None
        self._clock = StepClock()
        self._step: Step | None = None
        self._due: list[Instrument] = []
        self._leader: Door | None = None
        self._hide: Callable[[], None] = _nothing
        self._evaluated = False
        self._modes_seen = False
        self._last_due = 0
        self._logged: object = None
        self._epoch_at = -1

    def _read_by(self, family: Family | None) -> PassReader:
        return PassReader(family, partial(self._tell, "inputs"), partial(self._tell, "outputs"))

    def _take_family(self, given: FamilyMaker, model: nn.Module) -> None:
        """Read the model by a family that a door brings; the first that does speaks for all."""
        if self._given_family is None:
            self.family, self._given_family = bound_family(given, model), given
            self._reader = self._read_by(self.family)

    @classmethod
    def join(cls, door: Door, model: nn.Module, training: object, setting: Callable[[], Setting]) -> Session:
        """Return the session of a model's training, made by the first door that asks.

        Args:
            door: what joins.
            model: what is trained.
            training: names this training of the model: another one closes what an interrupted one has left.
            setting: makes what is known of the run.

        Raises:
            ValueError: where the door brings a family that does not fit the model.
        """
        for other in list(cls._by_model.values()):
            if not other.setting.is_running():
                other.close()
        session = cls._by_model.get(model)
        if session is not None and session._training is not training:
            session.close()
            session = None
        if session is None:
            session = cls._by_model[model] = cls(model, setting())
            session._training = training
        if door.family is not None:
            session._take_family(door.family, model)
        session._doors.append(door)
        session._sound = session._sound or door.sound
        if session._recorder is not None:  # opened by a door that joined earlier
            session._recorder.sound = session.sound
        return session

    def leave(self, door: Door) -> None:
        """Let a door go when training has ended for it; the last one closes the backends."""
        self._doors = [other for other in self._doors if other is not door]
        if not self._doors:
            self.close()

    def close(self) -> None:
        """Let go of hooks and close the backends."""
        self._end()
        self.sentinel.end()
        model = self._model()
        if model is not None:
            self._by_model.pop(model, None)
        with self._isolated("looking at the last steps"):
            self._look_at_the_last_steps()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _look_at_the_last_steps(self) -> None:
        """What this rank has trained on since the last due step: say so where a loss was bad."""
        seen = self.sentinel.take()
        if self._recorder is None or not seen:
            return
        named = [(number, names) for number, _, names in seen]
        rank = self.setting.rank if self.setting.world_size > 1 else None
        losses = [float(loss) for _, loss, _ in seen]
        bad = [Scalar(tag, float(n), one.name) for tag, n, one in judged(named, losses, rank) if one is not None]
        self._recorder.write(seen[-1][0], bad)

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        model = self._model()
        return model is not None and self._by_model.get(model) is self

    @property
    def sound(self) -> SoundPolicy:
        """What may be heard of this run, by the first door that says it."""
        return self._sound or SoundPolicy()

    @property
    def recorder(self) -> Recorder:
        """Opened at its first use, when all doors have joined and brought their backends."""
        if self._recorder is None:
            gather, launch_id = self._met()
            backends = self._backends()
            own = [one for one in backends if self.setting.rank == 0 or (gather is not None and is_on_every_rank(one))]
            given = next((door.health_rules for door in self._doors if door.health_rules), None)
            self._monitor = HealthMonitor(rules_of(given))
            run = self._run(launch_id if any(map(is_on_every_rank, backends)) else "")
            self._place, self._copies = ranks_of_a_batch(self.model)
            self._recorder = Recorder(
                own, gather, judge=self._monitor, sound=self.sound, rank=self.setting.rank, repeats=self._place > 0
            )
            self._recorder.open(run)
            self._word = RankWord(alone=self.setting.world_size == 1, together=gather is not None)
        return self._recorder

    def _met(self) -> tuple[RankGather | None, str]:
        """How ranks are brought together, and the launch's name: they meet once, before anything that one may fail at.

        A rank that failed between two meetings, or came to one again, would have the others wait for it.
        """
        if self._meeting is None:
            self._meeting = None, ""
            gather = RankGather.join()
            self._meeting = gather, gather.launch_id() if gather is not None else ""
            _ = self.lockstep
        return self._meeting

    @property
    def lockstep(self) -> Lockstep:
        """How ranks agree to run the model aside together; joined when the recorder is opened."""
        if self._lockstep is None:
            self._lockstep = Lockstep.join(self.model)
        return self._lockstep

    @property
    def model(self) -> nn.Module:
        """What is trained, without its DDP wrapper.

        Raises:
            RuntimeError: when it is gone.
        """
        model = self._model()
        if model is None:
            raise RuntimeError("the model is gone")
        return model

    # -- a due step ---------------------------------------------------------------------------------------------------

    def leads(self, door: Door) -> bool:
        """Return whether a due step is under way that a door has opened."""
        return self._step is not None and self._leader is door

    def begin_step(self, door: Door, number: int, evaluation_batches: Any = None) -> None:
        """Watch the model for a due step, led by a door; nothing where another has opened it.

        Before the first step of a fresh training all doors see evaluation batches, where there are any: the baseline.
        """
        if self._step is not None and self._step.number == number and self._leader is not door:
            return
        self._end()
        if number == 1 and not self._evaluated:  # with eval_on_start the Trainer has evaluated already
            several = evaluation_batches if isinstance(evaluation_batches, Mapping) else {"": evaluation_batches}
            for one, (of, batches) in itertools.product(self._doors, several.items()):
                self.evaluation(one, 0, batches, of)
        with self._isolated("beginning a step"):
            recorder = self.recorder
            self._clock = StepClock()
            with self._clock.running():
                recorder.discard()
                if self.family is None:
                    recorder.say_once("family", NO_FAMILY)
                due = [one for other in self._doors if other.is_due(number) for one in other.instruments]
                self._due = [instrument for instrument in due if self._is_its_turn(instrument)]
                self._step, self._leader, door._led = self._make_step(number), door, self
                self._watch.open()
                self._hide = self.setting.show_batches(self.prepare)
                self._reader.attach(self._watch)
                self._tell("begin")

    def announce(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Say what the next microbatch's samples are, from trainers that take it out of the batch."""
        self._reader.announce(metadata)

    def prepare(self, batch: Any, label_names: Collection[str] = ()) -> None:
        """Say what batch the next passes are of: its labels are read where the trainer keeps them from the model."""
        if self._step is not None and isinstance(batch, Mapping):
            with self._clock.running(), self._isolated("reading a prepared batch"):
                self._reader.prepare(batch, label_names)

    def hand_over(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        """Take a microbatch's pass from a trainer that shows it: read where the model cannot be watched."""
        if not self._watch.usable:
            self._replay(inputs, outputs)

    def tell(self, verb: Literal["gradients", "before_update", "after_update"], *args: Any) -> None:
        """Call a verb of every instrument that is due, with what comes after the step: see :class:`Instrument`."""
        with self._clock.running():
            self._tell(verb, *args)

    def see_gradients(self, clipped: bool | None, scaled: bool) -> None:
        """Tell instruments that all gradients are there: see :class:`Instrument` and :class:`Step`."""
        if self._step is not None and self._step.scaled != scaled:
            self._step = replace(self._step, scaled=scaled)
        self.tell("gradients", clipped)

    def end_step(self, inputs: Mapping[str, Any] | None = None, outputs: Any = None) -> None:
        """Finish the due step and send it on its way.

        Args:
            inputs, outputs: of its last pass, from a trainer that hands them over: read where no pass was seen.
        """
        step = self._step
        if step is None:
            return
        if self._reader.passes == 0 and inputs is not None:
            self._replay(inputs, outputs)
        each, before, self._last_due = self.sentinel.pace.each(), self._last_due, step.number
        with self._clock.running():
            self._unwatch()
            self._tell("finish")
            self._end()
        with self._isolated("sending a step on its way"):
            self.recorder.flush(step.number, self._clock, each=each if len(each) == step.number - before else ())

    def abandon_step(self, door: Door) -> None:
        """Let go of a due step that a door has opened and that came to nothing."""
        if self.leads(door):
            self._end()

    # -- between steps ------------------------------------------------------------------------------------------------

    def predicting(self, number: int, model: nn.Module) -> None:
        """See the modes that an evaluation of a Trainer runs in: once a training, whatever the number of batches."""
        if not self._modes_seen:
            self._modes_seen = True
            with self._isolated("looking at an evaluation's modes"):
                if (share := training_share(model)) is not None:
                    self.recorder.write(number, [Scalar("setup/modes/evaluation_fraction", share)])

    def saved(self, directory: Path) -> None:
        """Tell backends of a checkpoint."""
        if self._recorder is not None:
            self._recorder.saved(directory)

    def reason_to_stop(self, on: Sequence[str]) -> str:
        """Say what has been found that ends the training, the same on every rank; "" for nothing. All ranks ask."""
        if self._recorder is None:
            return ""
        return str(self._word.tell(self._monitor.reason_to_stop(on)) or "")

    def evaluation(
        self, door: Door, number: int, batches: Any, of: str = "", wait: bool = False
    ) -> Mapping[str, float]:
        """Let a door's instruments look at evaluation batches, and write what they record.

        An evaluation inside of a due step is left alone: the step goes on. So are streams: what can be read once is the
        evaluation's own.

        Args:
            door: whose instruments look.
            number: the optimizer step.
            batches: a data loader; None where there is none.
            of: the name of the set, where there are several.
            wait: for the numbers of all ranks, which every rank then asks for.

        Returns:
            With ``wait``, tag → value of what was measured, the same on every rank.
        """
        looking = [one for one in door.instruments if type(one).evaluation is not Instrument.evaluation and one.every]
        if batches is None or not looking or self._step is not None:
            return {}
        self._evaluated = True
        made: queue.SimpleQueue[Sequence[Record]] = queue.SimpleQueue()
        sent = False
        with self._isolated("watching an evaluation"):
            if is_stream(batches):
                self.recorder.absent("evaluation batches", STREAM)
                return {}
            self.recorder.discard()
            step = self._make_step(number, of)
            seen: Iterable[Mapping[str, Any]] = EvaluationBatches(batches, self.setting.device)
            clock = StepClock()
            with clock.running():
                for instrument in looking:
                    self._guard(instrument, instrument.evaluation, step, seen)
            self.recorder.flush(number, clock, own_state=False, told=made.put)
            sent = True
        if not wait:
            return {}
        numbers: dict[str, float] = {}
        with contextlib.suppress(queue.Empty):
            numbers = _numbers(made.get(timeout=GATHER_SECONDS) if sent else ())
        return self._word.tell(numbers) or {}

    def log(self, number: int, logs: Mapping[str, Any]) -> None:
        """Record numbers that a trainer logs, once however many doors hear of them.

        What is no number is left out, and said once.
        """
        if logs is self._logged:
            return
        self._logged = logs
        # Past the step that is being collected: a trainer may log in the middle of one.
        with self._isolated("recording what the Trainer logs"):
            numbers, others = logged_numbers(logs)
            if self._epoch_at == number:  # it comes with whatever is logged
                numbers.pop(EPOCH, None)
            elif EPOCH in numbers:
                self._epoch_at = number
            for tag, why in others.items():
                self.recorder.absent(tag, why)
            self.recorder.write(number, [Scalar(tag, value) for tag, value in numbers.items()])

    # -- how instruments are called -----------------------------------------------------------------------------------

    def _tell(self, verb: str, *args: Any) -> None:
        """Call a verb of every instrument that is due, and has something to do there."""
        nothing = getattr(Instrument, verb)
        for instrument in self._due:
            if getattr(type(instrument), verb) is not nothing:
                self._guard(instrument, getattr(instrument, verb), self._step, *args)

    def _measure(self, owner: object, action: Callable[..., None], *args: Any) -> None:
        """Do what a hook is there for, on the clock."""
        with self._clock.running():
            self._guard(owner, action, *args)

    def _guard(self, owner: object, action: Callable[..., None], *args: Any) -> None:
        """Have an owner do something; one that raises is reported and, after repeated failures, switched off."""
        if self._failures[owner] >= MAX_FAILURES:
            return
        try:
            action(*args)
        except Exception:
            self._failures[owner] += 1
            name = getattr(owner, "name", type(owner).__name__)
            if self._failures[owner] == 1:
                logger.exception("%s failed; training goes on", name)
            if self._failures[owner] == MAX_FAILURES:
                logger.error("%s failed %d times: switched off", name, MAX_FAILURES)

    @contextlib.contextmanager
    def _isolated(self, doing: str) -> Iterator[None]:
        """Say once, with its traceback, what goes wrong inside; training goes on."""
        try:
            yield
        except Exception:  # noqa: BLE001  (said once, with its traceback)
            said = "telemetry failed while %s; training goes on"
            self._once.say(doing, said, doing, level=logging.ERROR, traceback=True)

    def _is_its_turn(self, instrument: Instrument) -> bool:
        turn = self._turns[instrument]
        self._turns[instrument] += 1
        return instrument.every > 0 and turn % instrument.every == 0

    def _replay(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        with self._clock.running(), self._isolated("reading what a trainer handed over"):
            self._reader.replay(inputs, outputs)

    def _unwatch(self) -> None:
        """Take all hooks off: nothing more of the step is seen, and the model may be run aside."""
        self._watch.close()
        self._reader.forget()

    def _end(self) -> None:
        self._unwatch()
        self._hide()
        self._hide = _nothing
        if self._leader is not None and self._leader._led is self:
            self._leader._led = None
        self._step = self._leader = None
        self._due = []

    def _make_step(self, number: int, evaluation_set: str = "") -> Step:
        setting = self.setting
        return Step(
            number=number,
            model=self.model,
            family=self.family,
            recorder=self.recorder,
            watch=self._watch,
            lockstep=self.lockstep,
            processor=setting.processor,
            tokenizer=self.tokenizer,
            sound=self.sound,
            rank=setting.rank,
            output_dir=setting.output_dir,
            autocast=setting.autocast,
            progress=setting.progress,
            world_size=setting.world_size,
            batches=setting.world_size // self._copies,
            repeats_batch=self._place > 0,
            evaluation_set=str(evaluation_set).replace("/", "|"),  # one part of a tag
            tokens_across_ranks=setting.tokens_across_ranks,
            max_grad_norm=setting.max_grad_norm,
            sentinel=self.sentinel,
        )

    def _backends(self) -> Sequence[Backend]:
        given = [backend for door in self._doors for backend in door.backends or ()]
        unique = list({id(backend): backend for backend in given}.values())
        alert_to = dict.fromkeys(address for door in self._doors for address in door.alert_to)
        return [*(unique or self.setting.default_backends()), *followers([*alert_to])]

    def _run(self, launch_id: str) -> Run:
        setting = self.setting
        chosen = next((door.logging_dir for door in self._doors if door.logging_dir), None)
        return Run(
            logging_dir=Path(chosen or setting.logging_dir) / setting.within,
            starting_step=setting.starting_step,
            name=setting.name,
            config=setting.config(),
            output_dir=setting.output_dir,
            rank=setting.rank,
            launch_id=launch_id,
            defaults=setting.defaults(),
        )


def _numbers(records: Sequence[Record]) -> dict[str, float]:
    return {record.tag: record.value for record in records if isinstance(record, Scalar)}

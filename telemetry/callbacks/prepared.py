"""Finds the Trainer that runs, and shows what it offers no callback: its batches, its gradients before clipping."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from types import FrameType
from typing import Any

from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from transformers import Trainer

from telemetry.probes.sentinel import Sentinel

_PREPARE = "_prepare_inputs"
_CLIP = "_clip_grad_norm"
_STEP = "training_step"


class PreparedBatches:
    """Shows what a Trainer gets from ``_prepare_inputs``, which for that long is wrapped on the Trainer itself.

    Not its data loader, which may be there to be read once and reads ahead; nor its arguments to the model, which label
    smoothing, ``compute_loss_func`` and many a ``compute_loss`` have taken the labels out of.

    Args:
        trainer: held weakly; None shows nothing.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self._trainer = None if trainer is None else weakref.ref(trainer)

    def __call__(self, see: Callable[[Any, Any], None]) -> Callable[[], None]:
        """Begin to call ``see(batch, label_names)``; return what ends it."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            return lambda: None
        return _Seeing(trainer, see).end


def within_step(
    trainer: Trainer | None,
    about_to_clip: Callable[[], None],
    cut_off: Callable[[], None],
    update: Callable[[Any, bool], None],
) -> Callable[[], None]:
    """Have a function called when all gradients are there and the Trainer is about to clip, another when it is cut off.

    Cut off is a step whose forward or backward pass, update, or one of its callbacks, is left by an exception, Ctrl-C
    among them: no callback is told. DeepSpeed updates inside of the backward pass: ``update(optimizer, done)`` is
    called before and after what it puts in the place of the optimizer steps.

    Returns:
        What ends that.
    """
    if trainer is None:
        return lambda: None
    stands: list[_Stand] = [
        _Clipping(trainer, about_to_clip),
        _Stepping(trainer, cut_off),
        _Telling(trainer.callback_handler, cut_off),
    ]
    if trainer.optimizer is not None:
        stands.append(_Updating(trainer.optimizer, cut_off))
    if isinstance(trainer.optimizer, DeepSpeedOptimizerWrapper):
        stands.append(_UpdatingInside(trainer.optimizer.optimizer, update))

    def end() -> None:
        for stand in stands:
            stand.end()

    return end


def every_step(trainer: Trainer | None, sentinel: Sentinel) -> Callable[[], None] | None:
    """Have a sentinel shown every loss, and what every step takes: until the Trainer logs, evaluates or saves.

    Returns:
        What ends that; None without a Trainer.
    """
    if trainer is None:
        return None
    stands: list[_Stand] = [_Keeping(trainer, sentinel.note)]
    if all(hasattr(trainer, kind.name) for kind in (_Loading, _Ending)):
        stands += [_Loading(trainer, sentinel.pace.load), _Ending(trainer, sentinel.pace.end)]

    def end() -> None:
        for stand in stands:
            stand.end()

    return end


class _Stand:
    """Takes the place of a method of a Trainer, its callback handler or its optimizer; of a copy it becomes its own."""

    name = ""

    def __init__(self, trainer: Any, see: Callable[..., None]) -> None:
        self._trainer = weakref.ref(trainer)
        self._see = see
        self._replaced = vars(trainer).get(self.name)
        self._own = getattr(trainer, self.name)
        setattr(trainer, self.name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._own(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_own":  # which is not there yet
            raise AttributeError(name)
        return getattr(self._own, name)  # what others have marked it with: a scheduler asks for its own

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._trainer(), self.name)

    def end(self) -> None:
        """Put back what was there, unless it is gone or another has come after it."""
        trainer = self._trainer()
        if trainer is None or vars(trainer).get(self.name) is not self:
            self._see = lambda *_: None
        elif self._replaced is None:
            delattr(trainer, self.name)
        else:
            setattr(trainer, self.name, self._replaced)


class _Seeing(_Stand):
    """In the place of what prepares a batch."""

    name = _PREPARE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prepared, trainer = super().__call__(*args, **kwargs), self._trainer()
        if trainer is not None and getattr(trainer.model, "training", True):  # else of an evaluation inside of the step
            self._see(prepared, getattr(trainer, "label_names", None) or ())
        return prepared


class _Stepping(_Stand):
    """In the place of what runs a microbatch forward and backward."""

    name = _STEP

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except BaseException:
            self._see()
            raise


class _Keeping(_Stand):
    """In the same place, for what it returns."""

    name = _STEP

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._own(*args, **kwargs)
        trainer = self._trainer()
        if trainer is not None:
            self._see(trainer.state.global_step + 1, loss)
        return loss


class _Loading(_Stand):
    """In the place of what waits for the microbatches of a step."""

    name = "get_batch_samples"

    def __init__(self, trainer: Any, see: Callable[..., None]) -> None:
        super().__init__(trainer, see)
        self._ids = getattr(trainer.model, "main_input_name", "input_ids")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        made = self._own(*args, **kwargs)
        if isinstance(made, tuple) and made and isinstance(made[0], list):
            self._see(began, made[0], self._ids)
        return made


class _Ending(_Stand):
    """In the place of what logs, evaluates and saves after a step."""

    name = "_maybe_log_save_evaluate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._see()
        return self._own(*args, **kwargs)


class _Telling(_Stepping):
    """In the place of what tells callbacks of an event."""

    name = "call_event"


class _Updating(_Stepping):
    """In the place of what updates the weights."""

    name = "step"


class _UpdatingInside(_Stand):
    """In the place of what updates the weights for DeepSpeed."""

    name = "step"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = self._trainer()
        self._see(optimizer, False)
        returned = super().__call__(*args, **kwargs)
        self._see(optimizer, True)
        return returned


class _Clipping(_Stand):
    """In the place of what clips gradients."""

    name = _CLIP

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._see()
        return super().__call__(*args, **kwargs)


def calling_trainer(model: Any) -> Trainer | None:
    """Return the Trainer that trains a model and has called this, through whatever lies between; None for none.

    Callbacks are not handed it.
    """
    trainers = trainers_in(sys._getframe(1))  # one that is being made has no model yet
    return next((trainer for trainer in trainers if getattr(trainer, "model", None) is model), None)


def trainers_in(frame: FrameType | None) -> Iterator[Trainer]:
    """Yield the Trainers whose methods a stack of calls is in, the innermost first.

    No frame of the user's is touched: before Python 3.13 a frame keeps the copy of its local variables that is asked
    for, and all that they hold alive.
    """
    while frame is not None:
        of, code = frame.f_globals.get("__name__", ""), frame.f_code
        if of.startswith("transformers.") and code.co_varnames[:1] == ("self",):
            held: Mapping[str, Any] = frame.f_locals
            owner = held.get("self")
            if isinstance(held, dict):
                held.clear()
            if isinstance(owner, Trainer):
                yield owner
        frame = frame.f_back

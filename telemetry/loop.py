"""The door for a training loop of one's own.

with Telemetry(model, "runs/voice", optimizer=optimizer, logging_steps=100) as telemetry:
    for batch in loader:
        with telemetry.step():
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.hooks import RemovableHandle

from telemetry.backends.base import Backend
from telemetry.backends.registry import default_backends
from telemetry.families.base import FamilyMaker
from telemetry.instruments.questions import choose
from telemetry.probes.quiet import is_compiled
from telemetry.session import DEFAULT_LOGGING_STEPS, Door, Session
from telemetry.setting import Setting, default_logging_dir, local_directory, run_config
from telemetry.sound import SoundPolicy


class Telemetry(Door):
    """Watches a training loop: step 1 and every ``logging_steps`` optimizer steps. Off a due step it looks at
    the clock.

    Use it as a context, and each optimizer step with all its microbatches as a ``with telemetry.step()`` inside.

    Args:
        model: what the loop calls; its DDP wrapper is taken off.
        output_dir: where the run keeps its files.
        optimizer: a ``torch.optim.Optimizer``: its step is where gradients and update ratios are measured. Without one
            call :meth:`gradients`, and there are no update ratios.
        logging_steps, backends, logging_dir, components, options, sound: as of
            :class:`telemetry.StrategicTelemetry`; files go to ``<output_dir>/runs/telemetry`` by default.
        processing_class: a tokenizer, or a processor with a ``tokenizer``: decodes token ids.
        config: what is to be shown of the run's configuration; secrets are taken out.
        name: of the run; by default the last part of ``output_dir``.
        starting_step: optimizer steps that an earlier attempt has made.
        alert_to, stop_on, health_rules, family: as of :class:`telemetry.StrategicTelemetry`; the loop asks
            :meth:`should_stop`.

    Raises:
        ValueError: when ``logging_steps`` is below 1, or for unknown components or options, or another optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        output_dir: str | Path,
        optimizer: Any = None,
        logging_steps: int = DEFAULT_LOGGING_STEPS,
        backends: Sequence[Backend] | None = None,
        logging_dir: str | Path | None = None,
        components: Sequence[str] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        sound: SoundPolicy | None = None,
        processing_class: Any = None,
        config: Mapping[str, Any] | None = None,
        name: str = "",
        starting_step: int = 0,
        alert_to: str | Sequence[str] | None = None,
        stop_on: str | Sequence[str] = (),
        health_rules: str | Path | Mapping[str, Any] | None = None,
        family: FamilyMaker | None = None,
    ) -> None:
        chosen = choose(components, options)
        super().__init__(logging_steps, backends, logging_dir, sound, chosen, alert_to, stop_on, health_rules, family)
        self.steps = starting_step
        self._model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper holds the one that steps
        if self._optimizer is not None and not isinstance(self._optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._setting = self._of_run(
            model, local_directory(output_dir, "output_dir"), processing_class, config or {}, name
        )
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Telemetry:
        self._session = Session.join(self, self._model, self, lambda: self._setting)
        return self

    def __exit__(self, *error: object) -> None:
        self._unhook()
        self._leave()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Hold one optimizer step: the forward and backward passes of all its microbatches, and its update.

        A step that is left by an exception is not shown.

        Raises:
            RuntimeError: outside of ``with Telemetry(...)``.
        """
        self.begin_step()
        try:
            yield
        except BaseException:
            self._unhook()
            self._joined().abandon_step(self)
            raise
        self.end_step()

    def gradients(self) -> None:
        """Measure the gradients now: all backward passes are done, a loss scaler has unscaled, clipping is to come."""
        self._see_gradients(clipped=False)

    def should_stop(self) -> bool:
        """Return whether something of ``stop_on`` has been found; ``stopped`` says what. Once a step, on every rank."""
        return self._is_to_stop()

    def saved(self, directory: str | Path) -> None:
        """Leave what is known of the run in a checkpoint that has been saved: ``health.json``."""
        self._joined().saved(Path(directory))

    def microbatch(self, batch: Mapping[str, Any]) -> None:
        """Say what the next forward pass runs on, where the loop takes labels out before it.

        Labels are read by their names in the batch. ``metadata`` in it, one mapping a sample, names samples: see
        :class:`telemetry.probes.forward.Microbatch`. Off a due step it does nothing.
        """
        if (session := self._led) is not None:
            session.prepare(batch)
            session.announce(batch.get("metadata") or ())

    def log(self, logs: Mapping[str, Any]) -> None:
        """Record numbers of the loop's own at its last step, named as the Trainer names them.

        ``loss`` is shown as ``train/loss``, ``eval_loss`` as ``eval/loss``.
        """
        self._joined().log(self.steps, dict(logs))

    def evaluated(self, batches: Any) -> None:
        """Let telemetry look at evaluation batches (a data loader): after an evaluation, and before the first step.

        What is measured before the first step is the baseline that later evaluations are compared with.
        """
        self._joined().evaluation(self, self.steps, batches)

    # -- for loops that have events instead of a body -----------------------------------------------------------------

    def begin_step(self) -> None:
        """Begin an optimizer step: see :meth:`step`."""
        session = self._joined()
        session.sentinel.pace.begin()
        if not self.is_due(self.steps + 1):
            return
        self._gradients_seen = False
        session.begin_step(self, self.steps + 1)
        if self._optimizer is not None:
            self._handles = [
                self._optimizer.register_step_pre_hook(lambda optimizer, *_: self.before_update(optimizer)),
                self._optimizer.register_step_post_hook(lambda optimizer, *_: self.after_update(optimizer)),
            ]

    def before_update(self, optimizer: Any) -> None:
        """Look at the gradients, unless :meth:`gradients` has, and at the weights before the optimizer steps."""
        self._see_gradients(clipped=None)
        if (session := self._led) is not None:
            session.tell("before_update", optimizer)

    def after_update(self, optimizer: Any) -> None:
        """Look at the weights after the optimizer has stepped."""
        if (session := self._led) is not None:
            session.tell("after_update", optimizer)

    def end_step(self) -> None:
        """End an optimizer step: see :meth:`step`."""
        self.steps += 1
        self._unhook()
        if (session := self._led) is not None:
            session.end_step()
        self._joined().sentinel.pace.end()

    def _joined(self) -> Session:
        if self._session is None:
            raise RuntimeError("telemetry has not begun: use it inside of `with Telemetry(...) as telemetry:`")
        return self._session

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _of_run(
        self, model: nn.Module, output_dir: Path, processor: Any, config: Mapping[str, Any], name: str
    ) -> Setting:
        parameter = next(self._model.parameters(), torch.empty(0))
        return Setting(
            output_dir=output_dir,
            logging_dir=default_logging_dir(output_dir),
            default_backends=lambda: default_backends(()),
            config=lambda: run_config(config, self._model, {}),
            name=name or output_dir.name,
            starting_step=self.steps,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            device=parameter.device,
            compiled=is_compiled(model),
            processor=processor,
        )

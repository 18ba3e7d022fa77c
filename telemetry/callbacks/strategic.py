"""All strategic callbacks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from telemetry.backends.base import Backend
from telemetry.callbacks.shared_attention import SharedAttentionLoggerCallback
from telemetry.callbacks.trainer import DEFAULT_LOGGING_STEPS, StrategicCallback, is_due
from telemetry.callbacks.zero_shot import ZeroShotVerificationLoggerCallback
from telemetry.instruments.inputs import InputLoggerCallback
from telemetry.instruments.outputs import OutputLoggerCallback
from telemetry.sound import SoundPolicy

COMPONENTS: dict[str, type[StrategicCallback]] = {
    "inputs": InputLoggerCallback,
    "outputs": OutputLoggerCallback,
    "shared_attention": SharedAttentionLoggerCallback,
    "zero_shot": ZeroShotVerificationLoggerCallback,
}


class StrategicTelemetry(TrainerCallback):
    """One callback that holds one for each component and passes every event on to them.

    Args:
        components: which of :data:`COMPONENTS`; all by default.
        logging_steps, backends, logging_dir, sound: as for each callback alone.
        options: further arguments of single components: ``{"shared_attention": {"layers": [0, 5]}}``.

    Raises:
        ValueError: for a component that does not exist, options for one that is not chosen, or no component at all.
    """

    def __init__(
        self,
        components: Sequence[str] | None = None,
        logging_steps: int = DEFAULT_LOGGING_STEPS,
        backends: Sequence[Backend] | None = None,
        logging_dir: str | Path | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        sound: SoundPolicy | None = None,
    ) -> None:
        chosen = list(COMPONENTS) if components is None else list(dict.fromkeys(components))
        unknown = [name for name in chosen if name not in COMPONENTS]
        if unknown or not chosen:
            raise ValueError(f"unknown components {unknown}: choose from {', '.join(COMPONENTS)}")
        given = {name: dict(arguments) for name, arguments in (options or {}).items() if arguments}
        unknown = [name for name in given if name not in chosen]
        if unknown:
            raise ValueError(f"options for {unknown}, which are not among the components {chosen}")
        self.members = [
            COMPONENTS[name](logging_steps, backends, logging_dir, sound=sound, **given.get(name, {}))
            for name in chosen
        ]
        self.logging_steps = logging_steps
        self.stepping = False

    def is_due(self, step: int) -> bool:
        """Whether a step is measured."""
        return is_due(step, self.logging_steps)

    def _pass_on(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for member in self.members:
            getattr(member, event)(args, state, control, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping = False  # a training that ended in an exception may have left it on
        self._pass_on("on_train_begin", args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_due(state.global_step + 1, self.logging_steps):
            self.stepping = True
            self._pass_on("on_step_begin", args, state, control, **kwargs)

    def on_microbatch(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A microbatch's metadata, from trainers that take it out of the batch."""
        if self.stepping:
            self._pass_on("on_microbatch", args, state, control, **kwargs)

    def on_outputs(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A microbatch's forward pass, from trainers that show it."""
        if self.stepping:
            self._pass_on("on_outputs", args, state, control, **kwargs)

    def on_gradients(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients before clipping, from trainers that offer them."""
        if self.stepping:
            self._pass_on("on_gradients", args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stepping:
            self._pass_on("on_pre_optimizer_step", args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stepping:
            self._pass_on("on_optimizer_step", args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stepping:
            self.stepping = False
            self._pass_on("on_step_end", args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_log", args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_evaluate", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_train_end", args, state, control, **kwargs)

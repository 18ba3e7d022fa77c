"""Shared attention: do gradients reach every part of the model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from telemetry.callbacks.trainer import StrategicCallback
from telemetry.instruments.activations import ActivationLog
from telemetry.instruments.attention import DEFAULT_QUERIES, AttentionLog
from telemetry.instruments.gradients import GradientLog
from telemetry.probes.forward import Microbatch


class SharedAttentionLoggerCallback(StrategicCallback):
    """Attention of a few layers, their feed-forward networks, and gradients of every part.

    Args:
        args, kwargs: ``logging_steps``, ``backends``, ``logging_dir``, as of every strategic callback.
        layers: indices of the layers to look into; by default the first, the middle and the last.
        queries: how many positions of each sequence have their attention looked at.
        text_audio_cosine: also measure ``gradients/text_audio_cosine``, for a forward and two backward passes more on
            every due step.

    Raises:
        ValueError: for a layer below 0, or fewer than one query.
    """

    def __init__(
        self,
        *args: Any,
        layers: Sequence[int] | None = None,
        queries: int = DEFAULT_QUERIES,
        text_audio_cosine: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._gradients = GradientLog(text_audio_cosine)
        self._forward_logs = (AttentionLog(layers, queries), ActivationLog(layers))

    def begin_step(self) -> None:
        """Watch attention and feed-forward networks; forget the gradients of the step before."""
        for log in (*self._forward_logs, self._gradients):
            self.session.guard(log, log.begin, self.session)

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """A microbatch is about to run."""
        for log in (*self._forward_logs, self._gradients):
            self.session.guard(log, log.observe_inputs, microbatch)

    def release(self) -> None:
        """Take all hooks off."""
        for log in self._forward_logs:
            log.release()

    def finish_step(self) -> None:
        """Hand over what was measured."""
        for log in (*self._forward_logs, self._gradients):
            self.session.guard(log, log.finish)

    def observe_gradients(self, model: nn.Module, clipped: bool) -> None:
        """All gradients are there."""
        self.session.guard(self._gradients, self._gradients.observe_gradients, model, clipped)

    def before_update(self, model: nn.Module, optimizer: Any) -> None:
        """The optimizer is about to step."""
        self.session.guard(self._gradients, self._gradients.before_update, model, optimizer)

    def after_update(self, model: nn.Module, optimizer: Any) -> None:
        """The optimizer has stepped."""
        self.session.guard(self._gradients, self._gradients.after_update, model, optimizer)

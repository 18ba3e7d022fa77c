"""Shared attention: do gradients reach every part of the model?"""

from __future__ import annotations

from torch import nn

from telemetry.callbacks.base import StrategicCallback
from telemetry.measures.gradients import squared_norms
from telemetry.probes.gradients import gradients_by_group
from telemetry.records import Norm

CLIPPED_NOTE = "Measured after clipping: this Trainer shows its gradients no earlier."


class SharedAttentionLoggerCallback(StrategicCallback):
    """Norms of all gradients and of each group, before clipping where the trainer offers that."""

    def observe_gradients(self, model: nn.Module, clipped: bool) -> None:
        """Add ``gradients/total_norm`` and ``gradients/<group>/norm``."""
        if self.session.family is None:
            return
        note = CLIPPED_NOTE if clipped else ""
        if clipped:
            self.session.recorder.say_once("clipped", "gradient norms are measured after clipping on this Trainer")
        recorder = self.session.recorder
        groups = gradients_by_group(model, self.session.family, self.session.is_main)
        if not groups and self.session.is_main:
            recorder.absent("gradients/total_norm", "no parameter has a gradient")
        for group, gradients in groups.items():
            squares = squared_norms(gradients).sum()
            recorder.metric(f"gradients/{group}/norm", Norm(squares), note)
            recorder.metric("gradients/total_norm", Norm(squares), note)

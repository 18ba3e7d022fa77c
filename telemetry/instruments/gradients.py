"""Everything under ``gradients/``: do gradients reach every part, and does the optimizer move it?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telemetry.delivery.recorder import Build, Emitter
from telemetry.instruments.base import Instrument, Step
from telemetry.instruments.gradient_tables import LargestGradients, MissingGradients, ParameterSums
from telemetry.measures.gradients import ABSMAX, NONFINITE, SQUARES, ZEROS, gradient_statistics
from telemetry.probes.gradients import (
    TrainedParameter,
    UpdateProbe,
    out_of_reach,
    own_gradients,
    steps_by_itself,
    trained_parameters,
)
from telemetry.probes.sharding import gradient_of, is_offloaded
from telemetry.records import Mean, Norm, NormRatio, Scalar, Sum

CLIPPED_NOTE = "Measured after clipping: this Trainer shows its gradients no earlier."
NOTES = {
    False: "",
    True: CLIPPED_NOTE,
    None: "Measured as the optimizer stepped: after clipping, where the loop clips.",
}
TOTAL = "gradients/total_norm"
SUMS = "gradients/parameters"
PARTS_OF_A_LAYER = frozenset({"shared_attention", "text_ffn", "audio_ffn"})
NONE_KEPT = "no parameter has a gradient when the optimizer is to step (one that steps in the backward pass keeps none)"
OFFLOADED = "DeepSpeed has moved them to the host, and to look there would hold up the step"
STEPPED_BY_ITSELF = "DeepSpeed's optimizer has stepped before telemetry could look"


class GradientInstrument(Instrument):
    """Measures the gradients of a due step once, before clipping where the trainer offers that.

    Numbers are those of all ranks; the table of missing gradients is rank 0's. Of a loss that a ``GradScaler`` has
    scaled the gradients are taken back to the loss's own size: offer them (``on_gradients``) before unscaling.
    """

    def __init__(self) -> None:
        self._largest = LargestGradients()
        self._missing = MissingGradients()
        self._parameters: Sequence[TrainedParameter] = ()  # all that are trained
        self._values: dict[int, int] = {}  # index of a parameter → values in this rank's part of its gradient
        self._tensors: dict[str, Tensor] = {}  # statistics of these parts, and what their loss was multiplied by
        self._clipped: bool | None = None
        self._scaled = True
        self._update: UpdateProbe | None = None

    def begin(self, step: Step) -> None:
        """A due step begins: with nothing of the one before."""
        self._parameters, self._values, self._tensors = (), {}, {}
        self._clipped = self._update = None

    def gradients(self, step: Step, clipped: bool | None) -> None:
        """Sweep over all gradients, once."""
        reason = out_of_reach(step.model)
        if reason is not None:
            step.recorder.absent(TOTAL, reason)
            return
        if clipped:
            step.recorder.say_once("clipped", "gradient norms are measured after clipping on this Trainer")
        self._scaled = step.scaled
        self._parameters = trained_parameters(step.model, step.family)
        found = own_gradients(self._parameters, step.is_main)
        if found:
            self._values = {index: part.numel() for index, part in found.items()}
            self._tensors = {"statistics": gradient_statistics(list(found.values()))}
            self._clipped = clipped
        if step.is_main:
            self._look_for_missing(step, bool(found))

    def before_update(self, step: Step, optimizer: Any) -> None:
        """Copy some values of every parameter; see which the optimizer holds."""
        if not self._parameters or optimizer is None:
            return
        self._note_scale(optimizer)
        # Of no parameter at hand: whatever moves them has done so already, or nothing.
        if all(gradient_of(one.tensor) is None for one in self._parameters):
            step.recorder.absent("gradients/<group>/update_ratio", _why_none(self._parameters))
            return
        if step.is_main:
            self._missing.see_optimizer(step.number, self._parameters, optimizer, step.recorder)
        self._update = UpdateProbe(dict(enumerate(self._parameters)), step.is_main)

    def after_update(self, step: Step, optimizer: Any) -> None:
        """Compare, and let go of the copies."""
        probe, self._update = self._update, None
        if probe is None:
            return
        weights, norms = probe.compare()
        if not weights:
            return
        shares = [(self._parameters[index].group, weight) for index, weight in weights]

        def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
            sums = defaultdict[str, np.ndarray](lambda: np.zeros(2))
            for (group, weight), norms in zip(shares, host["norms"].double().numpy(), strict=True):
                sums[group] += norms * weight
            for group, (moved, before) in sums.items():
                emit.metric(f"gradients/{group}/update_ratio", NormRatio(moved, before))

        step.recorder.defer({"norms": norms}, build)

    def finish(self, step: Step) -> None:
        """Send the sweep on its way, and let go of everything."""
        parameters = self._parameters
        if self._tensors:
            step.recorder.defer(self._tensors, _metrics(parameters, self._values, self._clipped))
            if step.max_grad_norm > 0 and self._clipped is False:
                step.recorder.show({}, partial(_show_clipping, step.max_grad_norm))
            if step.is_main:
                self._show_largest(step)
        self.begin(step)
        if step.is_main and (missing := self._missing.table(parameters)) is not None:
            step.recorder.record(missing)

    def _look_for_missing(self, step: Step, found: bool) -> None:
        if found:
            self._missing.see_gradients(step.number, self._parameters, step.recorder)
        else:
            step.recorder.absent(TOTAL, _why_none(self._parameters))

    def _note_scale(self, optimizer: Any) -> None:
        """Until clipping or the Trainer's own norm takes it out, gradients carry the scale."""
        scale = getattr(getattr(optimizer, "scaler", None), "_scale", None)
        if steps_by_itself(self._parameters):  # a number, in what DeepSpeed puts in the place of an optimizer
            scale = torch.tensor(float(getattr(optimizer, "loss_scale", 1.0)))
        if self._tensors and self._scaled and self._clipped is False and isinstance(scale, Tensor):
            self._tensors["scale"] = scale.detach().clone()  # the scaler changes it in place

    def _show_largest(self, step: Step) -> None:
        names, largest = [(one.name, one.group) for one in self._parameters], self._largest

        def show(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            sums = emit.merged(SUMS)
            if sums is not None:
                emit.record(largest.table(names, sums.components))

        step.recorder.show({}, show)


def _why_none(parameters: Sequence[TrainedParameter]) -> str:
    if any(is_offloaded(one.tensor) for one in parameters):
        return OFFLOADED
    return STEPPED_BY_ITSELF if steps_by_itself(parameters) else NONE_KEPT


def _show_clipping(most: float, _host: Mapping[str, Tensor], emit: Emitter) -> None:
    """What torch multiplies the gradients by where it clips: of such as overflow nothing that is one number."""
    norm = total.result() if (total := emit.merged(TOTAL)) is not None else None
    if norm is not None and math.isfinite(norm):
        emit.record(Scalar("gradients/clip_coefficient", min(1.0, most / (norm + 1e-6))))


def _metrics(parameters: Sequence[TrainedParameter], values: Mapping[int, int], clipped: bool | None) -> Build:
    """What makes metrics of the host values of a sweep over this rank's parts of gradients."""
    layout, note = [(one.group, one.layer) for one in parameters], NOTES[clipped]
    indices = list(values)

    def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
        scale = float(host["scale"]) if "scale" in host else 1.0
        columns = np.zeros((5, len(layout)))
        columns[:4, indices] = host["statistics"].double().numpy().T
        columns[4, indices] = list(values.values())
        columns[SQUARES] /= scale**2
        columns[ABSMAX] /= scale
        emit.metric(SUMS, ParameterSums(*(torch.from_numpy(column) for column in columns)))
        groups, layers = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for index in indices:
            group, layer = layout[index]
            groups[group].append(index)
            if layer is not None and group in PARTS_OF_A_LAYER:
                layers[f"gradients/layer_{layer}/{group}/norm"].append(index)
        emit.metric(TOTAL, Norm(columns[SQUARES, indices].sum()), note)
        for group, own in groups.items():
            sums = columns[:, own].sum(axis=1).tolist()
            emit.metric(f"gradients/{group}/norm", Norm(sums[SQUARES]), note)
            emit.metric(f"gradients/{group}/zero_fraction", Mean(sums[ZEROS], sums[4]), note)
            emit.metric(f"gradients/{group}/nonfinite", Sum(sums[NONFINITE]), note)
        for tag, own in layers.items():
            emit.metric(tag, Norm(columns[SQUARES, own].sum()), note)

    return build

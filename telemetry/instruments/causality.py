"""Set-up: does a position see what comes after it? The model is run aside with the later half of its batch changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from telemetry.families.base import Family, each_logits
from telemetry.instruments.asked import FirstStep
from telemetry.instruments.base import Step
from telemetry.probes.forward import Microbatch, Reading, streams_of, watched_aside
from telemetry.probes.quiet import set_aside
from telemetry.records import Max

TAG = "setup/causality/earlier_changes"


class CausalityInstrument(FirstStep):
    """Two forward passes on the first due step's last microbatch, together with all ranks that they need."""

    def __init__(self) -> None:
        super().__init__()
        self._last: Microbatch | None = None

    def begin(self, step: Step) -> None:
        """Begin with nothing."""
        super().begin(step)
        self._last = None

    def outputs(self, step: Step, microbatch: Microbatch, reading: Reading) -> None:
        """Keep the microbatch, where what it is to predict is the next token."""
        predicts = any(stream.alignment == "shifted" and stream.each is None for stream in reading.streams)
        self._last = microbatch if self.looks and predicts else None

    def finish(self, step: Step) -> None:
        """Compare, and let go of it."""
        microbatch, self._last = self._last, None
        if not self.looks:
            return
        with set_aside(step.model):
            runs = _runs(step.family, microbatch)
            found: list[dict[str, Tensor]] = []
            why = ""
            for name in ("own", "changed"):
                agreed = step.lockstep.agree(runs is not None and len(found) == ("own", "changed").index(name), TAG)
                if not agreed or runs is None or microbatch is None or step.family is None:
                    step.recorder.absent(TAG, f"the batch could not be run a second time{why}")
                    return
                try:
                    found.append(dict(_logits(step, step.family, microbatch, runs[name])))
                except Exception as error:  # noqa: BLE001  (a model that cannot do without its labels; ranks go on)
                    why = f": {type(error).__name__}: {error}"
            if len(found) < 2:
                step.recorder.absent(TAG, f"the batch could not be run a second time{why}")
                return
        cut = runs["own"]["input_ids"].shape[1] // 2 if runs is not None else 0
        for name in found[0].keys() & found[1].keys():
            apart = (found[0][name].float() - found[1][name].float()).abs().flatten(2).amax(-1)
            earlier, later = apart[:, :cut].max(), apart[:, cut:].max()
            step.recorder.metric(TAG, Max(torch.where(later > 0, earlier / later.clamp(min=1e-30), 0.0)))


def _runs(family: Family | None, microbatch: Microbatch | None) -> dict[str, dict[str, Any]] | None:
    """The batch, and the batch with other tokens in its later half; None where that cannot be made."""
    if family is None or microbatch is None or microbatch.view is None:
        return None
    audio = microbatch.view.audio
    if audio is not None and audio.embedded is not None:  # sound that the model encodes in its pass
        return None
    view, inputs = microbatch.view, microbatch.inputs
    given = inputs.get("input_ids")
    if not isinstance(given, Tensor) or given.shape != view.input_ids.shape or given.shape[1] < 4:
        return None
    swaps = family.swaps_references and view.audio is not None
    own = family.swap_reference(inputs, None) if swaps else _without_labels(inputs)
    cut = given.shape[1] // 2
    later = torch.arange(given.shape[1], device=given.device) >= cut
    changed = dict(own)
    if swaps and view.audio is not None:
        codes = view.audio.codes
        changed = family.swap_reference(inputs, torch.where(later[:, None], (codes + 1) % view.audio.vocabulary, codes))
    first = given.gather(1, view.text.long().argmax(1, keepdim=True))
    changed["input_ids"] = torch.where(later & view.text & view.real, first, changed.get("input_ids", given))
    return {"own": own, "changed": changed}


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Nor with what else is there for the loss alone."""
    kept = {
        name: value for name, value in inputs.items() if not any(part in name for part in ("label", "loss", "items"))
    }
    return kept | {"use_cache": False}


def _logits(
    step: Step, family: Family, microbatch: Microbatch, inputs: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Name and logits ``[batch, sequence, ...]`` of every stream that covers all positions."""
    shape = microbatch.view.input_ids.shape if microbatch.view is not None else ()
    with torch.no_grad(), watched_aside(family, microbatch.view) as seen:
        outputs = step.model(**inputs)
        for stream, _ in each_logits(streams_of(family, {**microbatch.known, **inputs}, outputs, seen)):
            if stream.rows is None and stream.each is None and stream.logits.shape[:2] == shape:
                yield "/".join(stream.names), stream.logits.detach()

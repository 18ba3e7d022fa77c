"""Set-up: does a position see what comes after it, or another sample? The model is run aside on changed batches."""

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

EARLIER, ALONE = "setup/causality/earlier_changes", "setup/alone/changes"
RUNS = {"own": EARLIER, "later": EARLIER, "others": ALONE}
"""What is run → what says that it could not be: the batch, and the batch changed in two ways."""
ONE_SAMPLE = "the batch has one sample"


class CausalityInstrument(FirstStep):
    """Three forward passes on the first due step's last microbatch, together with all ranks that they need.

    One has other tokens in the later half of every sample; one has other samples in every other row, and other tokens
    at padding: what is before the half, and what is in the rows that are kept, must come out as it did.
    """

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
        found: dict[str, dict[str, Tensor]] = {}
        with set_aside(step.model):
            runs = _runs(step.family, microbatch) or {}
            why = ""
            for name, tag in RUNS.items():
                able = name in runs and not why
                if not step.lockstep.agree(able, tag) or not able or microbatch is None or step.family is None:
                    alone = bool(runs) and not why and name not in runs
                    step.recorder.absent(tag, ONE_SAMPLE if alone else f"the batch could not be run a second time{why}")
                    continue
                try:
                    found[name] = dict(_logits(step, step.family, microbatch, runs[name]))
                except Exception as error:  # noqa: BLE001  (a model that cannot do without its labels; ranks go on)
                    why = f": {type(error).__name__}: {error}"
                    step.recorder.absent(tag, f"the batch could not be run a second time{why}")
        if microbatch is None or microbatch.view is None or "own" not in found:
            return
        real = microbatch.view.real
        row = torch.arange(real.shape[0], device=real.device)[:, None] % 2 == 0
        early = (torch.arange(real.shape[1], device=real.device) < _cut(real)).expand_as(real)
        # Of padding nothing is said: where a query sees no key at all, it may be given any of them.
        for name, kept, changed in (("later", early & real, ~early & real), ("others", row & real, ~row & real)):
            for stream in found["own"].keys() & found.get(name, {}).keys():
                apart = (found["own"][stream].float() - found[name][stream].float()).abs().flatten(2).amax(-1)
                still, moved = (torch.where(part, apart, 0.0).max() for part in (kept, changed))
                ratio = torch.where(moved > 0, still / moved.clamp(min=1e-30), 0.0)
                step.recorder.metric(RUNS[name], Max(ratio))


def _cut(positions: Tensor) -> int:
    return positions.shape[1] // 2


def _runs(family: Family | None, microbatch: Microbatch | None) -> dict[str, dict[str, Any]] | None:
    """The batch, and with other tokens in places; None where that cannot be made."""
    if family is None or microbatch is None or microbatch.view is None:
        return None
    view, given = microbatch.view, microbatch.inputs.get("input_ids")
    if view.audio is not None and view.audio.embedded is not None:  # sound that the model encodes in its pass
        return None
    if not isinstance(given, Tensor) or given.shape[:2] != view.input_ids.shape or given.shape[1] < 4:
        return None
    swaps = family.swaps_references and view.audio is not None
    own = family.swap_reference(microbatch.inputs, None) if swaps else _without_labels(microbatch.inputs)

    def changed(places: Tensor) -> dict[str, Any]:
        made = dict(own)
        if swaps and view.audio is not None:
            codes = torch.where(places.unsqueeze(-1), (view.audio.codes + 1) % view.audio.vocabulary, view.audio.codes)
            made = family.swap_reference(microbatch.inputs, codes)
        if given.dim() == 2:
            first = given.gather(1, view.text.long().argmax(1, keepdim=True))
            made["input_ids"] = torch.where(places & (view.text | ~view.real), first, made.get("input_ids", given))
        return made

    later = (torch.arange(given.shape[1], device=given.device) >= _cut(given)).expand_as(view.real)
    other = torch.arange(given.shape[0], device=given.device)[:, None] % 2 == 1
    runs = {"own": own, "later": changed(later & view.real)}
    return runs if given.shape[0] < 2 else {**runs, "others": changed(other | ~view.real)}


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

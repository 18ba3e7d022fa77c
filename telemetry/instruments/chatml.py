"""ChatML verification: is every sample a well-formed voice-cloning prompt?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import AudioView, BatchView
from telemetry.families.chat import ChatFormat
from telemetry.families.voice_prompt import CHECKS, ClipLayout, VoicePrompt, clips_of, violations
from telemetry.instruments.base import Instrument, Step
from telemetry.probes.forward import Microbatch
from telemetry.records import Cell, Mean, Sum, Table

SHOWN_ROWS = 50
COLUMNS = ("sample", "speaker", "compliant", "violations")
COMPLIANCE = "zero_shot/chatml/compliance"
UNCHECKED = {
    "target_text": "no sample's metadata has a target transcript",
    "language": "no sample's metadata names its language",
    "delay_pattern": "placeholders and codes do not belong together",
}


class ChatMLInstrument(Instrument):
    """Compliance of every sample of a step, violations by kind, and a table of them."""

    def __init__(self) -> None:
        self._rows: list[tuple[Cell, ...]] = []
        self._languages_named = False

    def begin(self, step: Step) -> None:
        """A due step begins."""
        self._rows = []

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Have one microbatch checked in the background."""
        view, chat = microbatch.view, ChatFormat.of(step.tokenizer)
        if view is None or view.audio is None:
            step.recorder.absent(COMPLIANCE, "the batch has no audio")
        elif chat is None:
            step.recorder.absent(COMPLIANCE, "the tokenizer has no ChatML header tokens")
        else:
            self._check(step, microbatch, view, view.audio, chat)

    def finish(self, step: Step) -> None:
        """Show what the checks of all microbatches found, the violations first."""
        rows, self._rows = self._rows, []

        def build(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            if rows:
                shown = sorted(rows, key=lambda row: row[2] == "yes")[:SHOWN_ROWS]
                emit.record(Table("zero_shot/chatml", COLUMNS, tuple(shown)))

        step.recorder.show({}, build)

    def _check(self, step: Step, microbatch: Microbatch, view: BatchView, audio: AudioView, chat: ChatFormat) -> None:
        size = view.input_ids.shape[0]
        names = [microbatch.sample_id(row) for row in range(size)]
        metadata = [microbatch.metadata[row] if row < len(microbatch.metadata) else {} for row in range(size)]
        rows, tokenizer = self._rows, step.tokenizer
        layout = ClipLayout(audio.bos_id, audio.eos_id, audio.delay)

        def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
            self._languages_named |= any(sample.get("language") for sample in metadata)
            found = [violations(_prompt(host, row, of, chat, tokenizer, layout)) for row, of in enumerate(metadata)]
            if not self._languages_named:  # an optional field: it is missing where other samples of the data have it
                found = [{**by_kind, "language": None} for by_kind in found]
            compliant = [not any(by_kind.values()) for by_kind in found]
            emit.metric(COMPLIANCE, Mean(sum(compliant), len(compliant)))
            _count(found, emit)
            for name, sample, kept, by_kind in zip(names, metadata, compliant, found, strict=True):
                listed = "; ".join(_listed(by_kind))
                rows.append((name, sample.get("speaker"), "yes" if kept else "no", listed))

        step.recorder.defer(_tensors(view, audio), build)


def _listed(by_kind: Mapping[str, list[str] | None]) -> Iterator[str]:
    for kind, found in by_kind.items():
        yield from (f"{kind.replace('_', ' ')}: {what}" for what in found or ())


def _count(found: Sequence[Mapping[str, list[str] | None]], emit: Emitter) -> None:
    """How many samples break each rule, for the rules that could be checked."""
    for kind in CHECKS:
        checked = [of_kind for by_kind in found if (of_kind := by_kind[kind]) is not None]
        tag = f"zero_shot/chatml/violations/{kind}"
        if checked:
            emit.metric(tag, Sum(sum(map(bool, checked))))
        else:
            emit.absent(tag, UNCHECKED[kind])


def _tensors(view: BatchView, audio: AudioView) -> dict[str, Tensor]:
    # Codes fit in 32 bits: half of what has to come to the host.
    codes = audio.codes.to(torch.int32)
    return {
        "ids": view.input_ids,
        "real": view.real,
        "reference": audio.reference,
        "target": audio.target,
        "starts": audio.starts,
        "codes": codes if audio.embedded is None else codes.masked_fill(audio.embedded[..., None], -1),
        "frames": audio.frames,
        "placeholders": audio.placeholders,
    }


def _prompt(
    host: Mapping[str, Tensor],
    row: int,
    metadata: Mapping[str, Any],
    chat: ChatFormat,
    tokenizer: Any,
    layout: ClipLayout,
) -> VoicePrompt:
    real = host["real"][row].numpy()

    def own(name: str) -> np.ndarray:
        values: np.ndarray = host[name][row].numpy()
        return values[real]

    target = own("target")
    clips = clips_of(own("starts"), own("reference") | target, target, own("codes"))
    frames, placeholders = int(host["frames"][row]), int(host["placeholders"][row])
    return VoicePrompt(own("ids").tolist(), clips, frames, placeholders, metadata, chat, tokenizer, layout)

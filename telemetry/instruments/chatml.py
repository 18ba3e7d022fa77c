"""ChatML verification: is every sample a well-formed voice-cloning prompt?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import NO_LABELS, AudioView, BatchView
from telemetry.families.chat import ChatFormat
from telemetry.families.voice_prompt import CHECKS, ClipLayout, VoicePrompt, clips_of, violations
from telemetry.instruments.base import Instrument, Step
from telemetry.probes.forward import Microbatch
from telemetry.records import Cell, Metric, PresentSum, Sum, Table

SHOWN_ROWS = 50
COLUMNS = ("sample", "speaker", "compliant", "violations")
COMPLIANCE = "zero_shot/chatml/compliance"
LANGUAGE = "zero_shot/chatml/violations/language"
UNCHECKED = {
    "target_text": "no sample's metadata has a target transcript",
    "language": "no sample's metadata names its language",
    "delay_pattern": "placeholders and codes do not belong together",
}


Found = Mapping[str, list[str] | None]


class Compliance(Metric):
    """The share of samples without violations.

    A missing language is one only where others name theirs, in whichever microbatch, on whichever rank or before.

    Args:
        strictly, otherwise: compliant samples where a language is asked for, and where it is not.
        samples: their number.
        named: 1 where any sample has named its language, else 0.
    """

    ops = ("sum", "sum", "sum", "max")

    def _result(  # type: ignore[override]
        self, strictly: np.ndarray, otherwise: np.ndarray, samples: np.ndarray, named: np.ndarray
    ) -> float | None:
        return float(strictly if named else otherwise) / float(samples) if samples > 0 else None


class ChatMLInstrument(Instrument):
    """Compliance of every sample of a step, violations by kind, and a table of them."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Cell, Found]] = []
        self._languages_named = False

    def begin(self, step: Step) -> None:
        """A due step begins."""
        self._found = []

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Have one microbatch checked in the background."""
        view, chat = microbatch.view, ChatFormat.of(step.tokenizer)
        if not step.says(COMPLIANCE):
            return
        if view is None or view.audio is None:
            step.recorder.absent(COMPLIANCE, "the batch has no audio")
        elif not view.audio.labelled:
            step.recorder.absent(COMPLIANCE, NO_LABELS)
        elif chat is None:
            step.recorder.absent(COMPLIANCE, "the tokenizer has no ChatML header tokens")
        else:
            self._check(step, microbatch, view, view.audio, chat)

    def finish(self, step: Step) -> None:
        """Show what the checks of all microbatches found, the violations first."""
        found, self._found = self._found, []

        def build(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            merged = emit.merged(COMPLIANCE)
            named = bool(merged.components[-1]) if merged is not None else self._languages_named
            if merged is not None and not named:
                emit.absent(LANGUAGE, UNCHECKED["language"])
            rows = [_row(name, speaker, by_kind if named else _unasked(by_kind)) for name, speaker, by_kind in found]
            if rows:
                shown = sorted(rows, key=lambda row: row[2] == "yes")[:SHOWN_ROWS]
                emit.record(Table("zero_shot/chatml", COLUMNS, tuple(shown)))

        step.recorder.show({}, build)

    def _check(self, step: Step, microbatch: Microbatch, view: BatchView, audio: AudioView, chat: ChatFormat) -> None:
        size = view.input_ids.shape[0]
        names = [microbatch.sample_id(row) for row in range(size)]
        metadata = [microbatch.metadata[row] if row < len(microbatch.metadata) else {} for row in range(size)]
        of_step, tokenizer = self._found, step.tokenizer
        layout = ClipLayout(audio.bos_id, audio.eos_id, audio.delay)

        def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
            self._languages_named |= any(sample.get("language") for sample in metadata)
            found = [violations(_prompt(host, row, of, chat, tokenizer, layout)) for row, of in enumerate(metadata)]
            strictly, otherwise = (
                sum(not any(of(by_kind).values()) for by_kind in found) for of in (lambda one: one, _unasked)
            )
            emit.metric(COMPLIANCE, Compliance(strictly, otherwise, size, self._languages_named))
            _count(found, self._languages_named, emit)
            speakers = (sample.get("speaker") for sample in metadata)
            of_step.extend(zip(names, speakers, found, strict=True))

        step.recorder.defer(_tensors(view, audio), build)


def _unasked(by_kind: Found) -> Found:
    """The same where no sample names its language: it is an optional field."""
    return {**by_kind, "language": None}


def _row(name: str, speaker: Cell, by_kind: Found) -> tuple[Cell, ...]:
    return name, speaker, "no" if any(by_kind.values()) else "yes", "; ".join(_listed(by_kind))


def _listed(by_kind: Found) -> Iterator[str]:
    for kind, found in by_kind.items():
        yield from (f"{kind.replace('_', ' ')}: {what}" for what in found or ())


def _count(found: Sequence[Found], named: bool, emit: Emitter) -> None:
    """How many samples break each rule, for the rules that could be checked."""
    for kind in CHECKS:
        checked = [of_kind for by_kind in found if (of_kind := by_kind[kind]) is not None]
        tag = f"zero_shot/chatml/violations/{kind}"
        if tag == LANGUAGE:
            emit.metric(tag, PresentSum(sum(map(bool, checked)), named))
        elif checked:
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

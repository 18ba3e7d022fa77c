"""Zero-shot: is every sample a well-formed voice-cloning prompt with a reference voice?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from telemetry.callbacks.base import StrategicCallback
from telemetry.families.base import AudioView, BatchView
from telemetry.families.chat import ChatFormat, Turn, role_faults
from telemetry.probes.forward import Microbatch
from telemetry.recorder import Emitter
from telemetry.records import Cell, Mean, Table

SHOWN_ROWS = 50
COLUMNS = ("sample", "speaker", "compliant", "violations")


class ZeroShotVerificationLoggerCallback(StrategicCallback):
    """ChatML compliance with a table of violations, and the presence and length of reference audio."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows: list[tuple[Cell, ...]] = []

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """Measure one microbatch."""
        view = microbatch.view
        if view is None or view.audio is None:
            self.session.recorder.absent("zero_shot/reference/present_fraction", "the batch has no audio")
            return
        self.session.recorder.metric("zero_shot/reference/present_fraction", _present(view.audio))
        self._measure_seconds(microbatch)
        self._check(microbatch, view, view.audio)

    def finish_step(self) -> None:
        """Show what the checks of all microbatches found, the violations first."""
        rows, self._rows = self._rows, []

        def build(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            if rows:
                shown = sorted(rows, key=lambda row: row[2] == "yes")[:SHOWN_ROWS]
                emit.record(Table("zero_shot/chatml", COLUMNS, tuple(shown)))

        self.session.recorder.show({}, build)

    def _measure_seconds(self, microbatch: Microbatch) -> None:
        tag = "zero_shot/reference/seconds"
        if not microbatch.metadata:
            self.session.recorder.absent(tag, "the batch does not say how long the reference audio is")
            return
        seconds = [sum(clip.seconds for clip in sample.get("reference") or ()) for sample in microbatch.metadata]
        present = [length for length in seconds if length > 0]
        self.session.recorder.metric(tag, Mean(sum(present), len(present)))

    def _check(self, microbatch: Microbatch, view: BatchView, audio: AudioView) -> None:
        tokenizer = self.session.tokenizer
        chat = ChatFormat.of(tokenizer)
        if chat is None:
            self.session.recorder.absent("zero_shot/chatml/compliance", "the tokenizer has no ChatML header tokens")
            return
        names = [_names(microbatch, row) for row in range(view.input_ids.shape[0])]
        rows = self._rows

        def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
            compliant = 0
            for row, name in enumerate(names):
                faults = _faults(host, row, chat, tokenizer)
                compliant += not faults
                rows.append((*name, "no" if faults else "yes", "; ".join(faults)))
            emit.metric("zero_shot/chatml/compliance", Mean(compliant, len(names)))

        tensors = {
            "ids": view.input_ids,
            "real": view.real,
            "reference": audio.reference,
            "target": audio.target,
            "starts": audio.starts,
            "frames": audio.frames,
            "placeholders": audio.placeholders,
        }
        self.session.recorder.defer(tensors, build)


def _present(audio: AudioView) -> Mean:
    present = audio.reference.any(dim=1)
    return Mean(present.sum(), present.numel())


def _names(microbatch: Microbatch, row: int) -> tuple[Cell, ...]:
    speaker = microbatch.metadata[row].get("speaker") if row < len(microbatch.metadata) else None
    return microbatch.sample_id(row), speaker


def _faults(host: Mapping[str, Tensor], row: int, chat: ChatFormat, tokenizer: Any) -> list[str]:
    """What is wrong with one sample; empty for a compliant one."""
    real = host["real"][row]
    ids: list[int] = host["ids"][row][real].tolist()
    turns, faults = chat.turns(ids, tokenizer)
    faults += role_faults(turns)
    frames, placeholders = int(host["frames"][row]), int(host["placeholders"][row])
    if frames != placeholders:
        faults.append(f"placeholders: {placeholders} audio placeholders for {frames} code frames")
    starts = host["starts"][row][real]
    reference = (starts & host["reference"][row][real]).nonzero().flatten().tolist()
    if not reference:
        faults.append("reference: no reference audio")
    if not bool(host["target"][row].any()):
        faults.append("target: no supervised audio")
    faults += [
        f"transcript: no transcript before the reference audio at token {start}"
        for start in reference
        if not _has_transcript(ids, start, turns, tokenizer)
    ]
    return faults


def _has_transcript(ids: list[int], start: int, turns: list[Turn], tokenizer: Any) -> bool:
    """Whether text stands before a clip in its turn or, for a clip that an assistant speaks, in the turn before."""
    at = next((index for index, turn in enumerate(turns) if turn.start <= start < turn.end), None)
    if at is None:
        return False
    before = ids[turns[at].body : start]
    if turns[at].role == "assistant" and at > 0:
        before = ids[turns[at - 1].body : turns[at - 1].end] + before
    return bool(tokenizer.decode(before, skip_special_tokens=True).strip())

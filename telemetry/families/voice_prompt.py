"""Is one sample a well-formed voice-cloning prompt? Checked on the host, rule by rule."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from telemetry.families.chat import ChatFormat, Turn, role_faults

# What a prompt says of its language: "language: ar", "[lang=ar]", '"language": "Arabic"'.
_LANGUAGE = re.compile(r"\blang(?:uage)?\b[\"']?\s*[:=]\s*[\"']?([^\W\d_]+(?:[-_]\w+)*)", re.IGNORECASE)


@dataclass(frozen=True)
class PromptClip:
    """One clip of a prompt: ``codes`` int ``[frames, codebooks]`` at its positions, ``ids[start:end]``."""

    start: int
    end: int
    is_target: bool
    codes: np.ndarray


@dataclass(frozen=True)
class ClipLayout:
    """How a clip is laid out: the ids of its begin and end, and the frames that each codebook is shifted by."""

    bos_id: int
    eos_id: int
    delay: tuple[int, ...]


@dataclass(frozen=True)
class VoicePrompt:
    """One sample on the host, without its padding.

    Attributes:
        ids: the token ids.
        clips: its audio, in order.
        frames, placeholders: how much audio was handed over, and how much its ids ask for.
        metadata: ``target_transcript`` and ``language``, where known.
        chat, tokenizer: how its ids are read.
        layout: of its clips.
    """

    ids: Sequence[int]
    clips: Sequence[PromptClip]
    frames: int
    placeholders: int
    metadata: Mapping[str, Any]
    chat: ChatFormat
    tokenizer: Any
    layout: ClipLayout

    @cached_property
    def parsed(self) -> tuple[list[Turn], dict[str, list[str]]]:
        """The turns, and what is wrong with their headers and ends."""
        return self.chat.turns(self.ids, self.tokenizer)

    @property
    def turns(self) -> list[Turn]:
        """The turns, in order."""
        return self.parsed[0]

    def turn_at(self, position: int) -> int | None:
        """Index of the turn that a position lies in."""
        return next((index for index, turn in enumerate(self.turns) if turn.start <= position < turn.end), None)

    def text(self, start: int, end: int) -> str:
        """The words between two positions, audio left out, whitespace as single spaces."""
        audio = {position for clip in self.clips for position in range(clip.start, clip.end)}
        ids = [token for position, token in enumerate(self.ids[start:end], start) if position not in audio]
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return _normalized(decoded)


def clips_of(starts: np.ndarray, is_audio: np.ndarray, target: np.ndarray, codes: np.ndarray) -> list[PromptClip]:
    """The clips of one sample.

    Args:
        starts, is_audio, target: bool ``[sequence]``: first positions of clips, audio, supervised audio.
        codes: int ``[sequence, codebooks]``; negative where an audio position carries no codes.
    """
    begins = np.flatnonzero(starts).tolist()
    clips = []
    for start, following in pairwise([*begins, len(starts)]):
        silent = np.flatnonzero(~is_audio[start:following])
        end = start + int(silent[0]) if silent.size else following
        own = codes[start:end]
        clips.append(PromptClip(start, end, bool(target[start]), own[(own >= 0).all(axis=1)]))
    return clips


def violations(prompt: VoicePrompt) -> dict[str, list[str] | None]:
    """What is wrong with a prompt, by kind: nothing in the list for a rule that is kept, None for one that the sample
    gives nothing to check by."""
    return {kind: check(prompt) for kind, check in CHECKS.items()}


def _reference(prompt: VoicePrompt) -> list[str]:
    """One reference in every turn that has any."""
    turns = [prompt.turn_at(clip.start) for clip in prompt.clips if not clip.is_target]
    if not turns:
        return ["no reference audio"]
    counts = {at: turns.count(at) for at in turns if at is not None}
    return [
        f"{count} clips in the {prompt.turns[at].role} turn at token {prompt.turns[at].start}"
        for at, count in counts.items()
        if count > 1
    ]


def _target(prompt: VoicePrompt) -> list[str]:
    has_target = any(clip.is_target for clip in prompt.clips)
    return [] if has_target else ["no supervised audio"]


def _placeholders(prompt: VoicePrompt) -> list[str]:
    if prompt.frames == prompt.placeholders:
        return []
    return [f"{prompt.placeholders} audio placeholders, audio for {prompt.frames}"]


def _delay_pattern(prompt: VoicePrompt) -> list[str] | None:
    if prompt.frames != prompt.placeholders:
        return None  # which codes belong to which clip is not known
    found = ((clip, _layout_fault(clip.codes, prompt.layout)) for clip in prompt.clips if clip.codes.size)
    return [f"the audio at token {clip.start} {fault}" for clip, fault in found if fault]


def _layout_fault(codes: np.ndarray, layout: ClipLayout) -> str:
    """The first place where a clip's codes are not a stream: BOS, the codes, then EOS; "" for one that is."""
    frames, shifts = codes.shape[0], np.array(layout.delay)
    if codes.shape[1] != len(shifts):
        return f"has {codes.shape[1]} codebooks where {len(shifts)} are expected"
    length = frames - 2 - int(shifts.max())
    if length < 1:
        return f"has {frames} frames, which leaves none for its codes"
    at = np.arange(frames)[:, None] - shifts
    due = np.select([at <= 0, at > length], [0, 2], 1)
    found = np.select([codes == layout.bos_id, codes == layout.eos_id], [0, 2], 1)
    wrong = np.argwhere((due != found).T)  # codebook by codebook
    if not len(wrong):
        return ""
    k, frame = wrong[0].tolist()
    names = ("BOS", "a code", "EOS")
    more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
    return f"has {names[found[frame, k]]} for {names[due[frame, k]]} in codebook {k} at frame {frame}{more}"


def _transcript(prompt: VoicePrompt) -> list[str]:
    """Words before every reference in its turn or, for a clip that an assistant speaks, in the turn before."""
    return [
        f"no transcript before the reference audio at token {clip.start}"
        for clip in prompt.clips
        if not clip.is_target and not _said_before(prompt, clip)
    ]


def _said_before(prompt: VoicePrompt, clip: PromptClip) -> str:
    at = prompt.turn_at(clip.start)
    if at is None:
        return ""
    turn = prompt.turns[at]
    said = prompt.text(turn.body, clip.start)
    if not said and turn.role == "assistant" and at > 0:
        return prompt.text(prompt.turns[at - 1].body, prompt.turns[at - 1].end)
    return said


def _target_text(prompt: VoicePrompt) -> list[str] | None:
    """The words that the target clips are to say are those of the transcript."""
    transcript = _normalized(str(prompt.metadata.get("target_transcript") or ""))
    within = (prompt.turn_at(clip.start) for clip in prompt.clips if clip.is_target)
    turns = sorted({at for at in within if at is not None})
    if not transcript or not turns:
        return None
    text = " ".join(filter(None, (_words_of(prompt, at) for at in turns)))
    return [] if text == transcript else [f"says {text!r}, the transcript {transcript!r}"]


def _words_of(prompt: VoicePrompt, at: int) -> str:
    """The text of a target's turn or, where it has none, what stands last in the turn before."""
    turn = prompt.turns[at]
    own = prompt.text(turn.body, turn.end)
    if own or at == 0:
        return own
    before = prompt.turns[at - 1]
    after = max((clip.end for clip in prompt.clips if before.start <= clip.start < before.end), default=before.body)
    return prompt.text(after, before.end)


def _language(prompt: VoicePrompt) -> list[str]:
    """The language is named, and the prompt names no other."""
    language = prompt.metadata.get("language")
    if not language:
        return ["no language tag"]
    asked = " ".join(prompt.text(turn.body, turn.end) for turn in prompt.turns if turn.role != "assistant")
    stated = [name for name in _LANGUAGE.findall(asked) if _language_code(name) in LANGUAGES]
    other = [name for name in stated if _language_code(name) != _language_code(str(language))]
    return [f"tagged {language}, the prompt says {name}" for name in other[:1]]


def _language_code(name: str) -> str:
    """``ar`` for ``ar``, ``ar-EG`` and ``Arabic``."""
    primary = re.split(r"[-_]", name.lower())[0]
    return str(TO_LANGUAGE_CODE.get(primary, primary))


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


CHECKS: dict[str, Callable[[VoicePrompt], list[str] | None]] = {
    "role_order": lambda prompt: role_faults(prompt.turns),
    "header": lambda prompt: prompt.parsed[1]["header"],
    "end_of_turn": lambda prompt: prompt.parsed[1]["end_of_turn"],
    "reference": _reference,
    "target": _target,
    "placeholders": _placeholders,
    "delay_pattern": _delay_pattern,
    "transcript": _transcript,
    "target_text": _target_text,
    "language": _language,
}

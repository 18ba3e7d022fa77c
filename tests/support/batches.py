"""Voice-cloning batches built position by position, so that it is known what every position is."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import HiggsAudioV2Config

IGNORED = -100


@dataclass(frozen=True)
class Position:
    """One position of a sequence. ``kind``: padding, text, reference or target."""

    token: int
    kind: str
    label: int = IGNORED
    codes: tuple[int, ...] | None = None
    code_labels: tuple[int, ...] | None = None
    begins: bool = False


Sample = list[Position]


@dataclass(frozen=True)
class Voices:
    """Builds samples for one tokenizer and model configuration."""

    tokenizer: Any
    config: HiggsAudioV2Config

    def text(self, text: str, supervised: bool = False) -> Sample:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [Position(token, "text", token if supervised else IGNORED) for token in ids]

    def clip(self, length: int, seed: int, target: bool = False, ends: bool = True) -> Sample:
        """A clip of ``length`` codes in delay pattern; ``ends`` says whether a target's stream ends are supervised."""
        codebooks, bos, eos = (
            self.config.num_codebooks, self.config.audio_stream_bos_id, self.config.audio_stream_eos_id,
        )  # fmt: skip
        generator = random.Random(seed)
        codes = [[generator.randrange(min(bos, eos)) for _ in range(length)] for _ in range(codebooks)]
        positions = []
        frames = length + 1 + codebooks
        for frame in range(frames):
            given, labels = [], []
            for k in range(codebooks):
                at = frame - k  # 0: begin, 1 to length: codes, length + 1: end, beyond: end again
                code = bos if at <= 0 else codes[k][at - 1] if at <= length else eos
                taught = target and (1 <= at <= length or (ends and at == length + 1))
                given.append(code)
                labels.append(code if taught else IGNORED)
            delayed = frame >= frames - (codebooks - 1)
            token = self.config.audio_delay_token_id if delayed else self.config.audio_token_id
            kind = "target" if target else "reference"
            positions.append(Position(token, kind, IGNORED, tuple(given), tuple(labels), begins=frame == 0))
        return positions

    def turn(self, role: str, *parts: Sample) -> Sample:
        inside = [position for part in parts for position in part]
        return [*self.text(f"<|start_header_id|>{role}<|end_header_id|>\n\n"), *inside, *self.text("<|eot_id|>")]

    def spoken(self, clip: Sample) -> Sample:
        return [*self.text("<|audio_out_bos|>"), *clip, *self.text("<|audio_eos|>")]

    def conversation(
        self, reference: int | None = 4, target: int | None = 5, seed: int = 0, ends: bool = True, words: str = "ship"
    ) -> Sample:
        """A compliant sample; ``reference`` and ``target`` are lengths in codes, None for no such clip."""
        user = [self.text(f"The {words} sails.")]
        if reference is not None:
            user.append(self.spoken(self.clip(reference, seed)))
        user.append(self.text("Please say this."))
        assistant = [self.text(f"A green {words}.", supervised=True)]
        if target is not None:
            assistant.append(self.spoken(self.clip(target, seed + 1000, target=True, ends=ends)))
        return [
            *self.text("<|begin_of_text|>"),
            *self.turn("system", self.text("You clone voices.")),
            *self.turn("user", *user),
            *self.turn("assistant", *assistant),
        ]

    def pad(self, samples: Sequence[Sample], left: bool = False) -> list[Sample]:
        """The samples at one length."""
        length = max(len(sample) for sample in samples)
        filled = []
        for sample in samples:
            padding = [Position(self.tokenizer.pad_token_id, "padding")] * (length - len(sample))
            filled.append([*padding, *sample] if left else [*sample, *padding])
        return filled

    def batch(self, samples: Sequence[Sample], frame_padding: int = 0, frames_left: bool = False) -> dict[str, Tensor]:
        """The model's inputs for samples of one length. Frame padding holds codes and labels that must not be read."""
        codebooks = self.config.num_codebooks
        rows = [[position for position in sample if position.codes is not None] for sample in samples]
        most = max(len(row) for row in rows) + frame_padding
        codes, labels, mask = [], [], []
        for row in rows:
            padding = most - len(row)
            fill = [[1] * codebooks] * padding
            real_codes, real_labels = [list(p.codes or ()) for p in row], [list(p.code_labels or ()) for p in row]
            real, empty = [True] * len(row), [False] * padding
            codes.append([*fill, *real_codes] if frames_left else [*real_codes, *fill])
            labels.append([*fill, *real_labels] if frames_left else [*real_labels, *fill])
            mask.append([*empty, *real] if frames_left else [*real, *empty])
        shape = (len(samples), most, codebooks)
        return {
            "input_ids": torch.tensor([[position.token for position in sample] for sample in samples]),
            "attention_mask": torch.tensor([[int(p.kind != "padding") for p in sample] for sample in samples]),
            "labels": torch.tensor([[position.label for position in sample] for sample in samples]),
            "audio_input_ids": torch.tensor(codes, dtype=torch.long).reshape(shape),
            "audio_input_ids_mask": torch.tensor(mask, dtype=torch.bool).reshape(shape[:2]),
            "audio_labels": torch.tensor(labels, dtype=torch.long).reshape(shape),
        }


def every(samples: Iterable[Sample]) -> list[Position]:
    """All positions of some samples."""
    return [position for sample in samples for position in sample]


def reference_codes(sample: Sample, config: HiggsAudioV2Config) -> list[list[int]]:
    """By codebook, without delay, begin and end."""
    special = (config.audio_stream_bos_id, config.audio_stream_eos_id)
    return [
        [p.codes[k] for p in sample if p.kind == "reference" and p.codes is not None and p.codes[k] not in special]
        for k in range(config.num_codebooks)
    ]


def with_reference_of(sample: Sample, other: Sample, config: HiggsAudioV2Config) -> Sample:
    """Of a sample with one clip: what codebook ``k`` has at frame ``f`` is the other's code ``f - 1 - k``, repeated."""
    given = reference_codes(other, config)
    changed: Sample = []
    frame = 0
    for position in sample:
        if position.kind != "reference" or position.codes is None:
            changed.append(position)
            continue
        frame = 0 if position.begins else frame + 1
        codes = list(position.codes)
        for k, code in enumerate(codes):
            if code not in (config.audio_stream_bos_id, config.audio_stream_eos_id):
                codes[k] = given[k][(frame - 1 - k) % len(given[k])]
        changed.append(replace(position, codes=tuple(codes)))
    return changed


def text_batch(*lengths: int, left: bool = False) -> dict[str, Tensor]:
    """Sequences of token ids, padded to the longest."""
    most = max(lengths)
    ids, mask = [], []
    for row, length in enumerate(lengths):
        real, fill = [1 + (7 * row + 5 * at) % 27 for at in range(length)], [0] * (most - length)
        ids.append([*fill, *real] if left else [*real, *fill])
        mask.append([*fill, *[1] * length] if left else [*[1] * length, *fill])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

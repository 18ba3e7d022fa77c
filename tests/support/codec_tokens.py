"""A tiny Llama that writes codec tokens, and batches for it whose every code is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from telemetry.families import CodecTokens

from .models import SHAPE, SMALLER, sure
from .speech_models import IGNORED, numbers, padded

TEXT, FIRST, CODEBOOKS, SIZE = 12, 14, 3, 8  # ids of text, of the first code; 3 codebooks of 8
BEGIN, END = 12, 13
VOCABULARY = FIRST + CODEBOOKS * SIZE + 2


def declared(**changes: Any) -> CodecTokens:
    return CodecTokens(**{"first": FIRST, "codebooks": CODEBOOKS, "size": SIZE, "end": END, **changes})


def llama(**options: Any) -> Any:
    sizes = SHAPE | SMALLER | {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": END, "bos_token_id": None}
    return sure(lambda: LlamaForCausalLM(LlamaConfig(**(sizes | options))), 4, 0.3)


def codes_of(frames: int, seed: int) -> list[list[int]]:
    """Of every frame, a code of each codebook."""
    return [numbers(CODEBOOKS, seed + 13 * at, 0, SIZE) for at in range(frames)]


def tokens_of(frames: Sequence[Sequence[int]]) -> list[int]:
    return [FIRST + k * SIZE + code for frame in frames for k, code in enumerate(frame)]


def batch(*samples: tuple[int, int, int, int], left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Of every sample: tokens of text, frames of its reference, tokens of text, frames that are taught with their end.

    The text before the target is taught too.
    """
    ids, labels = [], []
    for row, (text, before, words, frames) in enumerate(samples):
        own = 100 * row + seed
        prompt = numbers(text, own, 1, TEXT)
        if before:
            prompt += [BEGIN, *tokens_of(codes_of(before, own + 1)), END]
        said = [*numbers(words, own + 2, 1, TEXT), BEGIN, *tokens_of(codes_of(frames, own + 3)), END]
        ids.append([*prompt, *said])
        labels.append([*[IGNORED] * len(prompt), *said])
    return {
        "input_ids": padded(ids, 0, left),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, left),
        "labels": torch.where(
            padded([[1] * len(row) for row in ids], 0, left) == 1, padded(labels, IGNORED, left), -100
        ),
    }

"""Pads examples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trainer.dataset import IGNORE_INDEX, Example


@dataclass(frozen=True)
class VoiceCloningCollator:
    """Batches examples, padded on the right.

    Attributes:
        pad_token_id: fills ``input_ids``; the attention mask, not this id, says what is padding.
        audio_fill_id: fills ``audio_input_ids``; ``audio_input_ids_mask`` says what is padding.
    """

    pad_token_id: int
    audio_fill_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The model's inputs, and ``metadata``: a list of what the model must not see, which the Trainer takes out."""
        frames = [torch.ones(len(example.audio_input_ids), dtype=torch.bool) for example in examples]
        tokens = [torch.ones(len(example.input_ids), dtype=torch.long) for example in examples]
        return {
            "input_ids": _pad([example.input_ids for example in examples], self.pad_token_id),
            "attention_mask": _pad(tokens, 0),
            "labels": _pad([example.labels for example in examples], IGNORE_INDEX),
            "audio_input_ids": _pad([example.audio_input_ids for example in examples], self.audio_fill_id),
            "audio_input_ids_mask": _pad(frames, 0),
            "audio_labels": _pad([example.audio_labels for example in examples], IGNORE_INDEX),
            "metadata": [dict(example.metadata) for example in examples],
        }


def _pad(tensors: list[torch.Tensor], fill: int) -> torch.Tensor:
    return pad_sequence(tensors, batch_first=True, padding_value=fill)

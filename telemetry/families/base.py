"""What a batch and a forward pass mean, told by each model family to everything that measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100


@dataclass(frozen=True)
class AudioView:
    """The audio of a microbatch, laid out along the sequence. ``C`` codebooks.

    Attributes:
        codes: int64 ``[batch, sequence, C]``, the codes given at each audio position, 0 elsewhere.
        labels: int64 ``[batch, sequence, C]``, unshifted; :data:`IGNORE_INDEX` where nothing is supervised.
        reference, target: bool ``[batch, sequence]``: audio that is not, and that is, supervised on. A clip is target
            when any of its codes has a label.
        starts: bool ``[batch, sequence]``: first position of each clip.
        vocabulary: ids of one codebook, special ids included.
        bos_id, eos_id: the stream's begin and end ids.
        frames, placeholders: int64 ``[batch]``: code frames handed over, and positions that ask for one.
    """

    codes: Tensor
    labels: Tensor
    reference: Tensor
    target: Tensor
    starts: Tensor
    vocabulary: int
    bos_id: int
    eos_id: int
    frames: Tensor
    placeholders: Tensor

    @property
    def codebooks(self) -> int:
        """Number of codebooks."""
        return self.codes.shape[-1]


@dataclass(frozen=True)
class BatchView:
    """One microbatch as its family reads it. Made without waiting for the device.

    Attributes:
        input_ids: int64 ``[batch, sequence]``.
        real: bool ``[batch, sequence]``, False at padding.
        text: bool ``[batch, sequence]``: neither padding nor audio.
        text_labels: int64 ``[batch, sequence]``, unshifted, or None without text labels.
        vocabulary: ids of the text vocabulary.
        audio: the audio, or None for a batch or family without any.
    """

    input_ids: Tensor
    real: Tensor
    text: Tensor
    text_labels: Tensor | None
    vocabulary: int
    audio: AudioView | None = None


@dataclass(frozen=True)
class Head:
    """A module whose output is logits.

    Attributes:
        module: its forward returns ``[batch, sequence, codebooks × vocabulary]``.
        modality: "text" or "audio".
        codebooks: 1 for text.
    """

    module: nn.Module
    modality: str
    codebooks: int = 1


@dataclass(frozen=True)
class ChatTokens:
    """Ids of the tokens that give a ChatML sequence its structure; None where the tokenizer has no such token."""

    header_start: int | None
    header_end: int | None
    turn_end: int | None
    audio: frozenset[int] = field(default_factory=frozenset)


class Family(Protocol):
    """How one kind of model is read. Bound to one model; holds no tensor of any batch."""

    name: str

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Read a batch (the model's keyword arguments), or None where it holds no token ids."""

    def heads(self) -> Sequence[Head]:
        """The modules whose outputs are logits."""

    def output_logits(self, outputs: Any) -> Sequence[tuple[Head, Tensor]]:
        """The logits that a model output holds, for trainers that hand outputs over instead of being watched."""

    def group_of(self, parameter_name: str) -> str:
        """The catalogue's gradient group of a parameter."""


def shift_labels(labels: Tensor) -> Tensor:
    """Labels of the next position, aligned with the logits that predict them.

    Args:
        labels: int64 ``[batch, sequence, ...]``, unshifted.

    Returns:
        The same shape; the last position, which predicts nothing, is :data:`IGNORE_INDEX`.
    """
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)


def real_positions(inputs: Mapping[str, Any], input_ids: Tensor) -> Tensor:
    """bool ``[batch, sequence]``: not padding, by the attention mask; all True where there is none."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return mask.bool()

"""What a batch and a forward pass mean, told by each model family to everything that measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        frames, placeholders: int64 ``[batch]``: code frames handed over, and positions that ask for one (whole clips,
            where one position asks for a clip).
        delayed: whether codebook *k* of a clip is shifted by *k* frames.
        embedded: bool ``[batch, sequence]``: audio that is given as embeddings of ``features``, without codes; None
            where there is no such audio.
        features: what an audio encoder of the model is given, ``[clips, channels, frames]``: no clips where nothing is
            given, None where the model has no such encoder.
        features_real: bool ``[clips, frames]``, False at the features' padding.
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
    delayed: bool = True
    embedded: Tensor | None = None
    features: Tensor | None = None
    features_real: Tensor | None = None

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
        exists: bool ``[batch, sequence]``, False at positions that only the view has: room for what a model expands
            inside of its forward pass. None where the model has them all.
    """

    input_ids: Tensor
    real: Tensor
    text: Tensor
    text_labels: Tensor | None
    vocabulary: int
    audio: AudioView | None = None
    exists: Tensor | None = None

    @property
    def positions(self) -> int | Tensor:
        """How many positions the model has, padding included."""
        return self.input_ids.numel() if self.exists is None else self.exists.sum()


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
class FeedForward:
    """One feed-forward network of a layer, and where it meets the residual stream.

    Attributes:
        module: its forward returns ``[..., hidden]``.
        added: the module whose output is added to the residual stream: ``module`` itself, or a norm behind it.
        residual: a module whose first argument is the residual stream that it is added to, position by position as
            the output; None where the layer has no such module.
    """

    module: nn.Module
    added: nn.Module
    residual: nn.Module | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        index: counted from 0.
        attention: the module that is handed to the attention function.
        feed_forward: ``text_ffn``, and ``audio_ffn`` where audio has a network of its own.
    """

    index: int
    attention: nn.Module
    feed_forward: Mapping[str, FeedForward]


class Family(Protocol):
    """How one kind of model is read. Bound to one model; holds no tensor of any batch."""

    name: str

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Read a batch (the model's keyword arguments), or None where it holds no token ids."""

    def heads(self) -> Sequence[Head]:
        """The modules whose outputs are logits."""

    def output_logits(self, outputs: Any) -> Sequence[tuple[Head, Tensor]]:
        """The logits that a model output holds, for trainers that hand outputs over instead of being watched."""

    def rows(self, view: BatchView, head: Head, logits: Tensor) -> Tensor | None:
        """Which positions a head's rows of logits stand for: int64 ``[rows]``, indices into ``batch × sequence``.

        None where logits ``[batch, sequence, ...]`` have one row for each.
        """

    def group_of(self, parameter_name: str) -> str:
        """The catalogue's gradient group of a parameter."""

    def layers(self) -> Sequence[Layer]:
        """The decoder layers, in order; none where the model does not show them."""

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """Which positions each feed-forward network is given, padding included: bool ``[batch, sequence]``.

        A network that is given a part of a batch gets its positions one after the other, sample by sample.
        """


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


def clips_with(starts: Tensor, is_audio: Tensor, marked: Tensor) -> Tensor:
    """bool ``[batch, sequence]``: audio positions of the clips that hold a marked position."""
    clip = starts.long().cumsum(dim=1)
    held = torch.zeros(clip.shape[0], clip.shape[1] + 1, dtype=torch.long, device=clip.device)
    held = held.scatter_reduce(1, clip, (marked & is_audio).long(), reduce="amax")
    return is_audio & held.gather(1, clip).bool()


def decoder_layers(decoder: Any) -> list[Any]:
    """The layers of a decoder as transformers writes them (``layers``, each with ``self_attn``); else none."""
    layers = getattr(decoder, "layers", None)
    found = list(layers) if isinstance(layers, nn.ModuleList) else []
    return found if all(hasattr(layer, "self_attn") for layer in found) else []

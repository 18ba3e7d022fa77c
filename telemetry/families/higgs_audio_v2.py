"""transformers' Higgs Audio v2: a Llama with shared attention and two feed-forward networks per layer.

Audio travels beside the text as ``audio_input_ids`` ``[batch, frames, codebooks]`` in delay pattern (codebook *k*
shifted by *k* frames between stream BOS and EOS); placeholder tokens in ``input_ids`` say where each frame goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import HiggsAudioV2ForConditionalGeneration

from telemetry.families.base import (
    IGNORE_INDEX,
    AudioView,
    BatchView,
    FeedForward,
    Head,
    Layer,
    clips_with,
    decoder_layers,
    real_positions,
)

_TEXT_GROUPS = (
    ("lora_", "lora"),
    ("embed_audio_tokens", "audio_embedding"),
    ("embed_tokens", "text_embedding"),
    ("audio_lm_head", "audio_head"),
    ("text_lm_head", "text_head"),
    ("self_attn", "shared_attention"),
    ("audio_mlp", "audio_ffn"),
    (".mlp.", "text_ffn"),
    ("norm", "norms"),
)


class HiggsAudioV2Family:
    """Reads batches of ``HiggsAudioV2ForConditionalGeneration``."""

    name = "higgs_audio_v2"

    def __init__(self, model: HiggsAudioV2ForConditionalGeneration) -> None:
        self._model = model
        self._config = model.config

    @classmethod
    def find(cls, model: nn.Module) -> HiggsAudioV2Family | None:
        """The family of a model, wrapped (DDP, FSDP, PEFT) or not; None for another model."""
        for module in model.modules():
            if isinstance(module, HiggsAudioV2ForConditionalGeneration):
                return cls(module)
        return None

    def heads(self) -> Sequence[Head]:
        """The audio head, and the text head where the model has one."""
        heads = [Head(self._model.audio_lm_head, "audio", self._config.num_codebooks)]
        if self._model.text_lm_head is not None:
            heads.append(Head(self._model.text_lm_head, "text"))
        return heads

    def output_logits(self, outputs: Any) -> Sequence[tuple[Head, Tensor]]:
        """The audio logits: the model's output holds no text logits."""
        logits = getattr(outputs, "logits", None)
        return [(self.heads()[0], logits)] if isinstance(logits, Tensor) else []

    def rows(self, view: BatchView, head: Head, logits: Tensor) -> Tensor | None:
        """None: every position has its logits."""
        return None

    def group_of(self, parameter_name: str) -> str:
        """Group of a parameter by its name in the model."""
        return next((group for part, group in _TEXT_GROUPS if part in parameter_name), "other")

    def layers(self) -> Sequence[Layer]:
        """Every decoder layer, with a feed-forward network for text and one for audio."""
        return [_layer(index, layer) for index, layer in enumerate(decoder_layers(self._model.model))]

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """Positions of audio placeholders go to the audio network, padding among them; all others to the other."""
        is_audio = self._is_audio(view.input_ids)
        return {"text_ffn": ~is_audio, "audio_ffn": is_audio}

    def _is_audio(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self._config.audio_token_id) | (input_ids == self._config.audio_delay_token_id)

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Text, reference and target positions, with codes and labels laid out along the sequence."""
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor):
            return None
        real = real_positions(inputs, input_ids)
        is_audio = self._is_audio(input_ids)
        return BatchView(
            input_ids=input_ids,
            real=real,
            text=real & ~is_audio,
            text_labels=inputs.get("labels"),
            vocabulary=self._config.vocab_size,
            audio=self._audio_view(inputs, input_ids, is_audio, real),
        )

    def _audio_view(self, inputs: Mapping[str, Any], input_ids: Tensor, asks: Tensor, real: Tensor) -> AudioView | None:
        """``asks``: positions that the model hands a frame to; it does so at padding too."""
        codes = inputs.get("audio_input_ids")
        if not isinstance(codes, Tensor):
            return None
        mask = inputs.get("audio_input_ids_mask")
        mask = mask.bool() if isinstance(mask, Tensor) else torch.ones_like(codes[..., 0], dtype=torch.bool)
        labels = inputs.get("audio_labels")
        if not isinstance(labels, Tensor):
            labels = torch.full_like(codes, IGNORE_INDEX)
        is_audio = asks & real
        starts = is_audio & ~self._continues(input_ids, is_audio)
        placed_labels = _place(labels, mask, asks, IGNORE_INDEX)
        target = clips_with(starts, is_audio, (placed_labels != IGNORE_INDEX).any(dim=-1))
        return AudioView(
            codes=_place(codes, mask, asks, 0),
            labels=placed_labels,
            reference=is_audio & ~target,
            target=target,
            starts=starts,
            vocabulary=self._config.codebook_size,
            bos_id=self._config.audio_stream_bos_id,
            eos_id=self._config.audio_stream_eos_id,
            frames=mask.sum(dim=1),
            placeholders=asks.sum(dim=1),
        )

    def _continues(self, input_ids: Tensor, is_audio: Tensor) -> Tensor:
        """bool ``[batch, sequence]``: in the same clip as the position before.

        A clip ends with its delay tokens: an audio token behind one begins the next clip.
        """
        after_audio = torch.zeros_like(is_audio)
        after_audio[:, 1:] = is_audio[:, :-1]
        after_delay = torch.zeros_like(is_audio)
        after_delay[:, 1:] = input_ids[:, :-1] == self._config.audio_delay_token_id
        return after_audio & ~(after_delay & (input_ids == self._config.audio_token_id))


def _layer(index: int, layer: Any) -> Layer:
    networks = {
        "text_ffn": FeedForward(layer.mlp, layer.mlp, layer.post_attention_layernorm),
        "audio_ffn": FeedForward(layer.audio_mlp, layer.audio_mlp, layer.audio_post_attention_layernorm),
    }
    return Layer(index, layer.self_attn, networks)


def _place(frames: Tensor, mask: Tensor, is_audio: Tensor, fill: int) -> Tensor:
    """Valid frames at the audio positions, in order, as the model's own masked scatter puts them.

    Without boolean indexing, which would wait for the device. Positions beyond the frames at hand get ``fill``.

    Args:
        frames: int64 ``[batch, frames, codebooks]``.
        mask: bool ``[batch, frames]``, the valid frames.
        is_audio: bool ``[batch, sequence]``.

    Returns:
        int64 ``[batch, sequence, codebooks]``.
    """
    flat = frames.reshape(-1, frames.shape[-1])
    if flat.shape[0] == 0:
        return frames.new_full((*is_audio.shape, frames.shape[-1]), fill)
    valid_first = torch.argsort(mask.reshape(-1).to(torch.int8), descending=True, stable=True)
    rank = is_audio.reshape(-1).long().cumsum(0) - 1
    source = valid_first[rank.clamp(0, flat.shape[0] - 1)]
    at_hand = is_audio.reshape(-1) & (rank < mask.sum())
    return torch.where(at_hand[:, None], flat[source], fill).view(*is_audio.shape, -1)

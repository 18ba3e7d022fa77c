"""Other reference audio for transformers' Higgs Audio v2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

_INPUTS = ("input_ids", "attention_mask", "position_ids", "audio_input_ids", "audio_input_ids_mask")


class HiggsAudioV2References:
    """See :class:`telemetry.families.references.References`."""

    def __init__(self, config: HiggsAudioV2Config) -> None:
        self._config = config

    @classmethod
    def find(cls, model: nn.Module) -> HiggsAudioV2References | None:
        """For a model, wrapped (DDP, FSDP, PEFT) or not; None for another model."""
        for module in model.modules():
            if isinstance(module, HiggsAudioV2ForConditionalGeneration):
                return cls(module.config)
        return None

    def own(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as it is, without labels."""
        return {name: inputs[name] for name in _INPUTS if inputs.get(name) is not None} | {"use_cache": False}

    def replaced(self, inputs: Mapping[str, Any], codes: Tensor) -> dict[str, Any]:
        """A batch with other codes at its audio positions."""
        input_ids, frames = inputs["input_ids"], inputs["audio_input_ids"]
        mask = inputs.get("audio_input_ids_mask")
        mask = torch.ones_like(frames[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        asks = (input_ids == self._config.audio_token_id) | (input_ids == self._config.audio_delay_token_id)
        return self.own(inputs) | {"audio_input_ids": _collect(codes, asks, frames, mask)}

    def hidden(self, inputs: Mapping[str, Any], positions: Tensor) -> dict[str, Any]:
        """A batch in which no position reads some positions.

        Position ids are those that the model would have counted, so that what stands behind does not move up.

        Raises:
            ValueError: when the batch's attention mask is not ``[batch, sequence]``.
        """
        input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if mask.shape != positions.shape:
            raise ValueError(f"positions {tuple(positions.shape)} cannot be hidden by a mask {tuple(mask.shape)}")
        counted = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        own = self.own(inputs)
        return {"position_ids": counted} | own | {"attention_mask": mask.masked_fill(positions, 0)}


def _collect(codes: Tensor, asks: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
    """Codes of the audio positions back in their frames: what the family's placing does, the other way round.

    Args:
        codes: int64 ``[batch, sequence, codebooks]``.
        asks: bool ``[batch, sequence]``: positions that the model hands a frame to.
        frames: int64 ``[batch, frames, codebooks]``: what stays in frames that no position asks for.
        mask: bool ``[batch, frames]``, the valid frames.

    Returns:
        int64 ``[batch, frames, codebooks]``.
    """
    asking_first = torch.argsort(asks.reshape(-1).to(torch.int8), descending=True, stable=True)
    rank = mask.reshape(-1).long().cumsum(0) - 1
    position = asking_first[rank.clamp(0, asks.numel() - 1)]
    placed = (mask.reshape(-1) & (rank < asks.sum())).view(mask.shape)
    return torch.where(placed.unsqueeze(-1), codes.reshape(-1, codes.shape[-1])[position].view_as(frames), frames)

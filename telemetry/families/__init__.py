"""What a batch and an output mean for a model family."""

from __future__ import annotations

from torch import nn

from telemetry.families.base import AudioView, BatchView, Family, Head
from telemetry.families.causal_lm import CausalLMFamily
from telemetry.families.higgs_audio_v2 import HiggsAudioV2Family

_FAMILIES = (HiggsAudioV2Family, CausalLMFamily)

__all__ = ["AudioView", "BatchView", "CausalLMFamily", "Family", "Head", "HiggsAudioV2Family", "find_family"]


def find_family(model: nn.Module) -> Family | None:
    """The first family that knows a model, or None."""
    return next((family for kind in _FAMILIES if (family := kind.find(model)) is not None), None)

"""What a batch and an output mean for a model family."""

from __future__ import annotations

from torch import nn

from telemetry.families.base import (
    Absent,
    AudioView,
    BatchView,
    Family,
    FeedForward,
    Layer,
    LossPart,
    Seen,
    Stream,
    reads,
    registered_family,
)
from telemetry.families.causal_lm import CausalLMFamily
from telemetry.families.higgs_audio import HiggsAudioFamily
from telemetry.families.higgs_audio_v2 import HiggsAudioV2Family

__all__ = [
    "Absent",
    "AudioView",
    "BatchView",
    "CausalLMFamily",
    "Family",
    "FeedForward",
    "HiggsAudioFamily",
    "HiggsAudioV2Family",
    "Layer",
    "LossPart",
    "Seen",
    "Stream",
    "find_family",
    "reads",
]


def find_family(model: nn.Module) -> Family | None:
    """Return the family of a model, wrapped or not: a registered one, else that of language models, or None."""
    return registered_family(model) or CausalLMFamily.find(model)

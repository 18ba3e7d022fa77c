"""What a batch and an output mean for a model family."""

from __future__ import annotations

from torch import nn

from telemetry.families.base import (
    Absent,
    AudioView,
    BatchView,
    Divided,
    Family,
    FeedForward,
    Layer,
    LossPart,
    Overruled,
    Seen,
    Stream,
    reads,
    registered_family,
)
from telemetry.families.causal_lm import CausalLMFamily
from telemetry.families.csm import CsmFamily
from telemetry.families.dia import DiaFamily
from telemetry.families.higgs_audio import HiggsAudioFamily
from telemetry.families.higgs_audio_v2 import HiggsAudioV2Family
from telemetry.families.moshi import MoshiFamily

__all__ = [
    "Absent",
    "AudioView",
    "BatchView",
    "CausalLMFamily",
    "CsmFamily",
    "DiaFamily",
    "Divided",
    "Family",
    "FeedForward",
    "HiggsAudioFamily",
    "HiggsAudioV2Family",
    "Layer",
    "LossPart",
    "MoshiFamily",
    "Overruled",
    "Seen",
    "Stream",
    "find_family",
    "reads",
]


def find_family(model: nn.Module) -> Family | None:
    """Return the family of a model, wrapped or not: a registered one, else that of language models, or None."""
    return registered_family(model) or CausalLMFamily.find(model)

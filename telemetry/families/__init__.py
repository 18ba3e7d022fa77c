"""What a batch and an output mean for a model family."""

from __future__ import annotations

from torch import nn

from telemetry.families.base import AudioView, BatchView, Family, FeedForward, Head, Layer
from telemetry.families.causal_lm import CausalLMFamily
from telemetry.families.higgs_audio import HiggsAudioFamily
from telemetry.families.higgs_audio_v2 import HiggsAudioV2Family
from telemetry.families.higgs_audio_v2_speech import HiggsAudioV2Speech
from telemetry.families.speech import SpeechFamily

_FAMILIES = (HiggsAudioV2Family, HiggsAudioFamily, CausalLMFamily)

__all__ = [
    "AudioView",
    "BatchView",
    "CausalLMFamily",
    "Family",
    "FeedForward",
    "Head",
    "HiggsAudioFamily",
    "HiggsAudioV2Family",
    "Layer",
    "SpeechFamily",
    "find_family",
    "find_speech_family",
]


def find_family(model: nn.Module) -> Family | None:
    """The first family that knows a model, or None."""
    return next((family for kind in _FAMILIES if (family := kind.find(model)) is not None), None)


def find_speech_family(model: nn.Module) -> SpeechFamily | None:
    """How a model is made to speak, or None for one that telemetry cannot make speak."""
    return HiggsAudioV2Speech.find(model)

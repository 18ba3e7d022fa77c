"""What a batch and an output mean for a model family."""

from __future__ import annotations

from torch import nn

from telemetry.families.base import (
    Absent,
    AudioView,
    BatchView,
    Divided,
    Family,
    FamilyMaker,
    FeedForward,
    Layer,
    LossPart,
    Overruled,
    Rest,
    Seen,
    Stream,
    reads,
    registered_family,
)
from telemetry.families.causal_lm import CausalLMFamily
from telemetry.families.codec_tokens import CodecTokens, CodecTokensFamily
from telemetry.families.continuous import FlowSpeechFamily, SpeechT5Family
from telemetry.families.csm import CsmFamily
from telemetry.families.dia import DiaFamily
from telemetry.families.higgs_audio import HiggsAudioFamily
from telemetry.families.higgs_audio_v2 import HiggsAudioV2Family
from telemetry.families.moshi import MoshiFamily
from telemetry.families.musicgen import MusicgenFamily
from telemetry.families.speech_lm import KyutaiSpeechToTextFamily, Qwen3TTSFamily, TalkerFamily, VibeVoiceFamily

__all__ = [
    "Absent",
    "AudioView",
    "BatchView",
    "CausalLMFamily",
    "CodecTokens",
    "CodecTokensFamily",
    "CsmFamily",
    "DiaFamily",
    "Divided",
    "Family",
    "FamilyMaker",
    "FeedForward",
    "FlowSpeechFamily",
    "HiggsAudioFamily",
    "HiggsAudioV2Family",
    "KyutaiSpeechToTextFamily",
    "Layer",
    "LossPart",
    "MoshiFamily",
    "MusicgenFamily",
    "Overruled",
    "Qwen3TTSFamily",
    "Rest",
    "Seen",
    "SpeechT5Family",
    "Stream",
    "TalkerFamily",
    "VibeVoiceFamily",
    "bound_family",
    "find_family",
    "reads",
]


def find_family(model: nn.Module) -> Family | None:
    """Return the family of a model, wrapped or not: a registered one, else that of language models, or None."""
    return registered_family(model) or CausalLMFamily.find(model)


def bound_family(given: FamilyMaker, model: nn.Module) -> Family:
    """Return a family of the user's choice for a model, an adapter's wrapper (PEFT) around it or not.

    Raises:
        ValueError: where it fits no part of the model.
    """
    unwrap = getattr(model, "get_base_model", None)
    inner: nn.Module = unwrap() if callable(unwrap) else model
    found = next((module for module in inner.modules() if given.fits(module)), None)
    if found is None:
        raise ValueError(f"family={given!r} fits no part of the model, a {type(inner).__name__}")
    return given(found)

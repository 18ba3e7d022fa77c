"""Language models with speech beside their text: Qwen3-Omni's talker, VibeVoice, Kyutai's speech to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from telemetry.families.base import (
    DECODER_GROUPS,
    Absent,
    BatchView,
    Declared,
    LossPart,
    Rest,
    Seen,
    Stream,
    output,
    reads,
)
from telemetry.families.causal_lm import CausalLMFamily

NOT_CALLED = "the predictor of the residual codebooks does not run in training"


@reads("Qwen3OmniMoeTalkerForConditionalGeneration")
class TalkerFamily(CausalLMFamily):
    """Reads Qwen3-Omni's talker: it predicts the first codebook, from embeddings of the thinker's text.

    Its residual codebooks are another model's (``code_predictor``), which the forward pass does not call.
    """

    name = "qwen3_omni_talker"
    modalities = ("audio",)
    groups = (
        ("lora_", "lora"),
        ("code_predictor", "depth_decoder"),
        ("codec_head", "audio_head"),
        ("codec_embedding", "audio_embedding"),
        ("_projection", "text_embedding"),
        *DECODER_GROUPS,
    )

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Its head is none that transformers knows by name."""
        return hasattr(model, "codec_head")

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """The first codebook, and experts' router losses."""
        config = self.model.config
        for one in super().streams(inputs, outputs, seen):
            if isinstance(one, Stream):
                yield replace(one, name="codebook_0", group="audio", eos_id=getattr(config, "codec_eos_token_id", None))
            else:
                yield replace(one, name="codebook_0") if isinstance(one, Absent) else one
        yield Absent("depth_decoder", NOT_CALLED, in_loss=False)

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Nothing: it is given embeddings in the place of token ids."""
        return None


@reads("VibeVoiceForConditionalGeneration")
class VibeVoiceFamily(CausalLMFamily):
    """Reads VibeVoice: its text by cross-entropy, and its speech, of which the model returns no loss of its own."""

    name = "vibevoice"
    groups = (
        ("lora_", "lora"),
        ("diffusion_head", "audio_head"),
        ("acoustic", "other"),
        ("semantic", "other"),
        ("multi_modal_projector", "audio_embedding"),
        ("connector", "audio_embedding"),
        ("lm_head", "text_head"),
        *DECODER_GROUPS,
    )

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """The text, weighted as the model weighs it, and what the diffusion's loss adds."""
        weight = float(self.model.config.diffusion_loss_weight)
        given = inputs.get("acoustic_loss_mask") is not None and output(outputs, "audio_features") is not None
        speaks = given and weight > 0
        for one in super().streams(inputs, outputs, seen):
            if speaks and isinstance(one, Stream):
                one = replace(one, weight=(1 - weight) * one.weight)
            elif speaks and isinstance(one, LossPart):
                one = replace(one, value=(1 - weight) * one.value)
            yield one
        if speaks:
            yield Rest("diffusion")


@reads("KyutaiSpeechToTextForConditionalGeneration")
class KyutaiSpeechToTextFamily(CausalLMFamily):
    """Reads Kyutai's speech to text: ``input_ids`` ``[batch, sequence, 1 + codebooks]``, of which text is predicted."""

    name = "kyutai_speech_to_text"
    groups = (("codec_model", "other"), *CausalLMFamily.groups)

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """The text, under which the heard codes lie."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 3:
            return super().view(inputs)
        view = super().view({**inputs, "input_ids": ids[..., 0]})
        return None if view is None else replace(view, vocabulary=view.vocabulary + 1)  # what begins is no prediction

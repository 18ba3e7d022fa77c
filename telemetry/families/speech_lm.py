"""Language models with speech beside their text: Qwen's talkers, VibeVoice, Kyutai's speech to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import (
    DECODER_GROUPS,
    IGNORE_INDEX,
    Absent,
    BatchView,
    Declared,
    LossPart,
    Overruled,
    Rest,
    Seen,
    Stream,
    codebook_names,
    marked_rows,
    output,
    reads,
)
from telemetry.families.causal_lm import CausalLMFamily

NOT_CALLED = "the predictor of the residual codebooks does not run in training"
_HEAD, _SUB_TALKER = "codec_head", "code_predictor.lm_head"


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
        yield from self._residual(inputs, seen)

    def _residual(self, inputs: Mapping[str, Any], seen: Seen) -> Iterable[Declared]:
        yield Absent("depth_decoder", NOT_CALLED, in_loss=False)

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Nothing: it is given embeddings in the place of token ids."""
        return None


@reads("Qwen3TTSTalkerForConditionalGeneration")
class Qwen3TTSFamily(TalkerFamily):
    """Reads Qwen3-TTS (the package ``qwen-tts-hf``): its talker, and the sub-talker of all codebooks but the first.

    It is trained through a module of one's own that calls both, and adds 0.3 of the sub-talker's loss, as the authors'
    script does. That module's ``codec_ids`` ``[batch, sequence, codebooks]`` and ``codec_mask`` ``[batch, sequence]``
    say what the sub-talker is to predict; without them its part of the loss is what the talker leaves.

    The sub-talker's loss shifts labels that fit its logits already: every head learns the codebook after its own.
    """

    name = "qwen3_tts"
    SUB_TALKER_WEIGHT = 0.3

    def watched(self) -> Mapping[str, nn.Module]:
        """All heads: what the module around them returns need not hold their logits."""
        heads = {f"{_SUB_TALKER}.{k}": head for k, head in enumerate(self.model.code_predictor.lm_head)}
        return {**super().watched(), _HEAD: self.model.codec_head, **heads}

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """The first codebook, and all others."""
        logits = seen.modules.get(_HEAD)
        return super().streams(inputs, outputs if logits is None else {"logits": logits}, seen)

    def _residual(self, inputs: Mapping[str, Any], seen: Seen) -> Iterable[Declared]:
        heads = range(len(self.model.code_predictor.lm_head))
        logits = [seen.modules[name] for k in heads if (name := f"{_SUB_TALKER}.{k}") in seen.modules]
        codes, mask = inputs.get("codec_ids"), inputs.get("codec_mask")
        if len(logits) < len(heads):
            yield Absent("depth_decoder", NOT_CALLED, in_loss=False)
        elif not isinstance(codes, Tensor) or not isinstance(mask, Tensor):
            yield Rest("depth_decoder")
        else:
            rows = marked_rows(mask.bool(), logits[0].shape[0])
            taught = mask.sum() * (len(heads) - 1)
            yield Stream(
                codebook_names(len(heads) + 1)[2:],
                torch.stack(logits[:-1], dim=1),
                codes[..., 2:].masked_fill(~mask.bool().unsqueeze(-1), IGNORE_INDEX),
                "audio",
                "aligned",
                weight=self.SUB_TALKER_WEIGHT,
                denominator=taught,
                rows=rows,
            )
            yield Overruled(
                "the sub-talker is given {} codes to predict, each with the head of its codebook",
                "its loss shifts them once more, and holds {} against the head of the codebook before",
                mask.sum() * len(heads),
                taught,
            )


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

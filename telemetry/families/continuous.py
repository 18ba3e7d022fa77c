"""Models of speech that predict spectrograms or latents, and no tokens: SpeechT5, PocketTTS, Phonon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from telemetry.families.base import NO_LABELS, Absent, Declared, Family, LossPart, Rest, Seen, output, reads

END_OF_SPEECH = "end_of_speech"
_POSTNET = "speech_decoder_postnet"
_NO_FRAME = -100.0


@reads("SpeechT5ForTextToSpeech")
class SpeechT5Family(Family):
    """Reads SpeechT5's text to speech: distances of spectrograms before and after the postnet, and when it ends.

    The guided attention's part is what these leave of the loss.
    """

    name = "speecht5"
    modalities = ("text", "audio")
    STOP_WEIGHT = 5.0  # of an end against any other frame, as the model's loss has it
    groups = (
        ("lora_", "lora"),
        ("encoder.prenet", "text_embedding"),
        ("decoder.prenet", "audio_embedding"),
        (_POSTNET, "audio_head"),
        ("norm", "norms"),
        ("attn", "shared_attention"),
        ("wrapped_decoder", "audio_ffn"),
        ("feed_forward", "text_ffn"),
    )

    def watched(self) -> Mapping[str, nn.Module]:
        """The postnet, which gives all that the loss is made of."""
        return {_POSTNET: self.model.speech_decoder_postnet}

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """No tokens: the loss's parts."""
        labels, given = inputs.get("labels"), seen.modules.get(_POSTNET)
        if not isinstance(labels, Tensor):
            yield Absent("audio", NO_LABELS, in_loss=False)
        elif given is None:
            yield Absent("audio", seen.missing)
        else:
            before, after, logits = (one.detach() for one in given)
            real = labels != _NO_FRAME
            apart = (before - labels).abs() + (after - labels).abs()
            yield LossPart("spectrogram", torch.where(real, apart, 0.0).sum() / real.sum())
            frames = real[..., 0]
            last = torch.cat([~frames[:, 1:], torch.ones_like(frames[:, :1])], dim=1)
            weight = logits.new_tensor(1.0) * self.STOP_WEIGHT
            stop = binary_cross_entropy_with_logits(logits, last.to(logits), pos_weight=weight, reduction="none")
            yield LossPart(END_OF_SPEECH, torch.where(frames, stop, 0.0).sum() / frames.sum())
            if self.model.config.use_guided_attention_loss:
                yield Rest("guided_attention")


@reads("PocketTTSForConditionalGeneration", "GradiumPhononTTSForConditionalGeneration")
class FlowSpeechFamily(Family):
    """Reads PocketTTS and Phonon: when speech ends, and the flow of latents, which is what that leaves of the loss.

    The flow's loss draws random noise, and falls below zero as its learnt uncertainty does.
    """

    name = "flow_speech"
    modalities = ("text", "audio")
    groups = (
        ("lora_", "lora"),
        ("flow_head", "audio_head"),
        ("eos_head", "audio_head"),
        ("loss_weighting", "other"),
        ("embed_tokens", "text_embedding"),
        ("audio_", "audio_embedding"),
        ("latent", "audio_embedding"),
        ("norm", "norms"),
        ("self_attn", "shared_attention"),
        (".mlp.", "text_ffn"),
    )

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """No tokens: the loss's parts."""
        logits, ids, config = output(outputs, "logits"), inputs.get("input_ids"), self.model.config
        if not isinstance(inputs.get("labels"), Tensor):
            yield Absent("audio", NO_LABELS, in_loss=False)
        elif logits is None or not isinstance(ids, Tensor):
            yield Absent("audio", seen.missing)
        else:
            frames = (ids == config.audio_bos_token_id) | (ids == config.audio_latent_token_id)
            last = frames & (frames.flip(1).long().cumsum(1).flip(1) == 1)
            given = logits.detach()[..., 0].float()
            stop = binary_cross_entropy_with_logits(given, last.to(given), reduction="none")
            part = torch.where(frames, stop, 0.0).sum() / frames.sum()
            yield LossPart(END_OF_SPEECH, part * config.eos_loss_weight)
            yield Rest("flow")

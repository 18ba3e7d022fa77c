"""transformers' Higgs Audio v2: a Llama with shared attention and two feed-forward networks per layer.

Audio travels beside the text as ``audio_input_ids`` ``[batch, frames, codebooks]`` in delay pattern (codebook *k*
shifted by *k* frames between stream BOS and EOS); placeholder tokens in ``input_ids`` say where each frame goes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from telemetry.families.base import (
    DECODER_GROUPS,
    IGNORE_INDEX,
    NO_LABELS,
    NO_LOGITS,
    Absent,
    AudioView,
    BatchView,
    Declared,
    Family,
    FeedForward,
    Layer,
    Seen,
    Stream,
    clips_with,
    codebook_names,
    decoder_layers,
    moved,
    output,
    reads,
    real_positions,
)
from telemetry.families.higgs_audio_v2_speech import HiggsAudioV2Speaker

if TYPE_CHECKING:
    from transformers import HiggsAudioV2ForConditionalGeneration

TEXT_HEAD = "text_lm_head"
_GIVEN = ("input_ids", "attention_mask", "position_ids", "audio_input_ids", "audio_input_ids_mask")


@reads("HiggsAudioV2ForConditionalGeneration")
class HiggsAudioV2Family(Family):
    """Reads ``HiggsAudioV2ForConditionalGeneration``.

    Its loss is the sum of every codebook's, and of the text's where the model has a text head. ``num_items_in_batch``
    divides each of them where it is one number, and each by its own where it is ``[1 + codebooks]``, text first.
    """

    name = "higgs_audio_v2"
    modalities = ("text", "audio")
    groups = (
        ("lora_", "lora"),
        ("embed_audio_tokens", "audio_embedding"),
        ("audio_lm_head", "audio_head"),
        ("text_lm_head", "text_head"),
        ("audio_mlp", "audio_ffn"),
        *DECODER_GROUPS,
    )

    def __init__(self, model: HiggsAudioV2ForConditionalGeneration) -> None:
        super().__init__(model)
        self._config = model.config

    @functools.cached_property
    def speaker(self) -> HiggsAudioV2Speaker:
        """Speaks the target's text in the reference's voice."""
        return HiggsAudioV2Speaker(self.model, self.view)

    def watched(self) -> Mapping[str, nn.Module]:
        """The text head: the model's output holds no text logits."""
        return {TEXT_HEAD: self.model.text_lm_head} if self.model.text_lm_head is not None else {}

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """Text, and all codebooks."""
        view, config = seen.view, self._config
        items = inputs.get("num_items_in_batch")
        text_items, code_items = (items[0], items[1:]) if isinstance(items, Tensor) and items.dim() else (items, items)
        labels = inputs.get("labels")
        if self.model.text_lm_head is not None:
            logits = seen.modules.get(TEXT_HEAD)
            if logits is None:
                yield Absent("text", seen.missing, in_loss=labels is not None)
            elif labels is not None:
                yield Stream("text", logits, labels, "text", "shifted", denominator=text_items)
        if view is None or view.audio is None:
            return
        logits, taught = output(outputs, "logits"), inputs.get("audio_labels") is not None
        if logits is None:
            yield Absent("audio", NO_LOGITS, in_loss=taught)
        elif taught:
            yield Stream(
                codebook_names(config.num_codebooks),
                logits.unflatten(-1, (config.num_codebooks, config.codebook_size)),
                view.audio.labels,
                "audio",
                "shifted",
                denominator=code_items,
                bos_id=config.audio_stream_bos_id,
                eos_id=config.audio_stream_eos_id,
            )
        else:
            yield Absent("audio", NO_LABELS, in_loss=False)

    def layers(self) -> Sequence[Layer]:
        """Every decoder layer, with a feed-forward network for text and one for audio."""
        return [_layer(index, layer) for index, layer in enumerate(decoder_layers(self.model.model))]

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """Positions of audio placeholders go to the audio network, padding among them; all others to the other."""
        is_audio = self._is_audio(view.input_ids)
        return {"text_ffn": ~is_audio, "audio_ffn": is_audio}

    def swap_reference(self, inputs: Mapping[str, Any], codes: Tensor | None) -> dict[str, Any]:
        """A batch with other codes in its frames."""
        given = {name: inputs[name] for name in _GIVEN if inputs.get(name) is not None} | {"use_cache": False}
        if codes is None:
            return given
        frames = inputs["audio_input_ids"]
        return given | {"audio_input_ids": moved(codes, self._is_audio(inputs["input_ids"]), _valid(inputs), frames)}

    def _is_audio(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self._config.audio_token_id) | (input_ids == self._config.audio_delay_token_id)

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Text, reference and target positions, with codes and labels laid out along the sequence."""
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor):
            return None
        real = real_positions(inputs, input_ids, self._config.pad_token_id, inputs.get("labels"))
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
        mask = _valid(inputs)
        labels = inputs.get("audio_labels")
        if not isinstance(labels, Tensor):
            labels = torch.full_like(codes, IGNORE_INDEX)
        is_audio = asks & real
        starts = is_audio & ~self._continues(input_ids, is_audio)
        placed_labels = moved(labels, mask, asks, IGNORE_INDEX)
        target = clips_with(starts, is_audio, (placed_labels != IGNORE_INDEX).any(dim=-1))
        return AudioView(
            codes=moved(codes, mask, asks, 0),
            labels=placed_labels,
            reference=is_audio & ~target,
            target=target,
            starts=starts,
            vocabulary=self._config.codebook_size,
            bos_id=self._config.audio_stream_bos_id,
            eos_id=self._config.audio_stream_eos_id,
            frames=mask.sum(dim=1),
            placeholders=asks.sum(dim=1),
            delay=tuple(range(self._config.num_codebooks)),
            labelled=any(inputs.get(name) is not None for name in ("labels", "audio_labels")),
        )

    def _continues(self, input_ids: Tensor, is_audio: Tensor) -> Tensor:
        """bool ``[batch, sequence]``: in the same clip as the position before.

        A clip ends with its delay tokens: an audio token after one begins the next clip.
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


def _valid(inputs: Mapping[str, Any]) -> Tensor:
    """bool ``[batch, frames]``: the frames that a position may be handed."""
    mask = inputs.get("audio_input_ids_mask")
    if isinstance(mask, Tensor):
        return mask.bool()
    return torch.ones_like(inputs["audio_input_ids"][..., 0], dtype=torch.bool)

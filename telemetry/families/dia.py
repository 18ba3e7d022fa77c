"""transformers' Dia: an encoder of text bytes, and a decoder of nine codebooks in delay pattern.

``decoder_input_ids`` ``[batch, frames, codebooks]`` (or ``[batch · codebooks, frames]``) begin with a frame of begins;
``labels`` and logits lie as ``[batch · codebooks, frames]``, and labels were shifted before the model is given them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from telemetry.families.base import (
    IGNORE_INDEX,
    NO_CONVERSATION,
    NO_LABELS,
    NO_LOGITS,
    Absent,
    AudioView,
    BatchView,
    Declared,
    Divided,
    Family,
    FeedForward,
    Layer,
    Overruled,
    Seen,
    Stream,
    codebook_names,
    decoder_audio,
    output,
    reads,
    real_positions,
)
from telemetry.families.dia_speech import DiaSpeaker

_GIVEN = ("input_ids", "attention_mask", "decoder_attention_mask", "decoder_position_ids", "encoder_outputs")


@reads("DiaForConditionalGeneration")
class DiaFamily(Family):
    """Reads ``DiaForConditionalGeneration``.

    Its loss is one mean over the codes of all codebooks. A view holds the encoder's text and then the decoder's audio.
    What of a sample's audio comes before its first label is a clip of its own, the reference.
    """

    name = "dia"
    modalities = ("text", "audio")
    meaningless = NO_CONVERSATION
    groups = (
        ("lora_", "lora"),
        ("encoder.embedding", "text_embedding"),
        ("decoder.embeddings", "audio_embedding"),
        ("logits_dense", "audio_head"),
        ("norm", "norms"),
        ("attention", "shared_attention"),
        ("encoder.layers", "text_ffn"),
        ("decoder.layers", "audio_ffn"),
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._config = model.config
        self._codebooks = int(self._config.decoder_config.num_channels)

    @functools.cached_property
    def speaker(self) -> DiaSpeaker:
        """Speaks text after a reference's text and sound."""
        return DiaSpeaker(self.model, self.view)

    def group_of(self, parameter_name: str) -> str:
        """As the list says, but the encoder's own attention sees text alone."""
        group = super().group_of(parameter_name)
        return "other" if group == "shared_attention" and "encoder.layers" in parameter_name else group

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """All codebooks."""
        logits, labels, items = output(outputs, "logits"), inputs.get("labels"), inputs.get("num_items_in_batch")
        if logits is None:
            yield Absent("audio", NO_LOGITS, in_loss=labels is not None)
        elif not isinstance(labels, Tensor):
            yield Absent("audio", NO_LABELS, in_loss=False)
        else:
            own = (labels != IGNORE_INDEX).sum()
            by_frame = (logits.shape[0] // self._codebooks, logits.shape[1], self._codebooks)
            if labels.shape == by_frame and logits.shape[1] != self._codebooks:
                yield Overruled(
                    "labels lie as [batch, frames, codebooks]: {}",
                    "the model reads all {} as [batch, codebooks, frames], each for another's",
                    own,
                    own,
                )
            decoder = self._config.decoder_config
            yield Stream(
                codebook_names(self._codebooks),
                self._by_frame(logits),
                self._by_frame(labels.reshape(logits.shape[:-1])),
                "audio",
                "given_shifted",
                denominator=own if items is None else items,
                bos_id=decoder.bos_token_id,
                eos_id=decoder.eos_token_id,
            )
            if items is not None:
                yield Divided("audio", own, items)

    def _by_frame(self, values: Tensor) -> Tensor:
        """``[batch · codebooks, frames, ...]`` as ``[batch, frames, codebooks, ...]``."""
        return values.unflatten(0, (-1, self._codebooks)).transpose(1, 2)

    def layers(self) -> Sequence[Layer]:
        """Every layer of the decoder, with both attentions and its feed-forward network."""
        return [
            Layer(
                index,
                one.self_attention,
                {"audio_ffn": FeedForward(one.mlp, one.mlp, one.pre_mlp_norm)},
                one.cross_attention,
            )
            for index, one in enumerate(self.model.model.decoder.layers)
        ]

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """The decoder's network is given every position of the decoder."""
        served = torch.zeros_like(view.real)
        served[:, view.decoded_from :] = True
        return {"audio_ffn": served}

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """The text, and after it the audio with codes and unshifted labels."""
        ids, frames = inputs.get("input_ids"), inputs.get("decoder_input_ids")
        if not isinstance(ids, Tensor) or not isinstance(frames, Tensor):
            return None
        codes = (self._by_frame(frames) if frames.dim() == 2 else frames).long()
        given = real_positions({"attention_mask": inputs.get("decoder_attention_mask")}, codes[..., 0])
        text = real_positions(inputs, ids)
        audio = torch.cat([torch.zeros_like(text), given], dim=1)
        return BatchView(
            input_ids=torch.cat([ids, ids.new_zeros(codes.shape[:2])], dim=1),
            real=torch.cat([text, given], dim=1),
            text=torch.cat([text, torch.zeros_like(given)], dim=1),
            text_labels=None,
            vocabulary=self._config.encoder_config.vocab_size,
            audio=self._audio_view(inputs.get("labels"), codes, audio, ids.shape[1]),
            decoded_from=ids.shape[1],
        )

    def _audio_view(self, given: Any, codes: Tensor, is_audio: Tensor, text: int) -> AudioView:
        decoder = self._config.decoder_config
        shifted = self._by_frame(given.reshape(-1, codes.shape[1])) if isinstance(given, Tensor) else None
        return decoder_audio(
            codes,
            shifted,
            is_audio,
            text,
            codes < self._first_special,
            vocabulary=decoder.vocab_size,
            bos_id=decoder.bos_token_id,
            eos_id=decoder.eos_token_id,
            delay=tuple(self._config.delay_pattern),
        )

    @property
    def _first_special(self) -> int:
        decoder = self._config.decoder_config
        return int(min(decoder.bos_token_id, decoder.eos_token_id, decoder.pad_token_id))

    def swap_reference(self, inputs: Mapping[str, Any], codes: Tensor | None) -> dict[str, Any]:
        """A batch with other codes for its decoder."""
        given = {name: inputs[name] for name in _GIVEN if inputs.get(name) is not None} | {"use_cache": False}
        frames = inputs["decoder_input_ids"]
        if codes is not None:
            frames = codes[:, inputs["input_ids"].shape[1] :]
        return given | {"decoder_input_ids": frames}

    def hide_reference(self, inputs: Mapping[str, Any], positions: Tensor) -> dict[str, Any]:
        """A batch with positions of the decoder masked, which stay where they are.

        Of a reference's later codebooks, what the delay pattern moves into the target's first frames stays visible.
        """
        hidden = positions[:, inputs["input_ids"].shape[1] :]
        mask = inputs.get("decoder_attention_mask")
        mask = torch.ones_like(hidden, dtype=torch.long) if mask is None else mask
        counted = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        own = {"decoder_position_ids": counted} | self.swap_reference(inputs, None)
        return own | {"decoder_attention_mask": mask.masked_fill(hidden, 0)}

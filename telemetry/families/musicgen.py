"""transformers' MusicGen and MusicGen Melody: an encoder of text, and a decoder of codebooks.

``labels`` ``[batch, frames, codebooks]`` are aligned with the logits, which lie as ``[batch · codebooks, frames]``: the
model shifts its decoder's input where it is not given one. A label that is the padding's id is none. Melody's decoder
has positions of melody and text in front of its frames.
"""

from __future__ import annotations

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
    BatchView,
    Declared,
    Family,
    Layer,
    Seen,
    Stream,
    codebook_names,
    decoder_audio,
    decoder_layers,
    output,
    reads,
    real_positions,
)


@reads(
    "MusicgenForConditionalGeneration",
    "MusicgenMelodyForConditionalGeneration",
    "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM",
)
class MusicgenFamily(Family):
    """Reads MusicGen's models. Their loss is the mean over codebooks of each one's own mean.

    A view holds the encoder's text, where there is one, and then the decoder's frames. Which delay its labels have is
    the user's choice, and not known.
    """

    name = "musicgen"
    modalities = ("text", "audio")
    meaningless = NO_CONVERSATION
    groups = (
        ("lora_", "lora"),
        ("audio_encoder", "other"),
        ("text_encoder.shared", "text_embedding"),
        ("text_encoder.encoder.embed_tokens", "text_embedding"),
        ("DenseReluDense", "text_ffn"),
        ("text_encoder", "other"),
        ("embed_tokens", "audio_embedding"),
        ("lm_heads", "audio_head"),
        ("norm", "norms"),
        ("attn", "shared_attention"),
        (".fc1.", "audio_ffn"),
        (".fc2.", "audio_ffn"),
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._encodes = hasattr(model, "text_encoder")
        self._language_model: Any = model.decoder if self._encodes else model
        self._config = self._language_model.config
        self._codebooks = int(self._config.num_codebooks)
        self._pad = int(self._config.pad_token_id)

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """All codebooks."""
        logits, labels = output(outputs, "logits"), inputs.get("labels")
        if not isinstance(labels, Tensor):
            yield Absent("audio", NO_LABELS, in_loss=False)
        elif logits is None:
            yield Absent("audio", NO_LOGITS)
        else:
            by_frame = logits.unflatten(0, (-1, self._codebooks)).transpose(1, 2)
            yield Stream(
                codebook_names(self._codebooks),
                by_frame[:, -labels.shape[1] :],
                self._taught(labels),
                "audio",
                "given_shifted",
                weight=1 / self._codebooks,
            )

    def _taught(self, labels: Tensor) -> Tensor:
        return labels.masked_fill(labels == self._pad, IGNORE_INDEX)

    def layers(self) -> Sequence[Layer]:
        """Every layer of the decoder; its feed-forward networks are no modules of their own."""
        return [
            Layer(index, one.self_attn, {}, getattr(one, "encoder_attn", None))
            for index, one in enumerate(decoder_layers(self._language_model.get_decoder()))
        ]

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """The text, and after it the frames with codes and unshifted labels."""
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        frames = inputs.get("decoder_input_ids") if self._encodes else ids
        if isinstance(frames, Tensor):
            codes = frames.reshape(-1, self._codebooks, frames.shape[-1]).transpose(1, 2).long()
        elif isinstance(labels, Tensor):  # as the model shifts them
            begin = getattr(self._config, "decoder_start_token_id", None) if self._encodes else None
            first = torch.full_like(labels[:, :1], self._config.bos_token_id if begin is None else begin)
            codes = torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] < 0, self._pad)], dim=1)
        else:
            return None
        mask = inputs.get("decoder_attention_mask" if self._encodes else "attention_mask")
        begin = torch.arange(codes.shape[1], device=codes.device) == 0
        given = (codes != self._pad).any(dim=-1) | begin if mask is None else mask.bool()
        text = codes.new_zeros(codes.shape[0], 0)
        if self._encodes and isinstance(ids, Tensor):
            text = ids
        real = real_positions({"attention_mask": inputs.get("attention_mask")}, text)
        audio = torch.cat([torch.zeros_like(real), given], dim=1)
        shifted = self._taught(labels) if isinstance(labels, Tensor) and labels.shape == codes.shape else None
        return BatchView(
            input_ids=torch.cat([text, text.new_zeros(codes.shape[:2])], dim=1),
            real=torch.cat([real, given], dim=1),
            text=torch.cat([real, torch.zeros_like(given)], dim=1),
            text_labels=None,
            vocabulary=int(self.model.config.text_encoder.vocab_size) if self._encodes else 1,
            audio=decoder_audio(
                codes,
                shifted,
                audio,
                text.shape[1],
                codes != self._pad,
                vocabulary=max(int(self._config.vocab_size), self._pad) + 1,
                bos_id=self._pad,
                eos_id=self._pad,
                delay=(0,) * self._codebooks,
            ),
            decoded_from=text.shape[1],
        )

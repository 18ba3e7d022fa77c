"""transformers' Moshi: text and two speakers' audio at every position; a depth decoder predicts the audio.

The model's own audio is predicted, the user's is heard. ``audio_labels`` ``[batch, codebooks, sequence]`` are not
shifted; the model delays all codebooks but the first by one position. A label of the size of the codebook is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from telemetry.families.base import (
    DECODER_GROUPS,
    IGNORE_INDEX,
    NO_LABELS,
    NO_LOGITS,
    Absent,
    BatchView,
    Declared,
    Family,
    FeedForward,
    Layer,
    Seen,
    Stream,
    codebook_names,
    decoder_layers,
    output,
    reads,
    real_positions,
)

NO_PROMPT = "the text is the model's own at every position: it has no prompt, and takes no labels that leave one out"
TEXT_FIRST = "the depth decoder is trained only where the text has labels too"


@reads("MoshiForConditionalGeneration")
class MoshiFamily(Family):
    """Reads ``MoshiForConditionalGeneration``.

    Its loss is the mean of the text and the mean over the codes of all codebooks, whatever the Trainer has counted.
    Every position is text and both speakers' audio at once: no position is audio alone, so a view shows text.
    """

    name = "moshi"
    modalities = ("text", "audio")
    meaningless: Mapping[str, str] = MappingProxyType({"inputs/supervised/text_fraction": NO_PROMPT})
    groups = (
        ("lora_", "lora"),
        ("audio_encoder", "other"),  # its layers have parts named like those of the decoder
        ("depth_decoder", "depth_decoder"),
        ("decoder.model.embed_tokens", "text_embedding"),
        ("embed_tokens", "audio_embedding"),
        ("lm_head", "text_head"),
        *DECODER_GROUPS,
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._config = model.config

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """The text, and all codebooks of the model's own audio."""
        text, spoken = inputs.get("text_labels"), inputs.get("audio_labels")
        logits, audio_logits = output(outputs, "logits"), output(outputs, "audio_logits")
        if not isinstance(text, Tensor):
            yield Absent("text", NO_LABELS, in_loss=False)
            yield Absent("audio", NO_LABELS if spoken is None else TEXT_FIRST, in_loss=False)
            return
        if logits is None:
            yield Absent("text", NO_LOGITS)
        else:
            yield Stream("text", logits, text, "text", "shifted")
        if not isinstance(spoken, Tensor):
            yield Absent("audio", NO_LABELS, in_loss=False)
        elif audio_logits is None:
            yield Absent("audio", NO_LOGITS)
        else:
            labels = self._delayed(spoken)
            yield Stream(
                codebook_names(labels.shape[-1]),
                audio_logits.unflatten(0, labels.shape[:2]),
                labels,
                "audio",
                "aligned",
                denominator=(labels != IGNORE_INDEX).sum(),
            )

    def _delayed(self, labels: Tensor) -> Tensor:
        """``[batch, codebooks, sequence]`` as the model compares it, ``[batch, sequence, codebooks]``."""
        labels = labels.masked_fill(labels == self._config.audio_vocab_size, IGNORE_INDEX).transpose(1, 2)
        later = torch.cat([torch.full_like(labels[:, :1, 1:], IGNORE_INDEX), labels[:, :-1, 1:]], dim=1)
        return torch.cat([labels[..., :1], later], dim=-1)

    def layers(self) -> Sequence[Layer]:
        """Every layer of the backbone, with its one feed-forward network."""
        return [
            Layer(index, one.self_attn, {"text_ffn": FeedForward(one.mlp, one.mlp, one.post_attention_layernorm)})
            for index, one in enumerate(decoder_layers(self.model.decoder.model))
        ]

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """The one network is given every position."""
        return {"text_ffn": torch.ones_like(view.real)}

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Text at every position."""
        ids, labels = inputs.get("input_ids"), inputs.get("text_labels")
        if not isinstance(ids, Tensor):
            return None
        real = real_positions(inputs, ids)
        # One id more than there are predictions: what stands where nothing has been said yet.
        return BatchView(ids, real, real, labels if isinstance(labels, Tensor) else None, self._config.vocab_size + 1)

"""transformers' Csm: a backbone that predicts the first codebook, and a depth decoder that predicts the others.

A batch is text and waveforms, whose codes the model makes in its forward pass (``input_ids`` ``[batch, sequence]``,
``input_values``), or codes ``[batch, sequence, codebooks]`` without text, or embeddings. A clip ends with a frame of
zeros in every codebook; a single zero is a code as any other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import (
    DECODER_GROUPS,
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
    clips_with,
    codebook_names,
    decoder_layers,
    marked_rows,
    moved,
    output,
    reads,
    real_positions,
    shift_labels,
)
from telemetry.families.csm_speech import BACKBONE_ONLY, CsmSpeaker

NOT_MADE = "the labels that the model makes of waveforms in its forward pass do not show"
CODES = "audio_codes"  # where codes lie in a batch whose waveforms have been encoded aside
_EMBEDDED = "backbone_model.embed_tokens"
_GIVEN = ("attention_mask", "position_ids", "labels")


@reads("CsmForConditionalGeneration")
class CsmFamily(Family):
    """Reads ``CsmForConditionalGeneration``.

    Its loss is the backbone's mean over codes of codebook 0 and the depth decoder's over codes of all others, and both
    sums are divided by ``num_items_in_batch`` where the Trainer has counted: labels as they are given, which are
    neither's number.

    Audio whose labels are -100 is context: a reference. Of waveforms the model supervises it all the same, which is
    said.
    """

    name = "csm"
    modalities = ("text", "audio")
    meaningless = NO_CONVERSATION
    groups = (
        ("lora_", "lora"),
        ("codec_model", "other"),  # its layers have parts named like those of the decoder
        ("depth_decoder", "depth_decoder"),
        ("embed_text_tokens", "text_embedding"),
        ("embed_audio_tokens", "audio_embedding"),
        ("lm_head", "audio_head"),
        *DECODER_GROUPS,
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._config = model.config
        self._end = int(self._config.codebook_eos_token_id)

    @functools.cached_property
    def speaker(self) -> CsmSpeaker:
        """Speaks text after a reference's text and sound."""
        return CsmSpeaker(self.model, self)

    def watched(self) -> Mapping[str, nn.Module]:
        """What embeds codes: it is given those that the model makes of waveforms."""
        return {_EMBEDDED: self.model.backbone_model.embed_tokens}

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """Codebook 0, of the backbone, and all others, of the depth decoder."""
        given, items = inputs.get("labels"), inputs.get("num_items_in_batch")
        if not isinstance(given, Tensor):
            yield Absent("audio", NO_LABELS, in_loss=False)
            return
        labels = given if given.dim() == 3 else self._expanded(inputs, given, seen)
        if labels is None:
            yield Absent("audio", NOT_MADE)
            return
        first, others = labels[..., 0], labels[..., 1:]
        ends = (labels == self._end).all(dim=-1)
        backbone, depth = output(outputs, "logits"), output(outputs, "depth_decoder_logits")
        if backbone is None:
            yield Absent("codebook_0", NO_LOGITS)
        else:
            yield Stream(
                "codebook_0",
                backbone,
                first,
                "audio",
                "shifted",
                denominator=items,
                eos_id=self._end,
                ends=shift_labels(ends.long()) == 1,
            )
        supervised = others != IGNORE_INDEX
        if depth is None:
            yield Absent("depth_decoder", NO_LOGITS)
        else:
            rows = marked_rows(supervised.any(dim=-1), depth.shape[0])
            yield Stream(
                codebook_names(labels.shape[-1])[1:],
                depth,
                others,
                "audio",
                "aligned",
                denominator=supervised.sum() if items is None else items,
                rows=rows,
                eos_id=self._end,
                ends=ends.flatten()[rows].unsqueeze(-1).expand(-1, others.shape[-1]),
            )
        if items is not None:
            yield Divided("codebook_0", (shift_labels(first) != IGNORE_INDEX).sum(), items)
            yield Divided("the depth decoder", supervised.sum(), items)
        if given.dim() == 2:
            unlabelled = self._is_audio(inputs["input_ids"]) & (given == IGNORE_INDEX)
            yield Overruled(
                "positions of audio with the label -100: {}",
                "the model makes labels of its own for all {} that it encodes",
                unlabelled.sum(),
                self._is_audio(inputs["input_ids"]).sum(),
            )

    def _expanded(self, inputs: Mapping[str, Any], given: Tensor, seen: Seen) -> Tensor | None:
        """Labels ``[batch, sequence, codebooks]`` as the model makes them; None where what it has encoded is not seen.

        Every position of audio gets its codes, whatever its label was.
        """
        ids, cutoffs = inputs.get("input_ids"), inputs.get("input_values_cutoffs")
        calls = seen.given.get(_EMBEDDED, ())
        codes = next(iter(calls[0].values()), None) if calls else None  # an adapter calls them otherwise
        if not isinstance(ids, Tensor) or not isinstance(cutoffs, Tensor) or not isinstance(codes, Tensor):
            return None
        clips = cutoffs.diff(prepend=torch.zeros_like(cutoffs[:, :1])).flatten()
        samples = clips[marked_rows((cutoffs >= 0).flatten() & (clips > 0), codes.shape[0])]
        frames = self.model.codec_model.get_encoded_length(samples)
        held = torch.arange(codes.shape[1], device=codes.device) < frames.to(codes.device)[:, None]
        labels = given.unsqueeze(-1).expand(*given.shape, codes.shape[-1])
        labels = moved(codes, held, ids == self._config.audio_token_id, labels)
        labels = labels.masked_fill((ids == self._config.audio_eos_token_id).unsqueeze(-1), self._end)
        others = labels[..., 1:].masked_fill((given == BACKBONE_ONLY).unsqueeze(-1), IGNORE_INDEX)
        return torch.cat([labels[..., :1], others], dim=-1)

    def _is_audio(self, ids: Tensor) -> Tensor:
        return (ids == self._config.audio_token_id) | (ids == self._config.audio_eos_token_id)

    def layers(self) -> Sequence[Layer]:
        """Every layer of the backbone, with its one feed-forward network."""
        return [
            Layer(index, one.self_attn, {"text_ffn": FeedForward(one.mlp, one.mlp, one.post_attention_layernorm)})
            for index, one in enumerate(decoder_layers(self.model.backbone_model))
        ]

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """The one network is given every position."""
        return {"text_ffn": torch.ones_like(view.real)}

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Text, reference and target positions. Of a batch of waveforms the codes are not known beforehand."""
        ids, codes = inputs.get("input_ids"), inputs.get(CODES)
        if not isinstance(ids, Tensor):
            return None
        unknown = None
        if ids.dim() == 3:  # codes alone
            codes, ids = ids, torch.full_like(ids[..., 0], self._config.audio_token_id)
        real = real_positions(inputs, ids)
        is_audio = self._is_audio(ids) & real
        if not isinstance(codes, Tensor):
            unknown = is_audio & (ids == self._config.audio_token_id)
            pad = self._config.codebook_pad_token_id
            codes = torch.where(unknown, pad, self._end).unsqueeze(-1).expand(*ids.shape, self._config.num_codebooks)
        codes = codes.masked_fill(~is_audio.unsqueeze(-1), 0)
        return BatchView(
            input_ids=ids,
            real=real,
            text=real & ~is_audio,
            text_labels=None,
            vocabulary=self._config.text_vocab_size,
            audio=self._audio_view(inputs, codes, is_audio, unknown),
        )

    def _audio_view(
        self, inputs: Mapping[str, Any], codes: Tensor, is_audio: Tensor, unknown: Tensor | None
    ) -> AudioView:
        given = inputs.get("labels")
        labels = torch.full_like(codes, IGNORE_INDEX)
        if isinstance(given, Tensor) and given.dim() == 3:
            labels = given.masked_fill(~is_audio.unsqueeze(-1), IGNORE_INDEX)
        elif isinstance(given, Tensor):
            labels = torch.where((is_audio & (given != IGNORE_INDEX)).unsqueeze(-1), codes, labels)
            others = labels[..., 1:].masked_fill((given == BACKBONE_ONLY).unsqueeze(-1), IGNORE_INDEX)
            labels = torch.cat([labels[..., :1], others], dim=-1)
        is_end = (codes == self._end).all(dim=-1) & is_audio
        continues = torch.zeros_like(is_audio)
        continues[:, 1:] = (is_audio & ~is_end)[:, :-1]
        starts = is_audio & ~continues
        target = clips_with(starts, is_audio, (labels != IGNORE_INDEX).any(dim=-1))
        return AudioView(
            codes=codes,
            labels=labels,
            reference=is_audio & ~target,
            target=target,
            starts=starts,
            vocabulary=self._config.vocab_size,
            bos_id=-1,
            eos_id=self._end,
            frames=is_audio.sum(dim=1),
            placeholders=is_audio.sum(dim=1),
            delay=(0,) * codes.shape[-1],
            ends=is_end.unsqueeze(-1).expand_as(codes),
            embedded=unknown,
            labelled=isinstance(given, Tensor),
        )

    def coded(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch with the codes of its waveforms, and with labels of its last clip alone where all clips have some.

        So that clips before the one that is spoken are its reference, as they are when the model is used.
        """
        ids, values = inputs.get("input_ids"), inputs.get("input_values")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not isinstance(values, Tensor):
            return inputs
        nothing = torch.full_like(ids, IGNORE_INDEX)
        merged = self.model._merge_input_ids_with_input_values(ids, values, inputs.get("input_values_cutoffs"), nothing)
        codes = merged["labels"]
        kept = {name: inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None}
        batch = {"input_ids": ids, **kept, CODES: codes.masked_fill(codes == IGNORE_INDEX, 0)}
        if not isinstance(inputs.get("labels"), Tensor):
            return batch
        view = self.view({**batch, "labels": inputs["labels"]})
        assert view is not None  # it has token ids
        assert view.audio is not None
        audio = view.audio
        clip = audio.starts.long().cumsum(dim=1)
        is_last = clip == clip.amax(dim=1, keepdim=True)
        wanted = audio.target & (is_last | audio.reference.any(dim=1, keepdim=True))
        return {**batch, "labels": audio.labels.masked_fill(~wanted.unsqueeze(-1), IGNORE_INDEX)}

    def swap_reference(self, inputs: Mapping[str, Any], codes: Tensor | None) -> dict[str, Any]:
        """A batch with other codes: with its labels, which the depth decoder is given to predict from."""
        ids, labels = inputs["input_ids"], inputs.get("labels")
        # With a cache: without one, the depth decoder fails on as many frames as it has codebooks (transformers 5.23).
        own = {name: inputs[name] for name in _GIVEN if inputs.get(name) is not None} | {"use_cache": True}
        if labels is not None and not bool((labels[..., 1:] != IGNORE_INDEX).any()):
            del own["labels"]  # which the depth decoder fails on: it has no frame to predict
        if ids.dim() == 3:
            return own | {"input_ids": ids if codes is None else codes}
        codes = inputs[CODES] if codes is None else codes
        spoken, text = self.model.backbone_model.embed_tokens(codes), self.model.embed_text_tokens(ids)
        return own | {"inputs_embeds": torch.where(self._is_audio(ids).unsqueeze(-1), spoken, text)}

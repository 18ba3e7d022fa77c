"""The original Higgs Audio model (``boson_multimodal``): Llama layers, some with an audio feed-forward network.

Read by its published interface (github.com/boson-ai/higgs-audio) and never imported. Codes travel beside the text as
``audio_in_ids`` and ``audio_out_ids`` ``[codebooks, frames]`` with the start of every clip; one placeholder token
stands for a whole clip, and the model expands it inside of its forward pass. An ``<|AUDIO|>`` may be given as
embeddings of ``audio_features`` (Whisper), as codes, or as both, the codes last.

How long the expanded sequence gets only the device knows. So that nobody waits for it, the view has room for all audio
in one sample, and says which of its positions the model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import (
    DECODER_GROUPS,
    IGNORE_INDEX,
    NO_LOGITS,
    Absent,
    AudioView,
    BatchView,
    Declared,
    Family,
    Seen,
    Stream,
    clips_with,
    codebook_names,
    marked_rows,
    output,
    reads,
    real_positions,
)

_ROUND_TO = 8  # the model pads its expanded sequences to a multiple of this
_SPECIAL_CODES = 2  # stream BOS and EOS, which the configured codebook size leaves out
_FIELDS = (
    "audio_num_codebooks", "audio_codebook_size", "audio_stream_bos_id", "audio_stream_eos_id",
    "audio_in_token_idx", "audio_out_token_idx",
)  # fmt: skip


@reads("HiggsAudioModel")
class HiggsAudioFamily(Family):
    """Reads ``HiggsAudioModel``.

    Text logits cover the model's own sequence; audio logits the ``<|AUDIO_OUT|>`` audio, sample by sample.
    """

    name = "higgs_audio"
    modalities = ("text", "audio")
    groups = (
        ("lora_", "lora"),
        # The audio encoder and a separate audio attention have parts named like those of the decoder: they come first.
        ("audio_tower", "other"),
        ("audio_encoder_proj", "other"),
        ("audio_attn.", "other"),
        ("audio_codebook_embeddings", "audio_embedding"),
        ("audio_out_embed_projector", "audio_embedding"),
        ("audio_lm_head", "audio_head"),
        ("text_lm_head", "text_head"),
        ("audio_mlp", "audio_ffn"),
        *DECODER_GROUPS,
    )

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether it has the heads and the configuration that are read."""
        config, heads = getattr(model, "config", None), getattr(model, "audio_decoder_proj", None)
        has_heads = hasattr(heads, "text_lm_head") and hasattr(heads, "audio_lm_head")
        return has_heads and all(hasattr(config, field) for field in _FIELDS)

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """Text, and all codebooks."""
        view, items = seen.view, inputs.get("num_items_in_batch")
        if view is None or view.audio is None:
            return
        config = self.model.config
        text, audio = output(outputs, "logits"), output(outputs, "audio_logits")
        text_taught, audio_taught = view.text_labels is not None, isinstance(inputs.get("label_audio_ids"), Tensor)
        room = tuple(view.input_ids.shape)
        if text is None:
            yield Absent("text", NO_LOGITS, in_loss=text_taught)
        elif text.shape[0] != room[0] or text.shape[1] > room[1]:
            why = f"logits {tuple(text.shape)} are not of the {room} positions that the batch has room for"
            yield Absent("text", why, in_loss=text_taught)
        elif view.text_labels is not None:
            yield Stream(
                "text",
                text.flatten(0, 1),
                view.text_labels,
                "text",
                "shifted",
                denominator=items,
                rows=_own_positions(view, text),
            )
        if audio is None:
            yield Absent("audio", NO_LOGITS, in_loss=audio_taught)
        elif audio_taught:
            is_out = view.input_ids == config.audio_out_token_idx
            yield Stream(
                codebook_names(view.audio.codebooks),
                audio,
                view.audio.labels,
                "audio",
                "shifted",
                denominator=items,
                rows=marked_rows(is_out, audio.shape[0]),
                bos_id=view.audio.bos_id,
                eos_id=view.audio.eos_id,
            )

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """The batch with every placeholder expanded as the model expands it."""
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor):
            return None
        config = self.model.config
        audio = _AudioInputs(inputs, input_ids.device, config)
        layout = _Layout(input_ids, audio, config, bool(inputs.get("use_cache")))
        labels = inputs.get("label_ids")
        given = real_positions(inputs, input_ids, config.pad_token_id, labels)
        real = (layout.take(given) & layout.is_text) | layout.is_audio
        return BatchView(
            input_ids=torch.where(layout.filled, layout.take(input_ids), int(config.pad_token_id)),
            real=real,
            text=real & ~layout.is_audio,
            text_labels=(
                torch.where(layout.is_text, layout.take(labels), IGNORE_INDEX) if isinstance(labels, Tensor) else None
            ),
            vocabulary=int(config.text_config.vocab_size),
            audio=self._audio_view(layout, audio),
            exists=layout.exists(real),
        )

    def _audio_view(self, layout: _Layout, audio: _AudioInputs) -> AudioView:
        config, codebooks = self.model.config, audio.codes.shape[1]
        coded = (layout.is_audio & ~layout.embedded)[..., None]
        codes, labels = (frames[layout.frame] for frames in (audio.codes, audio.labels))
        labels = torch.where(coded, labels, IGNORE_INDEX)
        target = clips_with(layout.starts, layout.is_audio, (labels != IGNORE_INDEX).any(dim=-1))
        return AudioView(
            codes=torch.where(coded, codes, 0),
            labels=labels,
            reference=layout.is_audio & ~target,
            target=target,
            starts=layout.starts,
            vocabulary=int(config.audio_codebook_size) + _SPECIAL_CODES,
            bos_id=int(config.audio_stream_bos_id),
            eos_id=int(config.audio_stream_eos_id),
            frames=layout.clips,
            placeholders=layout.placeholders,
            delay=tuple(range(codebooks)) if getattr(config, "use_delay_pattern", True) else (0,) * codebooks,
            embedded=layout.embedded,
            features=audio.features,
            features_real=audio.features_real,
            labelled=audio.labelled,
        )


class _AudioInputs:
    """The audio of a batch; what belongs to ``<|AUDIO|>`` comes before what belongs to ``<|AUDIO_OUT|>``.

    Attributes:
        codes, labels: int64 ``[frames, codebooks]``, one frame at least.
        in_first, in_frames, out_first, out_frames: int64 ``[clips]``: first frame and number of frames of every clip.
        features, features_real: see :class:`AudioView`.
        embeddings: int64 ``[clips]``: positions that the features of an ``<|AUDIO|>`` take.
        positions: no less than all of it takes.
        labelled: see :class:`AudioView`.
    """

    def __init__(self, inputs: Mapping[str, Any], device: torch.device, config: Any) -> None:
        codebooks = int(config.audio_num_codebooks)
        takes_codes = bool(getattr(config, "encode_audio_in_tokens", False))
        in_codes, self.in_first = _codes(inputs, "audio_in_ids" if takes_codes else "", codebooks, device)
        out_codes, out_first = _codes(inputs, "audio_out_ids", codebooks, device)
        self.out_first = out_first + in_codes.shape[1]
        self.in_frames = _lengths(self.in_first, in_codes.shape[1])
        self.out_frames = _lengths(out_first, out_codes.shape[1])
        out_labels = inputs.get("label_audio_ids")
        self.labelled = any(inputs.get(name) is not None for name in ("label_ids", "label_audio_ids"))
        if not isinstance(out_labels, Tensor) or out_labels.shape != out_codes.shape:
            out_labels = torch.full_like(out_codes, IGNORE_INDEX)
        spare = out_codes.new_full((codebooks, 1), IGNORE_INDEX)  # something to read where there is no frame at all
        self.codes = torch.cat([in_codes, out_codes, spare], dim=1).t()
        self.labels = torch.cat([torch.full_like(in_codes, IGNORE_INDEX), out_labels.to(device), spare], dim=1).t()
        self.features: Tensor | None
        self.features_real: Tensor | None
        self.features, self.features_real = _features(inputs, config)
        self.embeddings, most = _embedding_lengths(self.features_real, device)
        self.positions = in_codes.shape[1] + out_codes.shape[1] + self.embeddings.shape[0] * most


class _Layout:
    """Where the tokens of a batch go when its placeholders are expanded. All ``[batch, room]``.

    Attributes:
        token: int64: the token that stands there.
        filled: bool: whether any token does.
        frame: int64: index of the code frame that stands there, where one does.
        is_audio, embedded, starts, is_text: bool: audio, audio without codes, first positions of clips, other tokens.
        clips, placeholders: int64 ``[batch]``: clips that were handed over, and placeholders that ask for one.
    """

    def __init__(self, input_ids: Tensor, audio: _AudioInputs, config: Any, use_cache: bool) -> None:
        is_in, is_out = input_ids == int(config.audio_in_token_idx), input_ids == int(config.audio_out_token_idx)
        embeddings, _ = _by_placeholder(audio.embeddings, is_in)
        in_frames, _ = _by_placeholder(audio.in_frames, is_in)
        in_first, _ = _by_placeholder(audio.in_first, is_in)
        out_frames, _ = _by_placeholder(audio.out_frames, is_out)
        out_first, has_out = _by_placeholder(audio.out_first, is_out)
        has_in = is_in & ((embeddings + in_frames) > 0)
        length = torch.where(has_in | has_out, embeddings + in_frames + out_frames, 1)
        self._left_padded = use_cache or input_ids.shape[0] == 1
        self._round_to = 1 if use_cache else _ROUND_TO
        room = _rounded(input_ids.shape[1] + audio.positions, _ROUND_TO)
        self.token, within, self.filled = _expanded(length, room, self._left_padded)

        self.is_audio = self.filled & self.take(has_in | has_out)
        self.embedded = self.is_audio & (within < self.take(embeddings))
        self.starts = self.is_audio & (within == 0)
        self.is_text = self.filled & ~self.take(is_in | is_out)
        frame = self.take(in_first + out_first) + within - self.take(embeddings)
        self.frame = frame.clamp(0, audio.codes.shape[0] - 1)
        self.placeholders = (is_in | is_out).sum(dim=1)
        surplus = _surplus(max(audio.in_first.shape[0], audio.embeddings.shape[0]), is_in)
        surplus = surplus + _surplus(audio.out_first.shape[0], is_out)
        clips = (has_in | has_out).sum(dim=1)
        # A clip that nothing asks for belongs to no sample; the last one stands for the batch.
        self.clips = torch.cat([clips[:-1], clips[-1:] + surplus])

    def take(self, values: Tensor) -> Tensor:
        """What every position's token has, of values ``[batch, sequence]``."""
        return values.gather(1, self.token)

    def exists(self, real: Tensor) -> Tensor:
        """bool ``[batch, room]``: the positions that the model has, which it cuts to what is real and rounds up."""
        room = real.shape[1]
        column = torch.arange(room, device=real.device)
        from_edge = room - column if self._left_padded else column + 1
        extent = (real.any(dim=0) * from_edge).amax()
        return (from_edge <= _rounded(extent, self._round_to)).expand_as(real)


def _expanded(length: Tensor, room: int, left_padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For every one of ``room`` positions its token, the place within what that token expands to, and whether any is.

    Args:
        length: int64 ``[batch, sequence]``: positions that each token takes, at least 1.
    """
    ends = length.cumsum(dim=1)
    total = ends[:, -1:]
    place = torch.arange(room, device=length.device).expand(length.shape[0], room)
    place = place - (room - total) if left_padded else place.contiguous()
    token = torch.searchsorted(ends, place, right=True).clamp(max=length.shape[1] - 1)
    within = place - (ends - length).gather(1, token)
    return token, within, (place >= 0) & (place < total)


def _by_placeholder(of_clip: Tensor, asks: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the clips at the placeholders that ask for them, in order (0 elsewhere), and where they are."""
    if not of_clip.shape[0]:
        return torch.zeros_like(asks, dtype=torch.long), torch.zeros_like(asks)
    rank = (asks.flatten().long().cumsum(0) - 1).view_as(asks)
    has = asks & (rank < of_clip.shape[0])
    return torch.where(has, of_clip[rank.clamp(0, of_clip.shape[0] - 1)], 0), has


def _surplus(clips: int, asks: Tensor) -> Tensor:
    return (clips - asks.sum()).clamp(min=0)


def _codes(inputs: Mapping[str, Any], name: str, codebooks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes ``[codebooks, frames]`` and first frames ``[clips]`` of one kind of audio; empty where there is none."""
    codes, starts = inputs.get(name), inputs.get(f"{name}_start")
    if not isinstance(codes, Tensor) or not isinstance(starts, Tensor) or not codes.numel():
        empty = torch.zeros(codebooks, 0, dtype=torch.long, device=device)
        return empty, empty[0]
    return codes.to(device).long(), starts.to(device).long()


def _lengths(first: Tensor, frames: int) -> Tensor:
    return torch.cat([first[1:], first.new_full((min(1, first.shape[0]),), frames)]) - first


def _features(inputs: Mapping[str, Any], config: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Features ``[clips, channels, frames]`` and bool ``[clips, frames]``; no clips where nothing is given.

    None for a model without an audio encoder.
    """
    if getattr(config, "skip_audio_tower", False):
        return None, None
    features, mask = inputs.get("audio_features"), inputs.get("audio_feature_attention_mask")
    if not isinstance(features, Tensor) or not isinstance(mask, Tensor) or not features.shape[0]:
        return torch.zeros(0, 0, 0), torch.zeros(0, 0, dtype=torch.bool)
    return features, mask.bool()


def _embedding_lengths(features_real: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """Positions that each clip's features take, int64 ``[clips]``, and the most that any can."""
    if features_real is None or not features_real.shape[0]:
        return torch.zeros(0, dtype=torch.long, device=device), 0
    return _encoded(features_real.to(device).sum(dim=-1)), int(_encoded(features_real.shape[1]))


def _encoded(frames: Any) -> Any:
    """Frames after the encoder: a convolution of stride 2 and an average pool of 2, as the model states it."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def _rounded(number: Any, to: int) -> Any:
    return (number + to - 1) // to * to


def _own_positions(view: BatchView, logits: Tensor) -> Tensor:
    """int64 ``[batch · length]``: where the positions of text logits ``[batch, length, V]`` lie in a view with room."""
    room, device = view.input_ids.shape[1], view.input_ids.device
    exists = view.real if view.exists is None else view.exists
    first = exists.to(torch.int8).argmax(dim=1) + torch.arange(exists.shape[0], device=device) * room
    return (first[:, None] + torch.arange(logits.shape[1], device=device)).flatten()

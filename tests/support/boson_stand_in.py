"""A stand-in for the original Higgs Audio model: its published names, inputs, outputs and expansion, and little else.

Nothing of ``boson_multimodal`` is installed. Where the original merges embeddings with tensor operations, this one
lays every sample out position by position in plain loops, so that it is an independent reading of what is published.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

AUDIO_IN, AUDIO_OUT, PAD = 1, 2, 0
IGNORED = -100


@dataclass
class StandInTextConfig:
    vocab_size: int = 40


@dataclass
class StandInConfig:
    """The fields of the original's configuration that say how a batch is read."""

    audio_num_codebooks: int = 3
    audio_codebook_size: int = 10
    audio_stream_bos_id: int = 10
    audio_stream_eos_id: int = 11
    audio_in_token_idx: int = AUDIO_IN
    audio_out_token_idx: int = AUDIO_OUT
    pad_token_id: int = PAD
    encode_audio_in_tokens: bool = True
    skip_audio_tower: bool = True
    use_delay_pattern: bool = True
    text_config: StandInTextConfig = field(default_factory=StandInTextConfig)


@dataclass
class StandInOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    expanded_input_ids: Tensor | None = None
    expanded_labels: Tensor | None = None
    audio_in_mask: Tensor | None = None
    audio_in_discrete_codes_mask: Tensor | None = None
    audio_out_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    audio_logits: Tensor | None = None
    codebook_losses: Tensor | None = None


class DualFFNLayer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"o_proj": nn.Linear(hidden, hidden)})
        self.mlp, self.audio_mlp = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.post_attention_layernorm = nn.LayerNorm(hidden)
        self.audio_post_attention_layernorm = nn.LayerNorm(hidden)

    def forward(self, hidden: Tensor, is_audio: Tensor) -> Tensor:
        hidden = hidden + self.self_attn["o_proj"](hidden.cumsum(dim=1))
        text = self.mlp(self.post_attention_layernorm(hidden))
        audio = self.audio_mlp(self.audio_post_attention_layernorm(hidden))
        return hidden + torch.where(is_audio[..., None], audio, text)


class AudioDecoderProjector(nn.Module):
    def __init__(self, hidden: int, config: StandInConfig) -> None:
        super().__init__()
        self.text_lm_head = nn.Linear(hidden, config.text_config.vocab_size, bias=False)
        codes = config.audio_num_codebooks * (config.audio_codebook_size + 2)
        self.audio_lm_head = nn.Linear(hidden, codes, bias=False)


@dataclass
class Place:
    """One position of an expanded sample."""

    token: int
    real: bool = True
    label: int = IGNORED
    codes: Tensor | None = None
    embedded: Tensor | None = None
    is_out: bool = False


class HiggsAudioModel(nn.Module):
    """The stand-in. Its class name is how the family knows it, as it knows the original."""

    def __init__(self, config: StandInConfig, hidden: int = 8) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.text_config.vocab_size, hidden)
        codes = config.audio_num_codebooks * (config.audio_codebook_size + 2)
        self.audio_codebook_embeddings = nn.Embedding(codes, hidden)
        self.layers = nn.ModuleList([DualFFNLayer(hidden), DualFFNLayer(hidden)])
        self.norm = nn.LayerNorm(hidden)
        self.audio_tower = None if config.skip_audio_tower else nn.ModuleDict({"self_attn": nn.Linear(4, hidden)})
        self.audio_decoder_proj = AudioDecoderProjector(hidden, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        audio_features: Tensor | None = None,
        audio_feature_attention_mask: Tensor | None = None,
        audio_in_ids: Tensor | None = None,
        audio_in_ids_start: Tensor | None = None,
        audio_out_ids: Tensor | None = None,
        audio_out_ids_start: Tensor | None = None,
        label_ids: Tensor | None = None,
        label_audio_ids: Tensor | None = None,
        **_: Any,
    ) -> StandInOutput:
        ins = _clips(audio_in_ids, audio_in_ids_start) if self.config.encode_audio_in_tokens else []
        embedded = self._embedded(audio_features, audio_feature_attention_mask)
        rows = self._rows(
            input_ids, attention_mask, label_ids, ins, embedded, _clips(audio_out_ids, audio_out_ids_start)
        )
        rows = _padded(rows, left=len(rows) == 1)
        hidden = torch.stack([torch.stack([self._embed(place) for place in row]) for row in rows])
        is_out = torch.tensor([[place.is_out for place in row] for row in rows])
        is_in = torch.tensor([[place.token == AUDIO_IN for place in row] for row in rows])
        coded = torch.tensor([[place.codes is not None for place in row] for row in rows])
        for layer in self.layers:
            hidden = layer(hidden, coded)
        hidden = self.norm(hidden)
        codebooks = (self.config.audio_num_codebooks, self.config.audio_codebook_size + 2)
        audio_logits = self.audio_decoder_proj.audio_lm_head(hidden[is_out]).unflatten(1, codebooks).float()
        logits = self.audio_decoder_proj.text_lm_head(hidden)
        text = [
            cross_entropy(logits[row, at - 1], torch.tensor(place.label))
            for row, places in enumerate(rows)
            for at, place in enumerate(places)
            if at and place.label != IGNORED
        ]
        return StandInOutput(
            loss=_sum_of_means([text, *_code_losses(audio_logits, label_audio_ids, audio_out_ids_start)]),
            logits=logits,
            audio_logits=audio_logits,
            expanded_input_ids=torch.tensor([[place.token for place in row] for row in rows]),
            expanded_labels=torch.tensor([[place.label for place in row] for row in rows]),
            audio_in_mask=is_in,
            audio_in_discrete_codes_mask=coded & ~is_out,
            audio_out_mask=is_out,
            attention_mask=torch.tensor([[int(place.real) for place in row] for row in rows]),
        )

    def _rows(
        self,
        input_ids: Tensor,
        mask: Tensor,
        labels: Tensor | None,
        ins: list[Tensor],
        embedded: list[Tensor],
        outs: list[Tensor],
    ) -> list[list[Place]]:
        rows: list[list[Place]] = []
        taken = {AUDIO_IN: 0, AUDIO_OUT: 0}
        for row, ids in enumerate(input_ids.tolist()):
            places: list[Place] = []
            for column, token in enumerate(ids):
                if token not in taken:
                    label = IGNORED if labels is None else int(labels[row, column])
                    places.append(Place(token, bool(mask[row, column]), label))
                    continue
                at = taken[token]
                taken[token] += 1
                if token == AUDIO_IN:
                    places += [Place(token, embedded=part) for part in (embedded[at] if embedded else ())]
                    places += [Place(token, codes=codes) for codes in (ins[at].t() if ins else ())]
                else:
                    places += [Place(token, codes=codes, is_out=True) for codes in outs[at].t()]
            rows.append(places)
        return rows

    def _embedded(self, features: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        if self.audio_tower is None or features is None or mask is None:
            return []
        lengths = [_behind_the_encoder(int(row.sum())) for row in mask]
        encoded = self.audio_tower["self_attn"](features.transpose(1, 2).float())
        return [clip[::4][:length] for clip, length in zip(encoded, lengths, strict=True)]

    def _embed(self, place: Place) -> Tensor:
        if place.embedded is not None:
            return place.embedded
        if place.codes is not None:
            shift = torch.arange(self.config.audio_num_codebooks) * (self.config.audio_codebook_size + 2)
            return self.audio_codebook_embeddings(place.codes + shift).sum(0)
        return self.embed_tokens(torch.tensor(place.token))


def _code_losses(logits: Tensor, labels: Tensor | None, starts: Tensor | None) -> list[list[Tensor]]:
    """By codebook, the loss of every supervised code; the first of a clip is predicted by nothing."""
    if labels is None or starts is None:
        return []
    return [
        [
            cross_entropy(logits[frame - 1, k], label)
            for frame, label in enumerate(row)
            if label != IGNORED and frame not in starts.tolist()
        ]
        for k, row in enumerate(labels)
    ]


def _sum_of_means(losses: list[list[Tensor]]) -> Tensor | None:
    means = [torch.stack(each).mean() for each in losses if each]
    return torch.stack(means).sum() if means else None


def _behind_the_encoder(frames: int) -> int:
    halved = (frames - 1) // 2 + 1
    return (halved - 2) // 2 + 1


def _clips(codes: Tensor | None, starts: Tensor | None) -> list[Tensor]:
    if codes is None or starts is None or codes.numel() == 0:
        return []
    ends = [*starts.tolist()[1:], codes.shape[1]]
    return [codes[:, start:end] for start, end in zip(starts.tolist(), ends, strict=True)]


def _padded(rows: list[list[Place]], left: bool) -> list[list[Place]]:
    """At one length, a multiple of 8, without columns at the padded edge that no sample needs."""
    longest = -(-max(map(len, rows)) // 8) * 8
    filled = []
    for row in rows:
        padding = [Place(PAD, real=False) for _ in range(longest - len(row))]
        filled.append([*padding, *row] if left else [*row, *padding])
    used = [column for column in range(longest) if any(row[column].real for row in filled)]
    if left:
        first = used[0] // 8 * 8
        return [row[first:] for row in filled]
    end = -(-(used[-1] + 1) // 8) * 8
    return [row[:end] for row in filled]

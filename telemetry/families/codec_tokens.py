"""Codec tokens in the vocabulary of a language model, frame after frame (Orpheus, Llasa, OuteTTS, ...)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import (
    IGNORE_INDEX,
    NO_CONVERSATION,
    Absent,
    AudioView,
    BatchView,
    Declared,
    Group,
    Seen,
    Stream,
    clips_with,
    codebook_names,
    shift_labels,
)
from telemetry.families.causal_lm import CausalLMFamily, text_config
from telemetry.families.codec_tokens_speech import CodecTokensSpeaker

NO_PLACE = "codebooks share their ids, and which one a label is of does not show: labels are not those of the token ids"
MISPLACED = -1  # stands where a codebook's token is at the place of another


@dataclass(frozen=True)
class CodecTokens:
    """Declares which ids of a language model are codes of an audio codec, and how a frame of them is laid out.

    ``reads("LlamaForCausalLM")(CodecTokens(first=128266, codebooks=7, size=4096, end=128258))`` reads Orpheus.

    Args:
        first: id of the first code. A number: every codebook has ``size`` ids of its own, one codebook after the
            other. Several: where each codebook begins; those of equal ids are told apart by their place in the frame.
        codebooks: how many: the tokens of a frame.
        size: codes of one codebook.
        layout: the codebooks in the order of a frame's tokens; by default from the first to the last. Empty where
            tokens lie in no frames: then the model is not made to speak.
        end: id of the token that ends speech; None without one.
        codec: decodes speech: ``decode`` is given codes ``[1, codebooks, frames]`` and returns a waveform, at
            ``sampling_rate``. By default the processor's ``audio_tokenizer``.

    Raises:
        ValueError: for a number below 1, a layout that is none of the codebooks, and ids that only some share.
    """

    first: int | Sequence[int]
    codebooks: int = 1
    size: int = 4096
    layout: Sequence[int] | None = None
    end: int | None = None
    codec: Any = None

    def __post_init__(self) -> None:
        firsts, layout = self.firsts, self.places
        if self.codebooks < 1 or self.size < 1 or min(firsts) < 0:
            raise ValueError(f"codebooks and size must be at least 1 and ids at least 0, got {self}")
        if len(firsts) != self.codebooks:
            raise ValueError(f"first names {len(firsts)} codebooks of {self.codebooks}")
        if layout and sorted(layout) != list(range(self.codebooks)):
            raise ValueError(f"layout must name each codebook from 0 to {self.codebooks - 1} once, got {layout}")
        if self.shared and (not layout or len(set(firsts)) > 1):
            raise ValueError("codebooks may share ids where they share all of them, and tokens lie in frames")

    @property
    def firsts(self) -> tuple[int, ...]:
        """The id of the first code of every codebook."""
        if isinstance(self.first, int):
            return tuple(self.first + k * self.size for k in range(self.codebooks))
        return tuple(self.first)

    @property
    def places(self) -> tuple[int, ...]:
        """The codebook of each token of a frame, in order; none without frames."""
        return tuple(range(self.codebooks)) if self.layout is None else tuple(self.layout)

    @property
    def shared(self) -> bool:
        """Whether ids are those of several codebooks."""
        ordered = sorted(self.firsts)
        return any(later < one + self.size for one, later in itertools.pairwise(ordered))

    def fits(self, model: nn.Module) -> bool:
        """Return whether a model is a language model whose vocabulary has all codes."""
        return CausalLMFamily.fits(model) and max(self.firsts) + self.size <= text_config(model).vocab_size  # type: ignore[no-any-return]

    def __call__(self, model: Any) -> CodecTokensFamily:
        return CodecTokensFamily(model, self)


class CodecTokensFamily(CausalLMFamily):
    """Reads a language model that writes codec tokens.

    Its loss is one mean over all tokens: every stream is a share of it. A clip is a run of codes, with the end after
    it; one without labels is reference.

    Args:
        model: the language model.
        tokens: which of its ids are codes.
    """

    name = "codec_tokens"
    modalities: tuple[Group, ...] = ("text", "audio")
    meaningless = NO_CONVERSATION

    def __init__(self, model: Any, tokens: CodecTokens) -> None:
        super().__init__(model)
        self.tokens = tokens
        self._end = tokens.size  # of a codebook: one more than its codes

    @functools.cached_property
    def speaker(self) -> CodecTokensSpeaker | None:
        """Speaks after the batch's prompt, where tokens lie in frames."""
        return CodecTokensSpeaker(self.model, self) if self.tokens.places else None

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """The text, and every codebook: tokens of one sequence, from the same logits."""
        for one in super().streams(inputs, outputs, seen):
            if not isinstance(one, Stream):
                yield one
                if isinstance(one, Absent):
                    yield replace(one, name="audio")
                continue
            by = (one.targets != IGNORE_INDEX).sum() if one.denominator is None else one.denominator
            shared = replace(one, denominator=by, turns=one.labels)
            held = self._held_by(one, seen.view)
            other = (self._within(one.labels) if held is None else held).any(dim=-1)
            yield replace(shared, labels=one.labels.masked_fill(other, IGNORE_INDEX), eos_id=self.tokens.end)
            if held is None:
                yield Absent("audio", NO_PLACE)
                continue
            for k, name in enumerate(codebook_names(self.tokens.codebooks)):
                yield replace(
                    shared,
                    name=name,
                    group="audio",
                    labels=one.labels.masked_fill(~held[..., k], IGNORE_INDEX),
                    entries=(self.tokens.firsts[k], self.tokens.size),
                )

    def _held_by(self, stream: Stream, view: BatchView | None) -> Tensor | None:
        """bool ``[batch, sequence, codebooks]``: the labels that are of a codebook; None where that is not known."""
        if not self.tokens.shared:
            return self._within(stream.labels)
        audio = view.audio if view is not None else None
        if audio is None or audio.held is None:
            return None
        held = shift_labels(audio.held.long()) == 1 if stream.alignment == "given_shifted" else audio.held
        more = stream.labels.shape[1] - held.shape[1]  # of a prompt that an adapter puts in front
        if more < 0 or stream.labels.shape[0] != held.shape[0]:
            return None
        return torch.cat([held.new_zeros(held.shape[0], more, held.shape[2]), held], dim=1)

    def _within(self, ids: Tensor) -> Tensor:
        """bool ``[..., codebooks]``: the ids that lie among those of a codebook."""
        firsts = torch.tensor(self.tokens.firsts).to(ids.device, non_blocking=True)
        codes = ids.unsqueeze(-1) - firsts
        return (codes >= 0) & (codes < self.tokens.size)

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Text, reference and target positions, and the codes of each."""
        view = super().view(inputs)
        if view is None:
            return None
        ids, labels = view.input_ids, view.text_labels
        within = self._within(ids) & view.real.unsqueeze(-1)
        is_code = within.any(dim=-1)
        before = torch.cat([torch.zeros_like(is_code[:, :1]), is_code[:, :-1]], dim=1)
        is_end = (ids == (-1 if self.tokens.end is None else self.tokens.end)) & before & view.real
        starts = is_code & ~before
        held = within & self._in_place(starts) if self.tokens.places else within
        firsts = torch.tensor(self.tokens.firsts).to(ids.device, non_blocking=True)
        codes = torch.where(held, ids.unsqueeze(-1) - firsts, 0)
        misplaced = is_code & ~held.any(dim=-1)
        codes = codes.masked_fill((within & misplaced.unsqueeze(-1)), MISPLACED)
        codes = codes.masked_fill(is_end.unsqueeze(-1), self._end)
        taught = torch.zeros_like(is_code) if labels is None else labels != IGNORE_INDEX
        is_audio = is_code | is_end
        target = clips_with(starts, is_audio, taught)
        spoken = (held | is_end.unsqueeze(-1)) & taught.unsqueeze(-1)
        audio = AudioView(
            codes=codes,
            labels=codes.masked_fill(~spoken, IGNORE_INDEX),
            reference=is_audio & ~target,
            target=target,
            starts=starts,
            vocabulary=self.tokens.size + 1,
            bos_id=-1,
            eos_id=self._end,
            frames=is_audio.sum(dim=1),
            placeholders=is_audio.sum(dim=1),
            delay=(0,) * self.tokens.codebooks,
            reference_codes=held & ~target.unsqueeze(-1),
            held=held,
            labelled=labels is not None,
        )
        text = view.text & ~is_audio
        kept = None if labels is None else labels.masked_fill(is_code, IGNORE_INDEX)
        return replace(view, text=text, text_labels=kept, audio=audio)

    def _in_place(self, starts: Tensor) -> Tensor:
        """bool ``[batch, sequence, codebooks]``: where a frame, counted from its clip's start, has a codebook's token.

        Args:
            starts: bool ``[batch, sequence]``.
        """
        at = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
        since = at - torch.where(starts, at, 0).cummax(dim=1).values
        places = torch.tensor(self.tokens.places).to(starts.device, non_blocking=True)
        own = places[since % len(places)]
        return own.unsqueeze(-1) == torch.arange(self.tokens.codebooks, device=starts.device)

    def swap_reference(self, inputs: Mapping[str, Any], codes: Tensor | None) -> dict[str, Any]:
        """A batch with other codes among its token ids."""
        ids = inputs["input_ids"]
        given = {name: inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None}
        view = self.view(inputs)
        if codes is not None and view is not None and view.audio is not None and view.audio.held is not None:
            for k, first in enumerate(self.tokens.firsts):
                end = ids if self.tokens.end is None else self.tokens.end
                token = torch.where(codes[..., k] == self._end, end, codes[..., k] + first)
                ids = torch.where(view.audio.held[..., k] & (codes[..., k] >= 0), token, ids)
        return given | {"input_ids": ids, "use_cache": False}

"""Speech from a language model that writes codec tokens: the prompt cut out of a batch, generation, frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from telemetry.families.base import BatchView, clip_length, decoder_layers
from telemetry.families.speech import Ending, Prompt, Speaker, Speech, bounded, first, on, seed_sampling


class Tokens(Protocol):
    """Which ids are codes, as :class:`telemetry.families.codec_tokens.CodecTokens` declares them."""

    @property
    def codebooks(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def end(self) -> int | None: ...
    @property
    def codec(self) -> Any: ...
    @property
    def firsts(self) -> Sequence[int]: ...
    @property
    def places(self) -> Sequence[int]: ...


class Reader(Protocol):
    """What of a family speaking needs."""

    @property
    def tokens(self) -> Tokens: ...
    def view(self, inputs: Mapping[str, Any]) -> BatchView | None: ...


class CodecTokensSpeaker(Speaker):
    """Makes a language model speak, with the settings of generation that it was saved with.

    Args:
        model: the model.
        family: reads its batches.
    """

    def __init__(self, model: Any, family: Reader) -> None:
        self.model: nn.Module = model
        self.codec = family.tokens.codec
        self._lm: Any = model
        self._family = family
        self._tokens = family.tokens

    def prompt(self, inputs: Mapping[str, Any], row: int) -> Prompt | None:
        named = ("input_ids", "attention_mask", "labels")
        sample = {name: inputs[name][row : row + 1].cpu() for name in named if isinstance(inputs.get(name), Tensor)}
        padded = self._family.view(sample)
        if padded is None:
            return None
        sample = {name: tensor[:, padded.real[0]] for name, tensor in sample.items()}
        view = self._family.view(sample)
        if view is None or view.audio is None or not bool(view.audio.target.any()):
            return None
        begin = first(view.audio.target[0])
        end = begin + clip_length(view.audio, begin)
        ids, reference = sample["input_ids"], None
        if bool(view.audio.reference[0, :begin].any()):
            start = first(view.audio.reference[0])
            reference = self._codes(ids[0, start : start + clip_length(view.audio, start)])
        target = self._codes(ids[0, begin:end])
        if not target.shape[1]:
            return None
        spoken = ids[:, : begin + target.shape[1] * len(self._tokens.places)]
        return Prompt(_given(ids[:, :begin]), _given(spoken), reference, target)

    def generate(self, prompt: Prompt, max_new_tokens: int, max_seconds: float, seed: int) -> Speech:
        device = self._lm.device
        settings = bounded(self._lm, max_new_tokens, max_time=max_seconds)
        own = settings.eos_token_id
        ends = {*([] if own is None else [own] if isinstance(own, int) else own)}
        ends |= set() if self._tokens.end is None else {self._tokens.end}
        settings.update(eos_token_id=sorted(ends) or None)
        if settings.pad_token_id is None:
            settings.pad_token_id = next(iter(sorted(ends)), 0)
        seed_sampling(device, seed)
        said = self._lm.generate(**on(device, prompt.inputs), generation_config=settings, synced_gpus=False)
        said = said[0, prompt.inputs["input_ids"].shape[1] :].cpu()
        ended = bool(torch.isin(said, torch.tensor(sorted(ends), dtype=said.dtype)).any())
        ending: Ending = "tokens" if len(said) >= max_new_tokens else "time"
        return Speech(self._codes(said), "end of stream" if ended else ending)

    def teacher_forced(self, prompt: Prompt) -> Tensor:
        logits = self._lm(**on(self._lm.device, prompt.spoken), use_cache=False).logits[0]
        begin = prompt.inputs["input_ids"].shape[1]
        said = [  # a token is predicted one position earlier, and here among the codes of its own place alone
            row[start : start + self._tokens.size].argmax() + start
            for row, start in zip(logits[begin - 1 : -1], self._starts(len(logits)), strict=False)
        ]
        return self._codes(torch.stack(said).cpu())

    def idle(self) -> None:
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._lm.device), use_cache=False)

    def runs_always(self) -> Sequence[nn.Module]:
        """Everything: each pass embeds tokens and predicts one."""
        decoder = self._lm.get_decoder()
        rest = [child for child in decoder.children() if not isinstance(child, nn.ModuleList)]
        return [self.model, decoder, *rest, *decoder_layers(decoder), self._lm.get_output_embeddings()]

    def frames_for(self, prompt: Prompt, ratio: float) -> int:
        return math.ceil(ratio * prompt.target.shape[1]) * len(self._tokens.places) + 1

    def _starts(self, count: int) -> list[int]:
        """Where the codebooks of the first ``count`` tokens of a clip begin."""
        places = self._tokens.places
        return [self._tokens.firsts[places[at % len(places)]] for at in range(count)]

    def _codes(self, ids: Tensor) -> Tensor:
        """The codes of the whole frames ``ids`` begin with: int64 ``[C, frames]``.

        They end with the first token that is none of its place.
        """
        codes = ids - torch.tensor(self._starts(len(ids)), dtype=ids.dtype)
        fine = ((codes >= 0) & (codes < self._tokens.size)).long()
        places = self._tokens.places
        frames = codes[: int(fine.cumprod(0).sum()) // len(places) * len(places)].view(-1, len(places))
        return frames[:, sorted(range(len(places)), key=places.__getitem__)].t()


def _given(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}

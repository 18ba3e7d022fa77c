"""Speech from transformers' Higgs Audio v2: the prompt cut out of a batch, generation, the delay pattern undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from telemetry.families.base import AudioView, BatchView, clip_length
from telemetry.families.speech import (
    Ending,
    Prompt,
    Speaker,
    Speech,
    bounded,
    first,
    on,
    seed_sampling,
)

_TOKENS = ("input_ids", "attention_mask")
_FRAMES = ("audio_input_ids", "audio_input_ids_mask", "audio_labels")


class HiggsAudioV2Speaker(Speaker):
    """Makes ``HiggsAudioV2ForConditionalGeneration`` speak.

    Generation follows the model's own ``generation_config`` (greedy or sampling, temperature, repetition window): what
    is heard is what whoever uses the model will hear.

    Args:
        model: the model.
        view: reads a batch, as its family does.
    """

    codec = None

    def __init__(self, model: Any, view: Callable[[Mapping[str, Any]], BatchView | None]) -> None:
        self.model: nn.Module = model
        self._higgs: Any = model
        self._view = view
        self._config = model.config

    def prompt(self, inputs: Mapping[str, Any], row: int) -> Prompt | None:
        sample = _unpadded(inputs, row)
        view = self._view(sample)
        if view is None or view.audio is None or not bool(view.audio.target.any()):
            return None
        audio = view.audio
        begin = first(audio.target[0])
        end = begin + clip_length(audio, begin)
        return Prompt(
            inputs=_cut(sample, begin, audio),
            spoken=_cut(sample, end, audio),
            reference=self._reference(audio, begin),
            target=self._codes(audio.codes[0, begin:end]),
        )

    def generate(self, prompt: Prompt, max_new_tokens: int, max_seconds: float, seed: int) -> Speech:
        device = self._higgs.device
        seed_sampling(device, seed)
        # Ranks whose forward passes wait for each other are kept together by the caller, also when one of them raises.
        frames = self._higgs.generate(
            **on(device, prompt.inputs),
            generation_config=self._settings(max_new_tokens, max_seconds),
            synced_gpus=False,
        )
        given = prompt.inputs.get("audio_input_ids")
        said = frames[0, 0 if given is None else given.shape[1] :].cpu()
        return Speech(self._codes(said), self._ending(said, max_new_tokens))

    def teacher_forced(self, prompt: Prompt) -> Tensor:
        logits = self._higgs(**on(self._higgs.device, prompt.spoken), use_cache=False).logits
        shape = (*logits.shape[1:2], self._config.num_codebooks, self._config.codebook_size)
        begin = prompt.inputs["input_ids"].shape[1]
        # A frame is predicted one position earlier. Only codes: where the target goes on, an end would cut it short.
        predicted = logits[0].view(shape)[begin:-1, :, : self._code_count].argmax(-1).cpu()
        return _undelayed(predicted, prompt.target.shape[1])

    def idle(self) -> None:
        text = torch.full((1, 1), self._config.bos_token_id or 0, device=self._higgs.device)
        self.model(input_ids=text, use_cache=False)

    def runs_always(self) -> Sequence[nn.Module]:
        """Neither embedding: a prompt's pass embeds text and audio, a later one audio alone, some text alone."""
        decoder = self._higgs.model
        return [self.model, decoder, *decoder.layers, decoder.norm, self._higgs.audio_lm_head]

    def frames_for(self, prompt: Prompt, ratio: float) -> int:
        return math.ceil(ratio * prompt.target.shape[1]) + self._config.num_codebooks + 1

    @property
    def _code_count(self) -> int:
        """Ids below the stream's own two."""
        return min(self._config.audio_stream_bos_id, self._config.audio_stream_eos_id)

    def _settings(self, max_new_tokens: int, max_seconds: float) -> GenerationConfig:
        settings = bounded(self._higgs, max_new_tokens, max_time=max_seconds)
        if settings.eos_token_id is None:
            settings.eos_token_id = self._config.eos_token_id
        if settings.pad_token_id is None:
            settings.pad_token_id = self._config.pad_token_id
        return settings

    def _ending(self, frames: Tensor, max_new_tokens: int) -> Ending:
        if bool(self._ends(frames).any()):
            return "end of stream"
        return "tokens" if len(frames) >= max_new_tokens else "time"

    def _ends(self, frames: Tensor) -> Tensor:
        """bool ``[frames]``: every codebook has ended."""
        return (frames == self._config.audio_stream_eos_id).all(dim=-1)

    def _reference(self, audio: AudioView, before: int) -> Tensor | None:
        starts = audio.starts[0, :before]
        if not bool(starts.any()):
            return None
        begin = first(starts)
        return self._codes(audio.codes[0, begin : begin + clip_length(audio, begin)])

    def _codes(self, frames: Tensor) -> Tensor:
        """The codes of a stream ``[frames, C]`` in delay pattern, its first frame the begin: int64 ``[C, n]``.

        Begin and end of stream among the codes become the codec's last code, as in the model's own processor.
        """
        ends = self._ends(frames)
        body = frames[1 : first(ends) if bool(ends.any()) else len(frames)]
        return _undelayed(body, len(body) - frames.shape[1] + 1).clamp(0, self._code_count - 1)


def _unpadded(inputs: Mapping[str, Any], row: int) -> dict[str, Tensor]:
    """One sample of a batch, on the CPU, as a batch of one without padding."""
    held = {name: inputs[name][row : row + 1].cpu() for name in (*_TOKENS, *_FRAMES) if name in inputs}
    real = held["attention_mask"].bool() if "attention_mask" in held else torch.ones_like(held["input_ids"]).bool()
    sample = {name: held[name][:, real[0]] for name in _TOKENS if name in held}
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    if "audio_input_ids" in held:
        valid = held.get("audio_input_ids_mask", torch.ones_like(held["audio_input_ids"][..., 0])).bool()
        sample |= {name: held[name][:, valid[0]] for name in _FRAMES if name in held}
        sample["audio_input_ids_mask"] = torch.ones_like(sample["audio_input_ids"][..., 0], dtype=torch.bool)
    return sample


def _cut(sample: Mapping[str, Tensor], end: int, audio: AudioView) -> dict[str, Tensor]:
    """The model's inputs up to a position: no labels, and no audio inputs where no audio lies before it."""
    frames = int((audio.reference | audio.target)[0, :end].sum())
    cut = {name: sample[name][:, :end].clone() for name in _TOKENS}
    if frames:
        cut |= {name: sample[name][:, :frames].clone() for name in ("audio_input_ids", "audio_input_ids_mask")}
    return cut


def _undelayed(frames: Tensor, length: int) -> Tensor:
    """``[frames, C]`` with codebook *k* shifted by *k* frames, as ``[C, length]``; nothing where it is too short."""
    length = max(length, 0)
    return torch.stack([frames[k : k + length, k] for k in range(frames.shape[1])])

"""Speech from transformers' Csm: the prompt cut out of a batch, and generation frame by frame."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from telemetry.families.base import BatchView, clip_length
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

BACKBONE_ONLY = -101  # the label of a frame that the depth decoder is not trained on
_ALONG_THE_SEQUENCE = ("input_ids", "attention_mask", "labels", "audio_codes")
_OF_A_SAMPLE = (*_ALONG_THE_SEQUENCE, "input_values", "input_values_cutoffs")


class Reader(Protocol):
    """What of a family speaking needs."""

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None: ...
    def coded(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]: ...
    def swap_reference(self, inputs: Mapping[str, Any], codes: Tensor | None) -> dict[str, Any]: ...


class CsmSpeaker(Speaker):
    """Makes ``CsmForConditionalGeneration`` speak, with the settings of generation that it was saved with.

    Args:
        model: the model.
        family: reads its batches, and encodes their waveforms.
    """

    def __init__(self, model: Any, family: Reader) -> None:
        self.model: nn.Module = model
        self.codec = model.codec_model
        self._csm: Any = model
        self._family = family
        self._codes = min(int(model.config.codec_config.codebook_size), int(model.config.vocab_size))

    def prompt(self, inputs: Mapping[str, Any], row: int) -> Prompt | None:
        own = {name: inputs[name][row : row + 1] for name in _OF_A_SAMPLE if isinstance(inputs.get(name), Tensor)}
        if "labels" in own:  # every frame is to be predicted whole
            own["labels"] = own["labels"].masked_fill(own["labels"] == BACKBONE_ONLY, self._csm.config.audio_token_id)
        before = self._family.view(own)
        if before is None or before.audio is None or not bool(before.audio.target.any()):
            return None
        real = before.real[0].cpu()
        with torch.no_grad():
            coded = self._family.coded(on(self._csm.device, own))
        sample = {name: coded[name].cpu()[:, real] for name in _ALONG_THE_SEQUENCE if name in coded}
        view = self._family.view(sample)
        assert view is not None
        assert view.audio is not None
        audio = view.audio
        begin = first(audio.target[0])
        end = begin + clip_length(audio, begin)
        codes = audio.codes[0].t()
        reference = None
        if bool(audio.reference[0, :begin].any()):
            start = first(audio.reference[0])
            reference = self._spoken(codes[:, start : start + clip_length(audio, start)].t())
        return Prompt(
            inputs={name: tensor[:, :begin] for name, tensor in sample.items() if name != "labels"},
            spoken={name: tensor[:, :end] for name, tensor in sample.items()},
            reference=reference,
            target=self._spoken(codes[:, begin:end].t()),
        )

    def generate(self, prompt: Prompt, max_new_tokens: int, max_seconds: float, seed: int) -> Speech:
        device = self._csm.device
        given = self._family.swap_reference(on(device, prompt.inputs), None)
        del given["use_cache"]  # the settings say it
        frames = _Frames(time.monotonic() + max_seconds)
        seed_sampling(device, seed)
        settings = bounded(self._csm, max_new_tokens)  # Csm looks for its end by itself
        if settings.pad_token_id is None:
            settings.pad_token_id = self._csm.config.codebook_pad_token_id
        with self._settings_kept(), contextlib.suppress(_TimeIsUpError):
            self._csm.generate(**given, generation_config=settings, streamer=frames, synced_gpus=False)
        said = torch.stack(frames.said) if frames.said else torch.zeros(0, self._csm.config.num_codebooks).long()
        ending: Ending = "time" if frames.late else "tokens"
        return Speech(self._spoken(said), "end of stream" if bool(self._ends(said).any()) else ending)

    def teacher_forced(self, prompt: Prompt) -> Tensor:
        given = self._family.swap_reference(on(self._csm.device, prompt.spoken), None)
        outputs = self._csm(**given)
        frames = prompt.target.shape[1]
        begin = prompt.inputs["input_ids"].shape[1]
        codebooks = outputs.depth_decoder_logits.shape[1]
        first_codes = outputs.logits[0, begin - 1 : begin - 1 + frames, : self._codes].argmax(-1)
        # A row for every frame that is taught, in order: those of the only clip with labels that is not yet over.
        others = torch.zeros(frames, codebooks, dtype=torch.long, device=first_codes.device)
        taught = (given["labels"][0, begin : begin + frames, 1:] != -100).any(dim=-1)
        rows = outputs.depth_decoder_logits[: int(taught.sum()), :, : self._codes].argmax(-1)
        others[taught] = rows
        return torch.cat([first_codes[:, None], others], dim=-1).t().cpu()

    def idle(self) -> None:
        text = torch.full((1, 1), self._csm.config.bos_token_id or 0, device=self._csm.device)
        self.model(input_ids=text, use_cache=False)

    def runs_always(self) -> Sequence[nn.Module]:
        """The backbone: neither embedding, and not the depth decoder, which generates between its passes."""
        backbone = self._csm.backbone_model
        return [self.model, backbone, *backbone.layers, backbone.norm, self._csm.lm_head]

    def frames_for(self, prompt: Prompt, ratio: float) -> int:
        return math.ceil(ratio * prompt.target.shape[1]) + 1

    def _ends(self, frames: Tensor) -> Tensor:
        """bool ``[frames]``: where generation ends, which does not look at the last codebook."""
        return (frames[:, :-1] == self._csm.config.codebook_eos_token_id).all(dim=-1)

    def _spoken(self, frames: Tensor) -> Tensor:
        """The codes of frames ``[frames, C]`` up to the end: int64 ``[C, n]``, every one of the codec."""
        ends = self._ends(frames)
        return frames[: first(ends) if bool(ends.any()) else len(frames)].clamp(0, self._codes - 1).t().cpu()

    @contextlib.contextmanager
    def _settings_kept(self) -> Iterator[None]:
        """The depth decoder's own settings of generation, which generating writes to, are saved with the model."""
        depth = self._csm.depth_decoder
        kept, depth.generation_config = depth.generation_config, copy.deepcopy(depth.generation_config)
        depth.generation_config.cache_implementation = None  # as for the model itself
        try:
            yield
        finally:
            depth.generation_config = kept


class _TimeIsUpError(Exception):
    pass


class _Frames:
    """Keeps frames as they are generated, until some time: Csm ends by no criterion of time."""

    def __init__(self, until: float) -> None:
        self.said: list[Tensor] = []
        self.late = False
        self._until = until
        self._begun = False

    def put(self, frame: Tensor) -> None:
        if self._begun:
            self.said.append(frame[0])
        self._begun = True  # the first is the prompt
        if time.monotonic() > self._until:
            self.late = True
            raise _TimeIsUpError

    def end(self) -> None:
        """Nothing is left to be done."""

"""Speech from transformers' Dia: the prompt cut out of a batch, generation, the delay pattern undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import IGNORE_INDEX, BatchView, real_positions
from telemetry.families.speech import Ending, Prompt, Speaker, Speech, bounded, on, seed_sampling


class DiaSpeaker(Speaker):
    """Makes ``DiaForConditionalGeneration`` speak, with the settings of generation that it was saved with.

    Args:
        model: the model.
        view: reads a batch, as its family does.
    """

    codec = None

    def __init__(self, model: Any, view: Callable[[Mapping[str, Any]], BatchView | None]) -> None:
        self.model: nn.Module = model
        self._dia: Any = model
        self._view = view
        self._delay: tuple[int, ...] = tuple(model.config.delay_pattern)
        decoder = model.config.decoder_config
        self._begin, self._end, self._pad = decoder.bos_token_id, decoder.eos_token_id, decoder.pad_token_id
        self._codes = int(min(self._begin, self._end, self._pad))

    def prompt(self, inputs: Mapping[str, Any], row: int) -> Prompt | None:
        view = self._view(inputs)
        if view is None or view.audio is None or not isinstance(inputs.get("labels"), Tensor):
            return None
        here = slice(view.decoded_from, None)
        real = view.real[row, here].cpu()
        codes, labels = (one[row, here].cpu()[real] for one in (view.audio.codes, view.audio.labels))
        ids = inputs["input_ids"][row : row + 1].cpu()
        ids = ids[real_positions({"attention_mask": _row(inputs, row)}, ids)][None]
        streams = [self._stream(codes[:, k], labels[:, k], delay) for k, delay in enumerate(self._delay)]
        length = min(len(stream) for stream, _ in streams)
        whole, taught = (torch.stack([pair[part][:length] for pair in streams]) for part in (0, 1))
        begin = int((~taught.any(dim=0)).long().cumprod(0).sum())
        reference, target = whole[:, :begin], whole[:, begin:]
        if not target.shape[1]:
            return None
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Prompt(
            inputs={**text, **_frames(self._delayed(reference))},
            spoken={**text, **_frames(self._delayed(whole, ended=True))},
            reference=reference if reference.shape[1] else None,
            target=target,
        )

    def generate(self, prompt: Prompt, max_new_tokens: int, max_seconds: float, seed: int) -> Speech:
        device = self._dia.device
        settings = bounded(self._dia, max_new_tokens, max_time=max_seconds)
        settings.update(decoder_start_token_id=self._begin, eos_token_id=self._end, pad_token_id=self._pad)
        given = on(device, prompt.inputs)
        seed_sampling(device, seed)
        said = self._dia.generate(**given, generation_config=settings, synced_gpus=False)[0].cpu()
        begun = given["decoder_input_ids"].shape[1] - max(self._delay)  # the begin and the prompt
        ends = (said[:, 0] == self._end).nonzero()
        stop = int(ends[0]) if len(ends) else len(said) - max(self._delay)
        frames = max(stop - begun, 0)
        codes = torch.stack([said[begun + d : begun + d + frames, k] for k, d in enumerate(self._delay)])
        # Where the bound on its tokens is reached, an end is put in the first codebook so that the delay has room.
        bound = begun + max_new_tokens - max(self._delay) - 1
        ending: Ending = "time" if not len(ends) else "tokens" if stop >= bound else "end of stream"
        return Speech(codes.clamp(0, self._codes - 1), ending)

    def teacher_forced(self, prompt: Prompt) -> Tensor:
        logits = self._dia(**on(self._dia.device, prompt.spoken), use_cache=False).logits[..., : self._codes]
        begun = prompt.inputs["decoder_input_ids"].shape[1] - max(self._delay)
        frames = prompt.target.shape[1]
        # A frame is predicted one position earlier. Only codes: where the target goes on, an end would cut it short.
        rows = [logits[k, begun + d - 1 : begun + d - 1 + frames] for k, d in enumerate(self._delay)]
        return torch.stack([row.argmax(-1) for row in rows]).cpu()

    def idle(self) -> None:
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._dia.device), use_cache=False)

    def runs_always(self) -> Sequence[nn.Module]:
        """The decoder: the encoder runs once for all passes."""
        decoder = self._dia.model.decoder
        return [self.model, self._dia.model, decoder, *decoder.layers, decoder.norm, self._dia.logits_dense]

    def frames_for(self, prompt: Prompt, ratio: float) -> int:
        return math.ceil(ratio * prompt.target.shape[1]) + max(self._delay) + 1

    def _stream(self, codes: Tensor, labels: Tensor, delay: int) -> tuple[Tensor, Tensor]:
        """One codebook's codes without delay, and which of them have a label."""
        codes, taught = codes[1 + delay :], labels[1 + delay :] != IGNORE_INDEX
        end = int((codes < self._codes).long().cumprod(0).sum())
        return codes[:end], taught[:end]

    def _delayed(self, codes: Tensor, ended: bool = False) -> Tensor:
        """Codes ``[C, n]`` as the processor hands them over: begins, codes, ends, and pads where nothing is said."""
        ends = codes.new_full((codes.shape[0], int(ended)), self._end)
        streams = torch.cat([codes, ends], dim=1)
        frames = torch.full((streams.shape[1] + 1 + max(self._delay), codes.shape[0]), self._pad)
        for k, delay in enumerate(self._delay):
            frames[: delay + 1, k] = self._begin
            frames[delay + 1 : delay + 1 + streams.shape[1], k] = streams[k]
        return frames


def _frames(delayed: Tensor) -> dict[str, Tensor]:
    mask = torch.ones(1, len(delayed), dtype=torch.long)
    return {"decoder_input_ids": delayed[None].clone(), "decoder_attention_mask": mask}


def _row(inputs: Mapping[str, Any], row: int) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask[row : row + 1].cpu() if isinstance(mask, Tensor) else None

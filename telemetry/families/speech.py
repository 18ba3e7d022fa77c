"""What generating speech needs to know of a kind of model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

Ending = Literal["end of stream", "tokens", "time"]


@dataclass(frozen=True)
class Prompt:
    """One sample, cut where its target audio begins. ``C`` codebooks; all tensors on the CPU.

    Attributes:
        inputs: the model's inputs up to where it speaks, for a batch of one without padding.
        spoken: the same with the target audio after it.
        reference: int64 ``[C, frames]``, the codes of the first audio in the prompt; None without any.
        target: int64 ``[C, frames]``, the codes of the target audio.
    """

    inputs: Mapping[str, Tensor]
    spoken: Mapping[str, Tensor]
    reference: Tensor | None
    target: Tensor


@dataclass(frozen=True)
class Speech:
    """What a model has said.

    Attributes:
        codes: int64 ``[C, frames]`` on the CPU, every one a code of the codec.
        ending: what ended it: the model itself, the bound on its tokens or the bound on its time.
    """

    codes: Tensor
    ending: Ending


class Speaker(Protocol):
    """How one kind of model is made to speak. Bound to one model."""

    model: nn.Module
    """The module whose ``generate`` is called: one of its forward passes follows another."""

    codec: Any
    """What decodes its codes, where the model has a codec of its own; else None."""

    def prompt(self, inputs: Mapping[str, Any], row: int) -> Prompt | None:
        """Cut one sample of a batch in front of its (first) target audio; None where it has none."""

    def generate(self, prompt: Prompt, max_new_tokens: int, max_seconds: float, seed: int) -> Speech:
        """Let the model speak freely. The same seed, weights and prompt give the same speech.

        Reads and sets random states: run it where that leaves no trace.

        Args:
            prompt: from :meth:`prompt`.
            max_new_tokens: frames of codes at most, those that the delay pattern adds included.
            max_seconds: of wall time.
            seed: of sampling, where the model samples.
        """

    def teacher_forced(self, prompt: Prompt) -> Tensor:
        """What the model would have said where the target was said before: int64 ``[C, frames]`` on the CPU."""

    def idle(self) -> None:
        """One forward pass as small as can be, its result thrown away: for ranks that wait for each other."""

    def runs_always(self) -> Sequence[nn.Module]:
        """The modules that every forward pass calls, whatever it is given."""

    def frames_for(self, prompt: Prompt, ratio: float) -> int:
        """Tokens that speech of ``ratio`` times the target's length takes, with what the delay pattern adds."""


def first(marked: Tensor) -> int:
    """Index of the first marked one."""
    return int(marked.long().argmax())


def on(device: torch.device, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs on a device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def seed_sampling(device: torch.device, seed: int) -> None:
    """Of the CPU and of the model's device, and no other: ``torch.manual_seed`` would also seed devices of others."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def bounded(model: Any, max_new_tokens: int, **changes: Any) -> GenerationConfig:
    """The model's own settings of generation, with a bound on its tokens and without what would outlive the call."""
    settings: GenerationConfig = copy.deepcopy(model.generation_config)
    settings.update(
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_length=None,
        use_cache=True,
        cache_implementation=None,  # a static one would be compiled, and outlive the call
        return_dict_in_generate=False,
        **changes,
    )
    return settings

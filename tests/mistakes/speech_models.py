"""The same for other models: a Csm, a Llama that writes codec tokens, and a Llama on TRL's trainer."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mistakes.trainings import Planted, arguments, quiet
from support import codec_tokens, speech_models, trl_training
from torch import nn
from transformers import Trainer, set_seed

from telemetry import CodecTokens

BATCHES = 12
BASE_STEPS = 240


@dataclass(frozen=True)
class Kind:
    """A model, its batches (each as a collator makes it), and how it is read."""

    make: Callable[[], Any]
    batch: Callable[[int], Mapping[str, Any]]
    family: CodecTokens | None = None


def _lengths(seed: int) -> list[int]:
    return [3 + (seed + 2 * row) % 5 for row in range(4)]


KINDS = {
    "csm": Kind(
        speech_models.csm,
        lambda seed: speech_models.csm_codes(*((2, length) for length in _lengths(seed)), seed=1000 * seed),
    ),
    "codec_tokens": Kind(
        codec_tokens.llama,
        lambda seed: codec_tokens.batch(*((3, 2, 2, length) for length in _lengths(seed)), seed=1000 * seed, left=True),
        codec_tokens.declared(),
    ),
}


class SpeechLaboratory:
    """A base of some healthy steps on a few batches, and trainers that go on from there.

    Args:
        kind: of :data:`KINDS`.
    """

    options: Mapping[str, Any] = {"zero_shot": {"clips": 0}}

    def __init__(self, kind: str) -> None:
        self._kind = KINDS[kind]
        self.family = self._kind.family
        self._data = [self._kind.batch(at) for at in range(BATCHES)]

    @functools.cached_property
    def base(self) -> nn.Module:
        """The model after some healthy steps."""
        healthy = self.trainer(
            Planted("base", fresh=True, arguments={"max_steps": BASE_STEPS, "learning_rate": 1e-2}), []
        )
        with quiet():
            healthy.train()
        return healthy.model

    @staticmethod
    def _class(planted: Planted) -> type[Trainer]:
        own = planted.kind_of_trainer
        return Trainer if own is Planted.kind_of_trainer else own

    def trainer(self, planted: Planted, callbacks: Sequence[Any]) -> Trainer:
        """A trainer that makes the mistake."""
        set_seed(0)
        given = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "label_names": ["labels"]}
        made = self._class(
            planted
        )(
            model=self._kind.make() if planted.fresh else copy.deepcopy(self.base),
            args=arguments(Path(tempfile.mkdtemp(prefix="mistake-")), **given, **planted.arguments),
            data_collator=lambda rows: planted.batch({name: one.clone() for name, one in rows[0].items()}),
            train_dataset=self._data,  # type: ignore[arg-type]
            eval_dataset=self._data[:2],  # type: ignore[arg-type]
            callbacks=list(callbacks),
        )
        planted.trainer(made)  # type: ignore[arg-type]
        return made


class TextLaboratory:
    """TRL's trainer on a Llama that it fine-tunes on text, its loss fused with the head."""

    options: Mapping[str, Any] = {}
    family = None

    def trainer(self, planted: Planted, callbacks: Sequence[Any]) -> Any:
        """A trainer as TRL makes it."""
        import datasets
        import trl

        directory = tempfile.mkdtemp(prefix="mistake-")
        torch.manual_seed(7)
        with quiet():
            return trl.SFTTrainer(
                trl_training.llama(),
                args=trl.SFTConfig(directory, **{**trl_training.QUIET, "max_steps": 20, **planted.arguments}),
                train_dataset=datasets.Dataset.from_dict({"text": trl_training.SENTENCES}),
                processing_class=trl_training.tokenizer(),
                callbacks=list(callbacks),
            )

"""The training loss: text mean plus the sum over codebooks of each codebook's mean.

Each mean is over its own supervised tokens of the *whole* accumulated batch over all ranks. Left alone, the Trainer
divides every part by the number of text labels, which it passes to the model as ``num_items_in_batch``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import HiggsAudioV2Config
from transformers.loss.loss_utils import ForCausalLMLoss

from trainer.dataset import IGNORE_INDEX


def supervised_counts(batches: Sequence[Mapping[str, Any]], num_codebooks: int) -> Tensor:
    """How many labels each part of the loss has in some microbatches.

    Args:
        batches: of the collator.
        num_codebooks: ``C``.

    Returns:
        int64 ``[1 + C]``: text, then every codebook, on the batches' device.
    """
    return torch.stack([_counts(batch, num_codebooks) for batch in batches]).sum(dim=0)


def _counts(batch: Mapping[str, Any], num_codebooks: int) -> Tensor:
    # The first position has nothing before it to be predicted from.
    text = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    audio = batch.get("audio_labels")
    if audio is None:
        return torch.nn.functional.pad(text[None], (0, num_codebooks))
    labelled = (audio != IGNORE_INDEX) & batch["audio_input_ids_mask"].bool().unsqueeze(-1)
    return torch.cat([text[None], labelled.sum(dim=(0, 1))])


class AccumulatedLoss:
    """``model.loss_function`` of ``HiggsAudioV2ForConditionalGeneration``.

    The model's forward calls it for codebook 0, 1, ... and then for text, each time with what the Trainer passes as
    ``num_items_in_batch``: here :func:`supervised_counts` of the whole accumulated batch.

    Raises:
        ValueError: when text and codebooks cannot be told apart by the size of their vocabulary.
    """

    def __init__(self, config: HiggsAudioV2Config) -> None:
        if config.vocab_size == config.codebook_size:
            raise ValueError(f"text and audio vocabulary are both of {config.vocab_size} entries")
        self._config = config
        self._codebook = 0

    def begin(self) -> None:
        """A forward pass is about to start (the last one may have been cut short)."""
        self._codebook = 0

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One part of the loss: its sum over this microbatch over its count in the whole batch.

        Args:
            logits: ``[batch, sequence, vocab_size]``.
            labels: int64 ``[batch, sequence]``, unshifted.
            vocab_size: tells text from audio.
            num_items_in_batch: int64 ``[1 + C]``; None for the mean over this microbatch.
        """
        part = 0
        if vocab_size != self._config.vocab_size:
            part = 1 + self._codebook
            self._codebook = (self._codebook + 1) % self._config.num_codebooks
        counts = supervised(labels) if num_items_in_batch is None else num_items_in_batch[part]
        # Without a single label the sum is 0, and so is the part: 0 / 1, not 0 / 0.
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch=counts.clamp(min=1))


def supervised(labels: Tensor) -> Tensor:
    """Labels that some position predicts: int64 0-d."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()

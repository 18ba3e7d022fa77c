"""Microbatches with a known number of everything, and trainings over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import numpy as np
import pytest
from rank_scenarios import Batch
from support import models
from support.batches import Sample, Voices
from support.speaking import FRAME, Waveform

from trainer.demo.prepare import train_tokenizer


@pytest.fixture(scope="session")
def voices() -> Voices:
    tokenizer = train_tokenizer()
    return Voices(tokenizer, models.higgs_config(tokenizer))


@pytest.fixture(scope="session")
def make_batch(voices: Voices) -> Callable[..., Batch]:
    """Makes a microbatch of ``size`` samples, of other lengths for every ``seed``, with metadata."""

    def make(seed: int, size: int = 1, reference: bool = True) -> Batch:
        rows = [_Row(voices, 10 * seed + row, reference) for row in range(size)]
        batch = voices.batch(voices.pad([row.sample for row in rows]))
        return {**batch, "metadata": [row.metadata for row in rows]}

    return make


class _Row:
    def __init__(self, voices: Voices, seed: int, reference: bool) -> None:
        lengths = 1 + seed * 5 % 7, 2 + seed * 3 % 11
        self.sample: Sample = voices.conversation(lengths[0] if reference else None, lengths[1], seed)
        self.metadata: dict[str, Any] = {
            "sample_id": f"sample-{seed}",
            "speaker": f"speaker-{seed % 3}",
            "reference": [Waveform(np.zeros(lengths[0] * FRAME, np.float32))] if reference else [],
            "target": [Waveform(np.zeros(lengths[1] * FRAME, np.float32))],
        }


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """New directories."""
    return lambda: tmp_path_factory.mktemp("ranks")

"""The demonstration on disk, a tiny model of the same kind, and one call that trains it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import pytest
import torch
from huggingface_hub import constants
from one_step import TrainerFactory
from support.models import shrunk
from support.steps import make_trainer
from torch import Tensor, nn
from transformers import (
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    TrainerCallback,
)

from trainer.chatml import Sample, load_samples
from trainer.code_cache import CodeCache
from trainer.collator import VoiceCloningCollator
from trainer.dataset import VoiceCloningDataset
from trainer.demo.prepare import Demonstration, prepare
from trainer.processing import load_processor


@pytest.fixture(scope="session", autouse=True)
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of audio codes that is the tests' own."""
    home = tmp_path_factory.mktemp("hf_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setattr(constants, "HF_HOME", str(home))
        yield home


@pytest.fixture
def trainer_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What ``trainer`` logs, also after a test that has set up logging without propagation."""
    logger = logging.getLogger("trainer")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="trainer"):
        propagate, logger.propagate = logger.propagate, False
        yield caplog
        logger.propagate = propagate
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    return prepare(tmp_path_factory.mktemp("demonstration"), show_progress=False)


@pytest.fixture(scope="session")
def processor(demo: Demonstration) -> HiggsAudioV2Processor:
    return load_processor(str(demo.model))


@pytest.fixture(scope="session")
def demo_samples(demo: Demonstration) -> list[Sample]:
    return load_samples(demo.train_file, show_progress=False)


@pytest.fixture(scope="session")
def demo_codes(demo_samples: list[Sample], processor: HiggsAudioV2Processor, hf_home: Path) -> dict[Path, Tensor]:
    paths = [path for sample in demo_samples for path in (*sample.references, *sample.targets)]
    return CodeCache(processor.audio_tokenizer, hf_home / "demo_codes").encode(paths)


@pytest.fixture(scope="session")
def demo_dataset(
    demo_samples: list[Sample], processor: HiggsAudioV2Processor, demo_codes: dict[Path, Tensor]
) -> VoiceCloningDataset:
    return VoiceCloningDataset(demo_samples, processor, demo_codes)


@pytest.fixture(scope="session")
def collator(processor: HiggsAudioV2Processor) -> VoiceCloningCollator:
    return VoiceCloningCollator(processor.tokenizer.pad_token_id, processor.audio_stream_eos_id)


@pytest.fixture(scope="session")
def tiny_config(demo: Demonstration) -> HiggsAudioV2Config:
    """The demonstration model's configuration, much smaller, with dropout."""
    return shrunk(HiggsAudioV2Config.from_pretrained(demo.model), dropout=0.1)


@pytest.fixture(scope="session")
def tiny_model_path(
    tiny_config: HiggsAudioV2Config, demo: Demonstration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory as ``--model_path`` takes it."""
    directory = tmp_path_factory.mktemp("tiny_model")
    shutil.copytree(demo.model, directory, dirs_exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        HiggsAudioV2ForConditionalGeneration(tiny_config, use_text_head=True).save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_model(tiny_model_path: Path) -> HiggsAudioV2ForConditionalGeneration:
    """A new copy, with the same weights every time."""
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(tiny_model_path, use_text_head=True)


@pytest.fixture
def train(tmp_path: Path, collator: VoiceCloningCollator) -> TrainerFactory:
    """Makes a trainer; see :func:`support.steps.make_trainer`."""

    def make(model: nn.Module, dataset: Any, callbacks: Sequence[TrainerCallback] = (), **arguments: Any) -> Any:
        return make_trainer(model, dataset, collator, tmp_path / "output", callbacks, **arguments)

    return make

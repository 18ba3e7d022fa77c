"""Small models, and batches whose every position is known."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import pytest
from support import models
from support.batches import Voices
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, LlamaForCausalLM

from trainer.demo.prepare import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer()


@pytest.fixture(scope="session")
def higgs_config(tokenizer: Any) -> HiggsAudioV2Config:
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return models.higgs_config(tokenizer, codebooks=3, **narrow)


@pytest.fixture(scope="session")
def voices(tokenizer: Any, higgs_config: HiggsAudioV2Config) -> Voices:
    return Voices(tokenizer, higgs_config)


@pytest.fixture
def make_higgs(higgs_config: HiggsAudioV2Config) -> Callable[..., HiggsAudioV2ForConditionalGeneration]:
    """Makes a tiny Higgs model whose logits are far from uniform."""
    return lambda **options: models.higgs(copy.deepcopy(higgs_config), 11, 0.3, **options)


@pytest.fixture
def higgs(make_higgs: Callable[..., HiggsAudioV2ForConditionalGeneration]) -> HiggsAudioV2ForConditionalGeneration:
    return make_higgs()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A tiny text-only model."""
    return models.make("llama", **models.SMALLER)


@pytest.fixture(scope="module")
def llama_of_module() -> LlamaForCausalLM:
    """The same, for tests of a module that copy it."""
    return models.make("llama", **models.SMALLER)


@pytest.fixture
def telemetry_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What telemetry says, from INFO on, also after a test that has set up logging without propagation."""
    monkeypatch.setattr(logging.getLogger("telemetry"), "propagate", True)
    caplog.set_level(logging.INFO, logger="telemetry")
    return caplog

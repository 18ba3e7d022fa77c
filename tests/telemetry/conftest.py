"""Small models, and batches whose every position is known."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import pytest
import torch
from support.batches import Voices
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from trainer.demo.prepare import AUDIO_BOS_TOKEN, AUDIO_DELAY_TOKEN, AUDIO_TOKEN, train_tokenizer

CODES = 10


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer()


@pytest.fixture(scope="session")
def higgs_config(tokenizer: Any) -> HiggsAudioV2Config:
    return HiggsAudioV2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_codebooks=3,
        codebook_size=CODES + 2,
        audio_stream_bos_id=CODES,
        audio_stream_eos_id=CODES + 1,
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        audio_bos_token_id=tokenizer.convert_tokens_to_ids(AUDIO_BOS_TOKEN),
        audio_delay_token_id=tokenizer.convert_tokens_to_ids(AUDIO_DELAY_TOKEN),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="session")
def voices(tokenizer: Any, higgs_config: HiggsAudioV2Config) -> Voices:
    return Voices(tokenizer, higgs_config)


@pytest.fixture
def make_higgs(higgs_config: HiggsAudioV2Config) -> Callable[..., HiggsAudioV2ForConditionalGeneration]:
    """Makes a tiny Higgs model whose logits are far from uniform."""

    def make(use_text_head: bool = True) -> HiggsAudioV2ForConditionalGeneration:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = HiggsAudioV2ForConditionalGeneration(copy.deepcopy(higgs_config), use_text_head=use_text_head)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture
def higgs(make_higgs: Callable[..., HiggsAudioV2ForConditionalGeneration]) -> HiggsAudioV2ForConditionalGeneration:
    return make_higgs()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A tiny text-only model."""
    return tiny_llama()


@pytest.fixture(scope="module")
def llama_of_module() -> LlamaForCausalLM:
    """The same, for tests of a module that copy it."""
    return tiny_llama()


def tiny_llama() -> LlamaForCausalLM:
    """A tiny text-only model, the same every time."""
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def telemetry_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What telemetry says, from INFO on, also after a test that has set up logging without propagation."""
    monkeypatch.setattr(logging.getLogger("telemetry"), "propagate", True)
    caplog.set_level(logging.INFO, logger="telemetry")
    return caplog

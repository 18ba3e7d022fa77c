"""Tiny models of different architectures, the same every time, that are far from sure that all is as likely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from trainer.demo.codec import DemonstrationCodecConfig
from trainer.demo.prepare import model_config

WINDOW = 4
SHAPE: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3}),
    "olmo2": ("Olmo2", {}),
    "gpt_oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
SMALLER: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def sure(make: Callable[[], Any], seed: int, std: float) -> Any:
    """A model with logits that are far from uniform; the random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=std)
    return model


def make(kind: str, implementation: str = "sdpa", **changes: Any) -> Any:
    """A text model of one of :data:`KINDS`."""
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SHAPE | options | changes)
    made = sure(lambda: getattr(transformers, f"{name}ForCausalLM")(config), 3, 0.4)
    made.set_attn_implementation(implementation)
    return made


def higgs_config(tokenizer: Any, codebooks: int = 8, dropout: float = 0.0, **sizes: Any) -> HiggsAudioV2Config:
    """The demonstration model's configuration with codebooks of 10 codes, shrunk."""
    codec = DemonstrationCodecConfig(num_quantizers=codebooks, codebook_size=10)
    return shrunk(model_config(tokenizer, codec), dropout, **sizes)


def shrunk(config: HiggsAudioV2Config, dropout: float = 0.0, **sizes: Any) -> HiggsAudioV2Config:
    """The configuration with 2 layers, 32 wide unless ``sizes`` say otherwise."""
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, **sizes})
    config.attention_dropout = dropout
    return config


def higgs(config: HiggsAudioV2Config, seed: int, std: float, use_text_head: bool = True) -> Any:
    """A Higgs Audio v2 model."""
    return sure(lambda: HiggsAudioV2ForConditionalGeneration(config, use_text_head=use_text_head), seed, std)

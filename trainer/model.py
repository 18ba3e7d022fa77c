"""Loads the model and decides what of it is trained."""

from __future__ import annotations

import logging

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HiggsAudioV2ForConditionalGeneration

logger = logging.getLogger(__name__)

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AUDIO_PARTS = (
    "audio_mlp",
    "audio_input_layernorm",
    "audio_post_attention_layernorm",
    "embed_audio_tokens",
    "audio_lm_head",
)


def load_model(path: str) -> HiggsAudioV2ForConditionalGeneration:
    """The model with its text head, in float32: mixed precision keeps float32 weights.

    Args:
        path: a directory or hub id.

    Raises:
        ValueError: when there is no such model; says what to give.
    """
    try:
        return HiggsAudioV2ForConditionalGeneration.from_pretrained(path, use_text_head=True, dtype=torch.float32)
    except OSError as error:
        raise ValueError(
            f"--model_path {path}: no Higgs Audio v2 model there ({error}). Give a directory made by save_pretrained, "
            "or a hub id such as bosonai/higgs-audio-v2-generation-3B-base."
        ) from error


def freeze_llm(model: nn.Module) -> None:
    """Freeze the language model: what is left to train are the audio FFNs and norms, audio embedding and audio head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in AUDIO_PARTS))


def add_lora(model: nn.Module, rank: int, alpha: int, dropout: float) -> nn.Module:
    """The model with LoRA adapters on the shared attention and both feed-forward networks, all else frozen."""
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(LORA_MODULES))
    return get_peft_model(model, config)  # type: ignore[arg-type]


def describe_trainable(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.1%})"

"""What of the model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from one_step import TrainerFactory
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from trainer.dataset import VoiceCloningDataset
from trainer.model import add_lora, describe_trainable, freeze_llm, load_model

Model = HiggsAudioV2ForConditionalGeneration
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def changed_by_training(model: nn.Module, dataset: VoiceCloningDataset, train: TrainerFactory, steps: int) -> set[str]:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train(model, dataset, max_steps=steps).train()
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def layer_names(parts: Sequence[str], layers: int = 2) -> set[str]:
    return {f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts}


def test_the_model_has_its_text_head_in_float32(tiny_model_path: Path) -> None:
    model = load_model(str(tiny_model_path))
    assert model.text_lm_head.weight.shape == (model.config.vocab_size, model.config.hidden_size)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_half_precision_weights_become_float32_and_a_missing_text_head_is_made(
    tiny_config: HiggsAudioV2Config, tmp_path: Path
) -> None:
    saved = HiggsAudioV2ForConditionalGeneration(tiny_config, use_text_head=False).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.audio_lm_head.weight, saved.audio_lm_head.weight.float())
    assert model.text_lm_head.weight.isfinite().all()
    assert model.text_lm_head.weight.std() > 0


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--model_path {tmp_path}: no Higgs Audio v2 model there .* save_pretrained"):
        load_model(str(tmp_path))


def test_freeze_llm_leaves_exactly_the_audio_parts(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    freeze_llm(tiny_model)
    norms = ("audio_input_layernorm.weight", "audio_post_attention_layernorm.weight")
    expected = layer_names([*(f"audio_mlp.{part}.weight" for part in FFN), *norms])
    expected |= {"model.embed_audio_tokens.embed_audio_tokens.weight", "audio_lm_head.weight"}
    assert trainable(tiny_model) == expected
    assert changed_by_training(tiny_model, demo_dataset, train, steps=1) == expected


def test_lora_is_on_attention_and_both_ffns(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    wrapped = add_lora(tiny_model, rank=3, alpha=6, dropout=0.1)
    modules = layer_names([*PROJECTIONS, *(f"{ffn}.{part}" for ffn in ("mlp", "audio_mlp") for part in FFN)])
    expected = {f"base_model.model.{name}.lora_{side}.default.weight" for name in modules for side in "AB"}
    assert trainable(wrapped) == expected
    ranks = {w.shape[0] for name, w in wrapped.named_parameters() if "lora_A" in name}
    assert ranks == {3}
    config = wrapped.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.1)
    # Side A has no gradient before side B, which begins at zero, has moved.
    assert changed_by_training(wrapped, demo_dataset, train, steps=2) == expected


def test_how_much_is_trained_is_said() -> None:
    model = nn.Sequential(nn.Linear(40, 50, bias=False), nn.Linear(50, 10, bias=False))
    assert describe_trainable(model) == "2,500 of 2,500 parameters are trained (100.0%)"
    model[0].requires_grad_(False)
    assert describe_trainable(model) == "500 of 2,500 parameters are trained (20.0%)"

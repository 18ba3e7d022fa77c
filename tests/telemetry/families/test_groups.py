"""Which family a model is of, wrapped or not, and which gradient group each of its parameters belongs to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from slow_references import HIGGS_GROUPS, LLAMA_GROUPS, group_of
from torch import nn
from transformers import HiggsAudioV2ForConditionalGeneration, LlamaForCausalLM, LlamaModel

from telemetry.families import CausalLMFamily, HiggsAudioV2Family, find_family
from trainer.model import add_lora


class Wrapper(nn.Module):
    """A module around a model, as DDP is one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_every_parameter_of_a_higgs_model_has_its_group(higgs: HiggsAudioV2ForConditionalGeneration) -> None:
    family = HiggsAudioV2Family(higgs)
    groups = {name: family.group_of(name) for name, _ in higgs.named_parameters()}
    assert groups == {name: group_of(name, HIGGS_GROUPS) for name in groups}
    assert set(groups.values()) == set(HIGGS_GROUPS.values())


def test_every_parameter_of_a_lora_higgs_model_has_its_group(higgs: HiggsAudioV2ForConditionalGeneration) -> None:
    model = add_lora(higgs, rank=2, alpha=4, dropout=0.0)
    family = find_family(model)
    assert isinstance(family, HiggsAudioV2Family)
    counted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        adapter = ".lora_A." in name or ".lora_B." in name
        assert family.group_of(name) == ("lora" if adapter else group_of(plain, HIGGS_GROUPS)), name
        assert parameter.requires_grad == adapter, name
        counted[family.group_of(name)] += 1
    assert counted["lora"] == 2 * 2 * (4 + 3 + 3)  # A and B of 2 layers' attention, text and audio projections


def test_every_parameter_of_a_llama_has_its_group(llama: LlamaForCausalLM) -> None:
    family = find_family(llama)
    assert isinstance(family, CausalLMFamily)
    groups = {name: family.group_of(name) for name, _ in llama.named_parameters()}
    assert groups == {name: group_of(name, LLAMA_GROUPS) for name in groups}
    assert set(groups.values()) == set(LLAMA_GROUPS.values())


def test_an_unknown_parameter_is_other(higgs: HiggsAudioV2ForConditionalGeneration, llama: LlamaForCausalLM) -> None:
    assert HiggsAudioV2Family(higgs).group_of("model.adapter.weight") == "other"
    family = find_family(llama)
    assert family is not None
    assert family.group_of("model.adapter.weight") == "other"


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, lambda model: Wrapper(Wrapper(model))])
def test_wrapped_models_are_known(
    wrap: Any, higgs: HiggsAudioV2ForConditionalGeneration, llama: LlamaForCausalLM
) -> None:
    voice, text = find_family(wrap(higgs)), find_family(wrap(llama))
    assert isinstance(voice, HiggsAudioV2Family)
    assert [(head.module, head.modality, head.codebooks) for head in voice.heads()] == [
        (higgs.audio_lm_head, "audio", 3),
        (higgs.text_lm_head, "text", 1),
    ]
    assert isinstance(text, CausalLMFamily)
    assert [(head.module, head.modality, head.codebooks) for head in text.heads()] == [(llama.lm_head, "text", 1)]


def test_peft_models_are_known_and_their_heads_are_what_is_called(llama: LlamaForCausalLM) -> None:
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    family = find_family(model)
    assert isinstance(family, CausalLMFamily)
    (head,) = family.heads()
    called: list[torch.Size] = []
    head.module.register_forward_hook(lambda _module, _args, logits: called.append(logits.shape))
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert called == [torch.Size([1, 3, 29])]


def test_a_higgs_model_without_text_head_has_one_head(make_higgs: Any) -> None:
    family = find_family(make_higgs(use_text_head=False))
    assert family is not None
    assert [head.modality for head in family.heads()] == ["audio"]


def test_models_without_logits_belong_to_no_family(llama: LlamaForCausalLM) -> None:
    assert find_family(nn.Linear(3, 3)) is None
    assert find_family(LlamaModel(llama.config)) is None


def test_a_text_batch_is_read_with_its_padding(llama: LlamaForCausalLM) -> None:
    family = find_family(llama)
    assert family is not None
    ids, labels = torch.tensor([[0, 4, 5], [6, 7, 8]]), torch.tensor([[-100, -100, 5], [6, 7, 8]])
    view = family.view({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]), "labels": labels})
    assert view is not None
    assert view.real.tolist() == view.text.tolist() == [[False, True, True], [True, True, True]]
    assert view.text_labels is labels
    assert view.vocabulary == 29
    assert view.audio is None
    assert family.view({"inputs_embeds": torch.zeros(1, 2, 8)}) is None


def test_output_logits_are_the_head_of_the_models_own_output(
    higgs: HiggsAudioV2ForConditionalGeneration, llama: LlamaForCausalLM
) -> None:
    ids = torch.tensor([[3, 4]])
    for model, modality in ((higgs, "audio"), (llama, "text")):
        family = find_family(model)
        assert family is not None
        outputs = model(input_ids=ids)
        ((head, logits),) = family.output_logits(outputs)
        assert head.modality == modality
        assert logits is outputs.logits
        assert list(family.output_logits(None)) == []

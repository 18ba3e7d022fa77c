"""Which family a model is of, wrapped or not, and which gradient group each of its parameters belongs to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.batches import Voices
from support.references import HIGGS_GROUPS, LLAMA_GROUPS, group_of
from torch import Tensor, nn
from transformers import HiggsAudioV2ForConditionalGeneration, LlamaForCausalLM, LlamaModel

from telemetry.families import Absent, CausalLMFamily, HiggsAudioV2Family, Seen, Stream, find_family
from telemetry.families.base import NO_LOGITS
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
    assert voice.model is higgs
    assert voice.watched() == {"text_lm_head": higgs.text_lm_head}
    assert voice.modalities == ("text", "audio")
    assert isinstance(text, CausalLMFamily)
    assert text.model is llama
    assert text.watched() == {"model": llama, "decoder_0": llama.model}
    assert text.modalities == ("text",)


def test_peft_models_are_known_and_read(llama: LlamaForCausalLM) -> None:
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    family = find_family(model)
    assert isinstance(family, CausalLMFamily)
    ids = torch.tensor([[1, 2, 3]])
    outputs = model(input_ids=ids, labels=ids)
    (stream,) = family.streams({"input_ids": ids, "labels": ids}, outputs, Seen())
    assert isinstance(stream, Stream)
    assert stream.logits is outputs.logits
    assert stream.labels is ids


def test_a_higgs_model_without_text_head_has_one_group(make_higgs: Any, voices: Voices) -> None:
    model = make_higgs(use_text_head=False)
    assert list(declared(model, voices.batch([voices.conversation()]))) == ["audio"]


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


def declared(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Stream]:
    """Streams by their group, of a pass without text logits of a Higgs model."""
    family = find_family(model)
    assert family is not None
    found = family.streams(inputs, model(**inputs), Seen(family.view(inputs)))
    return {one.group: one for one in found if isinstance(one, Stream)}


def test_logits_are_those_of_the_models_own_output(
    higgs: HiggsAudioV2ForConditionalGeneration, llama: LlamaForCausalLM, voices: Voices
) -> None:
    spoken = voices.batch([voices.conversation()])
    text = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[3, 4]])}
    for model, inputs, group in ((higgs, spoken, "audio"), (llama, text, "text")):
        found = declared(model, inputs)
        assert list(found) == [group]
        logits = model(**inputs).logits
        assert torch.equal(found[group].logits.flatten(2), logits)


def test_what_is_no_output_has_no_streams(higgs: HiggsAudioV2ForConditionalGeneration, voices: Voices) -> None:
    family, inputs = HiggsAudioV2Family(higgs), voices.batch([voices.conversation()])
    found = list(family.streams(inputs, None, Seen(family.view(inputs))))
    assert found == [Absent("text", NO_LOGITS), Absent("audio", NO_LOGITS)]

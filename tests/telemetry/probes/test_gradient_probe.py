"""Gradients by group: each parameter that has one, once, under its own group."""

from __future__ import annotations

from typing import Any

import torch
from slow_references import HIGGS_GROUPS, group_of
from voice_batches import Voices

from telemetry.families import HiggsAudioV2Family
from telemetry.probes.gradients import gradients_by_group


def test_every_gradient_is_in_its_group_once(higgs: Any, voices: Voices) -> None:
    higgs.text_lm_head.weight.requires_grad_(False)
    higgs(**voices.batch([voices.conversation()])).loss.backward()
    groups = gradients_by_group(higgs, HiggsAudioV2Family(higgs))
    expected: dict[str, set[int]] = {}
    for name, parameter in higgs.named_parameters():
        if parameter.grad is not None:
            expected.setdefault(group_of(name, HIGGS_GROUPS), set()).add(parameter.grad.data_ptr())
    assert {group: {gradient.data_ptr() for gradient in found} for group, found in groups.items()} == expected
    assert sum(map(len, groups.values())) == len(list(higgs.parameters())) - 1
    assert "text_head" not in groups
    assert not any(gradient.requires_grad for found in groups.values() for gradient in found)


def test_shared_parameters_are_counted_once(higgs: Any) -> None:
    higgs.text_lm_head.weight = higgs.model.embed_tokens.weight
    higgs.model.embed_tokens.weight.grad = torch.ones_like(higgs.model.embed_tokens.weight)
    groups = gradients_by_group(higgs, HiggsAudioV2Family(higgs))
    assert list(groups) == ["text_embedding"]
    assert len(groups["text_embedding"]) == 1


def test_without_gradients_there_are_no_groups(higgs: Any) -> None:
    assert gradients_by_group(higgs, HiggsAudioV2Family(higgs)) == {}

"""Operations of a position, against what torch counts of every matrix product of a forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import models
from support.batches import Voices
from torch.utils.flop_counter import FlopCounterMode
from transformers import AriaTextConfig, AriaTextForCausalLM, BartConfig, BartForCausalLM

from telemetry.families import find_family
from telemetry.instruments.model_flops import UncountableError, operations_a_position, peak_operations


def products(model: Any, batch: dict[str, Any]) -> int:
    """Operations of all products of a matrix and weights; those of attention have more dimensions."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(**batch).loss.backward()
    return sum(counter.get_flop_counts()["Global"].get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))


def counted(model: Any) -> float:
    family = find_family(model)
    assert family is not None
    return operations_a_position(model, family.group_of)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
def test_a_decoder(kind: str, tied: bool) -> None:
    model, ids = models.make(kind, tie_word_embeddings=tied), torch.arange(14).reshape(2, 7)
    assert 14 * counted(model) == products(model, {"input_ids": ids, "labels": ids})


def test_two_feed_forward_networks(higgs: Any, voices: Voices) -> None:
    batch = voices.batch(voices.pad([voices.conversation(), voices.conversation(seed=1, target=9)]))
    assert batch["input_ids"].numel() * counted(higgs) == products(higgs, batch)


def test_what_is_not_counted() -> None:
    frozen = models.make("llama")
    frozen.model.embed_tokens.weight.requires_grad_(False)
    aria = AriaTextForCausalLM(AriaTextConfig(**models.SHAPE, moe_num_experts=4, moe_topk=2))
    bart = BartForCausalLM(BartConfig(d_model=16, decoder_layers=1, decoder_attention_heads=2, vocab_size=29))
    refused = (frozen, "frozen"), (models.make("gpt_oss", "eager"), "experts"), (aria, "experts"), (bart, "encoder")
    for model, why in refused:
        with pytest.raises(UncountableError, match=why):
            counted(model)


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.float16, 989),
        ("NVIDIA H20", torch.bfloat16, 148),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, None),
        ("GRID A100-10C", torch.bfloat16, None),
        ("NVIDIA A40-8Q", torch.bfloat16, None),
        ("NVIDIA H200 NVL", torch.bfloat16, 835),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("Tesla T4", torch.float16, 65),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-PCIE-16GB", torch.float16, 112),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("NVIDIA RTX A4000", torch.bfloat16, None),
        ("NVIDIA RTX A1000", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("a processor", torch.bfloat16, None),
    ],
)
def test_peaks_of_gpus(gpu: str, dtype: torch.dtype, peak: float | None) -> None:
    found = peak_operations(gpu, dtype)
    assert found == (None if peak is None else peak * 1e12)

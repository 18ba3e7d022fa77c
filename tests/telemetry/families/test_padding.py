"""Which positions are padding, however a batch says it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.references import scalars_at
from support.steps import Steps
from support.waiting import Watch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import InputLoggerCallback
from telemetry.families.base import real_positions

IDS = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 5, 6, 0], [9, 8, 7, 6, 5]])
LEFT = torch.tensor([[0, 0, 5, 6, 7], [0, 8, 9, 5, 6], [9, 8, 7, 6, 5]])


def told(ids: Tensor) -> Tensor:
    return ids != 0


def seen(ids: Tensor, causal: bool = True, window: int = 9, unmask: bool = False, heads: int = 1) -> Tensor:
    """bool ``[batch, heads, queries, keys]``, query by query; ``unmask``: who sees nothing sees everything."""
    batch, length = ids.shape
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row in range(batch):
        for query in range(length):
            for key in range(length):
                near = (key <= query or not causal) and abs(query - key) < window
                mask[row, :, query, key] = near and int(ids[row, key]) != 0
            if unmask and not mask[row, 0, query].any():
                mask[row, :, query] = True
    return mask


def added(mask: Tensor, lowest: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, lowest)


@pytest.mark.parametrize("ids", [IDS, LEFT], ids=["right", "left"])
@pytest.mark.parametrize(
    "mask",
    [
        lambda ids: told(ids).long(),
        lambda ids: seen(ids),
        lambda ids: seen(ids, heads=2),
        lambda ids: seen(ids).squeeze(1),
        lambda ids: seen(ids, causal=False),
        lambda ids: seen(ids, window=2),
        lambda ids: seen(ids, unmask=True),
        lambda ids: added(seen(ids)),
        lambda ids: added(seen(ids, unmask=True), float("-inf")),
        lambda ids: added(seen(ids), -1e4).half(),
        lambda ids: {"full_attention": added(seen(ids)), "sliding_attention": added(seen(ids, window=2))},
    ],
)
def test_a_mask_of_positions_or_of_queries_and_keys(mask: Any, ids: Tensor) -> None:
    assert torch.equal(real_positions({"attention_mask": mask(ids)}, ids), told(ids))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("ids", [IDS, LEFT], ids=["right", "left"])
def test_the_mask_that_transformers_makes(ids: Tensor, implementation: str, llama: LlamaForCausalLM) -> None:
    config = llama.config
    config._attn_implementation = implementation
    embedded = llama.get_input_embeddings()(ids)
    mask = create_causal_mask(config, embedded, told(ids).long(), past_key_values=None)
    assert isinstance(mask, Tensor)
    assert mask.dim() == 4
    assert torch.equal(real_positions({"attention_mask": mask}, ids), told(ids))


@pytest.mark.parametrize("ids", [IDS, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("mask", [None, torch.ones(5, 5).tril().bool().expand(3, 1, 5, 5)], ids=["none", "causal"])
def test_without_a_word_of_the_mask_it_is_what_sequences_are_filled_with(mask: Any, ids: Tensor) -> None:
    assert torch.equal(real_positions({"attention_mask": mask}, ids, 0), told(ids))
    assert real_positions({"attention_mask": mask}, ids).all()


def test_what_sequences_are_filled_with_may_also_stand_inside_or_be_taught() -> None:
    ids = torch.tensor([[5, 0, 7, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 0, -100]])  # it also ends what is said
    assert real_positions({}, ids, 0).tolist() == [[True, True, True, False, False]]
    assert real_positions({}, ids, 0, labels).tolist() == [[True, True, True, True, False]]
    assert real_positions({}, ids, 0, labels[:, :3]).tolist() == [[True, True, True, False, False]]


def test_packed_sequences_have_no_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    mask = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril()).bool()[None, None]
    assert real_positions({"attention_mask": mask}, ids, 0).all()


@pytest.mark.parametrize("form", ["none", "4-D"])
def test_the_share_of_padding(form: str, llama: LlamaForCausalLM, tmp_path: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 0, 0, 0], [8, 9, 5, 6, 7, 0]])
    given = {} if form == "none" else {"attention_mask": added(seen(ids))}
    backend = MemoryBackend()
    with Steps(
        llama, [InputLoggerCallback(1, [backend])], tmp_path, loss=lambda m, batch: m(**batch).logits.sum()
    ) as run:
        run.step([{"input_ids": ids, **given}])
    values = scalars_at(backend, 1, "inputs")
    assert values["inputs/tokens/padding_fraction"] == pytest.approx(4 / 12)
    assert values["inputs/tokens/text_fraction"] == pytest.approx(8 / 12)


def test_nothing_of_it_waits_for_the_device() -> None:
    masks = [seen(IDS), added(seen(IDS, heads=2)), seen(IDS).squeeze(1), None]
    with Watch() as watch:
        for mask in masks:
            real_positions({"attention_mask": mask}, IDS, 0, IDS)
    assert watch.operations
    assert watch.waits == []

"""The attention probe stands between a model and its kernel, and nobody notices."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import models
from support.batches import text_batch
from support.steps import open_watch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AttentionInterface

from telemetry.families import find_family
from telemetry.probes.activations import watch_networks
from telemetry.probes.attention import AttentionCall, watch_attention
from telemetry.probes.watch import Watch

ORIGINAL = AttentionInterface.get_interface


def probed(model: Any, calls: list[AttentionCall], layers: tuple[int, ...] = (0, 2)) -> Watch:
    family = find_family(model)
    assert family is not None
    watch = open_watch(model)
    watch_attention(watch, "test", [family.layers()[index] for index in layers], calls.append)
    return watch


def gradients(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_it_sees_what_the_kernel_is_given(implementation: str) -> None:
    model, calls = models.make("llama", implementation), []
    probe = probed(model, calls)
    model(**text_batch(7, 5))
    probe.close()
    assert [call.layer for call in calls] == [0, 2]
    assert [call.kernel for call in calls] == [implementation] * 2
    assert all(call.query.shape == (2, 4, 7, 4) and call.key.shape == (2, 2, 7, 4) for call in calls)
    assert not calls[0].query.is_contiguous() or calls[0].query.requires_grad  # the tensor itself, and no copy


def test_it_is_there_while_the_model_runs_and_not_after() -> None:
    model, calls = models.make("llama"), []
    probe = probed(model, calls)
    assert AttentionInterface.get_interface is ORIGINAL
    inside = []
    handle = model.model.norm.register_forward_hook(lambda *_: inside.append(AttentionInterface.get_interface))
    model(**text_batch(4))
    assert inside[0] is not ORIGINAL
    assert AttentionInterface.get_interface is ORIGINAL
    model.model(**text_batch(4))  # a part of it, elsewhere
    assert inside[1] is ORIGINAL
    handle.remove()
    assert len(calls) == 2
    probe.close()
    model(**text_batch(4))
    assert len(calls) == 2


def test_it_is_gone_when_the_forward_pass_raises() -> None:
    model, calls = models.make("llama"), []
    probe = probed(model, calls)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(**text_batch(4))
    assert AttentionInterface.get_interface is ORIGINAL
    handle.remove()
    probe.close()


def test_two_models_at_once_and_a_third_that_nobody_watches() -> None:
    outer, inner, other = (models.make(kind) for kind in ("llama", "qwen3", "mistral"))
    seen: tuple[list[AttentionCall], list[AttentionCall]] = ([], [])
    probes = [probed(model, calls) for model, calls in zip((outer, inner), seen, strict=True)]

    def run_others(*_: Any) -> None:
        inner(**text_batch(3))
        other(**text_batch(5))

    handle = outer.model.layers[1].register_forward_pre_hook(run_others)
    outer(**text_batch(4))
    handle.remove()
    assert [[call.query.shape[2] for call in calls] for calls in seen] == [[4, 4], [3, 3]]
    assert AttentionInterface.get_interface is ORIGINAL
    for probe in probes:
        probe.close()


def test_a_result_goes_on_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    given, result = [], (torch.zeros(1, 4, 4, 4), object())

    def kernel(*arguments: Any, **options: Any) -> Any:
        given.append((arguments, options))
        return result

    monkeypatch.setitem(AttentionInterface._global_mapping, "own", kernel)
    model, calls = models.make("llama"), []
    model.config._attn_implementation = "own"
    received = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda _module, _args, output: received.append(output[1]))
    probe = probed(model, calls)
    model(**text_batch(4))
    probe.close()
    assert received == [result[1]]
    arguments, options = given[0]
    assert arguments[0] is attention
    assert arguments[1] is calls[0].query
    assert calls[0].kernel is None
    assert options.items() >= calls[0].options.items()


# Gradient checkpointing -----------------------------------------------------------------------------------------------


def _save_products(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    saved = operation in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.mul.Tensor)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, _save_products),
    },
}


@pytest.mark.parametrize("way", CHECKPOINTING)
def test_gradient_checkpointing_counts_once_and_gives_the_same_bits(way: str) -> None:
    results = []
    for watched in (False, True):
        model = models.make("llama", "eager")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[way])
        model.train()
        calls: list[AttentionCall] = []
        outputs: list[str] = []

        def attend(call: AttentionCall, calls: list[AttentionCall] = calls) -> None:
            torch.mm(call.query[0, 0], call.query[0, 0].T).mul(2)  # as a measure would
            calls.append(call)

        def activate(_layer: int, _name: str, role: str, tensor: Tensor, outputs: list[str] = outputs) -> None:
            tensor.mul(2).square()
            outputs.append(role)

        layers = find_family(model).layers()  # type: ignore[union-attr]
        watch = open_watch(model)
        if watched:
            watch_attention(watch, "test", layers, attend)
            watch_networks(watch, "test", layers, activate)
        results.append(gradients(model, text_batch(6, 4)))
        watch.close()
        assert len(calls) == (3 if watched else 0)
        assert outputs == (["residual", "output"] * 3 if watched else [])  # which is what is added, as it is
    for plain, seen in zip(*results, strict=True):
        assert torch.equal(plain, seen)

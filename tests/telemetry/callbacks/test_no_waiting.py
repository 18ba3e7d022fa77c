"""On the training thread telemetry launches device work and waits for none of it, and takes no random number."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_runs import StepRun
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from voice_batches import Voices

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.base import StrategicCallback
from telemetry.callbacks.strategic import COMPONENTS
from telemetry.families import Head, HiggsAudioV2Family
from telemetry.probes.forward import Microbatch

# Each of them makes the host wait for the device, to read a value or to learn the shape of a result.
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes every operation and which of them wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations.append(name)
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        if name in WAITING or masked:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def watched(kind: type[StrategicCallback], watch: Watch) -> type[StrategicCallback]:
    """A kind of callback whose measures run under ``watch``."""

    class Watched(kind):  # type: ignore[misc,valid-type]
        def observe_inputs(self, microbatch: Microbatch) -> None:
            with watch:
                super().observe_inputs(microbatch)

        def observe_logits(self, microbatch: Microbatch, head: Head, logits: Tensor) -> None:
            with watch:
                super().observe_logits(microbatch, head, logits)

        def observe_gradients(self, model: nn.Module, clipped: bool) -> None:
            with watch:
                super().observe_gradients(model, clipped)

        def finish_step(self) -> None:
            with watch:
                super().finish_step()

    return Watched


def batches(voices: Voices) -> list[dict[str, Tensor]]:
    left = voices.pad([voices.conversation(reference=None, seed=3), voices.conversation(target=9)], left=True)
    return [voices.batch(voices.pad([voices.conversation(), voices.conversation(target=None)]), 2), voices.batch(left)]


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_measure_waits_for_the_device(name: str, higgs: Any, voices: Voices, tmp_path: Path) -> None:
    watch = Watch()
    backend = MemoryBackend()
    run = StepRun(higgs, [watched(COMPONENTS[name], watch)(1, [backend])], tmp_path, voices.tokenizer)
    run.step(batches(voices))
    run.end()
    assert backend.tags()  # it did measure
    assert watch.operations
    assert watch.waits == []


def test_reading_a_batch_waits_for_nothing(higgs: Any, voices: Voices) -> None:
    family = HiggsAudioV2Family(higgs)
    for inputs in batches(voices):
        with Watch() as watch:
            family.view(inputs)
        assert watch.operations
        assert watch.waits == []


def test_the_watch_sees_what_waits() -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with Watch() as watch:
        values[mask]
        values.sum().item()
        mask.nonzero()
        values.masked_select(mask)
        bool(mask.any())
    assert {"index", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"} & set(watch.waits) >= {
        "index", "_local_scalar_dense", "nonzero", "masked_select",
    }  # fmt: skip
    assert len(watch.waits) >= 5


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_random_number_is_taken_and_no_mode_changed(name: str, higgs: Any, voices: Voices, tmp_path: Path) -> None:
    run = StepRun(higgs, [COMPONENTS[name](1, [MemoryBackend()])], tmp_path, voices.tokenizer)
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()  # noqa: NPY002  # the one watched
    modes = [module.training for module in higgs.modules()]
    run.step(batches(voices))
    run.end()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert [module.training for module in higgs.modules()] == modes


def test_loss_and_gradients_are_the_same_bits_with_everything_watching(
    make_higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    gradients = []
    for kinds in ([], list(COMPONENTS.values())):
        model = make_higgs()
        run = StepRun(model, [kind(1, [MemoryBackend()]) for kind in kinds], tmp_path, voices.tokenizer)
        loss = run.step(batches(voices))
        run.end()
        gradients.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, plain), (watched_loss, seen) = gradients
    assert watched_loss == loss
    assert plain.keys() == seen.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, seen[name]), name

"""The forward probe sees every forward pass between attach and detach, with its inputs and every head's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from text_training import hooks_of
from torch import Tensor
from voice_batches import Voices

from telemetry.clock import StepClock
from telemetry.families import Head, HiggsAudioV2Family
from telemetry.probes.forward import ForwardProbe, Microbatch


class Ear:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.inputs: list[Microbatch] = []
        self.logits: list[tuple[Microbatch, Head, Tensor]] = []
        self.grad_enabled: set[bool] = set()

    def observe_inputs(self, microbatch: Microbatch) -> None:
        self.grad_enabled.add(torch.is_grad_enabled())
        self.inputs.append(microbatch)

    def observe_logits(self, microbatch: Microbatch, head: Head, logits: Tensor) -> None:
        self.grad_enabled.add(torch.is_grad_enabled())
        self.logits.append((microbatch, head, logits))


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture
def probe(higgs: Any, ear: Ear) -> ForwardProbe:
    return ForwardProbe(higgs, HiggsAudioV2Family(higgs), ear)


def test_every_forward_pass_between_attach_and_detach(
    higgs: Any, voices: Voices, probe: ForwardProbe, ear: Ear
) -> None:
    first, second = voices.batch([voices.conversation()]), voices.batch([voices.conversation(seed=4)])
    higgs(**first)
    probe.attach(StepClock())
    outputs = [higgs(**first), higgs(**second)]
    assert probe.forwards == 2
    probe.detach()
    higgs(**first)

    assert len(ear.inputs) == 2
    for microbatch, batch in zip(ear.inputs, (first, second), strict=True):
        assert microbatch.inputs["input_ids"] is batch["input_ids"]
    assert [head.modality for _, head, _ in ear.logits] == ["audio", "text"] * 2
    for index, (microbatch, _, _) in enumerate(ear.logits):
        assert microbatch is ear.inputs[index // 2]
    for index, output in enumerate(outputs):
        audio, text = (logits for _, _, logits in ear.logits[2 * index : 2 * index + 2])
        assert torch.equal(audio, output.logits)
        assert not audio.requires_grad
        assert text.shape == (*audio.shape[:2], higgs.config.vocab_size)
    assert ear.grad_enabled == {False}
    assert hooks_of(higgs) == 0


def test_attaching_twice_tells_once(higgs: Any, voices: Voices, probe: ForwardProbe, ear: Ear) -> None:
    probe.attach(StepClock())
    probe.attach(StepClock())
    higgs(**voices.batch([voices.conversation()]))
    assert len(ear.inputs) == 1
    assert len(ear.logits) == 2
    probe.detach()
    probe.detach()
    assert hooks_of(higgs) == 0


def test_announced_metadata_belongs_to_the_next_forward_pass_alone(
    higgs: Any, voices: Voices, probe: ForwardProbe, ear: Ear
) -> None:
    inputs = voices.batch([voices.conversation()])
    probe.attach(StepClock())
    for name in ("one", None, "three"):
        if name is not None:
            probe.announce([{"sample_id": name}])
        higgs(**inputs)
    probe.announce([{"sample_id": "never run"}])
    probe.attach(StepClock())
    higgs(**inputs)
    probe.detach()
    assert [microbatch.sample_id(0) for microbatch in ear.inputs] == ["one", "row 0", "three", "row 0"]


def test_a_replayed_pass_is_told_as_a_watched_one(higgs: Any, voices: Voices, probe: ForwardProbe, ear: Ear) -> None:
    inputs = voices.batch([voices.conversation()])
    outputs = higgs(**inputs)
    probe.replay({**inputs, "metadata": [{"sample_id": "one"}]}, outputs)
    assert probe.forwards == 1
    ((microbatch, head, logits),) = ear.logits
    assert microbatch is ear.inputs[0]
    assert microbatch.sample_id(0) == "one"
    assert "metadata" not in microbatch.inputs
    assert head.modality == "audio"
    assert torch.equal(logits, outputs.logits)
    assert not logits.requires_grad
    assert ear.grad_enabled == {False}


def test_a_sample_is_named_by_its_id_or_its_row() -> None:
    microbatch = Microbatch({}, None, [{"sample_id": 7}, {"sample_id": None}, {}])
    assert [microbatch.sample_id(row) for row in range(4)] == ["7", "row 1", "row 2", "row 3"]


def test_watching_changes_no_gradient(higgs: Any, voices: Voices, probe: ForwardProbe) -> None:
    inputs = voices.batch([voices.conversation()])
    found = []
    for watch in (False, True):
        higgs.zero_grad()
        if watch:
            probe.attach(StepClock())
        higgs(**inputs).loss.backward()
        probe.detach()
        found.append({name: parameter.grad.clone() for name, parameter in higgs.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

"""The reader sees every pass of training between attach and forget: its inputs, streams, and the model's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.batches import Voices
from support.references import Outputs, differing
from support.steps import gradients_of, hooks_of, open_watch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from telemetry.families import Absent, CausalLMFamily, Family, HiggsAudioV2Family, Seen, Stream
from telemetry.families.base import NO_LABELS, NO_LOGITS
from telemetry.probes.forward import NOT_SHOWN, Microbatch, PassReader, Reading
from telemetry.probes.watch import Watch


class Ear:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.microbatches: list[Microbatch] = []
        self.readings: list[tuple[Microbatch, Reading]] = []
        self.grad_enabled: set[bool] = set()

    def inputs(self, microbatch: Microbatch) -> None:
        self.grad_enabled.add(torch.is_grad_enabled())
        self.microbatches.append(microbatch)

    def outputs(self, microbatch: Microbatch, reading: Reading) -> None:
        self.grad_enabled.add(torch.is_grad_enabled())
        self.readings.append((microbatch, reading))

    @property
    def last(self) -> Reading:
        return self.readings[-1][1]


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture
def reader(higgs: Any, ear: Ear) -> PassReader:
    return PassReader(HiggsAudioV2Family(higgs), ear.inputs, ear.outputs)


@pytest.fixture
def attach(higgs: Any, reader: PassReader) -> Callable[[], Watch]:
    def begin() -> Watch:
        watch = open_watch(higgs)
        reader.attach(watch)
        return watch

    return begin


def test_every_pass_between_attach_and_the_end_of_the_watch(
    higgs: Any, voices: Voices, reader: PassReader, ear: Ear, attach: Any
) -> None:
    first, second = voices.batch([voices.conversation()]), voices.batch([voices.conversation(seed=4)])
    higgs(**first)
    watch = attach()
    outputs = [higgs(**first), higgs(**second)]
    assert reader.passes == 2
    watch.close()
    higgs(**first)

    assert len(ear.microbatches) == 2
    for microbatch, batch in zip(ear.microbatches, (first, second), strict=True):
        assert microbatch.inputs["input_ids"] is batch["input_ids"]
    assert [microbatch for microbatch, _ in ear.readings] == ear.microbatches
    for (_, reading), output in zip(ear.readings, outputs, strict=True):
        text, audio = reading.streams
        assert (text.group, audio.group) == ("text", "audio")
        assert torch.equal(audio.logits.flatten(2), output.logits)
        assert not audio.logits.requires_grad
        assert text.logits.shape == (*output.logits.shape[:2], higgs.config.vocab_size)
        assert not text.logits.requires_grad
        assert torch.equal(reading.loss, output.loss)
        assert not reading.loss.requires_grad
        assert reading.absent == []
    assert ear.grad_enabled == {False}
    assert hooks_of(higgs) == 0


def test_attaching_twice_tells_once(higgs: Any, voices: Voices, ear: Ear, attach: Any) -> None:
    attach().close()
    watch = attach()
    higgs(**voices.batch([voices.conversation()]))
    watch.close()
    assert len(ear.microbatches) == len(ear.readings) == 1
    assert hooks_of(higgs) == 0


def test_announced_metadata_belongs_to_the_next_pass_alone(
    higgs: Any, voices: Voices, reader: PassReader, ear: Ear, attach: Any
) -> None:
    inputs = voices.batch([voices.conversation()])
    watch = attach()
    for name in ("one", None, "three"):
        if name is not None:
            reader.announce([{"sample_id": name}])
        higgs(**inputs)
    reader.announce([{"sample_id": "never run"}])
    watch.close()
    watch = attach()
    higgs(**inputs)
    watch.close()
    assert [microbatch.sample_id(0) for microbatch in ear.microbatches] == ["one", "row 0", "three", "row 0"]


def test_a_replayed_pass_is_told_as_a_watched_one(higgs: Any, voices: Voices, reader: PassReader, ear: Ear) -> None:
    inputs = voices.batch([voices.conversation()])
    outputs = higgs(**inputs)
    reader.replay({**inputs, "metadata": [{"sample_id": "one"}]}, outputs)
    assert reader.passes == 1
    ((microbatch, reading),) = ear.readings
    assert microbatch is ear.microbatches[0]
    assert microbatch.sample_id(0) == "one"
    assert "metadata" not in microbatch.inputs
    (audio,) = reading.streams
    assert audio.group == "audio"
    assert torch.equal(audio.logits.flatten(2), outputs.logits)
    assert not audio.logits.requires_grad
    assert reading.absent == [Absent("text", NOT_SHOWN)]
    assert ear.grad_enabled == {False}


def test_a_sample_is_named_by_its_id_or_its_row() -> None:
    microbatch = Microbatch({}, None, [{"sample_id": 7}, {"sample_id": None}, {}])
    assert [microbatch.sample_id(row) for row in range(4)] == ["7", "row 1", "row 2", "row 3"]


def test_watching_changes_no_gradient(higgs: Any, voices: Voices, attach: Any) -> None:
    inputs = voices.batch([voices.conversation()])
    found = []
    for watched in (False, True):
        higgs.zero_grad()
        watch = attach() if watched else None
        higgs(**inputs).loss.backward()
        if watch is not None:
            watch.close()
        found.append(gradients_of(higgs))
    assert differing(*found) == []


# -- what a pass gives ------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def reading_of(model: nn.Module, family: Family | None, *args: Any, **inputs: Any) -> Reading:
    ear, watch = Ear(), open_watch(model)
    PassReader(family, ear.inputs, ear.outputs).attach(watch)
    model(*args, **inputs)
    watch.close()
    return ear.last


@pytest.mark.parametrize("how", ["by name", "by position", "as a tuple"])
def test_a_causal_model_however_it_is_called(llama: LlamaForCausalLM, how: str) -> None:
    if how == "by position":
        reading = reading_of(llama, CausalLMFamily(llama), IDS, labels=IDS)
    else:
        more = {"return_dict": False} if how == "as a tuple" else {}
        reading = reading_of(llama, CausalLMFamily(llama), input_ids=IDS, labels=IDS, **more)
    outputs = llama(input_ids=IDS, labels=IDS)
    (text,) = reading.streams
    assert torch.equal(text.logits, outputs.logits)
    assert torch.equal(text.predicted, torch.tensor([[4, 5, 6, -100], [8, 9, 10, -100]]))
    assert torch.equal(reading.loss, outputs.loss)


def test_labels_that_were_shifted_before(llama: LlamaForCausalLM) -> None:
    shifted = torch.tensor([[4, 5, 6, -100], [8, 9, 10, -100]])
    (text,) = reading_of(llama, CausalLMFamily(llama), input_ids=IDS, labels=IDS, shift_labels=shifted).streams
    assert torch.equal(text.predicted, shifted)


def test_a_model_without_a_family_has_its_loss(llama: LlamaForCausalLM) -> None:
    reading = reading_of(llama, None, input_ids=IDS, labels=IDS)
    assert torch.equal(reading.loss, llama(input_ids=IDS, labels=IDS).loss)
    assert reading.streams == []


def test_without_labels_there_is_nothing_and_it_is_said_why(llama: LlamaForCausalLM) -> None:
    for more in ({}, {"return_dict": False}):  # whose first part are logits
        reading = reading_of(llama, CausalLMFamily(llama), input_ids=IDS, **more)
        assert reading.loss is None
        assert reading.absent == [Absent("text", NO_LABELS, in_loss=False)]


class Declares(Family):
    """Declares what a test wants."""

    def __init__(self, declared: Any) -> None:
        super().__init__(None)
        self.declared = declared

    def streams(self, inputs: Any, outputs: Any, seen: Seen) -> Any:
        return self.declared() if callable(self.declared) else self.declared


def logits(*shape: int) -> Tensor:
    return torch.zeros(shape)


def labels(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (Stream("text", logits(2, 4, 9), labels(2, 4), "text", "shifted"), ""),
        (Stream("text", logits(5, 9), labels(5), "text", "aligned"), ""),
        (Stream(("a", "b"), logits(2, 4, 2, 9), labels(2, 4, 2), "audio", "given_shifted"), ""),
        (Stream("text", logits(3, 9), labels(2, 4), "text", "shifted", rows=labels(3)), ""),
        (
            Stream("text", logits(2, 3, 9), labels(2, 4), "text", "shifted"),
            "the logits do not cover every position: (2, 3, 9), where (2, 4, vocabulary) is expected",
        ),
        (
            Stream("text", logits(2, 6, 9), labels(2, 4), "text", "shifted"),
            "the logits do not fit the labels: (2, 6, 9), where (2, 4, vocabulary) is expected",
        ),
        (
            Stream("text", logits(2, 9), labels(2, 4), "text", "shifted", rows=labels(3)),
            "the logits do not fit the labels: (2, 9), where (3, vocabulary) is expected",
        ),
        (
            Stream(("a", "b"), logits(2, 4, 9), labels(2, 4), "audio", "shifted"),
            "labels (2, 4) for 2 sequences: their last dimension is expected",
        ),
        (
            Stream("text", logits(4, 9), labels(4), "text", "shifted"),
            "labels (4,) have no batch and sequence to be shifted or taken rows of",
        ),
        (
            Stream("text", labels(2, 4, 9), labels(2, 4), "text", "shifted"),
            "logits are torch.int64, labels torch.int64: floats and ids are expected",
        ),
        (
            Stream("text", logits(2, 4, 9), labels(2, 4), "words", "left"),  # type: ignore[arg-type]
            "group 'words' and alignment 'left' are to be of text, audio, shifted, aligned, given_shifted",
        ),
    ],
)
def test_a_stream_that_does_not_fit_is_absent_and_said_how(llama: LlamaForCausalLM, stream: Stream, fault: str) -> None:
    reading = reading_of(llama, Declares([stream]), input_ids=IDS)
    if fault:
        assert reading.streams == []
        assert reading.absent == [Absent(stream.group, f"{fault} (family Declares)")]
    else:
        assert [one.name for one in reading.streams] == [stream.name]
        assert reading.absent == []


def test_a_family_that_raises_is_said_once_and_training_goes_on(
    llama: LlamaForCausalLM, telemetry_log: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise KeyError("moon")

    ear, watch = Ear(), open_watch(llama)
    PassReader(Declares(broken), ear.inputs, ear.outputs).attach(watch)
    for _ in range(2):
        llama(input_ids=IDS, labels=IDS).loss.backward()
    watch.close()
    assert [one.why for one in ear.last.absent] == ["family Declares cannot read what the model returned"]
    assert ear.last.loss is not None
    said = [record for record in telemetry_log.records if "cannot read outputs" in record.getMessage()]
    assert len(said) == 1
    assert said[0].exc_info is not None


def test_a_loss_that_the_trainer_scales_in_place_stays_what_it_was(llama: LlamaForCausalLM) -> None:
    ear, watch = Ear(), open_watch(llama)
    PassReader(CausalLMFamily(llama), ear.inputs, ear.outputs).attach(watch)
    loss = llama(input_ids=IDS, labels=IDS).loss
    was = loss.item()
    loss *= 2
    watch.close()
    assert ear.last.loss is not None
    assert ear.last.loss.item() == was


def test_streams_hold_what_the_loss_is_made_of(higgs: Any, voices: Voices, ear: Ear, attach: Any) -> None:
    """Every stream's targets and logits, one token at a time, against the samples that the batch was built of."""
    samples = voices.pad([voices.conversation(seed=1), voices.conversation(reference=6, target=2, seed=2)], left=True)
    watch = attach()
    higgs(**voices.batch(samples))
    watch.close()
    text, audio = ear.last.streams
    expected, found = Outputs(), Outputs()
    expected.add_text([[position.label for position in sample] for sample in samples], text.logits)
    expected.add_audio(samples, audio.logits, 11)
    for stream in (text, audio):
        rows = stream.logits.flatten(0, -2 if stream is text else -3).reshape(
            -1, len(stream.names), stream.logits.shape[-1]
        )
        targets = stream.predicted.reshape(-1, len(stream.names))
        for at in range(targets.shape[0]):
            for k, name in enumerate(stream.names):
                if targets[at, k] != -100:
                    key = "text" if name == "text" else int(name.removeprefix("codebook_"))
                    found.streams[key].add(rows[at, k].double().tolist(), int(targets[at, k]), 11)
    assert {key: sorted(one.losses) for key, one in found.streams.items()} == {
        key: sorted(one.losses) for key, one in expected.streams.items()
    }
    assert sum(len(one.losses) for one in found.streams.values()) > 20
    assert NO_LOGITS not in [one.why for one in ear.last.absent]

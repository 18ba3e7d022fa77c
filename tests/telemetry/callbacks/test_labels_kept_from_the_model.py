"""Labels that the trainer takes out of the batch before the model runs are read all the same."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import Voices
from support.references import assert_same, scalars_at
from support.steps import make_trainer
from support.text_training import IGNORED, Collator, Training, training
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from telemetry import InputLoggerCallback, OutputLoggerCallback, StrategicTelemetry, Telemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.families.base import (
    NO_LABELS,
    NO_LOGITS,
    Declared,
    Divided,
    Family,
    LossPart,
    Overruled,
    Stream,
)
from telemetry.instruments.outputs import NO_LOSS, WITHHELD
from telemetry.probes.batches import PreparedBatch
from telemetry.probes.forward import PassReader, Reading
from telemetry.records import Scalar, Table

TOTAL, MODEL = "outputs/loss/total", "outputs/loss/model"
SUPERVISED = "inputs/supervised/text_fraction"
STEPS = 2


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Pops(Trainer):
    """Takes the labels out, and runs the model on the rest."""

    label = "labels"

    def run(self, model: Any, inputs: Any) -> Any:
        return model(**inputs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop(self.label)
        outputs = self.run(model, inputs)
        loss = loss_of(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class Positional(Pops):
    def run(self, model: Any, inputs: Any) -> Any:
        return model(inputs["input_ids"], inputs["attention_mask"])


class Embeds(Pops):
    def run(self, model: Any, inputs: Any) -> Any:
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        return model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"].clone())  # nothing of the batch


class Named(Pops):
    label = "targets"


class AsArgument(Trainer):
    """Gives the model labels that the batch has by another name."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["labels"] = inputs.pop("targets")
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Evaluates(Pops):
    """Evaluates between taking the batch and running the model on it."""

    def run(self, model: Any, inputs: Any) -> Any:
        if model.training and not self.state.global_step:
            collator, self.data_collator = self.data_collator, Collator()
            self.evaluate()
            self.data_collator = collator
            model.train()
        return model(**inputs)


class Augments(Pops):
    """Also runs the model on something else than the batch, of the same shape."""

    def run(self, model: Any, inputs: Any) -> Any:
        model(input_ids=inputs["input_ids"].flip(0).clone(), attention_mask=inputs["attention_mask"].flip(0).clone())
        return model(**inputs)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    summed = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return 3 * summed / num_items_in_batch


def sequence_to_sequence(args: TrainingArguments, **more: Any) -> Trainer:
    of = {one.name: getattr(args, one.name) for one in dataclasses.fields(args) if one.init}
    return Seq2SeqTrainer(args=Seq2SeqTrainingArguments(**of), **more)


KINDS: dict[str, tuple[Callable[..., Trainer], dict[str, Any], bool]] = {
    # kind of trainer, its arguments, and whether the Trainer counts the tokens of all microbatches
    "smoothing": (Trainer, {"label_smoothing_factor": 0.1}, True),
    "smoothing of Seq2SeqTrainer": (sequence_to_sequence, {"label_smoothing_factor": 0.1}, True),
    "compute_loss_func": (functools.partial(Trainer, compute_loss_func=own_loss), {}, True),
    "pops": (Pops, {}, False),
    "positional": (Positional, {}, False),
    "embeds": (Embeds, {}, False),
    "named": (Named, {"label_names": ["targets"]}, False),
    "evaluates": (Evaluates, {"eval_strategy": "no"}, False),
}


def prepared(name: str, model: Any, directory: Path, *callbacks: TrainerCallback, accumulation: int = 2) -> Training:
    kind, arguments, _ = KINDS[name]
    run = training(model, directory, callbacks, STEPS, accumulation, kind, **arguments)
    if "label_names" in arguments:
        renamed(run)
    return run


def renamed(run: Training) -> None:
    """Has the batches' labels named otherwise."""
    of = run.trainer.data_collator
    run.trainer.data_collator = lambda rows: {("targets" if n == "labels" else n): t for n, t in of(rows).items()}


def absences(backend: MemoryBackend) -> dict[str, str]:
    return {str(row[0]): str(row[1]) for row in backend.last("telemetry/absent", Table).rows}


@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_supervision_are_those_of_the_batchs_labels(
    name: str, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    run = prepared(name, llama, tmp_path, StrategicTelemetry(["inputs", "outputs"], 1, [backend]))
    run.trainer.train()
    for step in range(1, STEPS + 1):
        expected = {t: v for t, v in run.expected(step).items() if t.startswith("outputs/") and t != MODEL}
        if not KINDS[name][2]:
            expected[TOTAL] = sum(of_microbatches(run, step)) / 2
        assert_same(scalars_at(backend, step, "outputs"), expected)
        assert scalars_at(backend, step, "inputs")[SUPERVISED] == pytest.approx(run.expected(step)[SUPERVISED])
    for tag in (TOTAL, "outputs/loss/text", "outputs/entropy/text"):
        assert {record.note for _, record in backend.records[tag] if isinstance(record, Scalar)} == {WITHHELD}
    assert absences(backend)[MODEL] == NO_LOSS
    assert "_prepare_inputs" not in vars(run.trainer)


def of_microbatches(run: Training, step: int) -> list[float]:
    """The mean over its own tokens of every microbatch."""
    with torch.no_grad():
        return [float(run.snapshots.models[step](**batch).loss) for batch in run.of_step(step)]


def test_labels_by_another_name_that_the_model_is_given_are_compared_with_its_loss(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    run = training(llama, tmp_path, [OutputLoggerCallback(1, [backend])], STEPS, 2, AsArgument, label_names=["targets"])
    renamed(run)
    run.trainer.train()
    assert backend.scalars(TOTAL) == pytest.approx(backend.scalars(MODEL), rel=1e-5)
    assert {r.note for _, r in backend.records[TOTAL] if isinstance(r, Scalar)} == {""}


class Weights(Trainer):
    """Gives the model its labels, and makes another loss of what it returns."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = self.weighted(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def weighted(self, outputs: Any, labels: Tensor) -> Tensor:
        return 3 * outputs.loss


class InPlace(Weights):
    def weighted(self, outputs: Any, labels: Tensor) -> Tensor:
        outputs.loss *= 3
        outputs.logits = outputs.logits * 2
        return outputs.loss


class ByToken(Weights):
    def weighted(self, outputs: Any, labels: Tensor) -> Tensor:
        weight = torch.linspace(1, 2, outputs.logits.shape[-1])
        return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight)


class MasksAfter(Weights):
    def weighted(self, outputs: Any, labels: Tensor) -> Tensor:
        labels[:, :3] = IGNORED
        return loss_of(outputs.logits, labels)


class Deletes(Weights):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop("attention_mask")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("kind", [Weights, InPlace, ByToken, MasksAfter, Deletes])
def test_a_loss_made_of_the_models_is_no_misreading(
    kind: type[Trainer], llama: LlamaForCausalLM, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    run = training(llama, tmp_path, [OutputLoggerCallback(1, [backend])], STEPS, 2, kind)
    run.trainer.train()
    assert list(backend.scalars(TOTAL)) == [1, 2]
    assert backend.scalars(TOTAL) == pytest.approx(backend.scalars(MODEL), rel=1e-5)
    if kind is not Deletes:
        text = run.expected(1)["outputs/loss/text"]
        assert backend.scalars("outputs/loss/text")[1] == pytest.approx(text, rel=1e-5)
    assert not [one for one in telemetry_log.records if one.levelname == "WARNING" and TOTAL in one.getMessage()]


def test_a_pass_over_something_else_has_no_labels(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend = MemoryBackend()
    run = training(llama, tmp_path, [OutputLoggerCallback(1, [backend])], 1, 1, Augments)
    run.trainer.train()
    assert backend.scalars("outputs/loss/text")[1] == pytest.approx(run.expected(1)["outputs/loss/text"], rel=1e-5)
    assert absences(backend)["outputs/loss/text"] == NO_LABELS


def test_training_is_the_same_to_the_bit(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    plain, watched = copy.deepcopy(llama), copy.deepcopy(llama)
    for model, callbacks in ((plain, []), (watched, [StrategicTelemetry(logging_steps=1, backends=[MemoryBackend()])])):
        prepared("smoothing", model, tmp_path, *callbacks).trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


@dataclasses.dataclass
class Holds:
    prepare: Any


class Other:
    def _prepare_inputs(self) -> str:
        return "the other's"


def test_a_trainers_own_replacement_is_put_back_and_a_copy_is_free(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    calls: list[int] = []

    class Copies(TrainerCallback):
        trainer: Any = None

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ours = vars(self.trainer)["_prepare_inputs"]
            assert ours is not counted
            copied = copy.deepcopy(Holds(ours), {id(self.trainer): Other()})
            assert copied.prepare() == "the other's"

    backend, acts = MemoryBackend(), Copies()
    run = prepared("pops", llama, tmp_path, OutputLoggerCallback(2, [backend]))
    own = run.trainer._prepare_inputs

    def counted(inputs: Any) -> Any:
        calls.append(1)
        return own(inputs)

    acts.trainer = run.trainer
    run.trainer._prepare_inputs = counted  # type: ignore[method-assign]
    run.trainer.train()
    assert run.trainer._prepare_inputs is counted
    assert len(calls) == STEPS * 2
    assert list(backend.scalars("outputs/loss/text")) == [1, 2]


def test_a_step_that_raises_leaves_nothing_that_sees(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    class Raises(Pops):
        raises = True

        def run(self, model: Any, inputs: Any) -> Any:
            if self.raises:
                raise RuntimeError("once")
            return model(**inputs)

    backend = MemoryBackend()
    run = training(llama, tmp_path, [OutputLoggerCallback(1, [backend])], STEPS, 1, Raises)
    with pytest.raises(RuntimeError, match="once"):
        run.trainer.train()
    run.trainer.raises = False  # type: ignore[attr-defined]
    run.trainer.train()
    assert list(backend.scalars("outputs/loss/text")) == [1, 2]
    assert "_prepare_inputs" not in vars(run.trainer)


def test_a_part_of_the_labels_of_higgs(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """The model is given the labels of the audio alone, and does not run its text head."""

    def text_alone(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs.loss + 0 * labels.sum()

    backend = MemoryBackend()
    samples = voices.pad([voices.conversation(seed=1), voices.conversation(target=9, seed=2)])
    batch = voices.batch(samples)
    with torch.no_grad():
        given = {name: value for name, value in batch.items() if name != "labels"}
        audio, counted = (
            float(higgs(**given, **items).loss)
            for items in ({}, {"num_items_in_batch": (batch["labels"][:, 1:] != IGNORED).sum()})
        )
    make_trainer(
        higgs,
        [0, 1],
        lambda _rows: batch,
        tmp_path,
        [OutputLoggerCallback(1, [backend]), InputLoggerCallback(1, [backend])],
        functools.partial(Trainer, compute_loss_func=text_alone),
        max_steps=1,
        per_device_train_batch_size=2,
        average_tokens_across_devices=False,
    ).train()
    values = scalars_at(backend, 1, "outputs", "inputs")
    codebooks = sum(values[f"outputs/loss/codebook_{k}"] for k in range(3))
    assert codebooks == pytest.approx(audio, rel=1e-5)
    assert values[MODEL] == pytest.approx(counted, rel=1e-5)
    texts = [position for sample in samples for position in sample if position.kind == "text"]
    assert values[SUPERVISED] == pytest.approx(sum(one.label != IGNORED for one in texts) / len(texts))
    assert TOTAL not in values
    assert absences(backend)["outputs/loss/text"] == NO_LOGITS


# -- loops of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [True, False])
def test_a_loop_says_what_it_has_taken_out(llama: LlamaForCausalLM, tmp_path: Path, said: bool) -> None:
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    labels = torch.tensor([[IGNORED, 4, 5, 6], [IGNORED, IGNORED, 9, 10]])
    backend = MemoryBackend()
    with Telemetry(llama, tmp_path, logging_steps=1, backends=[backend]) as telemetry, telemetry.step():
        batch = {"input_ids": ids, "labels": labels, "metadata": [{"sample_id": "a"}, {"sample_id": "b"}]}
        if said:
            telemetry.microbatch(batch)
        loss = loss_of(llama(input_ids=batch["input_ids"]).logits, labels)
        loss.backward()
    measured = backend.scalars("outputs/loss/text")
    if said:
        assert measured == {1: pytest.approx(loss.item(), rel=1e-5)}
        assert backend.scalars(SUPERVISED) == {1: 5 / 8}
        assert {row[0] for row in backend.last("outputs/predictions", Table).rows} == {"a", "b"}
    else:
        assert measured == {}
        assert absences(backend)["outputs/loss/text"] == NO_LABELS
        assert SUPERVISED in absences(backend)


# -- which passes a batch's labels belong to --------------------------------------------------------------------------


def test_what_a_batch_adds_to_a_pass() -> None:
    ids, mask, labels, targets = (torch.zeros(2, 3, dtype=torch.long) for _ in range(4))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "note": "text"}
    one = PreparedBatch(batch)
    assert one.beside({"input_ids": ids}) == {"labels": labels}
    assert one.beside({"input_ids": ids.clone(), "attention_mask": mask, "labels": None}) == {"labels": labels}
    assert one.beside({"input_ids": ids, "labels": targets}) == {}
    assert one.beside({"input_ids": ids.clone()}) == {}
    assert one.beside({"inputs_embeds": torch.zeros(2, 3, 4)}) == {"labels": labels, "input_ids": ids}
    assert one.beside({"inputs_embeds": torch.zeros(2, 5, 4)}) == {}
    on_device = {"input_ids": ids.to("meta"), "labels": labels}
    assert PreparedBatch(on_device).beside({"input_ids": on_device["input_ids"]})["labels"].device.type == "meta"
    other = PreparedBatch({"input_ids": ids, "targets": targets}, ["targets"])
    assert other.beside({"input_ids": ids}) == {"targets": targets, "labels": targets}
    several = PreparedBatch({"input_ids": ids, "starts": labels, "ends": targets}, ["starts", "ends"])
    assert "labels" not in several.beside({"input_ids": ids})


@pytest.mark.parametrize("name", ["pops", "smoothing"])
def test_a_callback_that_joins_late_reads_labels_and_keeps_no_batch_alive(
    name: str, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Adds(TrainerCallback):
        trainer: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                self.trainer.add_callback(OutputLoggerCallback(2, [backend]))
            if state.global_step == 3:
                gc.collect()
                alive.extend(ref() is not None for ref in held[: 3 * 2])

    adds = Adds()
    kind, arguments, _ = KINDS[name]
    run = training(llama, tmp_path, [adds], 4, 2, kind, **arguments)
    collate = run.trainer.data_collator

    def kept(rows: Any) -> Any:
        batch = collate(rows)
        held.append(weakref.ref(batch["input_ids"]))
        return batch

    adds.trainer, run.trainer.data_collator = run.trainer, kept
    run.trainer.train()
    assert list(backend.scalars("outputs/loss/text")) == [1, 2, 4]
    assert alive == [False] * 6


def test_audio_without_any_labels_is_neither_reference_nor_target(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """A loop that takes all labels out, and does not say so: shares of what is supervised are not 0 but unknown."""
    batch = voices.batch([voices.conversation(seed=1)])
    backend = MemoryBackend()
    with (
        Telemetry(higgs, tmp_path, logging_steps=1, backends=[backend], processing_class=voices.tokenizer) as telemetry,
        telemetry.step(),
    ):
        higgs(**{name: value for name, value in batch.items() if "labels" not in name}).logits.sum().backward()
    said = absences(backend)
    unknown = {
        *(f"inputs/{name}_fraction" for name in ("tokens/reference_audio", "tokens/target_audio", "supervised/audio")),
        *("outputs/eos/supervised", "outputs/loss/audio", "zero_shot/chatml/compliance"),
        *("zero_shot/reference/present_fraction", "zero_shot/conditioning/gain"),
    }
    assert {said[tag] for tag in unknown} == {NO_LABELS}
    assert unknown.isdisjoint(backend.tags())
    assert {"inputs/tokens/text_fraction", "attention/layer_0/text_to_text"} <= set(backend.tags())
    assert not [tag for tag in backend.tags() if tag.endswith("to_reference")]


def test_nothing_is_said_of_a_loss_that_the_model_has_not_made() -> None:
    class Tells(Family):
        def streams(self, inputs: Any, outputs: Any, seen: Any) -> Iterator[Declared]:
            one = torch.ones(())
            yield Stream("text", outputs["logits"], inputs["labels"], "text", "shifted")
            yield from (LossPart("part", one), Divided("part", one, one), Overruled("{}", "{}", one, one))

    ids, labels = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    readings: list[Reading] = []
    reader = PassReader(Tells(None), lambda _microbatch: None, lambda _microbatch, reading: readings.append(reading))
    reader.prepare({"input_ids": ids, "labels": labels})
    outputs = {"logits": torch.zeros(2, 3, 5)}
    reader.replay({"input_ids": ids}, outputs)
    reader.replay({"input_ids": ids, "labels": labels}, {**outputs, "loss": torch.ones(())})
    withheld, given = readings
    assert [len(one.streams) for one in readings] == [1, 1]
    assert (withheld.parts, withheld.divided, withheld.overruled) == ([], [], [])
    assert [len(found) for found in (given.parts, given.divided, given.overruled)] == [1, 1, 1]

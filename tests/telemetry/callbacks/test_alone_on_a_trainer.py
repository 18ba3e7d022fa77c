"""Each callback alone, added to an unmodified ``transformers.Trainer`` with a small Llama."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import Faulty
from support.references import OWN_SECTIONS, assert_same, measured_records, scalars_at
from support.steps import hooks_of
from support.text_training import Training, training
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast

from telemetry import (
    InputLoggerCallback,
    OutputLoggerCallback,
    SharedAttentionLoggerCallback,
    StrategicTelemetry,
    ZeroShotVerificationLoggerCallback,
)
from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import COMPONENTS
from telemetry.callbacks.trainer import StrategicCallback
from telemetry.instruments.base import COMPILED
from telemetry.records import Mean, Scalar, Table

SECTIONS = {InputLoggerCallback: "inputs", OutputLoggerCallback: "outputs", SharedAttentionLoggerCallback: "gradients"}
ALL = [*SECTIONS, ZeroShotVerificationLoggerCallback]


def measured_steps(backend: MemoryBackend) -> dict[str, set[int]]:
    """Section → steps with a record; the Trainer's own logs and telemetry's own state left out.

    Attention and activations come with the gradients, from one callback.
    """
    found: dict[str, set[int]] = {}
    for tag, records in backend.records.items():
        section = tag.split("/")[0]
        if section not in ("train", "eval", *OWN_SECTIONS):
            found.setdefault(section, set()).update(step for step, _ in records)
    for section in ("attention", "activations"):
        assert found.pop(section, found.get("gradients")) == found.get("gradients")
    return found


@pytest.mark.parametrize("kind", list(SECTIONS))
def test_values_of_due_steps_and_no_other(
    kind: type[StrategicCallback], llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    run = training(llama, tmp_path, [kind(3, [backend])], steps=7, accumulation=2)
    run.trainer.train()
    section = SECTIONS[kind]
    assert measured_steps(backend) == {section: {1, 3, 6}}
    for step in (1, 3, 6):
        expected = {tag: value for tag, value in run.expected(step).items() if tag.startswith(section)}
        assert expected
        assert_same(scalars_at(backend, step, section), expected)
    assert backend.closed


def test_the_zero_shot_callback_says_that_there_is_no_audio(
    llama: LlamaForCausalLM, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    training(llama, tmp_path, [ZeroShotVerificationLoggerCallback(1, [backend])], steps=2).trainer.train()
    assert measured_steps(backend) == {}
    said = [record.getMessage() for record in telemetry_log.records]
    assert said.count("no zero_shot/reference/present_fraction: the batch has no audio") == 1


@pytest.mark.parametrize("accumulation", [1, 3])
def test_all_together_with_other_accumulations(llama: LlamaForCausalLM, tmp_path: Path, accumulation: int) -> None:
    backend = MemoryBackend()
    run = training(llama, tmp_path, [StrategicTelemetry(logging_steps=2, backends=[backend])], 3, accumulation)
    run.trainer.train()
    for step in (1, 2):
        assert_same(scalars_at(backend, step, "inputs", "outputs", "gradients"), run.expected(step))
    assert scalars_at(backend, 3, "inputs", "outputs", "gradients") == {}


@pytest.mark.parametrize("kind", [*ALL, StrategicTelemetry])
def test_hooks_live_for_due_steps_only(kind: type, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    counted: dict[str, list[int]] = {"begin": [], "end": []}

    class Counter(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counted["begin"].append(hooks_of(llama))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counted["end"].append(hooks_of(llama))

    before = hooks_of(llama)
    run = training(llama, tmp_path, [kind(logging_steps=3, backends=[MemoryBackend()]), Counter()], steps=4)
    run.trainer.train()
    assert [count > before for count in counted["begin"]] == [True, False, True, False]
    assert counted["end"] == [before] * 4
    assert hooks_of(llama) == before


@pytest.mark.parametrize("kind", [*ALL, StrategicTelemetry])
def test_nothing_of_a_step_is_kept_alive(kind: type, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Logits of every step: their storage is gone when telemetry has returned from ``on_step_end``."""
    storages: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def remember(_module: Any, _args: Any, logits: torch.Tensor) -> None:
        storages.append(weakref.ref(logits.untyped_storage()))

    class Check(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gc.collect()
            alive.append(sum(storage() is not None for storage in storages))

    llama.lm_head.register_forward_hook(remember)
    run = training(llama, tmp_path, [kind(logging_steps=1, backends=[MemoryBackend()]), Check()], steps=3)
    run.trainer.train()
    asides = len(storages) - 3 * 2  # the set-up's, on the first step
    assert asides in (0, 3)
    assert alive == [0, 0, 0]


def test_the_check_for_what_is_kept_alive_sees_a_leak(llama: LlamaForCausalLM) -> None:
    logits = llama(input_ids=torch.tensor([[1, 2]])).logits
    storage = weakref.ref(logits.untyped_storage())
    view = logits.detach()[:, :1]
    del logits
    gc.collect()
    assert storage() is not None
    del view
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_gradient_norms_are_those_before_clipping_and_say_nothing(
    llama: LlamaForCausalLM, tmp_path: Path, max_grad_norm: float, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    callback = SharedAttentionLoggerCallback(1, [backend])
    run = training(llama, tmp_path, [callback], steps=2, max_grad_norm=max_grad_norm)
    run.trainer.train()
    for step in (1, 2):
        expected = {t: v for t, v in run.expected(step).items() if t.startswith("gradients")}
        assert_same(scalars_at(backend, step, "gradients"), expected, rel=1e-4)
    notes = {
        record.note
        for tag in backend.tags()
        if tag.startswith("gradients/") and not tag.endswith("/update_ratio")
        for _, record in backend.records[tag]
        if isinstance(record, Scalar)
    }
    assert notes == {""}
    assert not [record for record in telemetry_log.records if "clipping" in record.getMessage()]


def opened_and_closed(backend: Faulty) -> list[str]:
    return [call for call in backend.calls if call != "write"]


def test_two_callbacks_share_one_backend_and_one_step(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend = Faulty(at=())
    callbacks = [OutputLoggerCallback(2, [backend]), InputLoggerCallback(2, [backend])]
    run = training(llama, tmp_path, callbacks, steps=2)
    run.trainer.train()
    assert opened_and_closed(backend) == ["open", "close"]
    for step in (1, 2):
        expected = {t: v for t, v in run.expected(step).items() if not t.startswith("gradients")}
        assert_same(scalars_at(backend, step, "inputs", "outputs"), expected)


def test_callbacks_with_backends_of_their_own_share_what_they_measure(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    one, other = Faulty(at=()), Faulty(at=())
    callbacks = [OutputLoggerCallback(1, [one]), InputLoggerCallback(1, [other, one])]
    training(llama, tmp_path, callbacks, steps=1).trainer.train()
    assert opened_and_closed(one) == opened_and_closed(other) == ["open", "close"]
    assert one.records == other.records
    assert set(measured_steps(one)) == {"inputs", "outputs"}


def test_callbacks_of_different_cadence_each_keep_their_own(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend = MemoryBackend()
    callbacks = [
        InputLoggerCallback(2, [backend]),
        OutputLoggerCallback(3, [backend]),
        SharedAttentionLoggerCallback(4, [backend]),
    ]
    run = training(llama, tmp_path, callbacks, steps=7)
    run.trainer.train()
    assert measured_steps(backend) == {"inputs": {1, 2, 4, 6}, "outputs": {1, 3, 6}, "gradients": {1, 4}}
    for step in (1, 2, 3, 4, 6):
        sections = [name for name, steps in measured_steps(backend).items() if step in steps]
        expected = {t: v for t, v in run.expected(step).items() if t.split("/")[0] in sections}
        assert_same(scalars_at(backend, step, "inputs", "outputs", "gradients"), expected)
    assert hooks_of(llama) == 0


def test_the_trainers_own_numbers_come_once_under_train_and_eval(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend = MemoryBackend()
    callbacks = [InputLoggerCallback(100, [backend]), StrategicTelemetry(["outputs"], 100, [backend])]
    run = training(llama, tmp_path, callbacks, steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2)
    run.trainer.train()
    expected: dict[str, list[tuple[int, float]]] = {}
    for logs in run.trainer.state.log_history:
        for name, value in logs.items():
            if name not in ("step", "total_flos"):  # the Trainer's own printer takes total_flos out of what others see
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                found = (int(logs["step"]), float(value))
                if tag != "train/epoch" or found not in expected.get(tag, ()):  # which comes with whatever is logged
                    expected.setdefault(tag, []).append(found)
    shown = {
        tag: [(step, record.value) for step, record in records if isinstance(record, Scalar)]
        for tag, records in backend.records.items()
        if tag.split("/")[0] in ("train", "eval")
    }
    assert shown == expected
    assert {"train/loss", "train/learning_rate", "eval/loss", "train/train_runtime"} <= set(shown)
    assert [step for step, _ in shown["eval/loss"]] == [2, 4]


def test_a_trainer_that_logs_in_the_middle_of_a_step_tears_nothing(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    class Talkative(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.log({"part": 1.0})
            return loss

    backend = MemoryBackend()
    run = training(llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=2, kind=Talkative)
    run.trainer.train()
    assert measured_steps(backend) == {"inputs": {1, 2}, "outputs": {1, 2}, "gradients": {1, 2}}
    for step in (1, 2):
        assert_same(scalars_at(backend, step, "inputs", "outputs", "gradients"), run.expected(step))
    assert [step for step, _ in backend.records["train/part"]] == [0, 0, 1, 1]


@pytest.mark.parametrize("on_start", [False, True])
def test_the_baseline_comes_once_and_when_every_callback_has_joined(
    llama: LlamaForCausalLM, tmp_path: Path, on_start: bool
) -> None:
    class Looks(StrategicCallback):
        def observe_evaluation(self, batches: Any) -> None:
            assert hooks_of(llama) == 0
            self.session.recorder.metric("outputs/entropy/text", Mean(float(len(list(batches))), 1.0))

    class Knows(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.callback_handler.eval_dataloader = self.get_eval_dataloader()
            return super().train(*args, **kwargs)

    backend = MemoryBackend()
    callbacks = [Looks(1), InputLoggerCallback(1, [backend])]  # the second brings the backend
    run = training(llama, tmp_path, callbacks, steps=2, kind=Knows, eval_strategy="epoch", eval_on_start=on_start)
    run.trainer.train()
    assert [step for step, _ in backend.records["outputs/entropy/text"]][:1] == [0]
    assert [step for step, _ in backend.records["outputs/entropy/text"]].count(0) == 1


class HandingOver(Trainer):
    """Takes its loss from a model that hooks do not see, and hands inputs and outputs to ``on_step_end``."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        kwargs = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        self.inputs = inputs
        self.outputs = type(model).forward(model, **inputs, **kwargs)  # not model(...): no hook of the model's fires
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        self.outputs.logits = torch.nn.functional.linear(hidden, model.lm_head.weight).detach()
        return self.outputs.loss


class Hand(TrainerCallback):
    """What a trainer of one's own does: passes the step's data on."""

    def __init__(self, callback: StrategicCallback) -> None:
        self.callback = callback
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.callback.on_step_end(args, state, control, inputs=self.trainer.inputs, outputs=self.trainer.outputs)


@pytest.mark.parametrize("kind", [InputLoggerCallback, OutputLoggerCallback])
def test_inputs_and_outputs_handed_over_where_no_hook_fires(
    kind: type[StrategicCallback], llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    callback = kind(2, [backend])
    hand = Hand(callback)
    run = training(llama, tmp_path, [hand, callback], steps=3, accumulation=1, kind=HandingOver)
    hand.trainer = run.trainer
    run.trainer.train()
    section = SECTIONS[kind]
    assert measured_steps(backend) == {section: {1, 2}}
    for step in (1, 2):
        expected = {tag: value for tag, value in run.expected(step).items() if tag.startswith(section)}
        assert_same(scalars_at(backend, step, section), expected)


def test_of_a_compiled_model_whose_passes_nobody_hands_over_it_is_said_why_there_are_none(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    llama._compiled_call_impl = llama._call_impl  # as torch.nn.Module.compile leaves it
    backend = MemoryBackend()
    training(llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=1).trainer.train()
    assert not [tag for tag in backend.tags() if tag.startswith(("inputs", "outputs"))]
    why = {str(row[0]): str(row[1]) for row in backend.last("telemetry/absent", Table).rows}
    assert {why[section] for section in ("inputs", "outputs", "attention", "activations")} == {COMPILED}


class FusedLlama(LlamaForCausalLM):
    """Its loss never calls the head as a module and returns no logits, as fused linear cross entropies do."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = torch.nn.functional.linear(hidden, self.lm_head.weight)
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss)


def test_of_a_fused_loss_of_ones_own_everything_is_shown(
    llama: LlamaForCausalLM, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    """As the class that it derives from has it."""
    backend = MemoryBackend()
    model = FusedLlama(llama.config)
    run = training(model, tmp_path, [OutputLoggerCallback(1, [backend])], steps=2)
    run.trainer.train()
    for step in (1, 2):
        of_class = LlamaForCausalLM(llama.config)
        of_class.load_state_dict(run.snapshots.models[step].state_dict())
        run.snapshots.models[step] = of_class
        expected = {tag: value for tag, value in run.expected(step).items() if tag.startswith("outputs")}
        assert_same(scalars_at(backend, step, "outputs"), expected)
    assert "Traceback" not in telemetry_log.text


def test_of_a_fused_loss_that_cannot_be_read_the_loss_alone_is_shown_and_it_is_said_once(
    llama: LlamaForCausalLM, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "forward", FusedLlama.forward)
    backend = MemoryBackend()
    run = training(llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=3)
    run.trainer.train()
    assert measured_steps(backend) == {"inputs": {1, 2, 3}, "outputs": {1, 2, 3}, "gradients": {1, 2, 3}}
    assert [tag for tag in backend.tags() if tag.startswith("outputs/")] == ["outputs/loss/model"]
    said = [record.getMessage() for record in telemetry_log.records if "outputs/" in record.getMessage()]
    assert said == [
        "no outputs/loss/text: the model computed no logits for it (a fused loss, or no such head)",
        "no outputs/loss/total: a part of it could not be measured",
    ]


def test_tables_of_a_text_model(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend = MemoryBackend()
    run = training(llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=1, accumulation=2)
    run.trainer.train()
    last = run.of_step(1)[-1]
    rows = backend.last("inputs/sequence", Table).rows
    for row in range(2):
        spans = [cells[1:] for cells in rows if cells[0] == f"row {row}"]
        assert sum(int(str(span[1])) for span in spans) == last["input_ids"].shape[1]
        shown = " ".join(str(span[3]) for span in spans)
        assert shown == " ".join(map(str, last["input_ids"][row].tolist()))
        supervised = sum(int(str(span[1])) for span in spans if span[2] == "yes")
        assert supervised == int((last["labels"][row] != -100).sum())
    streams = {row[1] for row in backend.last("outputs/predictions", Table).rows}
    assert streams == {"text", "text tokens"}


def test_another_training_of_the_same_model_starts_afresh(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backends = [MemoryBackend(), MemoryBackend()]
    for backend in backends:
        run = training(llama, tmp_path, [InputLoggerCallback(2, [backend])], steps=2)
        run.trainer.train()
    assert [measured_steps(backend) for backend in backends] == [{"inputs": {1, 2}}] * 2


@pytest.mark.parametrize("logging_steps", [0, -1])
def test_a_cadence_below_one_is_refused(logging_steps: int) -> None:
    for kind in ALL:
        with pytest.raises(ValueError, match="logging_steps must be at least 1"):
            kind(logging_steps)


@pytest.mark.parametrize("components", [[], ["outputs", "everything"]])
def test_unknown_components_are_refused(components: list[str]) -> None:
    with pytest.raises(ValueError, match="choose from inputs, outputs, shared_attention, zero_shot"):
        StrategicTelemetry(components)


@pytest.mark.parametrize("name", COMPONENTS)
def test_one_component_is_what_its_callback_alone_is(name: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    shown: list[Any] = []
    for callback in (StrategicTelemetry([name, name], 2), COMPONENTS[name](2)):
        backend = MemoryBackend()
        for member in getattr(callback, "members", [callback]):
            member.backends = [backend]
        run: Training = training(llama_copy(llama), tmp_path, [callback], steps=2)
        run.trainer.train()
        shown.append(
            {tag: records for tag, records in measured_records(backend).items() if not tag.startswith("train/")}
        )
    assert shown[0] == shown[1]


def llama_copy(llama: LlamaForCausalLM) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama.config)
    model.load_state_dict(llama.state_dict())
    return model

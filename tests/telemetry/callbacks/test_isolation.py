"""Nothing that goes wrong in telemetry, or in a training that it watched, reaches training or what comes after it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.backends import Faulty
from support.references import assert_same, differing, measured_records, scalars_at
from support.steps import hooks_of
from support.text_training import training
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from telemetry import InputLoggerCallback, OutputLoggerCallback, SharedAttentionLoggerCallback, StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.trainer import Head, StrategicCallback
from telemetry.delivery.recorder import MAX_FAILURES
from telemetry.families import CausalLMFamily
from telemetry.probes.forward import Microbatch
from telemetry.session import NO_FAMILY
from telemetry.setting import model_defaults, run_config


class BrokenError(RuntimeError):
    """What the tests' measures and backends raise."""


class BreaksOnInputs(StrategicCallback):
    calls = 0

    def observe_inputs(self, microbatch: Microbatch) -> None:
        type(self).calls += 1
        raise BrokenError("inputs")


class BreaksOnLogits(StrategicCallback):
    calls = 0

    def observe_logits(self, microbatch: Microbatch, head: Head, logits: Tensor) -> None:
        type(self).calls += 1
        raise BrokenError("logits")


class BreaksOnGradients(StrategicCallback):
    calls = 0

    def observe_gradients(self, model: nn.Module, clipped: bool) -> None:
        type(self).calls += 1
        raise BrokenError("gradients")


class BreaksAtTheEnd(StrategicCallback):
    calls = 0

    def finish_step(self) -> None:
        type(self).calls += 1
        raise BrokenError("end")


@pytest.mark.parametrize("kind", [BreaksOnInputs, BreaksOnLogits, BreaksOnGradients, BreaksAtTheEnd])
@pytest.mark.parametrize("first", [True, False])
def test_a_measure_that_raises_is_said_once_and_switched_off(
    kind: Any, first: bool, llama: LlamaForCausalLM, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    kind.calls = 0
    backend = MemoryBackend()
    others = [InputLoggerCallback(1, [backend]), OutputLoggerCallback(1, [backend])]
    broken = kind(1, [backend])
    run = training(llama, tmp_path, [broken, *others] if first else [*others, broken], steps=6)
    run.trainer.train()

    assert run.trainer.state.global_step == 6
    for step in range(1, 7):
        expected = {t: v for t, v in run.expected(step).items() if not t.startswith("gradients")}
        assert_same(scalars_at(backend, step, "inputs", "outputs"), expected)
    assert kind.calls == MAX_FAILURES
    errors = [record for record in telemetry_log.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in errors] == [
        f"{kind.__name__} failed; training goes on",
        f"{kind.__name__} failed {MAX_FAILURES} times: switched off",
    ]
    assert errors[0].exc_info is not None
    assert errors[0].exc_info[0] is BrokenError
    assert hooks_of(llama) == 0


def test_training_is_the_same_with_a_measure_that_raises(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [BreaksOnLogits(1, [MemoryBackend()]), BreaksOnGradients(1)]):
        model = LlamaForCausalLM(llama.config)
        model.load_state_dict(llama.state_dict())
        training(model, tmp_path, callbacks, steps=3).trainer.train()
        weights.append(model.state_dict())
    assert differing(*weights) == []


@pytest.mark.parametrize("verb", ["open", "write", "close"])
def test_a_backend_that_raises_is_said_once_and_others_go_on(
    verb: str, llama: LlamaForCausalLM, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    broken, good = Faulty(verb), MemoryBackend()
    run = training(llama, tmp_path, [InputLoggerCallback(1, [broken, good])], steps=6)
    run.trainer.train()
    for step in range(1, 7):
        assert_same(
            scalars_at(good, step, "inputs"), {t: v for t, v in run.expected(step).items() if t.startswith("inputs")}
        )
    assert good.closed
    assert run.trainer.state.global_step == 6
    errors = [record for record in telemetry_log.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in errors if record.exc_info] == [
        f"backend {broken.name} could not {verb}; training goes on"
    ]
    if verb == "open":
        assert broken.calls == ["open"]
    elif verb == "write":
        assert broken.calls == ["open", *["write"] * MAX_FAILURES]
        assert errors[-1].getMessage() == f"backend {broken.name} failed {MAX_FAILURES} times: left out from now on"
    else:
        assert broken.calls[-1] == "close"
        assert broken.calls.count("close") == 1


class Stops(TrainerCallback):
    """Raises in the middle of a step, as an interrupt does."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop("on_step_begin", state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop("on_substep_end", state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop("on_pre_optimizer_step", state)

    def _stop(self, event: str, state: Any) -> None:
        if event == self.event and state.global_step + 1 == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step"])
@pytest.mark.parametrize("again", ["same callbacks", "new callbacks"])
def test_after_a_training_that_was_interrupted_the_next_one_is_whole(
    event: str, again: str, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    interrupted, backend = MemoryBackend(), MemoryBackend()
    callbacks: list[Any] = [InputLoggerCallback(2, [interrupted]), StrategicTelemetry(["outputs"], 2, [interrupted])]
    with pytest.raises(KeyboardInterrupt):
        training(llama, tmp_path, [*callbacks, Stops(event, 2)], steps=4).trainer.train()
    assert callbacks[0].session.recorder.drain()
    shown_before = len(interrupted.records["inputs/invalid_ids"])
    if again == "new callbacks":
        callbacks = [InputLoggerCallback(2, [backend]), StrategicTelemetry(["outputs"], 2, [backend])]
    else:
        callbacks[0].backends = callbacks[1].backends = [backend]

    run = training(llama, tmp_path, callbacks, steps=4)
    run.trainer.train()

    for step in (1, 2, 4):
        expected = {t: v for t, v in run.expected(step).items() if not t.startswith("gradients")}
        assert_same(scalars_at(backend, step, "inputs", "outputs"), expected)
    assert scalars_at(backend, 3, "inputs", "outputs") == {}
    assert interrupted.closed
    assert len(interrupted.records["inputs/invalid_ids"]) == shown_before
    assert hooks_of(llama) == 0


def test_a_step_resumed_behind_an_interrupted_one_is_not_taken_for_it(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """The resumed training begins at a step that is due for one callback and not for the one that was interrupted."""
    backend = MemoryBackend()
    callbacks = [SharedAttentionLoggerCallback(4, [backend]), InputLoggerCallback(3, [backend])]
    with pytest.raises(KeyboardInterrupt):
        training(
            llama, tmp_path, [*callbacks, Stops("on_substep_end", 4)], 5, save_strategy="steps", save_steps=2
        ).trainer.train()
    assert list(backend.scalars("inputs/invalid_ids")) == [1, 3]
    run = training(llama, tmp_path, callbacks, steps=5)
    run.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step for step, _ in backend.records["inputs/invalid_ids"]] == [1, 3, 3]
    assert [step for step, _ in backend.records["gradients/total_norm"]] == [1, 4]
    assert backend.run is not None
    assert backend.run.starting_step == 2


def test_a_batch_that_the_family_cannot_read_is_said_once_and_its_tensors_are_still_shown(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, telemetry_log: pytest.LogCaptureFixture
) -> None:
    def unreadable(self: CausalLMFamily, inputs: Any) -> None:
        raise BrokenError("view")

    monkeypatch.setattr(CausalLMFamily, "view", unreadable)
    backend = MemoryBackend()
    run = training(llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=2)
    run.trainer.train()
    assert run.trainer.state.global_step == 2
    for step in (1, 2):
        expected = {t: v for t, v in run.expected(step).items() if t.startswith("inputs/tensor/")}
        assert_same(scalars_at(backend, step, "inputs"), expected)
    said = [record for record in telemetry_log.records if "cannot read a batch" in record.getMessage()]
    assert len(said) == 1
    assert said[0].exc_info is not None


class Odd(nn.Module):
    """A model of one's own: a head and a configuration that are not transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=29)
        self.embedding = nn.Embedding(29, 4)
        self.head = nn.Linear(4, 29)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def test_a_model_with_a_configuration_of_its_own_is_measured(tmp_path: Path) -> None:
    backend = MemoryBackend()
    run = training(Odd(), tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=1)
    run.trainer.train()
    assert run.trainer.state.global_step == 1
    assert {"inputs/tokens/total", "outputs/loss/text", "gradients/other/norm"} <= set(backend.tags())
    assert backend.run is not None
    assert "model" not in backend.run.config
    # What nobody set says nothing, but for what every comparison begins with.
    defaults = backend.run.defaults
    assert len(defaults) >= 80
    assert {"adam_beta2", "hub_token", "deepspeed"} <= defaults
    assert defaults.isdisjoint({"output_dir", "max_steps", "seed", "learning_rate", "max_grad_norm"})


def test_settings_of_a_model_that_are_its_classes_own_are_known() -> None:
    model = nn.Module()
    model.config = LlamaConfig(hidden_size=64, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    shown, defaults = run_config({}, model, {})["model"], model_defaults(model)
    assert {"model.hidden_size", "model.rope_parameters.rope_theta"}.isdisjoint(defaults)
    assert "model.model_type" in defaults
    whole = LlamaConfig().to_dict()
    same = {f"model.{name}" for name, value in shown.items() if name in whole and value == whole[name]}
    assert {name for name in defaults if name.count(".") == 1} == same

    class Demanding(LlamaConfig):
        def __init__(self, needed: int, **others: Any) -> None:
            super().__init__(**others)

    model.config = Demanding(1)
    assert model_defaults(model) == model_defaults(nn.Module()) == frozenset()


class Headless(nn.Module):
    """A model that no family knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.embedding(input_ids).square().mean()}


def test_a_model_of_no_family_trains_on_and_it_is_said_once(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    run = training(Headless(), tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=2)
    run.trainer.train()
    assert run.trainer.state.global_step == 2
    found = set(measured_records(backend))
    shown = {tag for tag in found if not tag.startswith("inputs/tensor")}
    assert {tag.split("/")[0] for tag in shown} == {"gradients", "outputs", "train"}
    assert {tag for tag in shown if tag.startswith("outputs/")} == {"outputs/loss/model"}
    assert {"inputs/tensor/input_ids/max", "gradients/other/norm", "gradients/other/update_ratio"} <= found
    said = [record.getMessage() for record in telemetry_log.records if "no family" in record.getMessage()]
    assert said == [NO_FAMILY]


def test_a_forward_that_raises_stops_training_as_it_would_have(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    class Fails(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            super().compute_loss(*args, **kwargs)
            raise ZeroDivisionError

    callbacks = [StrategicTelemetry(logging_steps=1, backends=[MemoryBackend()])]
    with pytest.raises(ZeroDivisionError):
        training(llama, tmp_path, callbacks, kind=Fails).trainer.train()
    training(llama, tmp_path, callbacks, steps=1).trainer.train()
    assert hooks_of(llama) == 0


def test_evaluation_outside_training_is_not_watched(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend = MemoryBackend()
    run = training(llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=1)
    run.trainer.evaluate()
    assert backend.tags() == []
    run.trainer.train()
    written = {tag: len(records) for tag, records in backend.records.items()}
    run.trainer.evaluate()
    assert {tag: len(records) for tag, records in backend.records.items()} == written


def test_a_callback_has_no_session_outside_training() -> None:
    with pytest.raises(RuntimeError, match="InputLoggerCallback is not watching a training run"):
        _ = InputLoggerCallback().session


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("telemetry.session.find_family", "reading the model"),
        ("telemetry.callbacks.trainer.run_config", "beginning a step"),
        ("telemetry.probes.forward.PassReader.attach", "beginning a step"),
        ("telemetry.delivery.recorder.Recorder.flush", "sending a step on its way"),
        ("telemetry.delivery.recorder.Recorder.write", "recording what the Trainer logs"),
    ],
)
def test_telemetry_itself_failing_ends_no_training(
    place: str,
    doing: str,
    llama: LlamaForCausalLM,
    tmp_path: Path,
    telemetry_log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise BrokenError("telemetry itself")

    monkeypatch.setattr(place, fails)
    run = training(llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[MemoryBackend()])], steps=4)
    run.trainer.train()
    assert run.trainer.state.global_step == 4
    assert hooks_of(llama) == 0
    said = [record for record in telemetry_log.records if f"failed while {doing}" in record.getMessage()]
    assert len(said) == 1
    assert said[0].exc_info is not None

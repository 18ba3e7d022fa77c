"""What a script's own callbacks do in a due step: copy, save, generate, evaluate. Telemetry is not in their way, and
counts none of it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.references import assert_same, scalars_at
from support.steps import hooks_of
from support.text_training import training
from transformers import LlamaForCausalLM, TrainerCallback

from telemetry import InputLoggerCallback, StrategicTelemetry
from telemetry.backends.memory import MemoryBackend

EVENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")


class Acts(TrainerCallback):
    """Does something with the model at one event of every step."""

    def __init__(self, event: str, act: Callable[[Any], Any]) -> None:
        self.results: list[Any] = []
        setattr(self, event, lambda args, state, control, model=None, **kwargs: self.results.append(act(model)))


def saved(model: Any) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def expected_at(run: Any, step: int) -> dict[str, float]:
    return {t: v for t, v in run.expected(step).items() if not t.startswith("gradients")}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("first", [True, False], ids=["before telemetry", "after telemetry"])
@pytest.mark.parametrize("how", [copy.deepcopy, saved, pickle.dumps])
def test_a_model_may_be_copied_and_saved(
    how: Any, event: str, first: bool, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    acts, watching = Acts(event, how), StrategicTelemetry(logging_steps=1, backends=[backend])
    run = training(llama, tmp_path, [acts, watching] if first else [watching, acts], steps=2)
    run.trainer.train()
    assert len(acts.results) == 2
    assert_same(scalars_at(backend, 2, "inputs", "outputs"), expected_at(run, 2))


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step"])
def test_a_copy_is_whole_and_knows_nothing_of_telemetry(event: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    watching = StrategicTelemetry(logging_steps=1, backends=[MemoryBackend()])
    copies, files = Acts(event, copy.deepcopy), Acts(event, saved)
    training(llama, tmp_path, [watching, copies, files], steps=1).trainer.train()
    (twin,), (file,) = copies.results, files.results
    ids = torch.arange(1, 6)[None]
    loaded = torch.load(io.BytesIO(file), weights_only=False)
    assert torch.equal(loaded(input_ids=ids).logits, twin(input_ids=ids).logits)
    assert b"telemetry" not in file


def test_a_saved_model_loads_where_there_is_no_telemetry(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    files = Acts("on_pre_optimizer_step", saved)
    training(
        llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[MemoryBackend()]), files], 1
    ).trainer.train()
    (tmp_path / "model.pt").write_bytes(files.results[0])
    program = (
        "import sys; sys.modules['telemetry'] = None\n"
        "import trainer  # repairs what transformers imports\n"
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["3"]


def generates(model: Any) -> Any:
    return model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=3, do_sample=False)


def looks(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.ones(1, 17, dtype=torch.long), labels=torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize("act", [generates, looks])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("first", [True, False], ids=["before telemetry", "after telemetry"])
def test_passes_that_are_not_training_are_not_counted(
    act: Any, event: str, first: bool, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    acts, watching = Acts(event, act), StrategicTelemetry(logging_steps=1, backends=[backend])
    run = training(llama, tmp_path, [acts, watching] if first else [watching, acts], steps=2)
    run.trainer.train()
    for step in (1, 2):
        assert_same(scalars_at(backend, step, "inputs", "outputs"), expected_at(run, step))


@pytest.mark.parametrize("event", EVENTS)
def test_an_evaluation_inside_of_a_step_leaves_it_whole(event: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend = MemoryBackend()
    watching = StrategicTelemetry(logging_steps=1, backends=[backend])
    acts = Acts(event, lambda _model: run.trainer.evaluate())
    run = training(llama, tmp_path, [acts, watching], steps=2)
    # The collator of an evaluation is the one whose batches the expected values are worked out from.
    made, get = run.batches, run.trainer.get_eval_dataloader
    run.trainer.get_eval_dataloader = lambda *given: _aside(get(*given), made)  # type: ignore[method-assign]
    run.trainer.train()
    for step in (1, 2):
        assert_same(scalars_at(backend, step, "inputs", "outputs"), expected_at(run, step))
    assert len(acts.results) == 2


def _aside(loader: Any, collator: Any) -> list[Any]:
    """The batches of a loader, taken back out of what the collator has kept."""
    before = len(collator.made)
    batches = list(loader)
    del collator.made[before:]
    return batches


@pytest.mark.parametrize("every", [1, 2])
def test_a_callback_that_is_added_while_training_runs_joins_at_its_next_due_step(
    every: int, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    late = InputLoggerCallback(every, [backend])

    class Adds(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                run.trainer.add_callback(late)

    run = training(llama, tmp_path, [Adds()], steps=6)
    run.trainer.train()
    assert list(backend.scalars("inputs/invalid_ids")) == {1: [3, 4, 5, 6], 2: [4, 6]}[every]
    assert backend.closed
    assert hooks_of(llama) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("when", ["before", "while it runs", "after"])
def test_callbacks_may_be_copied_and_a_copy_watches_a_training_of_its_own(
    when: str, copied: Callable[[Any], Any], llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    watching = StrategicTelemetry(logging_steps=1, options={"shared_attention": {"layers": [0]}}, logging_dir=tmp_path)
    watching.backends = []
    made = [copied(watching)] if when == "before" else []

    class Copies(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if when == "while it runs" and state.global_step == 1:
                made.append(copied(watching))

    training(llama, tmp_path, [watching, Copies()], steps=2).trainer.train()
    twin = made[0] if made else copied(watching)
    backend = MemoryBackend()
    twin.backends = [backend]
    run = training(llama, tmp_path, [twin], steps=1)
    run.trainer.train()
    assert_same(scalars_at(backend, 1, "inputs", "outputs"), expected_at(run, 1))
    assert hooks_of(llama) == 0


def test_what_is_logged_outside_of_training_is_said_once(
    llama: LlamaForCausalLM, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    run = training(llama, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=1)
    for _ in range(2):
        run.trainer.evaluate()
    run.trainer.train()
    run.trainer.evaluate()
    assert telemetry_log.text.count("outside of train() is not recorded") == 1
    assert not any(tag.startswith("eval/") for tag in backend.tags())


def test_a_late_callback_that_would_have_been_refused_ends_no_training(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, telemetry_log: pytest.LogCaptureFixture
) -> None:
    class Adds(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "gs://bucket/logs")
                run.trainer.add_callback(InputLoggerCallback(1))

    run = training(llama, tmp_path, [Adds()], steps=4)
    run.trainer.train()
    assert run.trainer.state.global_step == 4
    assert telemetry_log.text.count("InputLoggerCallback cannot join: TENSORBOARD_LOGGING_DIR=gs://bucket/logs") == 1
    assert hooks_of(llama) == 0


def averages() -> Callable[[Any], Any]:
    """A moving average of the weights, by a copy of the model at every step."""
    held: list[Any] = []

    def average(model: Any) -> Any:
        twin = copy.deepcopy(model)
        for ours, before in zip(twin.parameters(), held[-1].parameters() if held else (), strict=bool(held)):
            ours.data.lerp_(before.data, 0.9)
        held.append(twin)
        return torch.cat([parameter.data.flatten() for parameter in twin.parameters()])

    return average


def samples(model: Any) -> Any:
    return model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=3, do_sample=True)


COMPANY: dict[str, Callable[[Callable[[], Any]], Acts]] = {
    "a moving average": lambda _trainer: Acts("on_pre_optimizer_step", averages()),
    "one that generates": lambda _trainer: Acts("on_pre_optimizer_step", samples),
    "one that evaluates": lambda trainer: Acts("on_substep_end", lambda _model: trainer().evaluate()["eval_loss"]),
}


@pytest.mark.parametrize("first", [True, False], ids=["before telemetry", "after telemetry"])
@pytest.mark.parametrize("company", COMPANY)
def test_beside_other_callbacks_training_is_the_same_to_the_bit(company: str, first: bool, tmp_path: Path) -> None:
    """Parameters, losses in training and in evaluation, the order of the data, random numbers, what it came up with."""

    def left(watched: bool) -> tuple[Any, ...]:
        backend = MemoryBackend()
        other = COMPANY[company](lambda: run.trainer)
        watching = [StrategicTelemetry(logging_steps=1, backends=[backend])] if watched else []
        torch.manual_seed(1)
        model = models.make("llama", **models.SMALLER, attention_dropout=0.2)
        callbacks = [other, *watching] if first else [*watching, other]
        evaluated = {"eval_strategy": "steps", "eval_steps": 1}
        run, order = training(model, tmp_path, callbacks, steps=4, **evaluated), []

        def note(_model: Any, _args: Any, inputs: Any) -> None:
            if torch.is_grad_enabled():
                order.append(inputs["input_ids"].tolist())

        model.register_forward_pre_hook(note, with_kwargs=True)
        run.trainer.train()
        assert (len(order), len(other.results)) == (8, 4)
        assert list(backend.scalars("outputs/loss/text")) == ([1, 2, 3, 4] if watched else [])
        logged = [
            {name: value for name, value in row.items() if not name.endswith(("time", "per_second"))}
            for row in run.trainer.state.log_history
        ]
        came = [torch.as_tensor(one).tolist() for one in other.results]
        weights = [parameter.tolist() for parameter in model.parameters()]
        return weights, logged, order, came, torch.get_rng_state().tolist()

    assert left(watched=True) == left(watched=False)

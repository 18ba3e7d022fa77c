"""Loops of one's own: the same numbers as on the Trainer, whoever drives the steps."""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.references import measured_records
from support.steps import hooks_of
from support.text_training import IGNORED, training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from telemetry import StrategicTelemetry, Telemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.instruments.gradients import NOTES
from telemetry.records import Scalar

ACCUMULATION = 2
STEPS = 3
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
Steps = Sequence[Sequence[dict[str, Tensor]]]


def supervised(microbatches: Sequence[dict[str, Tensor]]) -> Tensor:
    return sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in microbatches)  # type: ignore[return-value]


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)


def plain(model: Any, steps: Steps, backend: MemoryBackend, directory: Path) -> None:
    optimizer = optimizer_of(model)
    with Telemetry(model, directory, optimizer=optimizer, logging_steps=2, backends=[backend]) as telemetry:
        for microbatches in steps:
            with telemetry.step():
                for batch in microbatches:
                    model(**batch, num_items_in_batch=supervised(microbatches)).loss.backward()
                telemetry.gradients()
                optimizer.step()
                optimizer.zero_grad()


def accelerated(model: Any, steps: Steps, backend: MemoryBackend, directory: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    wrapped, optimizer = accelerator.prepare(model, optimizer_of(model))
    with Telemetry(wrapped, directory, optimizer=optimizer, logging_steps=2, backends=[backend]) as telemetry:
        for microbatches in steps:
            with telemetry.step():
                for batch in microbatches:
                    with accelerator.accumulate(wrapped):
                        loss = wrapped(**batch, num_items_in_batch=supervised(microbatches)).loss
                        accelerator.backward(loss * ACCUMULATION)  # which it divides by
                        if accelerator.sync_gradients:
                            telemetry.gradients()
                        optimizer.step()
                        optimizer.zero_grad()


def lightning(model: Any, steps: Steps, backend: MemoryBackend, directory: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer

    from telemetry.lightning import TelemetryCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, items = batch
            return self.model(**inputs, num_items_in_batch=items).loss * ACCUMULATION  # which Lightning divides by

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.model)

    batches = [(batch, supervised(microbatches)) for microbatches in steps for batch in microbatches]
    Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATION,
        callbacks=[TelemetryCallback(logging_steps=2, backends=[backend])],
        default_root_dir=directory,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(Module(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def numbers(backend: MemoryBackend) -> dict[str, dict[int, float]]:
    measured = (tag for tag in measured_records(backend) if not tag.startswith("train/"))
    return {tag: backend.scalars(tag) for tag in measured if backend.scalars(tag)}


@pytest.fixture(scope="module")
def on_the_trainer(llama_of_module: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, MemoryBackend, Any]:
    """The microbatches that a Trainer saw, what telemetry showed of them, and the model after."""
    model, backend = copy.deepcopy(llama_of_module), MemoryBackend()
    run = training(
        model,
        tmp_path_factory.mktemp("trainer"),
        [StrategicTelemetry(logging_steps=2, backends=[backend])],
        steps=STEPS,
        accumulation=ACCUMULATION,
        optim="adamw_torch",
        lr_scheduler_type="constant",
    )
    run.trainer.train()
    return [run.of_step(step) for step in range(1, STEPS + 1)], backend, model


@pytest.mark.parametrize("loop", [plain, accelerated, lightning])
def test_a_loop_shows_what_the_trainer_shows(
    loop: Callable[..., None], on_the_trainer: Any, llama_of_module: Any, tmp_path: Path
) -> None:
    steps, theirs, trained = on_the_trainer
    model, ours = copy.deepcopy(llama_of_module), MemoryBackend()
    loop(model, steps, ours, tmp_path)
    expected, got = numbers(theirs), numbers(ours)
    assert expected.keys() == got.keys()
    assert {"outputs/loss/text", "gradients/total_norm", "gradients/text_ffn/update_ratio"} <= got.keys()
    assert any(tag.startswith("attention/") for tag in got)
    for tag, values in expected.items():
        assert got[tag] == pytest.approx(values, rel=1e-6, abs=1e-6), tag
    assert list(got["inputs/tokens/total"]) == [1, 2]
    for ours_now, theirs_now in zip(model.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours_now, theirs_now, rtol=1e-6, atol=1e-7)
    assert hooks_of(model) == 0
    assert ours.closed


def batch_of(length: int = 6) -> dict[str, Tensor]:
    ids = torch.arange(1, 1 + length)[None]
    return {"input_ids": ids, "labels": ids}


def take_step(telemetry: Telemetry, model: Any, optimizer: Any) -> None:
    with telemetry.step():
        model(**batch_of()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_that_the_loop_does_not_show_are_measured_as_the_optimizer_steps(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    backend, optimizer = MemoryBackend(), optimizer_of(llama)
    with Telemetry(llama, tmp_path, optimizer, logging_steps=1, backends=[backend]) as telemetry:
        take_step(telemetry, llama, optimizer)
    (_, record) = backend.records["gradients/total_norm"][0]
    assert isinstance(record, Scalar)
    assert record.note == NOTES[None]
    assert "gradients/text_ffn/update_ratio" in backend.tags()


def test_an_optimizer_step_outside_of_a_due_one_meets_no_hook(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    optimizer = optimizer_of(llama)
    with Telemetry(llama, tmp_path, optimizer, logging_steps=3, backends=[MemoryBackend()]) as telemetry:
        for step in (1, 2, 3):
            with telemetry.step():
                assert bool(optimizer._optimizer_step_pre_hooks) == (step != 2)
                assert (hooks_of(llama) > 0) == (step != 2)
            assert not optimizer._optimizer_step_pre_hooks
            assert hooks_of(llama) == 0


def fail_after(_outputs: Any) -> None:
    raise ZeroDivisionError


def test_a_step_that_raises_is_not_shown_and_the_next_one_is_whole(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend, optimizer = MemoryBackend(), optimizer_of(llama)
    with Telemetry(llama, tmp_path, optimizer, logging_steps=1, backends=[backend]) as telemetry:
        with pytest.raises(ZeroDivisionError), telemetry.step():
            fail_after(llama(**batch_of(9)))
        assert hooks_of(llama) == 0
        take_step(telemetry, llama, optimizer)
    assert backend.scalars("inputs/tokens/total") == {1: 6.0}


def test_what_the_loop_logs_is_shown_as_the_trainer_names_it(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend, optimizer = MemoryBackend(), optimizer_of(llama)
    logs: dict[str, float] = {}
    with Telemetry(llama, tmp_path, optimizer, logging_steps=10, backends=[backend]) as telemetry:
        for step in range(3):
            take_step(telemetry, llama, optimizer)
            logs.update(loss=float(step), eval_loss=10.0 + step)
            telemetry.log(logs)
    assert backend.scalars("train/loss") == {1: 0.0, 2: 1.0, 3: 2.0}
    assert backend.scalars("eval/loss") == {1: 10.0, 2: 11.0, 3: 12.0}


def test_a_loop_goes_on_where_an_earlier_attempt_ended(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    backend, optimizer = MemoryBackend(), optimizer_of(llama)
    with Telemetry(
        llama, tmp_path, optimizer, logging_steps=4, backends=[backend], starting_step=6, name="voice", config={"a": 1}
    ) as telemetry:
        for _ in range(3):
            take_step(telemetry, llama, optimizer)
    assert list(backend.scalars("inputs/tokens/total")) == [8]
    assert backend.run is not None
    assert (backend.run.starting_step, backend.run.name, backend.run.config["a"]) == (6, "voice", 1)


def test_it_makes_no_training_arguments(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building them would reset what Accelerate knows of the loop."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("TrainingArguments were made")

    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", fail)
    optimizer = optimizer_of(llama)
    with Telemetry(llama, tmp_path, optimizer, logging_steps=1, backends=[MemoryBackend()]) as telemetry:
        take_step(telemetry, llama, optimizer)
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.state.initialized


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logging_steps": 0}, "logging_steps must be at least 1, got 0"),
        ({"components": ["input"]}, "unknown components"),
        ({"optimizer": "adamw"}, "optimizer must be a torch.optim.Optimizer, got str"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    given: dict[str, Any], message: str, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Telemetry(llama, tmp_path, **given)


def test_a_step_outside_of_its_context_says_what_to_do(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    telemetry = Telemetry(llama, tmp_path)
    with pytest.raises(RuntimeError, match=r"with Telemetry\(...\) as telemetry"), telemetry.step():
        pass


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_the_examples_run_as_the_documentation_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    events = EventAccumulator(str(tmp_path / "runs" / "telemetry"))
    events.Reload()
    assert [event.step for event in events.Scalars("outputs/loss/text")] == [1, 5, 10, 15, 20]
    losses = [event.value for event in events.Scalars("outputs/loss/text")]
    assert losses[-1] < losses[0]

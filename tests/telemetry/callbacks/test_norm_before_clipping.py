"""On unmodified Trainers too, gradients are measured before clipping, and with a loss scaler's factor taken out."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support import tiny_training as tiny
from support.steps import quiet_arguments
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from telemetry import SharedAttentionLoggerCallback
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Table

STEPS = 3
ALWAYS = 0.01


def train(directory: Path, kind: type[Trainer] = Trainer, telemetry: bool = True, **arguments: Any) -> Any:
    backend = MemoryBackend()
    made = kind(
        model=models.make("llama", **tiny.SHAPE),
        args=arguments_of(kind, directory, **arguments),
        train_dataset=tiny.rows(),  # type: ignore[arg-type]
        callbacks=[SharedAttentionLoggerCallback(2, [backend])] if telemetry else [],
    )
    made.train()
    return made, backend


def arguments_of(kind: type[Trainer], directory: Path, **arguments: Any) -> Any:
    given = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.01, **arguments}
    usual = quiet_arguments(directory, **given)
    if kind is Trainer:
        return usual
    kept = {"output_dir": str(directory), "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    return Seq2SeqTrainingArguments(**kept, save_strategy="no", **given)


@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [ALWAYS, 0.0])
def test_the_total_norm_is_the_trainers(
    tmp_path: Path, kind: type[Trainer], accumulation: int, max_grad_norm: float
) -> None:
    made, backend = train(tmp_path, kind, gradient_accumulation_steps=accumulation, max_grad_norm=max_grad_norm)
    logged, measured = backend.scalars("train/grad_norm"), backend.scalars("gradients/total_norm")
    assert sorted(measured) == [1, 2]
    for step, value in measured.items():
        assert value > 10 * ALWAYS
        assert value == pytest.approx(logged[step], rel=1e-5)
    clipped = backend.scalars("gradients/clip_coefficient")
    expected = {step: min(1, ALWAYS / value) for step, value in measured.items()} if max_grad_norm else {}
    assert clipped == pytest.approx(expected, rel=1e-3)
    assert not [record.note for _, record in backend.records["gradients/total_norm"] if record.note]
    assert "_clip_grad_norm" not in vars(made)  # as it was


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    states = [
        train(tmp_path, telemetry=watched, max_grad_norm=ALWAYS)[0].model.state_dict() for watched in (True, False)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Scaled(Trainer):
    """With a loss scaler, as on a GPU in float16."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


@pytest.mark.parametrize("max_grad_norm", [ALWAYS, 0.0])
def test_a_loss_scalers_factor_is_taken_out(tmp_path: Path, max_grad_norm: float) -> None:
    _, backend = train(tmp_path, Scaled, max_grad_norm=max_grad_norm, gradient_accumulation_steps=1)
    logged, measured = backend.scalars("train/grad_norm"), backend.scalars("gradients/total_norm")
    assert measured[1] == pytest.approx(logged[1], rel=1e-3)


def test_a_copy_of_the_trainer_clips_for_itself(tmp_path: Path) -> None:
    copies: list[Any] = []

    class Copies(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            copies.append(copy.copy(holder[0]))

    backend = MemoryBackend()
    made = Trainer(
        model=models.make("llama", **tiny.SHAPE),
        args=arguments_of(Trainer, tmp_path, max_grad_norm=ALWAYS),
        train_dataset=tiny.rows(),  # type: ignore[arg-type]
        callbacks=[SharedAttentionLoggerCallback(1, [backend]), Copies()],
    )
    holder = [made]
    made.train()
    assert sorted(backend.scalars("gradients/total_norm")) == [1, 2, 3]
    assert len(copies) == STEPS
    assert "_clip_grad_norm" not in vars(made)


class Leaves(TrainerCallback):
    """Ctrl-C in a due step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt


class LeavesLater(TrainerCallback):
    """Ctrl-C in another event of a due step."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._leave)

    def _leave(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


class LeavesForward(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            model(input_ids=inputs["input_ids"])
            raise KeyboardInterrupt
        return super().compute_loss(model, inputs, *args, **kwargs)


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize("kind", [Trainer, LeavesForward])
def test_no_hook_is_left_by_a_training_that_is_left(tmp_path: Path, kind: type[Trainer]) -> None:
    model: Any = models.make("llama", **tiny.SHAPE)
    made = kind(
        model=model,
        args=quiet_arguments(tmp_path, max_steps=STEPS, per_device_train_batch_size=2),
        train_dataset=tiny.rows(),  # type: ignore[arg-type]
        callbacks=[SharedAttentionLoggerCallback(1, [MemoryBackend()]), *([Leaves()] if kind is Trainer else [])],
    )
    with pytest.raises(KeyboardInterrupt):
        made.train()
    if kind is Trainer:  # left in a callback, of which nobody is told before the model runs again
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert hooks_of(model) == 0


def test_an_optimizer_that_steps_in_the_backward_pass_has_no_false_zeros(tmp_path: Path) -> None:
    backend = MemoryBackend()
    model: Any = models.make("llama", **tiny.SHAPE)
    for parameter in model.parameters():

        def step(one: torch.Tensor) -> None:
            with torch.no_grad():
                one.sub_(one.grad, alpha=0.01)  # type: ignore[arg-type]
            one.grad = None

        parameter.register_post_accumulate_grad_hook(step)
    Trainer(
        model=model,
        args=quiet_arguments(tmp_path, max_steps=2, per_device_train_batch_size=2),
        train_dataset=tiny.rows(),  # type: ignore[arg-type]
        callbacks=[SharedAttentionLoggerCallback(1, [backend])],
    ).train()
    assert not [tag for tag in backend.tags() if tag.startswith("gradients/") and backend.scalars(tag)]
    reasons = dict(backend.last("telemetry/absent", Table).rows)
    assert "one that steps in the backward pass keeps none" in str(reasons["gradients/total_norm"])
    assert "one that steps in the backward pass keeps none" in str(reasons["gradients/<group>/update_ratio"])


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
@pytest.mark.parametrize("first", [True, False])
def test_no_hook_is_left_by_ctrl_c_in_another_callback(tmp_path: Path, event: str, first: bool) -> None:
    model: Any = models.make("llama", **tiny.SHAPE)
    callbacks = [LeavesLater(event), SharedAttentionLoggerCallback(1, [MemoryBackend()])]
    made = Trainer(
        model=model,
        args=quiet_arguments(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=tiny.rows(),  # type: ignore[arg-type]
        callbacks=callbacks if first else callbacks[::-1],
    )
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert hooks_of(model) == 0
    assert not {"_clip_grad_norm", "training_step", "_prepare_inputs"} & vars(made).keys()
    assert "call_event" not in vars(made.callback_handler)


class LeavesUpdate(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise KeyboardInterrupt


def test_no_hook_is_left_by_ctrl_c_in_the_update(tmp_path: Path) -> None:
    model: Any = models.make("llama", **tiny.SHAPE)
    made = Trainer(
        model=model,
        args=quiet_arguments(tmp_path, max_steps=2, per_device_train_batch_size=2),
        train_dataset=tiny.rows(),  # type: ignore[arg-type]
        callbacks=[SharedAttentionLoggerCallback(1, [MemoryBackend()])],
        optimizer_cls_and_kwargs=(LeavesUpdate, {"lr": 0.1}),
    )
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert hooks_of(model) == 0
    assert made.optimizer is not None
    assert not type(vars(made.optimizer).get("step")).__module__.startswith("telemetry")
    assert not {"_clip_grad_norm", "training_step", "_prepare_inputs"} & vars(made).keys()


def test_a_scheduler_finds_the_optimizers_step_as_it_left_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Trainer(
            model=models.make("llama", **tiny.SHAPE),
            args=quiet_arguments(tmp_path, max_steps=3, per_device_train_batch_size=2),
            train_dataset=tiny.rows(),  # type: ignore[arg-type]
            callbacks=[SharedAttentionLoggerCallback(1, [MemoryBackend()])],
        )
        made.train()

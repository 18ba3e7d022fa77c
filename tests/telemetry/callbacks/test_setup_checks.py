"""Set-up checks on real trainings: mistakes are named at step 1, and trainings that are as they should be are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support import tiny_training as tiny
from support.steps import quiet_arguments
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.health.setup_rules import SETUP_RULES
from telemetry.records import Alert, Table
from trainer.model import add_lora

STEPS = 2
PAD = 0
Batch = dict[str, Tensor]


def collate(rows: list[Batch]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def train(
    directory: Path,
    batch: Callable[[Batch], Batch] = lambda batch: batch,
    kind: type[Trainer] = Trainer,
    change: Callable[[Trainer], None] = lambda trainer: None,
    lora: bool = False,
    **arguments: Any,
) -> MemoryBackend:
    backend = MemoryBackend()
    model = models.make("llama", **tiny.SHAPE)
    made = kind(
        model=add_lora(model, 2, 4, 0.0) if lora else model,
        args=quiet_arguments(
            directory, **{"max_steps": STEPS, "learning_rate": 0.01, "per_device_train_batch_size": 4, **arguments}
        ),
        train_dataset=tiny.rows(),  # type: ignore[arg-type]
        eval_dataset=tiny.rows(4),  # type: ignore[arg-type]
        data_collator=lambda rows: batch(collate(rows)),
        callbacks=[StrategicTelemetry(logging_steps=1, backends=[backend])],
    )
    change(made)
    made.train()
    return backend


def fired(backend: MemoryBackend) -> dict[str, float]:
    """Set-up checks that are not well at step 1."""
    names = [rule.name for rule in SETUP_RULES]
    found = {name: backend.scalars(f"setup/{name}").get(1, 0.0) for name in names}
    return {name: level for name, level in found.items() if level}


def moved(batch: Batch, by: int) -> Batch:
    labels = batch["labels"]
    made = torch.full_like(labels, -100)
    if by > 0:
        made[:, :-by] = labels[:, by:]
    else:
        made[:, -by:] = labels[:, :by]
    return {**batch, "labels": made}


class OwnLoss(Trainer):
    """Labels leave the batch, and a loss written by hand is given them."""

    shift = 1
    weight = 1.0
    smoothing = 0.0
    z_loss = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        given, wanted = outputs.logits[:, : -self.shift], labels[:, self.shift :]
        loss = cross_entropy(given.flatten(0, 1), wanted.flatten(), label_smoothing=self.smoothing) * self.weight
        loss = loss + self.z_loss * given.logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss


class ShiftsTwice(OwnLoss):
    shift = 2


class TenTimes(OwnLoss):
    weight = 10.0


class Smooths(OwnLoss):
    smoothing = 0.1


class KeepsSmall(OwnLoss):
    z_loss = 1e-3


def frozen_optimizer(trainer: Trainer) -> None:
    held = [one for name, one in trainer.model.named_parameters() if "mlp" not in name]  # type: ignore[union-attr]
    trainer.optimizer = torch.optim.AdamW(held, lr=0.01)


def with_lora(trainer: Trainer) -> None:
    trainer.model = trainer.model_wrapped = add_lora(trainer.model, 2, 4, 0.0)


def lora_outside(trainer: Trainer) -> None:
    before = [*trainer.model.parameters()]  # type: ignore[union-attr]
    with_lora(trainer)
    trainer.optimizer = torch.optim.AdamW(before, lr=0.01)


class Evaluating(Trainer):
    """Leaves the model in evaluation mode."""

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.eval()
        model.train = lambda mode=True: model
        return super().training_step(model, *args, **kwargs)


def in_bfloat16(trainer: Trainer) -> None:
    trainer.model.to(torch.bfloat16)  # type: ignore[union-attr]


def padded_on_the_left(batch: Batch) -> Batch:
    """Every sample has other padding, which no mask hides."""
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    for row in range(len(ids)):
        ids[row, : 1 + row % 3], labels[row, : 1 + row % 3] = PAD, -100
    return {"input_ids": ids, "labels": labels}


def with_padding(trainer: Trainer) -> None:
    trainer.model.config.pad_token_id = PAD  # type: ignore[union-attr]


def bidirectional(trainer: Trainer) -> None:
    for module in trainer.model.modules():  # type: ignore[union-attr]
        if hasattr(module, "is_causal"):
            module.is_causal = False
    trainer.model.config.is_causal = False  # type: ignore[union-attr]


PLANTED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "labels shifted twice in the batch": ("asked_labels", {"batch": lambda batch: moved(batch, 1)}),
    "labels not shifted": ("asked_labels", {"batch": lambda batch: moved(batch, -1)}),
    "labels shifted twice in an own loss": ("asked_labels", {"kind": ShiftsTwice}),
    "a loss times 10": ("loss_weight", {"kind": TenTimes}),
    "parameters outside of the optimizer": ("optimizer", {"change": frozen_optimizer}),
    "LoRA outside of the optimizer": ("optimizer", {"change": lora_outside}),
    "bfloat16 that swallows steps": ("optimizer", {"change": in_bfloat16, "learning_rate": 1e-7}),
    "training in evaluation mode": ("modes", {"kind": Evaluating}),
    "bidirectional attention": ("causality", {"change": bidirectional}),
    "padding that no mask hides": ("alone", {"batch": padded_on_the_left, "change": with_padding}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named_at_step_1(name: str, tmp_path: Path) -> None:
    check, planted = PLANTED[name]
    backend = train(tmp_path, **planted)
    assert fired(backend).get(check) == 2, {
        tag: backend.scalars(tag) for tag in backend.records if tag.startswith("setup")
    }
    alerts = [one for _, one in backend.records["setup/alerts"] if isinstance(one, Alert)]
    rule = next(rule for rule in SETUP_RULES if rule.name == check)
    assert rule.fault in [alert.title for alert in alerts]
    table = backend.last("setup/checks", Table)
    assert table.rows[0][0] == rule.fault


HEALTHY: dict[str, Mapping[str, Any]] = {
    "as it should be": {},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "bf16": {"bf16": True},
    "an own loss": {"kind": OwnLoss},
    "an own loss that smooths": {"kind": Smooths},
    "a z-loss": {"kind": KeepsSmall},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "LoRA": {"lora": True},
    "warm-up": {"warmup_steps": 10},
    "checkpointing": {"gradient_checkpointing": True},
    "masked prompts": {
        "batch": lambda batch: {**batch, "labels": batch["labels"].index_fill(1, torch.tensor([0, 1]), -100)}
    },
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_is_not_blamed(name: str, tmp_path: Path) -> None:
    backend = train(tmp_path, **HEALTHY[name])
    assert fired(backend) == {}
    assert backend.scalars("setup/asked/text/next")[1] == 1
    assert backend.scalars("setup/loss_weight/text")[1] == pytest.approx(1, abs=0.15)


def test_changes_are_those_of_passes_by_hand(tmp_path: Path) -> None:
    """Padding on the left of a batch of two; measured after the update."""
    seen: list[Any] = []

    def batch(given: Batch) -> Batch:
        seen.append(padded_on_the_left(given))
        return seen[-1]

    def change(trainer: Trainer) -> None:
        with_padding(trainer)
        seen.append(trainer.model)

    size = {"per_device_train_batch_size": 2, "max_steps": 1}
    backend = train(tmp_path, batch=batch, change=change, **size)
    model, ids = seen[0].eval(), seen[1]["input_ids"]
    others = ids.clone()
    others[0, 0], others[1] = ids[0, 1], ids[1, 2]  # of the first sample its padding alone: all is the first token
    later = ids.clone()
    half = ids.shape[1] // 2
    for row, first in enumerate((1, 2)):
        later[row, half:] = ids[row, first]
    with torch.no_grad():
        own, alone, early = (model(input_ids=one).logits for one in (ids, others, later))
    moved = (own - alone).abs().amax(-1)
    assert backend.scalars("setup/alone/changes")[1] == pytest.approx(float(moved[0, 1:].max() / moved[1, 2:].max()))
    moved = (own - early).abs().amax(-1)
    expected = float(moved[:, :half].max() / moved[:, half:].max())
    assert backend.scalars("setup/causality/earlier_changes")[1] == pytest.approx(expected, abs=1e-6)


def test_everything_is_looked_at_once(tmp_path: Path) -> None:
    backend = train(tmp_path, max_steps=4)
    steps = {tag: {step for step, _ in held} for tag, held in backend.records.items() if tag.startswith("setup/")}
    late = {"setup/recombined", "setup/checks"}  # the Trainer logs its loss after the step has been judged
    assert {tag for tag, at in steps.items() if at != {1}} <= late


def test_a_second_training_is_looked_at_again(tmp_path: Path) -> None:
    backend = MemoryBackend()
    made = Trainer(
        model=models.make("llama", **tiny.SHAPE),
        args=quiet_arguments(tmp_path, max_steps=1, per_device_train_batch_size=4),
        train_dataset=tiny.rows(),  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[StrategicTelemetry(logging_steps=1, backends=[backend])],
    )
    made.train()
    made.train()
    assert len(backend.records["setup/asked_labels"]) == 2


def test_dropout_in_evaluation_is_named_when_one_is_made(tmp_path: Path) -> None:
    class Forgets(Trainer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            self.model.eval = lambda: self.model.train()  # type: ignore[method-assign, union-attr]
            return super().evaluation_loop(*args, **kwargs)

    evaluates = {"eval_strategy": "steps", "eval_steps": 1}
    assert train(tmp_path, kind=Forgets, **evaluates).scalars("setup/modes")[1] == 2
    assert train(tmp_path, **evaluates).scalars("setup/modes")[1] == 0

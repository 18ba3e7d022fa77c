"""An unmodified Trainer on a tiny text model, whose every step can be worked out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .references import LLAMA_GROUPS, Outputs, gradient_values, tensor_values, update_values
from .steps import Snapshots, quiet_arguments

IGNORED = -100
LENGTHS = (5, 9, 3, 7, 4, 8, 6, 2, 9, 3, 5, 7)


def examples(count: int = 36) -> list[dict[str, list[int]]]:
    """Token ids of unequal length; the first two of each are a prompt without labels."""
    found = []
    for index in range(count):
        ids = [1 + (7 * index + 3 * at) % 28 for at in range(LENGTHS[index % len(LENGTHS)])]
        found.append({"input_ids": ids, "labels": [IGNORED, IGNORED, *ids[2:]]})
    return found


@dataclass
class Collator:
    """Pads on the right and keeps every batch that it has made."""

    made: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        most = max(len(row["input_ids"]) for row in rows)
        missing = [most - len(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": torch.tensor([row["input_ids"] + [0] * n for row, n in zip(rows, missing, strict=True)]),
            "attention_mask": torch.tensor([[1] * (most - n) + [0] * n for n in missing]),
            "labels": torch.tensor([row["labels"] + [IGNORED] * n for row, n in zip(rows, missing, strict=True)]),
        }
        self.made.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


@dataclass
class Training:
    """A Trainer that has not begun, and what it will have seen."""

    trainer: Trainer
    batches: Collator
    snapshots: Snapshots
    accumulation: int

    def of_step(self, step: int) -> list[dict[str, Tensor]]:
        """The microbatches of a step."""
        return self.batches.made[(step - 1) * self.accumulation : step * self.accumulation]

    def expected(self, step: int, max_grad_norm: float = 0.0) -> dict[str, float]:
        """Every scalar of a step, worked out with the model as it was and the microbatches that it saw."""
        model, batches = self.snapshots.models[step], self.of_step(step)
        after = self.snapshots.models.get(step + 1, self.trainer.model)
        updates = update_values(model, after, LLAMA_GROUPS)
        gradients = _gradient_values(model, batches, max_grad_norm)
        return _input_values(batches) | _output_values(model, batches) | gradients | updates


def training(
    model: Any,
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
    steps: int = 6,
    accumulation: int = 2,
    kind: Callable[..., Trainer] = Trainer,
    **arguments: Any,
) -> Training:
    """A Trainer with everything of its own at its defaults, callbacks added by ``add_callback``."""
    collator, snapshots = Collator(), Snapshots()
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": steps}
    trainer = kind(
        model=model,
        args=quiet_arguments(directory, **{"learning_rate": 0.01, "max_grad_norm": 0.0, **sizes, **arguments}),
        data_collator=collator,
        train_dataset=examples(),
        eval_dataset=examples(3),
        callbacks=[snapshots],
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    return Training(trainer, collator, snapshots, accumulation)


def _input_values(batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    masks = [value for batch in batches for value in batch["attention_mask"].flatten().tolist()]
    labels = [value for batch in batches for value in batch["labels"].flatten().tolist()]
    rows = [row for batch in batches for row in batch["labels"].tolist()]
    found = {
        "inputs/tokens/total": float(len(masks)),
        "inputs/tokens/text_fraction": sum(masks) / len(masks),
        "inputs/tokens/padding_fraction": 1 - sum(masks) / len(masks),
        "inputs/supervised/text_fraction": sum(label != IGNORED for label in labels) / sum(masks),
        "inputs/tokens/hidden_fraction": 0.0,
        "inputs/supervised/samples_fraction": sum(map(_has_label, rows)) / len(rows),
        "inputs/invalid_ids": 0.0,
    }
    for name in batches[0]:
        found |= tensor_values(name, [batch[name] for batch in batches])
    return found


def _has_label(row: Sequence[int]) -> bool:
    return any(label != IGNORED for label in row)


def _output_values(model: Any, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    outputs = Outputs()
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        outputs.add_text(batch["labels"].tolist(), logits)
    return outputs.values()


def _gradient_values(model: Any, batches: Sequence[dict[str, Tensor]], max_grad_norm: float) -> dict[str, float]:
    model.zero_grad()
    supervised = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=supervised).loss.backward()
    total = gradient_values(model, LLAMA_GROUPS)["gradients/total_norm"]
    scale = min(1.0, max_grad_norm / total) if max_grad_norm else 1.0
    return gradient_values(model, LLAMA_GROUPS, scale)

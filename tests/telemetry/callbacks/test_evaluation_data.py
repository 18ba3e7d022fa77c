"""Evaluation data are the user's: whatever they are, losses, their order and training are as without telemetry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support.steps import quiet_arguments
from support.text_training import Collator, examples, training
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.trainer import StrategicCallback, _evaluation_set
from telemetry.catalogue import find
from telemetry.instruments.base import Instrument
from telemetry.records import Mean, Table

NAMES = ("a/b c", "eval", "x_runtime", "ünï")


class Augmented:
    """Drops tokens at random, by a generator of its own."""

    def __init__(self) -> None:
        self.rows = examples(6)
        self.generator = np.random.default_rng(1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        keep = len(row["labels"]) - int(self.generator.integers(2))
        return {name: values[:keep] for name, values in row.items()}


class Numbered(IterableDataset[Any]):
    """Goes on where it has stopped."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(4):
            self.at += 1
            yield examples(36)[self.at % 36]


class Spent(IterableDataset[Any]):
    """Has so many samples, for all evaluations together."""

    def __init__(self) -> None:
        self.rows = iter(examples(12))

    def __iter__(self) -> Iterator[Any]:
        return self.rows


class OwnLoader(Trainer):
    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return DataLoader(examples(4), batch_size=2, shuffle=True, collate_fn=self.data_collator)  # type: ignore[arg-type]


class OneShotLoader(Trainer):
    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return (self.data_collator(examples(4)[at : at + 2]) for at in (0, 2))


class Twice(Trainer):
    """Also evaluates on another set at every evaluation, and predicts."""

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        super().evaluate(examples(4), metric_key_prefix="eval_other")  # type: ignore[arg-type]
        self.predict(examples(2))  # type: ignore[arg-type]
        return super().evaluate(eval_dataset, *args, **kwargs)


def lines() -> Iterator[Any]:
    yield from examples(4)


def counted(found: Any, compute_result: bool = True) -> dict[str, float]:
    assert found.inputs is not None
    return {"my_runtime": 1.0, "hits": float((found.predictions == found.label_ids[..., None]).sum())}


WITH_METRICS = {"batch_eval_metrics": True, "include_for_metrics": ["inputs"], "eval_do_concat_batches": False}

KINDS: dict[str, tuple[Callable[[], Any], type[Trainer], dict[str, Any]]] = {
    "none": (lambda: None, Trainer, {"eval_strategy": "no"}),
    "on start": (Augmented, Trainer, {"eval_on_start": True}),
    "augmented": (Augmented, Trainer, {}),
    "named": (lambda: {name: Augmented() for name in NAMES}, Trainer, {}),
    "named, one a stream": (lambda: {"one": Augmented(), "two": Numbered()}, Trainer, {}),
    "stream with a state": (Numbered, Trainer, {}),
    "stream that is spent": (Spent, Trainer, {"eval_steps": 3}),
    "lines": (lambda: datasets.IterableDataset.from_generator(lines), Trainer, {}),
    "rows": (lambda: datasets.Dataset.from_list(examples(4)), Trainer, {}),
    "loader of one's own": (Augmented, OwnLoader, {}),
    "loader that is spent": (Augmented, OneShotLoader, {}),
    "other sets": (Augmented, Twice, {}),
    "metrics": (Augmented, Trainer, WITH_METRICS),
}


class Orders(TrainerCallback):
    """Evaluates before training too, so that there is a loader when it begins."""

    trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy != "no" and type(self.trainer) is Trainer:
            sets = self.trainer.eval_dataset
            named = sets if isinstance(sets, dict) else [None]
            loaders = {name: self.trainer.get_eval_dataloader(name) for name in named}
            self.trainer.callback_handler.eval_dataloader = loaders if isinstance(sets, dict) else loaders[None]


def trained(name: str, model: Any, directory: Path, *callbacks: TrainerCallback) -> tuple[Any, list[Any]]:
    """Losses as logged, and every evaluation batch in its order."""
    make, kind, arguments = KINDS[name]
    collator, orders = Collator(), Orders()
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 3, "eval_steps": 1}
    metrics = {"compute_metrics": counted} if "batch_eval_metrics" in arguments else {}
    trainer = kind(
        model=model,
        args=quiet_arguments(directory, **{"eval_strategy": "steps", "learning_rate": 0.01, **sizes, **arguments}),
        data_collator=collator,
        train_dataset=examples(),  # type: ignore[arg-type]
        eval_dataset=make(),
        callbacks=[orders, *callbacks],
        **metrics,  # type: ignore[arg-type]
    )
    orders.trainer = trainer
    trainer.train()
    timing = ("_runtime", "_per_second")
    history = [{k: v for k, v in logs.items() if not k.endswith(timing)} for logs in trainer.state.log_history]
    return history, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", KINDS)
def test_losses_and_training_are_those_without_telemetry(name: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.config.attention_dropout = 0.3  # draws at every step
    plain, of_plain = trained(name, copy.deepcopy(llama), tmp_path)
    backend = MemoryBackend()
    watched, of_watched = trained(
        name, copy.deepcopy(llama), tmp_path, StrategicTelemetry(logging_steps=1, backends=[backend])
    )
    assert watched == plain
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(of_watched, of_plain, strict=True))
    evaluations = [logs for logs in plain if any(name.startswith("eval_") for name in logs)]
    assert bool(evaluations) == (name != "none")
    said = {row[0]: row[1] for row in backend.last("telemetry/absent", Table).rows}
    assert ("evaluation batches" in said) == any(word in name for word in ("stream", "lines", "spent"))


@pytest.mark.parametrize("name", ["named", "augmented"])
def test_every_set_is_seen_under_its_name(name: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    seen: list[tuple[int, str, int]] = []

    class Sees(Instrument):
        def evaluation(self, step: Any, batches: Any) -> None:
            seen.append((step.number, step.evaluation_set, len(list(batches))))
            step.recorder.metric(f"zero_shot/conditioning/eval/{step.evaluation_set or 'only'}/gain", Mean(1.0, 1))

    backend = MemoryBackend()
    trained(name, llama, tmp_path, StrategicCallback(1, [backend], instruments=[Sees()]))
    names = [one.replace("/", "|") for one in NAMES] if name == "named" else [""]
    assert seen == [(step, one, 3) for step in range(4) for one in names]
    for one in names:
        tag = f"zero_shot/conditioning/eval/{one or 'only'}/gain"
        assert find(tag) is not None
        assert list(backend.scalars(tag)) == [0, 1, 2, 3]


def test_the_name_of_a_set_is_that_of_the_trainers_own_metrics() -> None:
    assert _evaluation_set({"eval_loss": 1.0, "eval_runtime": 1.0}) == ("eval", "")
    assert _evaluation_set({"eval_a/b c_loss": 1.0, "eval_a/b c_runtime": 1.0, "epoch": 1.0}) == ("eval_a/b c", "a/b c")
    assert _evaluation_set({"eval_one_my_runtime": 3.0, "eval_one_runtime": 1.0}) == ("eval_one", "one")
    assert _evaluation_set({"eval_eval_runtime": 1.0}) == ("eval_eval", "eval")
    assert _evaluation_set({}) == ("eval", "")


@pytest.mark.parametrize("predicts", [True, False])
def test_what_was_predicted_before_training_is_no_baseline(
    predicts: bool, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    seen: list[int] = []

    class Sees(Instrument):
        def evaluation(self, step: Any, batches: Any) -> None:
            seen.append(step.number)

    callback = StrategicCallback(1, [MemoryBackend()], instruments=[Sees()])
    run = training(llama, tmp_path, [callback], 1, 1)
    run.trainer.evaluate()
    if predicts:
        run.trainer.predict(examples(2))  # type: ignore[arg-type]
    run.trainer.train()
    assert seen == ([] if predicts else [0])

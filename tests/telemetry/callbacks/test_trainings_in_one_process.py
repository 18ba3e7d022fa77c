"""Several trainings in one process: each is a run of its own, whatever came of the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.steps import quiet_arguments
from support.tiny_training import SHAPE, make_trainer, rows, train
from transformers import Trainer, TrainerCallback

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend

LOSS = "outputs/loss/text"


def watching(*backends: MemoryBackend) -> StrategicTelemetry:
    return StrategicTelemetry(["outputs"], 1, list(backends))


def steps(backend: MemoryBackend, tag: str = LOSS) -> list[int]:
    return [step for step, _ in backend.records[tag]]


class Does(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event: str, step: int, action: Callable[[], Any]) -> None:
        self._event, self._step, self._action = event, step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._do("on_step_begin", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._do("on_step_end", state.global_step)

    def _do(self, event: str, step: int) -> None:
        if (event, step) == (self._event, self._step):
            self._action()


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
def test_a_training_inside_of_another(event: str, tmp_path: Path) -> None:
    outer, inner = MemoryBackend(), MemoryBackend()
    train(tmp_path, [watching(outer), Does(event, 2, lambda: train(tmp_path, [watching(inner)], 3))], 4)
    for backend, last in ((outer, 4), (inner, 3)):
        assert steps(backend) == steps(backend, "train/loss") == list(range(1, last + 1))
        assert backend.closed


@pytest.mark.parametrize(
    ("event", "at", "seen"),
    [
        ("on_step_begin", 2, [1, *(1, 2, 3), 2, 3]),
        ("on_step_end", 2, [1, 2, *(1, 2, 3), 3]),
        ("on_step_end", 3, [1, 2, 3, *(1, 2, 3)]),
    ],
)
def test_the_same_telemetry_inside_of_its_own_training(event: str, at: int, seen: list[int], tmp_path: Path) -> None:
    backend = MemoryBackend()
    telemetry = watching(backend)
    train(tmp_path, [telemetry, Does(event, at, lambda: train(tmp_path, [telemetry], 3))], 3)
    assert steps(backend) == seen
    assert backend.closed


def test_trainings_at_the_same_time_in_threads(tmp_path: Path) -> None:
    backends = [MemoryBackend() for _ in range(2)]
    together = threading.Barrier(len(backends))

    made = [  # one after the other: accelerate's state is one for all
        make_trainer(tmp_path / str(number), [watching(one), Does("on_step_begin", 2, lambda: together.wait(60))], 3)
        for number, one in enumerate(backends)
    ]
    threads = [threading.Thread(target=one.train) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for backend in backends:
        assert steps(backend) == steps(backend, "train/loss") == [1, 2, 3]
        assert backend.closed


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("again", ["the same telemetry", "another"])
def test_a_training_that_was_interrupted_is_over_when_the_next_begins(again: str, tmp_path: Path) -> None:
    """Another model's: as in a notebook, where everything is made anew."""
    backend = MemoryBackend()
    first = watching(backend)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [first, Does("on_step_begin", 3, interrupt)], 4)
    assert not backend.closed
    closed: list[bool] = []
    second = first if again == "the same telemetry" else watching(MemoryBackend())
    begun = Does("on_step_begin", 1, lambda: closed.append(backend.closed))
    train(tmp_path, [second, begun], 2)
    if again == "another":  # the same one may be open again by then
        assert closed == [True]
    assert steps(backend) == ([1, 2] if again == "another" else [1, 2, 1, 2])
    assert backend.closed


@pytest.mark.parametrize("named", [False, True])
def test_each_trial_of_a_search_is_a_run_of_its_own(named: bool, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    telemetry = StrategicTelemetry(["outputs"], 1)
    made = Trainer(
        model_init=lambda: models.make("llama", **SHAPE),
        args=quiet_arguments(tmp_path, max_steps=1, per_device_train_batch_size=2),
        train_dataset=rows(4),  # type: ignore[arg-type]
        eval_dataset=rows(2),  # type: ignore[arg-type]
        callbacks=[telemetry],
    )
    made.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [0.001])},
        hp_name=(lambda trial: f"trial/{trial.number}") if named else None,
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    runs = tmp_path / "runs" / "telemetry"
    names = {"trial_0", "trial_1"} if named else {"learning_rate=0.001", "learning_rate=0.001 (2)"}
    assert {path.relative_to(runs).parts[0] for path in runs.rglob("*tfevents*")} == names
    assert all(path.name.count("tfevents") for path in runs.glob("*/*"))

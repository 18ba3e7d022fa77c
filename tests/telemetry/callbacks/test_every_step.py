"""Losses of steps that are not due, on the real Trainer: what was bad is counted and named at the next due step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.text_training import training
from support.trl_training import llama
from transformers import Trainer

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.prepared import every_step
from telemetry.probes.sentinel import KEPT, Sentinel
from telemetry.records import Alert, Scalar

NONFINITE, ZERO = (f"steps/{kind}_losses" for kind in ("nonfinite", "zero"))
BAD = {(2, 1): torch.nan, (3, 0): torch.inf, (7, 1): 0.0}  # step, microbatch of it → what becomes of the loss


class Bad(Trainer):
    """Its losses are bad here and there; it names its samples."""

    bad: Mapping[tuple[int, int], float] = BAD
    _seen = (0, -1)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        step = self.state.global_step + 1
        self._seen = (step, self._seen[1] + 1 if self._seen[0] == step else 0)
        names = [{"sample_id": f"{step}.{self._seen[1]}.{row}"} for row in range(len(inputs["input_ids"]))]
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_microbatch"):
                callback.on_microbatch(self.args, self.state, self.control, metadata=names)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._seen not in self.bad:
            return loss
        model.zero_grad()
        return torch.full_like(loss, self.bad[self._seen])


class Well(Bad):
    bad: Mapping[tuple[int, int], float] = {}


def train(kind: type[Trainer], directory: Path, every: int, steps: int, telemetry: bool = True) -> Any:
    backend = MemoryBackend()
    watching = [StrategicTelemetry(["outputs"], every, [backend])] if telemetry else []
    run = training(llama(0.1), directory, watching, steps, 2, kind)
    torch.manual_seed(0)
    run.trainer.train()
    return run.trainer, backend


def test_what_was_bad_between_due_steps_is_counted_and_named(tmp_path: Path) -> None:
    trainer, backend = train(Bad, tmp_path / "on", 5, 9)
    assert backend.scalars(NONFINITE) == {1: 0, 5: 2}
    assert backend.scalars(ZERO) == {1: 0, 5: 0, 9: 1}  # the last steps, which no due step follows
    notes = {(tag, step): one.note for tag in (NONFINITE, ZERO) for step, one in backend.records[tag]
             if isinstance(one, Scalar) and one.note}  # fmt: skip
    assert notes == {
        (NONFINITE, 5): "first at step 2 (samples 2.1.0, 2.1.1)",
        (ZERO, 9): "first at step 7 (samples 7.1.0, 7.1.1)",
    }
    alerts = [one for _, one in backend.records["health/alerts"] if isinstance(one, Alert)]
    named = {one.title: one.text for one in alerts}
    assert "samples 2.1.0, 2.1.1" in named["a step's loss was not finite"]
    assert "samples 7.1.0, 7.1.1" in named["a step was skipped: its loss is exactly 0"]
    assert "training_step" not in vars(trainer)

    plain, _ = train(Bad, tmp_path / "off", 5, 9, telemetry=False)
    after = plain.model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in trainer.model.state_dict().items())


def test_a_healthy_training_has_nothing_to_say(tmp_path: Path) -> None:
    _, backend = train(Well, tmp_path, 2, 4)
    assert backend.scalars(NONFINITE) == backend.scalars(ZERO) == {1: 0, 2: 0, 4: 0}
    assert not [one for _, one in backend.records.get("health/alerts", ()) if "loss" in getattr(one, "title", "")]


def test_no_loss_keeps_a_graph_and_none_is_kept_for_ever() -> None:
    sentinel = Sentinel()
    with_graph = torch.ones((), requires_grad=True) * 2
    for step in range(KEPT + 5):
        sentinel.note(step, with_graph)
    sentinel.announce(["no mapping", {"sample_id": 3}])  # type: ignore[list-item]
    sentinel.announce(None)  # type: ignore[arg-type]
    sentinel.note(KEPT + 5, 1.5)  # no tensor, and nothing that a due step could look at
    seen = sentinel.take()
    assert len(seen) == KEPT
    assert not any(loss.requires_grad for _, loss, _ in seen)
    assert sentinel.take() == []
    assert not sentinel.watches


@pytest.mark.parametrize("fails", [False, True])
def test_a_trainer_gets_its_own_step_back(fails: bool) -> None:
    class Minimal:
        state = type("State", (), {"global_step": 4})()

        def training_step(self, model: Any, inputs: Any) -> torch.Tensor:
            if fails:
                raise ValueError("bad batch")
            return torch.tensor(2.0)

    trainer: Any = Minimal()
    sentinel = Sentinel()
    end = every_step(trainer, sentinel)
    assert end is not None
    if fails:
        with pytest.raises(ValueError, match="bad batch"):
            trainer.training_step(None, None)
    else:
        assert float(trainer.training_step(None, None)) == 2.0
    end()
    assert [(step, float(loss)) for step, loss, _ in sentinel.take()] == ([] if fails else [(5, 2.0)])
    assert vars(trainer) == {}

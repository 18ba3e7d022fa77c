"""Planted faults are named, with parameter and step, in ``gradients/largest``, ``gradients/missing`` and the log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import Voices
from support.steps import Steps
from torch import Tensor, nn

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import SharedAttentionLoggerCallback
from telemetry.instruments.gradient_tables import LARGEST_COLUMNS, MISSING_COLUMNS, LargestGradients
from telemetry.records import Table
from trainer.loss import AccumulatedLoss
from trainer.model import add_lora

Row = dict[str, Any]


@pytest.fixture
def batch(voices: Voices) -> dict[str, Tensor]:
    return voices.batch([voices.conversation(target=3)])


def train(
    model: Any, directory: Path, steps: Iterable[dict[str, Tensor]], optimizer: torch.optim.Optimizer | None = None
) -> Iterator[MemoryBackend]:
    """Before each step, what has been shown up to then; once more at the end."""
    backend = MemoryBackend()
    made = optimizer or torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    with Steps(model, [SharedAttentionLoggerCallback(1, [backend])], directory, optimizer=made) as run:
        for inputs in steps:
            yield backend
            run.step([inputs])
    yield backend


def table(backend: MemoryBackend, tag: str, step: int) -> list[Row]:
    found = [record for at, record in backend.records.get(tag, []) if at == step]
    assert len(found) <= 1
    for record in found:
        assert isinstance(record, Table)
        assert record.columns == (LARGEST_COLUMNS if tag == "gradients/largest" else MISSING_COLUMNS)
        return [dict(zip(record.columns, row, strict=True)) for row in record.rows]
    return []


def parameters_of(rows: Iterable[Row], why: str) -> list[str]:
    return [row["parameter"] for row in rows if row["why"] == why]


def test_a_nan_in_one_weights_gradient_is_named_at_its_step(
    higgs: Any, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    broken = "model.layers.1.self_attn.k_proj.weight"
    poison = torch.zeros_like(higgs.get_parameter(broken))
    poison[3, 5] = math.nan
    running = train(higgs, tmp_path, [batch] * 3, torch.optim.SGD(higgs.parameters(), lr=0.0))
    next(running)
    next(running)
    handle = higgs.get_parameter(broken).register_hook(lambda gradient: gradient + poison)
    next(running)
    handle.remove()
    higgs.get_parameter(broken).data.nan_to_num_(0.0)  # 0 · NaN
    backend = next(running)
    rows = {step: table(backend, "gradients/largest", step) for step in (1, 2, 3)}
    assert [parameters_of(rows[step], "non-finite") for step in (1, 2, 3)] == [[], [broken], []]
    row = rows[2][0]
    assert (row["why"], row["group"], row["non-finite"], row["growth"]) == ("non-finite", "shared_attention", 1, None)
    assert math.isnan(row["norm"])
    assert backend.scalars("gradients/shared_attention/nonfinite") == {1: 0, 2: 1, 3: 0}


def test_the_largest_and_the_fastest_growing_are_named(higgs: Any, tmp_path: Path, batch: dict[str, Tensor]) -> None:
    grown = "model.layers.0.mlp.up_proj.weight"
    running = train(higgs, tmp_path, [batch] * 2, torch.optim.SGD(higgs.parameters(), lr=0.0))
    next(running)
    next(running)
    norms = {name: float(parameter.grad.norm()) for name, parameter in higgs.named_parameters()}
    zeros = {name: float((parameter.grad == 0).double().mean()) for name, parameter in higgs.named_parameters()}
    absmax = {name: float(parameter.grad.abs().max()) for name, parameter in higgs.named_parameters()}
    higgs.get_parameter(grown).register_hook(lambda gradient: gradient * 7)
    backend = next(running)
    first, second = (table(backend, "gradients/largest", step) for step in (1, 2))
    assert parameters_of(first, "largest") == sorted(norms, key=lambda name: -norms[name])[:10]
    for row in first:
        name = row["parameter"]
        assert (row["norm"], row["absmax"]) == pytest.approx((norms[name], absmax[name]), rel=1e-5)
        assert (row["zero fraction"], row["non-finite"], row["growth"]) == (pytest.approx(zeros[name]), 0, None)
    assert parameters_of(first, "growth") == []
    growth = [row for row in second if row["why"] == "growth"]
    assert len(growth) == 10
    assert growth[0]["parameter"] == grown
    assert growth[0]["growth"] == pytest.approx(7, rel=1e-4)
    assert [row["growth"] for row in growth[1:]] == pytest.approx([1] * 9, rel=1e-4)


def test_more_broken_parameters_than_fit_are_counted() -> None:
    sums = torch.ones(5, 100)
    sums[0, :40] = math.inf  # a norm beyond float32, without a broken value
    sums[3] = 0
    rows = LargestGradients().table([(f"p{at}", "other") for at in range(100)], [*sums.double()]).rows
    assert [row[0] for row in rows] == ["non-finite"] * 30 + ["largest"] * 10 + ["non-finite"]
    assert rows[-1][1] == "and 10 more"


class Detached(nn.Module):
    """A feed-forward network whose output has lost its graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, values: Tensor) -> Tensor:
        return self.inner(values).detach()


def test_a_detached_audio_ffn_is_named(
    higgs: Any, tmp_path: Path, batch: dict[str, Tensor], telemetry_log: pytest.LogCaptureFixture
) -> None:
    layer = higgs.model.layers[1]
    running = train(higgs, tmp_path, [batch] * 3)
    next(running)
    next(running)
    layer.audio_mlp = Detached(layer.audio_mlp)
    backend = list(running)[-1]
    names = [f"model.layers.1.audio_mlp.inner.{part}_proj.weight" for part in ("gate", "up", "down")]
    names.append("model.layers.1.audio_post_attention_layernorm.weight")  # which feeds it alone
    assert table(backend, "gradients/missing", 1) == []
    for step in (2, 3):
        rows = table(backend, "gradients/missing", step)
        assert parameters_of(rows, "no gradient") == names
        found = {(row["group"], row["values"], row["since step"], row["last gradient at step"]) for row in rows}
        assert found == {("audio_ffn", 16 * 24, 2, None), ("norms", 16, 2, 1)}  # the networks have another name now
    said = [record.getMessage() for record in telemetry_log.records if "no gradient for" in record.getMessage()]
    assert said == [f"step 2: no gradient for {', '.join(names)}, though it is to be trained"]


def test_parts_that_one_batch_does_not_reach_are_not_called_dead(
    higgs: Any, tmp_path: Path, batch: dict[str, Tensor], telemetry_log: pytest.LogCaptureFixture
) -> None:
    """A step without audio gives the audio head no gradient; the next one does, and again not."""
    silent = {name: batch[name] for name in batch if name != "audio_labels"}
    *_, backend = train(higgs, tmp_path, [batch, silent, batch, silent])
    missing = {step: table(backend, "gradients/missing", step) for step in (1, 2, 3, 4)}
    assert missing[1] == missing[3] == []
    for step, last in ((2, 1), (4, 3)):
        head = next(row for row in missing[step] if row["parameter"] == "audio_lm_head.weight")
        assert (head["since step"], head["last gradient at step"]) == (step, last)
    said = [record.getMessage() for record in telemetry_log.records if "audio_lm_head.weight" in record.getMessage()]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 3"]
    assert said[1] == "step 3: a gradient for audio_lm_head.weight, which had none (seen first at step 2)"


def test_a_module_left_out_of_the_optimizer_is_named(
    higgs: Any, tmp_path: Path, batch: dict[str, Tensor], telemetry_log: pytest.LogCaptureFixture
) -> None:
    left_out = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    held = [parameter for name, parameter in higgs.named_parameters() if name not in left_out]
    *_, backend = train(higgs, tmp_path, [batch] * 2, torch.optim.SGD(held, lr=1e-3))
    for step in (1, 2):
        rows = table(backend, "gradients/missing", step)
        assert parameters_of(rows, "not in the optimizer") == left_out
        assert {row["since step"] for row in rows} == {1}
        assert {row["last gradient at step"] for row in rows} == {step}
    said = [record.getMessage() for record in telemetry_log.records if "does not hold" in record.getMessage()]
    assert said == [f"step 1: the optimizer does not hold {', '.join(left_out)}, which is to be trained"]


def test_an_optimizer_of_copies_raises_no_alarm(
    higgs: Any, tmp_path: Path, batch: dict[str, Tensor], telemetry_log: pytest.LogCaptureFixture
) -> None:
    copies = [parameter.detach().clone().requires_grad_() for parameter in higgs.parameters()]
    *_, backend = train(higgs, tmp_path, [batch], torch.optim.SGD(copies, lr=1e-3))
    assert table(backend, "gradients/missing", 1) == []
    assert any("the optimizer holds copies" in record.getMessage() for record in telemetry_log.records)


def test_lora_raises_no_false_alarm(
    higgs: Any, tmp_path: Path, batch: dict[str, Tensor], telemetry_log: pytest.LogCaptureFixture
) -> None:
    """Frozen base weights have no gradient and are not in the optimizer; the adapters' B begins at zero."""
    higgs.loss_function = AccumulatedLoss(higgs.config)
    model = add_lora(higgs, rank=2, alpha=4, dropout=0.0)
    *_, backend = train(model, tmp_path, [batch] * 2)
    assert "gradients/missing" not in backend.tags()
    assert {row["group"] for row in table(backend, "gradients/largest", 2)} == {"lora"}
    assert backend.scalars("gradients/lora/update_ratio")[1] > 0
    said = [record.getMessage() for record in telemetry_log.records]
    assert [line for line in said if "gradient for" in line or "optimizer" in line] == []

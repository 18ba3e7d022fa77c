"""What every door says of a run: its configuration as plain text and numbers, and what a trainer logs."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from telemetry import StrategicTelemetry, Telemetry
from telemetry.setting import default_logging_dir, local_directory, logged_numbers, logs_directory, run_config


class Unspeakable:
    """Neither a number nor shown."""

    def __float__(self) -> float:
        raise KeyError("no number")

    def __repr__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (True, 1.0),
        (np.float32(1.5), 1.5),
        (np.int64(7), 7.0),
        (np.array(2.5), 2.5),
        (torch.tensor(3.5), 3.5),
        (torch.tensor([4.0]), 4.0),
        (torch.tensor(2, dtype=torch.int8), 2.0),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (torch.ones(1, 1), 1.0),
        (np.array([2.0]), 2.0),
        (np.bool_(True), 1.0),
        (np.longdouble(2), 2.0),
        (Fraction(1, 4), 0.25),
        (Decimal("0.25"), 0.25),
        (10**20, 1e20),
        (math.inf, math.inf),
    ],
)
@pytest.mark.filterwarnings("error")
def test_numbers_of_every_kind_are_taken(value: Any, expected: float) -> None:
    assert logged_numbers({"loss": value}) == ({"train/loss": expected}, {})


@pytest.mark.parametrize(
    "value",
    [
        *(None, "fast", "3.5", b"3", 10**400, 10**5000, [1.0], (1, 2), {1.0}, range(10**9), object(), Unspeakable()),
        *(1 + 2j, torch.tensor(1 + 2j), np.complex64(1 + 2j), torch.ones(2), np.ones(3), np.array(None)),
        *(np.datetime64("2020-01-01"), np.timedelta64(5, "s"), timedelta(1)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_number_is_left_out_with_a_reason(value: Any) -> None:
    numbers, others = logged_numbers({"eval_kind": value, "loss": 1.0})
    assert numbers == {"train/loss": 1.0}
    assert list(others) == ["eval/kind"]
    assert others["eval/kind"].startswith("what was logged is no number: ")


def test_mappings_are_taken_apart() -> None:
    numbers, others = logged_numbers({"rewards": {"mean": 1.0, "of": {"a": torch.tensor(2.0), "b": None}}, "step": 3})
    assert numbers == {"train/rewards/mean": 1.0, "train/rewards/of/a": 2.0}
    assert list(others) == ["train/rewards/of/b"]


def test_a_tensor_on_a_device_is_not_waited_for() -> None:
    numbers, others = logged_numbers({"loss": torch.ones((), device="meta")})
    assert (numbers, others) == ({}, {"train/loss": "it was logged as a tensor on meta: log its .item()"})


def test_a_configuration_of_any_kinds_is_shown_as_text(llama: LlamaForCausalLM, monkeypatch: Any) -> None:
    llama.config.odd = {1, 2}
    llama.config.kind = torch.float32
    monkeypatch.setattr("sys.argv", ["train.py", "--name", "a\udcff"])
    found = run_config({"dir": Path("runs"), "of": {3: Decimal("1.5")}, "raw": b"\xff"}, llama, {})
    assert json.loads(json.dumps(found, ensure_ascii=False).encode()) == found
    assert (found["dir"], found["of"], found["raw"]) == ("runs", {"3": "1.5"}, "\\xff")
    assert sorted(found["model"]["odd"]) == [1, 2]
    assert found["model"]["kind"] == "torch.float32"
    assert found["command"].endswith("'a\\udcff'")


@pytest.mark.parametrize("url", ["s3://bucket/voice", "gs://bucket", "hf://buckets/me/voice", "memory://x", "gs:/b/c"])
def test_a_place_elsewhere_is_refused_before_training(
    url: str, llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"logging_dir=.*directories of this machine"):
        StrategicTelemetry(logging_dir=url)
    with pytest.raises(ValueError, match=r"output_dir=.*directories of this machine"):
        Telemetry(llama, url)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", url)
    with pytest.raises(ValueError, match=r"TENSORBOARD_LOGGING_DIR=.*directories of this machine"):
        default_logging_dir(tmp_path)


@pytest.mark.parametrize("path", ["runs/voice", "/tmp/a:b/c", "./s3:x", "voice:2"])
def test_any_name_of_a_local_directory_is_taken(path: str) -> None:
    assert local_directory(path, "logging_dir") == Path(path)


def test_a_home_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert local_directory("~/logs", "logging_dir") == Path("/home/ann/logs")


def test_environment_variables_in_where_the_logs_go_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/ann")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "$SCRATCH/logs")
    assert logs_directory("${SCRATCH}/logs", "logging_dir") == Path("/scratch/ann/logs")
    assert logs_directory(Path("$NOWHERE/logs"), "logging_dir") == Path("$NOWHERE/logs")
    assert default_logging_dir(Path("out")) == Path("/scratch/ann/logs")
    monkeypatch.setenv("SCRATCH", "gs://bucket")
    with pytest.raises(ValueError, match="directories of this machine"):
        logs_directory("$SCRATCH/logs", "logging_dir")

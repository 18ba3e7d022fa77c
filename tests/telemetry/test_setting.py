"""What every door says of a run: its configuration as plain text and numbers, and what a trainer logs."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from telemetry.setting import logged_numbers, run_config


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
        (Decimal("0.25"), 0.25),
        (10**20, 1e20),
        (math.inf, math.inf),
    ],
)
def test_numbers_of_every_kind_are_taken(value: Any, expected: float) -> None:
    assert logged_numbers({"loss": value}) == ({"train/loss": expected}, {})


@pytest.mark.parametrize(
    "value", [None, "fast", 10**400, torch.ones(2), np.ones(3), [1.0], object(), torch.tensor(1 + 2j)]
)
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

"""Thousands of due steps: nothing grows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fault_runs import MEASURED, scenario, started, steps_of

STEPS, SETTLED = 1800, 800
# Of the process's whole memory, over the 9,000 steps from 1,000 to 10,000.
LIMIT = 5e6 / 9000


@pytest.mark.timeout(400)
def test_memory_files_and_threads_do_not_grow_with_due_steps(tmp_path: Path) -> None:
    with started([*scenario("endures", tmp_path), str(STEPS)], tmp_path) as program:
        ended = program.wait(380)
    assert ended.status == 0, ended.said
    assert steps_of(tmp_path)[MEASURED[0]] == list(range(1, STEPS + 2))
    held = [entry for entry in json.loads((tmp_path / "held.json").read_text()) if entry["step"] >= SETTLED]
    assert [held[0]["step"], held[-1]["step"]] == [SETTLED, STEPS]
    slope, _ = np.polyfit([entry["step"] for entry in held], [entry["bytes"] for entry in held], 1)
    assert slope < LIMIT, held
    for kind in ("files", "threads"):
        assert {entry[kind] for entry in held} == {held[0][kind]}, held

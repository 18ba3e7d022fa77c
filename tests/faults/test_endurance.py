"""Due steps leave nothing behind in the process. ``make bench`` follows its memory over thousands of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from fault_runs import MEASURED, scenario, steps_of
from scenarios import HELD
from support import programs

STEPS, EVERY, SETTLED = 160, 10, 120  # the rules of health look back a hundred steps
LIMIT = 5e6 / 9000  # bytes a step


def test_memory_files_and_threads_do_not_grow_with_due_steps(tmp_path: Path) -> None:
    ended = programs.run([*scenario("endures", tmp_path), str(STEPS), str(EVERY), "trace"], tmp_path)
    assert ended.status == 0, ended.said
    assert steps_of(tmp_path)[MEASURED[0]] == list(range(1, STEPS + 2))
    held = [entry for entry in json.loads((tmp_path / HELD).read_text()) if entry["step"] >= SETTLED]
    assert [held[0]["step"], held[-1]["step"]] == [SETTLED, STEPS]
    slope, _ = np.polyfit([entry["step"] for entry in held], [entry["allocated"] for entry in held], 1)
    assert held[0]["allocated"] > 0
    assert slope < LIMIT, held
    for kind in ("files", "threads"):
        assert {entry[kind] for entry in held} == {held[0][kind]}, held

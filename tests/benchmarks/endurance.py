"""What a process holds over thousands of due steps: memory, open files, threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

EVERY, SHOWN, SETTLED = 100, 1000, 1000
ROOT = Path(__file__).parents[2]


def report(steps: int) -> list[tuple[str, ...]]:
    """Rows of step, resident MB, files, threads; in the end the growth of the memory, in bytes a step."""
    with tempfile.TemporaryDirectory() as directory:
        program = [str(ROOT / "tests" / "faults" / "scenarios.py"), "endures", directory, str(steps), str(EVERY)]
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, *program], env=environment, check=True, capture_output=True)
        held = json.loads((Path(directory) / "held.json").read_text())
    settled = [entry for entry in held if entry["step"] >= SETTLED]
    slope, _ = np.polyfit([entry["step"] for entry in settled], [entry["bytes"] for entry in settled], 1)
    rows = [
        (f"{entry['step']:,}", f"{entry['bytes'] / 1e6:.1f}", str(entry["files"]), str(entry["threads"]))
        for entry in held
        if entry["step"] % SHOWN == 0
    ]
    return [*rows, (f"growth from step {SETTLED:,}", f"{slope:.0f} bytes a step", "", "")]

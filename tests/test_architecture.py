"""Who may import whom: the contracts in ``pyproject.toml``, and that they are about every package of the project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_import_keeps_to_the_layers() -> None:
    program = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_packages_at_the_top_are_the_three_and_the_tests() -> None:
    found = {
        path.parent.name
        for path in ROOT.glob("*/*.py")
        if not path.parent.name.startswith(".") and not (path.parent / "pyvenv.cfg").exists()
    }
    assert found - {"docs", "build", "dist"} == {"telemetry", "trainer", "dashboards", "tests"}

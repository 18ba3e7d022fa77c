"""TRL's SFTTrainer on two ranks, started by torchrun and by ``accelerate launch``, reports what one process reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.programs import BRIEF_FORK, finish, run

PROGRAM = Path(__file__).parent / "sft_program.py"
SECTIONS = ("inputs", "outputs", "gradients", "attention", "activations")


def shown(directory: Path, ranks: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((directory / f"shown-{ranks}").read_text())
    return {tag: values for tag, values in found.items() if tag.split("/")[0] in SECTIONS}


@pytest.fixture(scope="module")
def alone(scratch: Callable[[], Path]) -> dict[str, dict[str, float]]:
    pytest.importorskip("trl")
    directory = scratch()
    finish([str(PROGRAM), str(directory)], directory)
    return shown(directory, 1)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_ranks(launcher: str, alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    if launcher == "torchrun":
        finish([str(PROGRAM), str(tmp_path)], tmp_path, ranks=2)
    else:
        # Of several processes it knows GPUs alone, and leaves it to the program where it computes.
        ranks = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"]
        more = ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--no_python"]
        launch = ["-m", "accelerate.commands.launch", *ranks, *more, *BRIEF_FORK]
        ended = run([*launch, str(PROGRAM), str(tmp_path)], tmp_path, brief=True)
        assert ended.status == 0, ended.said
    found = shown(tmp_path, 2)
    assert found.keys() == alone.keys()
    for tag, values in alone.items():
        assert found[tag] == pytest.approx(values, rel=1e-5, abs=1e-7), tag
    assert found["outputs/loss/text"].keys() == {"1", "2"}

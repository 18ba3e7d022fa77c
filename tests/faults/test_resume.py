"""The real training script, ended or killed after a checkpoint and resumed from it: one run in TensorBoard."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_runs import LOGS, steps_in_files
from support.programs import ROOT, run, started, wait_until
from support.tensorboard_server import LOADERS, serve

from trainer.demo.prepare import Demonstration, prepare

CHECKPOINT, ENDED, RESUMED = 8, 12, 16
LEARNING_RATE = 1e-3
ENDS = ("ended", "killed")
DUE = list(range(1, RESUMED + 1))
STRATEGIC = ("inputs/tokens/total", "outputs/loss/total", "gradients/total_norm", "telemetry/step_seconds")
TRAINERS = ("train/loss", "train/learning_rate")


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    return prepare(tmp_path_factory.mktemp("demo"), show_progress=False)


def command(demonstration: Demonstration, directory: Path, steps: int) -> list[str]:
    return [
        *(str(ROOT / "trainer" / "train_v2_ddp.py"), "--model_path", str(demonstration.model)),
        *("--train_data_file", str(demonstration.train_file), "--disable_eval", "--max_steps", str(steps)),
        *("--output_dir", str(directory / "output"), "--logging_dir", str(directory / LOGS)),
        *("--save_steps", "4", "--logging_steps", "1", "--learning_rate", str(LEARNING_RATE)),
        *("--enable_strategic_logging", "--strategic_logging_steps", "1"),
    ]


def train_to_the_end(demonstration: Demonstration, directory: Path, steps: int, *arguments: str) -> None:
    program = [*command(demonstration, directory, steps), *arguments]
    ended = run(program, directory, brief=True, HF_HOME=str(directory))
    assert ended.status == 0, ended.said


def train_until_killed(demonstration: Demonstration, directory: Path) -> None:
    """Killed two steps after the checkpoint or a little later; it would have gone on for long."""
    with started(command(demonstration, directory, 500), directory, HF_HOME=str(directory)) as program:
        wait_until(lambda: max(steps_in_files(directory, STRATEGIC[0]), default=0) >= CHECKPOINT + 2)
        program.process.send_signal(signal.SIGKILL)
        assert program.wait().status == -signal.SIGKILL


def resumed(how: str, demonstration: Demonstration, directory: Path) -> Path:
    """The logs of a run that was resumed from a checkpoint that it had passed."""
    if how == "ended":
        train_to_the_end(demonstration, directory, ENDED)
    else:
        train_until_killed(demonstration, directory)
    before = steps_in_files(directory, STRATEGIC[0])
    assert max(before) > CHECKPOINT + 1
    checkpoint = directory / "output" / f"checkpoint-{CHECKPOINT}"
    train_to_the_end(demonstration, directory, RESUMED, "--resume_from_checkpoint", str(checkpoint))
    # Steps that both attempts have measured are in the files twice: it is for the readers to show them once.
    assert steps_in_files(directory, STRATEGIC[0]) == before + DUE[CHECKPOINT:]
    return directory / LOGS


@dataclass(frozen=True)
class Shown:
    """What a server answers of a run: tag → points, tag → times, and the steps of a table."""

    runs: list[str]
    scalars: dict[str, list[tuple[int, Any]]]
    times: dict[str, list[float]]
    tables: list[int]


def shown(logs: Path, loader: str) -> Shown:
    tags = (*STRATEGIC, *TRAINERS)
    with serve(logs, loader) as server:
        server.wait_for(lambda: all(server.scalars(tag)[-1][0] == RESUMED for tag in tags))
        return Shown(
            server.runs(),
            {tag: server.scalars(tag) for tag in tags},
            {tag: server.wall_times(tag) for tag in tags},
            sorted(server.texts("inputs/sequence")),
        )


@pytest.fixture(scope="module")
def all_shown(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Shown]:
    """Every kind of run in every loader. One fixture: in random order, parametrized ones train again and again."""
    logs = {how: resumed(how, demonstration, tmp_path_factory.mktemp(how)) for how in ENDS}
    return {(how, loader): shown(logs[how], loader) for how in ENDS for loader in LOADERS}


@pytest.fixture(params=[(how, loader) for how in ENDS for loader in LOADERS], ids="-".join)
def page(request: pytest.FixtureRequest, all_shown: dict[tuple[str, str], Shown]) -> Shown:
    return all_shown[request.param]


def test_a_resumed_run_is_one_run_with_every_step_once(page: Shown) -> None:
    assert page.runs == ["."]
    for tag, points in page.scalars.items():
        assert [step for step, _ in points] == DUE, tag
        assert all(isinstance(value, float) and math.isfinite(value) for _, value in points), tag
        assert page.times[tag] == sorted(page.times[tag]), tag
    assert page.tables == DUE


def test_what_is_shown_of_repeated_steps_is_of_the_resumed_run(page: Shown) -> None:
    """Its learning rate falls to 0 at its own last step; the first of its steps still has the checkpoint's."""
    rates = dict(page.scalars["train/learning_rate"])
    for step in DUE[CHECKPOINT + 1 :]:
        assert rates[step] == pytest.approx(LEARNING_RATE * (RESUMED - step + 1) / RESUMED, rel=1e-5)

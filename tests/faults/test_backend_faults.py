"""A backend or a disk that fails: training is what it would have been, and the others are shown every step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import LOGGED, LOGS, MEASURED, assert_every_step, run, scalars, steps_of
from scenarios import BLOCKED_FROM, BROKEN_FROM, FREE_FROM, FULL_FROM, LEFT_OUT
from support.programs import Ended
from support.tiny_training import Outcome, outcome, progress
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from dashboards.report.media import collect
from dashboards.report.overview import overview
from dashboards.runs import read_runs
from telemetry.delivery.recorder import MAX_FAILURES
from telemetry.health.rules import Level

STEPS = 20
MARGIN = 15.0
MANY = 70  # two writes each, what was measured and what the Trainer logs; in the end the Trainer's summary, and losses


def assert_trained_as(expected: Outcome, directory: Path, ended: Ended) -> None:
    assert ended.status == 0, ended.said
    assert expected.error == ""
    assert outcome(directory) == expected


@pytest.fixture(scope="module")
def raising(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A training with three backends that raise, each in its own way, before the one that is read here."""
    directory = tmp_path_factory.mktemp("raising")
    return directory, run("backends_raise", directory)


@pytest.mark.parametrize(
    ("name", "writes", "left_out"),
    [("always", MAX_FAILURES, True), ("once", 2 * MANY + 2, False), ("late", BROKEN_FROM + MAX_FAILURES, True)],
)
def test_a_backend_that_raises_is_said_once_and_left_out_where_it_goes_on(
    name: str, writes: int, left_out: bool, raising: tuple[Path, Ended]
) -> None:
    directory, ended = raising
    assert json.loads((directory / "writes.json").read_text())[name] == writes
    assert ended.said.count(f"backend {name} could not write; training goes on") == 1
    assert ended.said.count(f"backend {name} failed {MAX_FAILURES} times: {LEFT_OUT}") == left_out


def test_beside_backends_that_raise_training_and_other_backends_are_whole(
    raising: tuple[Path, Ended], untouched: Callable[..., Outcome]
) -> None:
    directory, ended = raising
    assert_trained_as(untouched(steps=MANY), directory, ended)
    assert_every_step(directory, range(1, MANY + 1))
    assert ended.said.count("Traceback") == 3
    assert ended.said.count("had to drop records") == 1
    dropped = [value for _, value in scalars(directory)["telemetry/dropped_records"]]
    assert dropped[0] == 0
    assert dropped == sorted(dropped)
    assert dropped[-1] > dropped[MANY // 2] > 0


@pytest.mark.parametrize(
    ("name", "bound"), [("backend_blocks", 5.0), ("backend_blocks_until_the_end", 4.0)], ids=["mid-run", "at the end"]
)
def test_a_backend_that_blocks_forever(
    name: str, bound: float, tmp_path: Path, untouched: Callable[..., Outcome]
) -> None:
    ended = run(name, tmp_path)
    assert_trained_as(untouched(steps=STEPS), tmp_path, ended)
    assert_every_step(tmp_path, range(1, STEPS + 1))
    assert json.loads((tmp_path / "writes.json").read_text()) == {"faulty": BLOCKED_FROM}
    assert ended.said.count(LEFT_OUT) == 1
    # Some seconds are the interpreter's own end, on a busy machine; the thread is blocked all the while.
    assert ended.at - progress(tmp_path)[STEPS] < bound + MARGIN


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, untouched: Callable[..., Outcome]) -> None:
    ended = run("disk_is_full_for_a_while", tmp_path)
    assert_trained_as(untouched(steps=STEPS), tmp_path, ended)
    written = [step for step in range(1, STEPS + 1) if not FULL_FROM <= step < FREE_FROM]
    steps = steps_of(tmp_path)
    for tag in MEASURED:
        assert steps[tag] == written, tag
    # A step's log follows its end: the last one before the disk filled up came too late, the last one while full not.
    assert steps[LOGGED] == [step for step in range(1, STEPS + 1) if not FULL_FROM - 1 <= step < FREE_FROM - 1]
    assert ended.said.count("losing steps until it can be written again") == 1
    assert ended.said.count("steps were lost") == 1

    given = [(step, tag) for step, tag in json.loads((tmp_path / "given.json").read_text())]
    found = shown(tmp_path)
    missing = len([one for one in given if one not in found])
    assert missing > len(MEASURED) * (FREE_FROM - FULL_FROM)
    assert scalars(tmp_path)["telemetry/dropped_records"][-1] == (STEPS, missing)
    assert scalars(tmp_path)["health/records_lost"][-1] == (STEPS, Level.WARNING)
    runs = read_runs([tmp_path / LOGS])
    assert overview(runs, collect(runs)).dropped == ((0, missing),)


def shown(directory: Path) -> set[tuple[int, str]]:
    """Step and tag of everything that is in a run's only event file."""
    (path,) = (directory / LOGS).iterdir()
    return {(event.step, value.tag) for event in EventFileLoader(str(path)).Load() for value in event.summary.value}


def test_threads_and_descriptors_that_run_out(tmp_path: Path, untouched: Callable[..., Outcome]) -> None:
    ended = run("threads_run_out", tmp_path)
    assert_trained_as(untouched(steps=STEPS), tmp_path, ended)
    assert ended.said.count("telemetry loses what it measures (can't start new thread); training goes on") == 1

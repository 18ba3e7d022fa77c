"""A W&B server that fails in every way: training is not held up, and nothing is lost that the disk does not hold."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fault_runs import HERE
from support import programs
from support.wandb_server import Run, Server, serve
from wandb_scenarios import (
    CLIPS,
    COLUMNS,
    ENDED,
    LOSS,
    NAMES,
    NEVER_REACHABLE,
    SEEN,
    STEPS,
    TABLE_EVERY,
    TOKENS,
    Seen,
)

STALL_SECONDS = 0.05
END_SECONDS = 30.0  # what the recorder gives its backends together
EXIT_SECONDS = 15.0
STREAMED = ("nothing wrong", "500 for a while", "429 for a while", "killed and back", "slow")
REFUSED = ("401 on the stream", "404 on the stream", "409 on the stream")
FORBIDDEN, GONE, CLIENT_KILLED, TRAINER_KILLED = "403 on blobs", "gone for good", "client killed", "trainer killed"
ON_DISK = (*REFUSED, FORBIDDEN, TRAINER_KILLED)


@dataclass(frozen=True)
class Ran:
    """One scenario that has ended.

    Attributes:
        steps: each recorded step, and when it ended.
        ended_at: when the process did, on the same clock.
        live: the run as the server had it when the process had ended; None where it had none.
    """

    directory: Path
    seen: Seen
    steps: dict[int, float]
    status: int
    ended_at: float
    live: Run | None

    @property
    def run_directories(self) -> list[Path]:
        """The client's, in the order of their making."""
        return sorted(path for path in self.directory.glob("client/**/*run-*-*") if path.is_dir())

    @property
    def sync_command(self) -> list[str]:
        """What telemetry said with which to send the run."""
        said = next(line for line in self.seen.said if "wandb sync" in line and "run-" in line)
        return shlex.split(said[said.index("wandb sync") :])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """All scenarios, at the same time."""
    directory = tmp_path_factory.mktemp("wandb_faults")
    program = programs.run([str(HERE / "wandb_scenarios.py"), str(directory)], directory)
    assert program.status == 0, program.said
    ended = json.loads((directory / ENDED).read_text())
    return {name: read(directory / name, **ended[name]) for name in NAMES}


def read(directory: Path, status: int, at: float) -> Ran:
    assert (directory / SEEN).exists(), (directory / "said.txt").read_text()
    seen = Seen(**json.loads((directory / SEEN).read_text()))
    lines = (directory / STEPS).read_text().splitlines()
    steps = {int(step): float(ended) for step, ended in map(str.split, lines)}
    runs = Server(directory / "server").runs() if (directory / "server").exists() else []
    return Ran(directory, seen, steps, status, at, runs[0] if runs else None)


@pytest.fixture(scope="module")
def synced(ran: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs by name, as one server in the place of all has them after what is on disk was sent too, as users would.

    Of the run whose client was killed it has nothing but what is on disk of the time before.
    """
    directory = tmp_path_factory.mktemp("wandb_synced")
    earlier = [Server(ran[name].directory / "server") for name in (*ON_DISK, GONE)]
    paths = [path for name in ON_DISK for path in ran[name].run_directories]
    paths += ran[CLIENT_KILLED].run_directories[:1]
    commands = [
        ["wandb", "sync", "--include-online", *map(str, paths)],
        ran[GONE].sync_command,
        ran[NEVER_REACHABLE].sync_command,
    ]
    with serve(directory, *earlier) as server:
        environment = {**os.environ, **server.environment(directory / "client")}
        for command in commands:
            subprocess.run(
                [sys.executable, "-m", *command], env=environment, check=True, capture_output=True, timeout=120
            )
        return {run.name: run for run in server.runs()}


def expected(key: str, steps: Iterable[int]) -> list[tuple[int, float]]:
    values = {LOSS: lambda step: 1 / np.float32(step), TOKENS: float}
    return [(step, pytest.approx(float(values[key](step)))) for step in steps]


def assert_has_steps(run: Run | None, steps: Iterable[int]) -> None:
    """Every one, once, in order, with its values."""
    assert run is not None
    for key in (LOSS, TOKENS):
        assert run.points(key) == expected(key, steps), key


def steps_with_tables(steps: Iterable[int]) -> list[int]:
    return [step for step in steps if step % TABLE_EVERY == 1]


def assert_has_tables(run: Run | None, steps: Iterable[int]) -> None:
    """Every row, with its sound, once and in order, at the step that it is of."""
    assert run is not None
    shown = steps_with_tables(steps)
    assert [step for step, _ in run.points(CLIPS)] == shown
    tables = run.tables(CLIPS)
    assert [len(table.rows) for table in tables] == list(range(1, len(shown) + 1))
    columns = [tables[-1].columns.index(name) for name in COLUMNS]
    rows = [[row[at] for at in columns] for row in tables[-1].rows]
    assert [row[:2] for row in rows] == [[step, f"sentence {step}"] for step in shown]
    assert all(row[2].startswith(b"RIFF") for row in rows)
    assert len({row[2] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_training_thread_is_not_held_up(name: str, ran: dict[str, Ran]) -> None:
    seen = ran[name].seen
    assert len(seen.stalls) == seen.steps > 0
    assert seen.open_seconds < 1
    assert max(seen.stalls) <= STALL_SECONDS


@pytest.mark.parametrize("name", NAMES)
def test_training_ends_as_it_would_have_and_in_time(name: str, ran: dict[str, Ran]) -> None:
    one = ran[name]
    assert one.status == (-signal.SIGKILL if name == TRAINER_KILLED else 0), (one.directory / "said.txt").read_text()
    assert one.seen.close_seconds < END_SECONDS
    # Some seconds are the interpreter's own end, for several of these programs at once.
    assert one.ended_at - one.steps[one.seen.steps] < one.seen.close_seconds + EXIT_SECONDS


@pytest.mark.parametrize("name", STREAMED)
def test_what_passes_leaves_nothing_out(name: str, ran: dict[str, Ran]) -> None:
    one = ran[name]
    assert_has_steps(one.live, one.steps)
    assert_has_tables(one.live, one.steps)
    assert one.live is not None
    assert one.live.exit_code == 0


@pytest.mark.parametrize("name", [*REFUSED, NEVER_REACHABLE])
def test_what_the_server_never_took_is_on_disk(name: str, ran: dict[str, Ran], synced: dict[str, Run]) -> None:
    one = ran[name]
    assert one.live is None or len(one.live.history()) < one.seen.steps
    assert_has_steps(synced[name], one.steps)
    assert_has_tables(synced[name], one.steps)


def test_the_numbers_of_a_run_whose_server_is_gone_for_good_are_on_disk(
    ran: dict[str, Ran], synced: dict[str, Run]
) -> None:
    one = ran[GONE]
    assert one.live is not None
    assert len(one.live.history()) < one.seen.steps
    assert_has_steps(synced[GONE], one.steps)


def test_what_is_lost_is_what_is_missing(ran: dict[str, Ran], synced: dict[str, Run]) -> None:
    """Each table comes with its sound: two records. The number of those that are lost is there when all is synced."""
    for name in (*STREAMED, *REFUSED, NEVER_REACHABLE, CLIENT_KILLED):
        assert ran[name].seen.dropped == 0, name
    one, kept = ran[GONE], synced[GONE]
    missing = set(steps_with_tables(one.steps)) - {step for step, _ in kept.points(CLIPS)}
    assert one.seen.dropped == 2 * len(missing) > 0
    assert kept.points("telemetry/dropped_records")[-1] == (one.seen.steps, one.seen.dropped)


def test_where_blobs_are_forbidden_numbers_stream(ran: dict[str, Ran], synced: dict[str, Run]) -> None:
    one = ran[FORBIDDEN]
    assert_has_steps(one.live, one.steps)
    assert one.live is not None
    assert not any(name.startswith("media/table/") for name in one.live.files)
    tables = {value["path"] for _, value in one.live.points(CLIPS)}
    assert tables
    assert tables <= synced[FORBIDDEN].files.keys()


def test_a_client_that_is_killed_is_replaced(ran: dict[str, Ran], synced: dict[str, Run]) -> None:
    one = ran[CLIENT_KILLED]
    assert one.live is not None
    live = [step for step, _ in one.live.points(LOSS)]
    assert live == sorted(set(live))
    assert live[-1] == one.seen.steps
    before = [step for step, _ in synced[CLIENT_KILLED].points(LOSS)]
    assert sorted({*live, *before}) == list(one.steps)
    # The rows that the client was taking when it died are sent again: they may be there twice, and are not left out.
    rows = [row for table in one.live.tables(CLIPS) for row in table.rows]
    assert {row[-1][:4] for row in rows} == {b"RIFF"}
    assert {step for step, _ in one.live.points(CLIPS)} == set(steps_with_tables(one.steps))
    assert sum("has died" in line for line in one.seen.said) == 1


def test_a_trainer_that_is_killed_leaves_all_but_its_last_second(ran: dict[str, Ran], synced: dict[str, Run]) -> None:
    one = ran[TRAINER_KILLED]
    kept = [step for step, _ in synced[TRAINER_KILLED].points(LOSS)]
    assert kept == list(range(1, len(kept) + 1))
    assert 0 < one.seen.streamed <= kept[-1] <= one.seen.steps

"""What the W&B backend does with a client that is slow, away or dead: without one, and without its network."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import telemetry.backends.wandb.backend
import telemetry.backends.wandb.client
import telemetry.backends.wandb.values
from telemetry.backends.base import Run
from telemetry.backends.wandb import WandbBackend
from telemetry.backends.wandb.attempts import FILE, Attempts, AttemptsFile, digest
from telemetry.backends.wandb.tables import GrowingTable, Tables, shortened
from telemetry.backends.wandb.values import Values
from telemetry.delivery.recorder import Recorder
from telemetry.records import Alert, Audio, Clip, Image, Scalar, Table


class FakeClient:
    """Stands for the client: keeps what it is given, and fails as it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.alerts: list[tuple[str, str, str]] = []
        self.opening = threading.Event()
        self.opening.set()
        self.errors: list[Exception] = []
        self.fails_on_tables = False
        self.cannot_take: dict[str, Exception] = {}
        self.alive = True
        self.reopened = 0
        self.first_lost = math.inf
        self.finished = self.abandoned = False
        self.sync_command = "wandb sync HERE"
        self.is_offline = False
        self.answering = True
        self.was_ended = False

    def __call__(self, _run: Run, _shared: bool) -> FakeClient:
        return self

    def open(self) -> None:
        self.opening.wait(20)

    def reopen(self) -> float:
        self.reopened += 1
        self.alive = True
        return self.first_lost

    def is_alive(self) -> bool:
        return self.alive

    def has_room(self, _step: int, _newest: int) -> bool:
        return True

    def answers(self) -> bool:
        return self.answering

    def has(self, _step: int, _tags: Iterable[str]) -> bool:
        return False

    def log(self, step: int, values: Mapping[str, Any], tags: Iterable[str]) -> int:
        if values.keys() & self.cannot_take.keys():
            raise self.cannot_take[next(iter(values.keys() & self.cannot_take.keys()))]
        if not self.alive or (self.fails_on_tables and "t" in values):
            raise ConnectionResetError("gone") if not self.alive else RuntimeError("the server is away")
        self.rows.append((step, dict(values)))
        return len(self.rows) - 1

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append((title, text, level))

    def finish(self) -> None:
        self.finished = True

    def abandon(self) -> None:
        self.abandoned = True

    def numbers(self) -> list[tuple[int, float]]:
        return [(step, row["x"]) for step, row in self.rows if "x" in row]

    def tables(self) -> list[int]:
        return [step for step, row in self.rows if "t" in row]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(telemetry.backends.wandb.client, "WandbClient", fake)
    return fake


@pytest.fixture
def backend(client: FakeClient) -> WandbBackend:
    return WandbBackend()


def opened(backend: WandbBackend, directory: Path) -> Recorder:
    made = Recorder([backend])
    made.open(Run(directory))
    return made


@pytest.fixture
def recorder(backend: WandbBackend, tmp_path: Path) -> Recorder:
    """The way to the backend."""
    return opened(backend, tmp_path)


def rows(step: int) -> list[Any]:
    return [Scalar("x", float(step)), Table("t", ("v",), ((step,),))]


def settle(recorder: Recorder) -> None:
    assert recorder.drain(20)


def test_nothing_waits_for_the_opening_and_nothing_is_lost(
    client: FakeClient, backend: WandbBackend, tmp_path: Path
) -> None:
    client.opening.clear()
    began = time.perf_counter()
    recorder = opened(backend, tmp_path)
    for step in range(1, 51):
        recorder.write(step, rows(step))
    assert time.perf_counter() - began < 1
    assert client.rows == []
    client.opening.set()
    settle(recorder)
    assert client.numbers() == [(step, float(step)) for step in range(1, 51)]
    assert client.tables() == list(range(1, 51))


def test_numbers_go_first_and_by_themselves(client: FakeClient, recorder: Recorder) -> None:
    recorder.write(3, [Table("text", ("said",), (("a",),)), *rows(3), Scalar("y", 2.0)])
    settle(recorder)
    assert client.rows[0] == (3, {"x": 3.0, "y": 2.0})
    assert client.rows[1][1].keys() == {"text", "t"}
    assert len(client.rows) == 2


def test_numbers_wait_for_one_table_at_most(
    client: FakeClient, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes its time over the first table: the numbers that came meanwhile go before the next."""
    log, stuck, gate = client.log, threading.Event(), threading.Event()

    def slow(step: int, values: Mapping[str, Any], tags: Iterable[str]) -> int:
        if "t" in values and not stuck.is_set():
            stuck.set()
            assert gate.wait(20)
        return log(step, values, tags)

    monkeypatch.setattr(client, "log", slow)
    monkeypatch.setattr(telemetry.backends.wandb.backend, "SLOW_SECONDS", 0.0)
    recorder.write(1, rows(1))
    assert stuck.wait(20)
    for step in range(2, 11):
        recorder.write(step, rows(step))
    assert recorder._home.drain(20)
    gate.set()
    settle(recorder)
    assert [next(iter(values)) for _, values in client.rows] == ["x", "t", *9 * ["x"], *9 * ["t"]]
    assert client.tables() == list(range(1, 11))


def test_tables_that_were_not_taken_are_sent_again_and_numbers_go_on(
    client: FakeClient, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, telemetry_log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry.backends.wandb.backend, "AWAY_SECONDS", 0.0)
    client.fails_on_tables = True
    for step in (1, 2):
        recorder.write(step, rows(step))
    settle(recorder)
    assert client.numbers() == [(1, 1.0), (2, 2.0)]
    assert client.tables() == []
    client.fails_on_tables = False
    recorder.write(3, rows(3))
    settle(recorder)
    assert client.tables() == [1, 2, 3]
    assert telemetry_log.text.count("did not take the tables") == 1
    assert recorder.dropped_records == 0


@pytest.mark.parametrize(
    ("room", "answering"), [(0, True), (10**6, True), (10**6, False)], ids=["no room", "refused", "gone"]
)
def test_tables_that_are_never_taken_are_counted(
    room: int,
    answering: bool,
    client: FakeClient,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    telemetry_log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(telemetry.backends.wandb.backend, "MAX_HELD_BYTES", room)
    client.fails_on_tables, client.answering = True, answering
    for step in range(1, 31):
        recorder.write(step, rows(step))
    recorder.close()
    assert len(client.numbers()) == 30
    assert recorder.dropped_records == 30
    assert client.rows[-1] == (30, {"telemetry/dropped_records": 30.0})
    assert telemetry_log.text.count("records were lost on their way to W&B") == 1
    assert (client.finished, client.abandoned) == ((True, False) if answering else (False, True))


@pytest.mark.parametrize("error", [ValueError("too long"), RuntimeError("no reason given")], ids=["said", "not said"])
def test_a_table_that_can_never_be_taken_is_the_only_thing_lost(
    error: Exception,
    client: FakeClient,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    telemetry_log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(telemetry.backends.wandb.backend, "AWAY_SECONDS", 0.0)
    client.cannot_take = {"bad": error}
    for step in range(1, 13):
        bad = [Table("bad", ("v",), ((step,),))] if step in (1, 7) else []
        recorder.write(step, [*rows(step), *bad])
        settle(recorder)
    recorder.close()
    assert client.numbers() == [(step, step) for step in range(1, 13)]
    assert sorted(client.tables()) == list(range(1, 13))
    assert recorder.dropped_records == 2
    assert client.rows[-1] == (12, {"telemetry/dropped_records": 2.0})
    assert client.finished
    assert telemetry_log.text.count("W&B cannot take bad of step 1") == 1


@pytest.mark.parametrize("dies_with", ["numbers", "tables"])
def test_a_client_that_dies_is_opened_again_once(
    dies_with: str,
    client: FakeClient,
    backend: WandbBackend,
    recorder: Recorder,
    telemetry_log: pytest.LogCaptureFixture,
) -> None:
    recorder.write(1, rows(1))
    settle(recorder)
    client.alive = False
    recorder.write(2, rows(2) if dies_with == "numbers" else rows(2)[1:])
    settle(recorder)
    assert client.reopened == 1
    assert client.tables() == [1, 2]
    client.alive = False
    recorder.write(3, rows(3))
    settle(recorder)
    assert client.reopened == 1
    assert client.abandoned
    assert "W&B is given up" in telemetry_log.text
    assert "wandb sync HERE" in telemetry_log.text
    assert recorder.dropped_records == 2
    with pytest.raises(RuntimeError, match="given up"):
        backend.write(4, rows(4))


def test_tables_that_died_with_the_client_are_sent_again(client: FakeClient, recorder: Recorder) -> None:
    for step in (1, 2, 3):
        recorder.write(step, rows(step))
        settle(recorder)
    client.alive, client.first_lost = False, 3  # the server has step 1, and the numbers of step 2
    recorder.write(4, rows(4))
    settle(recorder)
    assert client.tables() == [1, 2, 3, 2, 3, 4]


def test_closing_takes_its_time_and_no_more(
    client: FakeClient, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, telemetry_log: pytest.LogCaptureFixture
) -> None:
    settle(recorder)
    hangs = threading.Event()
    monkeypatch.setattr(client, "finish", lambda: hangs.wait(20))
    began = time.perf_counter()
    recorder.close(0.4)
    assert 0.2 < time.perf_counter() - began < 5
    hangs.set()
    assert client.abandoned
    assert "send this run to W&B with: wandb sync HERE" in telemetry_log.text


def test_an_opening_that_fails_is_said_once_and_counted(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, telemetry_log: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(client, "open", fail)
    backend = WandbBackend()
    recorder = Recorder([backend])
    recorder.open(Run(Path("nowhere")))
    recorder.write(1, rows(1))
    settle(recorder)
    assert recorder.dropped_records == 2
    assert telemetry_log.text.count("backend wandb could not open") == 1
    with pytest.raises(RuntimeError, match="before open"):
        backend.write(1, rows(1))
    recorder.close()


def test_a_backend_serves_one_training_after_the_other(client: FakeClient, tmp_path: Path) -> None:
    """Whatever the first has lost is not the second's."""
    backend = WandbBackend()
    for lost in (1, 0):
        recorder = Recorder([backend])
        recorder.open(Run(tmp_path))
        client.fails_on_tables = lost == 1
        recorder.write(1, rows(1))
        recorder.close()
        assert recorder.dropped_records == backend.dropped_records == lost
    assert client.numbers() == [(1, 1.0), (1, 1.0)]


def test_an_alert_comes_once_in_ten_minutes_for_a_rule(
    client: FakeClient, backend: WandbBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.open(Run(tmp_path))
    now = [1000.0]
    monkeypatch.setattr(telemetry.backends.wandb.backend.time, "monotonic", lambda: now[0])
    for at, title in ((0, "a"), (10, "a"), (20, "b"), (599, "a"), (601, "a")):
        now[0] = 1000.0 + at
        backend.write(1, [Alert("health/x", title, str(at))])
    assert [(title, text) for title, text, _ in client.alerts] == [("a", "0"), ("b", "20"), ("a", "601")]


def test_an_alert_that_is_not_taken_is_the_only_thing_lost(
    client: FakeClient, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: str) -> None:
        raise RuntimeError("the server is away")

    monkeypatch.setattr(client, "alert", fail)
    recorder.write(1, [*rows(1), Alert("health/x", "a", "b")])
    settle(recorder)
    assert (client.numbers(), client.tables()) == ([(1, 1.0)], [1])
    assert recorder.dropped_records == 1


def test_what_the_trainers_own_callback_reports_is_left_to_it(client: FakeClient, tmp_path: Path) -> None:
    backend = WandbBackend(trainer_logs=False)
    backend.open(Run(tmp_path))
    backend.write(1, [Scalar("train/loss", 1.0), Scalar("x", 2.0), Scalar("eval/loss", 3.0)])
    assert client.rows == [(1, {"x": 2.0})]


# Values


def no_media(_: Audio | Image) -> Any:
    raise AssertionError("there is none")


def grown(table: GrowingTable, step: int, rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return table.grown(step, Table("t", table.columns, tuple(rows)), no_media).data


def test_a_column_keeps_the_kind_of_its_first_cells() -> None:
    table = GrowingTable("t", ("a", "b", "c"))
    assert grown(table, 1, [(None, 1, "x"), (True, 2.5, 3)]) == [[1, None, 1, "x"], [1, True, 2.5, "3"]]
    assert grown(table, 2, [(False, np.float64(4), True)])[-1] == [2, False, 4.0, "True"]
    assert table.fits(Table("t", ("a", "b", "c"), ((None, None, None),)))
    assert not table.fits(Table("t", ("a", "b", "c"), ((None, "text", None),)))
    assert not table.fits(Table("t", ("a", "b"), ()))


def test_rows_that_do_not_fit_begin_another_table(telemetry_log: pytest.LogCaptureFixture) -> None:
    tables = Tables()
    first = Table("t", ("a",), ((1,),))
    tables.for_rows(first).grown(1, first, no_media)
    other = Table("t", ("a",), (("one",),))
    tables.for_rows(other).grown(2, other, no_media)
    assert tables.for_rows(first).key == "t"
    assert tables.for_rows(other).key == "t/2"
    assert tables.for_rows(Table("t", ("a", "b"), ())).key == "t/3"
    assert telemetry_log.text.count("no longer fit") == 2


def test_a_table_begins_again_after_a_hundred_increments() -> None:
    table = GrowingTable("t", ("a",))
    lengths = [len(grown(table, step, [(step,)])) for step in range(1, 103)]
    assert lengths == [*range(1, 101), 1, 2]


def test_long_texts_are_cut_and_say_so() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("abcde", 3) == "abc… (2 more characters)"
    (cell,) = grown(GrowingTable("t", ("a",)), 1, [("x" * 11_000_000,)])
    assert len(cell[1]) < 11_000


@pytest.mark.parametrize(
    "record",
    [
        Image("i", np.zeros((4, 4), np.float32)),
        Audio("a", (Clip(np.array(["x"]), 8000),)),
    ],
)
def test_what_cannot_be_shown_is_counted_and_said_once(record: Any, telemetry_log: pytest.LogCaptureFixture) -> None:
    values = Values()
    for step in (1, 2):
        assert values.shows(step, [record, Table("text", ("said",), (("x",),))]).keys() == {"text"}
    assert values.unshown_records == 2
    assert telemetry_log.text.count(f"W&B cannot show {record.tag}") == 1


def test_a_broken_cell_costs_its_table_and_nothing_of_the_next() -> None:
    values = Values()
    broken = Table("t", ("v", "i"), (("a", Image("i", np.zeros((2, 2), np.float32))),))
    whole = Table("t", ("v", "i"), (("b", None),))
    assert values.shows(1, [broken]) == {}
    assert values.shows(2, [whole])["t"].data == [[2, "b", None]]


# What earlier attempts have written


def written(directory: Path, entries: Iterable[tuple[int, int, int]], resumed: bool = False) -> None:
    file = AttemptsFile(directory, "id1", "voices", resumed)
    for entry in entries:
        file.add(*entry)
    file.close()


def test_rows_of_attempts(tmp_path: Path) -> None:
    written(tmp_path, [(100, 0, 7), (100, 1, 8), (200, 2, 7), (200, 3, 8), (212, 4, 7)])
    found = Attempts.read(tmp_path)
    assert found is not None
    assert (found.run_id, found.project) == ("id1", "voices")
    assert found.last_row(200) == 3
    assert found.last_row(99) is None
    assert found.last_step() == 212
    assert found.last_step(end=4) == 200
    assert found.rows_after(199, end=3) == {(200, 7)}
    assert found.rows_after(100, end=5) == {(200, 7), (200, 8), (212, 7)}


def test_a_row_that_comes_again_supersedes_what_is_behind_it(tmp_path: Path) -> None:
    written(tmp_path, [(100, 0, 7), (200, 1, 7), (212, 2, 7), (216, 3, 7)])
    written(tmp_path, [(208, 2, 7)], resumed=True)
    found = Attempts.read(tmp_path)
    assert found is not None
    assert found.rows == {0: (100, 7), 1: (200, 7), 2: (208, 7)}


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    written(tmp_path, [(100, 0, 7)])
    with (tmp_path / FILE).open("a") as file:
        file.write("[200, 1")
    written(tmp_path, [(200, 1, 7)], resumed=True)
    found = Attempts.read(tmp_path)
    assert found is not None
    assert found.rows == {0: (100, 7), 1: (200, 7)}


def test_a_fresh_run_forgets_the_one_before(tmp_path: Path) -> None:
    written(tmp_path, [(100, 0, 7)])
    Attempts.forget(tmp_path)
    assert Attempts.read(tmp_path) is None
    Attempts.forget(tmp_path)


@pytest.mark.parametrize("content", [None, "", "no json\n", "[]\n", '{"id": "x"}\n'])
def test_where_there_is_no_file_there_is_no_attempt(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    assert Attempts.read(tmp_path) is None


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path, telemetry_log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    written(tmp_path / "file" / "below", [(1, 0, 7)])
    assert telemetry_log.text.count("cannot write wandb_run.jsonl") == 1


def test_rows_are_told_apart_by_their_tags() -> None:
    assert digest(["a", "b"]) == digest(["b", "a"])
    assert digest(["a", "b"]) != digest(["ab"])


def test_telemetry_ends_before_what_was_registered_after_it() -> None:
    """At the interpreter's exit: a client's own exit hook would else run first."""
    program = """
import atexit
from telemetry import shutdown

class Writes:
    def close(self, seconds=None):
        print("telemetry")

kept = Writes()
shutdown.register(kept)
atexit.register(print, "client")
shutdown.close_before_others()
"""
    root = Path(telemetry.backends.wandb.backend.__file__).parents[3]
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert ended.stdout.split() == ["telemetry", "client"]


def test_of_two_runs_at_once_the_first_keeps_its_rows(tmp_path: Path, telemetry_log: pytest.LogCaptureFixture) -> None:
    first = AttemptsFile(tmp_path, "id1", "voices", resumed=False)
    first.add(1, 0, 7)
    Attempts.forget(tmp_path)  # as a fresh run does
    second = AttemptsFile(tmp_path, "id2", "voices", resumed=False)
    second.add(5, 5, 7)
    first.add(2, 1, 7)
    second.close()
    first.close()
    found = Attempts.read(tmp_path)
    assert found is not None
    assert (found.run_id, found.rows) == ("id1", {0: (1, 7), 1: (2, 7)})
    assert telemetry_log.text.count("another run is under way in the directory") == 1
    Attempts.forget(tmp_path)
    assert Attempts.read(tmp_path) is None

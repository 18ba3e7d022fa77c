"""The stand-in W&B server: what the real client sends is there, in order and once, whatever goes wrong in between."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.programs import Program, started, wait_until
from support.wandb_server import API_KEY, Fault, Run, Server, serve
from wandb_clients import COUNTS, EDGES, GO, RATE, SAID, STEP

PROGRAM = Path(__file__).parent / "wandb_clients.py"


@contextlib.contextmanager
def client(server: Server, name: str, directory: Path, *arguments: str) -> Iterator[Program]:
    """The real client at work in a process of its own."""
    environment = server.environment(directory)
    with started([str(PROGRAM), name, str(directory), *arguments], directory, **environment) as program:
        yield program


def finish(program: Program) -> None:
    ended = program.wait()
    assert ended.status == 0, ended.said


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wandb")


@pytest.fixture(scope="module")
def served(outside: Path) -> Iterator[Server]:
    """A server that all of these clients have been at, one beside the other; its journal is read afterwards."""
    with serve(outside) as server, contextlib.ExitStack() as clients:
        others = [("shared", "rank_0"), ("shared", "rank_1"), ("offline",), ("workspace",)]
        started = [
            clients.enter_context(client(server, name, outside / "-".join([name, *rest]), *rest))
            for name, *rest in others
        ]
        for one in started:
            finish(one)
        yield server


@pytest.fixture(scope="module")
def whole(served: Server, outside: Path) -> dict[str, Run]:
    """The run of every kind of thing: ``live``, while it still runs, ``resumed`` and ``rewound``."""
    with client(served, "everything", outside / "everything") as running:
        wait_until((outside / "everything" / SAID).exists)
        state = served.wait_for(lambda state: len(state.run("whole").history()) == 3, seconds=5)
        live = state.run("whole")
        (outside / "everything" / GO).touch()
        finish(running)
    return {"live": live, "rewound": served.run("whole"), "resumed": before_rewind(served)}


def before_rewind(server: Server) -> Run:
    """The run as the journal had it until then."""
    state = type(server.state())(server.journal.blobs)
    for entry in server.journal.entries():
        if entry["kind"] == "rewind":
            break
        state.apply(entry)
    return state.run("whole")


def test_rows_and_what_the_run_is_are_there_while_it_runs(whole: dict[str, Run]) -> None:
    run = whole["live"]
    assert [row["_step"] for row in run.history()] == [0, 1, 2]
    assert run.points("loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    odd = [value for _, value in run.points("odd")]
    assert math.isnan(odd[0])
    assert odd[1:] == [math.inf, -1.0]
    assert run.config == {"lr": 0.1, "model": {"layers": 2}}
    assert (run.name, run.attribute("groupName"), run.attribute("tags")) == ("first attempt", "pair", ["a", "b"])
    assert run.exit_code is None


def test_media_tables_alerts_and_summary_are_complete(whole: dict[str, Run]) -> None:
    run = whole["resumed"]
    rows = [row for row in run.history() if "clips" in row]
    assert [row[STEP] for row in rows] == [3, 4]
    assert [rows[0]["shape"][part] for part in ("bins", "values")] == [EDGES, COUNTS]
    with wave.open(io.BytesIO(run.media(rows[0]["sound"]))) as sound:
        assert (sound.getframerate(), sound.getnframes()) == (RATE, RATE // 10)
    assert Image.open(io.BytesIO(run.media(rows[1]["face"]))).getpixel((0, 0)) == (9, 9, 9)
    first, second = run.tables("whole")
    assert [first.rows, second.rows] == [[["a", 3], ["b", 4]], [["a", 4], ["b", 5]]]
    assert [alert.title for alert in run.alerts] == ["loss is not finite"]
    assert (run.alerts[0].severity, run.alerts[0].text, run.alerts[0].wait_seconds) == ("ERROR", "at step 1", 2.0)
    assert run.summary["best"] == 0.25
    assert run.summary["loss"] == 0.125
    assert {"wandb-metadata.json", "config.yaml"} <= run.files.keys()
    assert [artifact.missing for artifact in run.artifacts] == [[]] * 4
    assert {artifact.committed for artifact in run.artifacts} == {True}


def test_increments_of_a_table_are_joined_and_their_cells_are_files(whole: dict[str, Run]) -> None:
    first, second = whole["resumed"].tables("clips")
    assert [len(first.rows), len(second.rows)] == [1, 2]
    assert second.columns == ["step", "sound", "picture"]
    assert [row[0] for row in second.rows] == [3, 4]
    assert first.rows[0] == second.rows[0]
    for step, sound, picture in second.rows:
        assert sound.startswith(b"RIFF")
        assert Image.open(io.BytesIO(picture)).getpixel((0, 0)) == (50 * step,) * 3


def test_a_resumed_run_goes_on_behind_its_rows(whole: dict[str, Run]) -> None:
    run = whole["resumed"]
    assert [row["_step"] for row in run.history()] == [0, 1, 2, 3, 4, 5]
    assert run.points("loss")[-1] == (5, 0.125)


def test_a_rewound_run_goes_on_behind_the_rows_that_it_keeps(whole: dict[str, Run]) -> None:
    run = whole["rewound"]
    assert run.rewinds == [1.0]
    assert [(row["_step"], row["loss"]) for row in run.history()] == [(0, 1.0), (1, 0.5), (2, 9.0)]
    assert run.exit_code == 0


def test_two_writers_of_one_run_overwrite_nothing(served: Server) -> None:
    run = served.run("shared")
    assert len(run.clients) == 2
    for label in ("rank_0", "rank_1"):
        assert run.points(label) == [(step, step) for step in range(4)]
        assert label in run.summary


def test_an_offline_run_is_complete_after_it_is_synced(served: Server) -> None:
    run = served.run("offline")
    assert run.points("loss") == [(step, step) for step in range(3)]
    sounds = [row[0] for row in run.tables("clips")[-1].rows]
    assert len(sounds) == len(set(sounds)) == 3
    assert run.exit_code == 0


def test_a_workspace_is_saved_and_found_at_its_address(served: Server, outside: Path) -> None:
    (view,) = served.views()
    assert (view.project, view.display_name) == ("voices", "What to look at")
    assert (outside / "workspace" / SAID).read_text() == "outputs/loss/total"


def test_the_client_asks_nothing_that_the_stand_in_does_not_know(whole: dict[str, Run], served: Server) -> None:
    assert served.state().unknown == []


def test_a_text_is_found_wherever_the_client_has_put_it(whole: dict[str, Run], served: Server) -> None:
    found = served.find("first attempt", "train/global_step", "wandb_clients.py", API_KEY, "not sent by anyone")
    assert found["first attempt"] == ["journal.jsonl"]
    assert "journal.jsonl" in found["train/global_step"]
    assert any(place.startswith("blobs/") for place in found["wandb_clients.py"])  # in the run's metadata
    assert not found.keys() & {API_KEY, "not sent by anyone"}


OUTAGES = ["killed", "refused", "answers lost"]


@pytest.fixture(scope="module")
def outages(outside: Path) -> Iterator[dict[str, tuple[Run, int]]]:
    """The run, and how many rows its client has logged, of an outage of each kind."""
    with contextlib.ExitStack() as stack:
        servers = {fault: stack.enter_context(serve(outside / fault / "server")) for fault in OUTAGES}
        directories = {fault: outside / fault / "client" for fault in OUTAGES}
        clients = [stack.enter_context(client(servers[fault], "outage", directories[fault])) for fault in OUTAGES]
        for fault, server in servers.items():
            wait_until((directories[fault] / SAID).exists)
            server.wait_for(lambda state: state.run("outage").history(), seconds=10)
        servers["killed"].kill()
        servers["refused"].fail(Fault(status=503, seconds=1.5))
        servers["answers lost"].fail(Fault(of="file_stream", status=0, accepted=True, calls=1))
        servers["refused"].wait_for(lambda state: ("file_stream", 503) in state.refused, seconds=10)
        servers["answers lost"].wait_for(lambda state: ("file_stream", 0) in state.refused, seconds=10)
        servers["killed"].start()
        for directory in directories.values():
            (directory / GO).touch()
        for one in clients:
            finish(one)
        rows = {fault: int((directory / "rows").read_text()) for fault, directory in directories.items()}
        yield {fault: (server.run("outage"), rows[fault]) for fault, server in servers.items()}


@pytest.mark.parametrize("fault", OUTAGES)
def test_rows_and_media_of_an_outage_arrive_once_and_in_order(fault: str, outages: dict[str, tuple[Run, int]]) -> None:
    run, logged = outages[fault]
    assert [row["row"] for row in run.history()] == list(range(logged))
    assert all(run.media(row["sound"]) for row in run.history() if "sound" in row)


# ----------------------------------------------------------------------------------------------------- without a client


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("alone")) as server:
        yield server


@pytest.fixture
def server(alone: Server) -> Iterator[Server]:
    yield alone
    alone.heal()


def ask(server: Server, path: str, body: Any, method: str = "POST", **headers: str) -> int:
    """The status of the answer, 0 where there is none."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, content, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (ConnectionError, urllib.error.URLError):
        return 0


def viewer(server: Server) -> int:
    return ask(server, "/graphql", {"query": "query Viewer { viewer { id } }"})


def stream(server: Server, run: str, offset: int, *rows: int, writer: str = "") -> int:
    content = [json.dumps({"_step": row}) for row in rows]
    body = {"files": {"wandb-history.jsonl": {"offset": offset, "content": content}}}
    return ask(server, f"/files/e/p/{run}/file_stream", body, **{"X-WANDB-ASYNC-CLIENT-ID": writer})


def upload(server: Server, name: str, content: bytes) -> int:
    return ask(server, f"/upload/run/e/p/uploads/{name}", content, "PUT")


def steps(server: Server, run: str) -> list[int]:
    return [row["_step"] for row in server.run(run).history()]


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500, 0])
def test_a_fault_is_for_its_kind_and_for_so_many_calls(status: int, server: Server) -> None:
    server.fail(Fault(of="graphql", status=status, calls=2))
    assert [upload(server, "beside", b"x"), stream(server, "beside", 0, 0)] == [200, 200]
    assert [viewer(server) for _ in range(3)] == [status, status, 200]
    assert server.state().refused[-2:] == [("graphql", status)] * 2


def test_a_fault_is_for_so_many_seconds_and_delays_as_told(server: Server) -> None:
    server.fail(Fault(status=500, seconds=0.5), Fault(of="upload", delay=0.3))
    began = time.monotonic()
    assert viewer(server) == 500
    while viewer(server) != 200:
        assert time.monotonic() - began < 5
    assert time.monotonic() - began >= 0.4
    began = time.monotonic()
    assert upload(server, "slow", b"x") == 200
    assert time.monotonic() - began >= 0.3
    server.heal()
    began = time.monotonic()
    assert upload(server, "slow", b"x") == 200
    assert time.monotonic() - began < 0.3


def test_a_fault_of_one_operation_leaves_the_others(server: Server) -> None:
    server.fail(Fault(of="graphql", matching="Artifact", status=403), Fault(of="upload", matching="media/", status=403))
    assert viewer(server) == 200
    assert ask(server, "/graphql", {"query": "mutation CommitArtifact { x }"}) == 403
    assert [upload(server, "media%2Fa.wav", b"x"), upload(server, "config.yaml", b"x")] == [403, 200]
    assert server.run("uploads").files.keys() & {"media/a.wav", "config.yaml"} == {"config.yaml"}


def test_an_answer_that_is_lost_follows_a_request_that_is_taken_in(server: Server) -> None:
    server.fail(Fault(of="file_stream", status=0, accepted=True, calls=1))
    assert stream(server, "lost", 0, 0, 1) == 0
    assert steps(server, "lost") == [0, 1]
    assert stream(server, "lost", 0, 0, 1) == 200
    assert stream(server, "lost", 2, 2) == 200
    assert steps(server, "lost") == [0, 1, 2]


def test_lines_lie_where_their_writer_puts_them(server: Server) -> None:
    for offset, row, writer in [(1, 11, "a"), (0, 20, "b"), (0, 10, "a")]:
        assert stream(server, "two", offset, row, writer=writer) == 200
    assert server.run("two").clients == ["a", "b"]
    of_a = [step for step in steps(server, "two") if step != 20]
    assert of_a == [10, 11]


def test_an_operation_without_an_answer_is_an_error_and_noted(server: Server) -> None:
    assert ask(server, "/graphql", {"query": "query Unheard { of }"}) == 200
    assert server.state().unknown == ["Unheard"]


def test_what_was_accepted_survives_a_kill_and_the_port_stays(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        url = server.url
        assert stream(server, "kept", 0, 0, 1) == 200
        assert upload(server, "sound", b"bytes") == 200
        server.kill()
        assert viewer(server) == 0
        with server.journal.path.open("ab") as file:
            file.write(b'{"kind": "stream", "ent')  # what was being written when it was killed
        assert steps(server, "kept") == [0, 1]
        server.start()
        assert server.url == url
        assert stream(server, "kept", 2, 2) == 200
        assert steps(server, "kept") == [0, 1, 2]
        assert server.run("uploads").files == {"sound": b"bytes"}


def test_it_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    code = """
import sys, pathlib
from support.programs import Program, started, wait_until
from support.wandb_server import Server
server = Server(pathlib.Path(sys.argv[1]))
server.start()
print(server.url, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    starter = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    port = int(starter.stdout.readline().rsplit(":", 1)[1])
    assert is_listening(port)
    starter.send_signal(signal.SIGKILL)
    starter.communicate()
    wait_until(lambda: not is_listening(port), 10)


def is_listening(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("written", ["plain", "json", "base64"])
def test_a_planted_secret_is_found_however_it_is_written(written: str, tmp_path: Path) -> None:
    secret = 'pass"wörd\\1'
    forms = {
        "plain": secret,
        "json": json.dumps(json.dumps(secret)),
        "base64": base64.b64encode(secret.encode()).decode(),
    }
    with serve(tmp_path) as server:
        assert upload(server, "log.txt", f"before {forms[written]} after".encode()) == 200
        (place,) = server.find(secret, "another")[secret]
        assert place.startswith("blobs/")

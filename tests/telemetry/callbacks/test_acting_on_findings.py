"""What is found reaches people and programs, and ends a training where that was asked for."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_training as tiny
from support.receiver import receiver
from transformers import TrainerCallback

from dashboards import status
from telemetry import StrategicTelemetry, Telemetry
from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.backends.run_files import ALERTS_FILE, RunFiles
from telemetry.backends.tensorboard import TensorBoardBackend
from telemetry.catalogue import HEALTH_FILE
from telemetry.health.monitor import COLUMNS
from telemetry.records import Alert, Record, Scalar, Table

POISONED = 3
STEPS = 8
SECRET = "hunter2-is-no-password"


class Poison(TrainerCallback):
    """A weight becomes NaN, as after an update that went wrong; each step's end is noted."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == POISONED:
            with torch.no_grad():
                next(model.parameters()).view(-1)[7] = math.nan

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.time())


class Patient(TrainerCallback):
    """Steps that take their time, as those of a real model: findings come in between."""

    def __init__(self, telemetry: StrategicTelemetry) -> None:
        self._telemetry = telemetry

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self._telemetry.session._recorder is not None:
            assert self._telemetry.session._recorder.drain()


def train(directory: Path, *others: TrainerCallback, **given: Any) -> tuple[StrategicTelemetry, MemoryBackend]:
    backend = MemoryBackend()
    own = ("alert_to", "stop_on", "backends", "logging_dir")
    arguments = {name: given.pop(name) for name in own if name in given}
    made = StrategicTelemetry(logging_steps=1, **{"backends": [backend], **arguments})
    tiny.train(directory, [made, *others], steps=STEPS, **given)
    return made, backend


def test_a_fault_reaches_an_address_with_what_to_do_and_no_secret(tmp_path: Path) -> None:
    poison = Poison()
    with receiver() as server:
        train(tmp_path, poison, alert_to=[server.address(secret=SECRET)], run_name="voices")
    ((at, path, said),) = [one for one in server.got if "values are not finite" in one[2]["title"]]  # once a worsening
    assert path == "/hook"
    assert said["type"] == "failure"
    assert "voices: values are not finite" in said["title"]
    assert f"Step {POISONED}: " in said["message"]
    assert "What to do: " in said["message"]
    assert f"python -m dashboards status {tmp_path / 'output'}" in said["message"]
    assert at - poison.ends[POISONED - 1] < 5
    assert SECRET not in json.dumps([body for *_, body in server.got])


def slow(_: BaseHTTPRequestHandler) -> None:
    threading.Event().wait(2)


def elsewhere(port: int) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("Location", f"http://127.0.0.1:{port}/elsewhere")
        handler.end_headers()

    return answer


@pytest.mark.parametrize("fault", ["slow", "gone", "answers 500", "redirects"])
def test_an_address_that_does_not_take_alerts_costs_nothing_and_is_said_once(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    poison = Poison()
    with receiver() as other:
        answers = {"slow": slow, "gone": 500, "answers 500": 500, "redirects": elsewhere(other.port)}
        with receiver(answers[fault]) as server:
            address = server.address(secret=SECRET)
            if fault != "gone":
                _, backend = train(tmp_path, poison, alert_to=address)
        if fault == "gone":
            _, backend = train(tmp_path, poison, alert_to=address)
        assert other.got == []  # nobody is sent elsewhere
    assert sorted(backend.scalars("train/loss")) == list(range(1, STEPS + 1))
    assert caplog.text.count("alerts do not reach") == 1
    assert SECRET not in caplog.text
    assert "apprise" not in {record.name for record in caplog.records}
    kept = (tmp_path / "output" / ALERTS_FILE).read_text().splitlines()
    assert len(kept) == sum(isinstance(one, Alert) for found in backend.records.values() for _, one in found)


def test_addresses_come_from_the_environment_and_are_checked_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as one, receiver() as two:
        monkeypatch.setenv("STRATEGIC_TELEMETRY_ALERT_TO", f"{one.address()} {two.address()}")
        train(tmp_path, Poison())
    assert one.got
    assert len(one.got) == len(two.got)
    with pytest.raises(ValueError, match=r"alert_to: address 2 \(carrier:\.\.\.\)") as raised:
        StrategicTelemetry(alert_to=["json://127.0.0.1/x", f"carrier://{SECRET}"])
    assert SECRET not in str(raised.value)


def test_files_for_programs_say_what_is_known(tmp_path: Path) -> None:
    _, backend = train(tmp_path, Poison(), save_strategy="steps", save_steps=2)
    output = tmp_path / "output"
    known = json.loads((output / HEALTH_FILE).read_text())
    assert (known["version"], known["state"], known["step"], known["verdict"]) == (1, "ended", STEPS, "failing")
    worst = known["checks"][0]
    assert worst["verdict"] == "failing"
    assert worst["of"] == "health"
    assert {"finding", "evidence", "what_to_do"} <= worst.keys()
    assert known["numbers"]["train/loss"] == {"step": STEPS, "value": backend.scalars("train/loss")[STEPS]}
    lines = [json.loads(line) for line in (output / ALERTS_FILE).read_text().splitlines()]
    shown = [(step, one) for found in backend.records.values() for step, one in found if isinstance(one, Alert)]
    assert [(line["step"], line["level"], line["title"], line["text"]) for line in lines] == [
        (step, one.level, one.title, one.text) for step, one in sorted(shown, key=lambda pair: pair[0])
    ]
    # Every checkpoint knows what was known when it was saved.
    verdicts = {
        step: json.loads((output / f"checkpoint-{step}" / HEALTH_FILE).read_text()) for step in range(2, STEPS + 1, 2)
    }
    assert {step: found["step"] for step, found in verdicts.items()} == {step: step for step in verdicts}
    assert verdicts[2]["verdict"] != "failing"
    assert verdicts[4]["verdict"] == "failing"


def test_what_is_known_is_written_once_a_second_and_a_finding_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    files = RunFiles()
    files.open(Run(name="run", logging_dir=tmp_path, output_dir=tmp_path))

    def known_after(step: int, *records: Record) -> int:
        files.write(step, [Scalar("train/loss", float(step)), *records])
        return int(json.loads((tmp_path / HEALTH_FILE).read_text())["step"])

    def judged(verdict: str) -> Table:
        return Table("health/checks", COLUMNS, (("a loss", verdict, "", "", ""),))

    assert [known_after(step) for step in (1, 2, 3)] == [1, 1, 1]
    now = 0.9
    files.saved(checkpoint)  # with all that is known, which puts the run's own file off no longer
    assert json.loads((checkpoint / HEALTH_FILE).read_text())["step"] == 3
    now = 1.0
    assert [known_after(step) for step in (4, 5)] == [4, 4]
    assert [known_after(6, judged("ok")), known_after(7, judged("ok")), known_after(8, judged("failing"))] == [6, 6, 8]
    assert [known_after(9, Alert("health/alerts", "a loss", "is bad")), known_after(10)] == [9, 9]
    files.close()
    ended = json.loads((tmp_path / HEALTH_FILE).read_text())
    assert (ended["state"], ended["step"], ended["numbers"]["train/loss"]["value"]) == ("ended", 10, 10.0)


@pytest.mark.parametrize("asked", ["failing", "nonfinite"])
def test_a_finding_stops_the_training_with_a_checkpoint_that_resumes(tmp_path: Path, asked: str) -> None:
    made = StrategicTelemetry(logging_steps=1, backends=[MemoryBackend()], stop_on=asked)
    tiny.train(tmp_path, [made, Poison(), Patient(made)], steps=STEPS)
    assert made.stopped.startswith("values are not finite (step 3")
    (checkpoint,) = (tmp_path / "output").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == POISONED + 1
    assert json.loads((checkpoint / HEALTH_FILE).read_text())["verdict"] == "failing"


def test_nothing_stops_that_was_not_asked_for(tmp_path: Path) -> None:
    made, backend = train(tmp_path, Poison(), stop_on=["reference_used"])
    assert made.stopped == ""
    assert max(backend.scalars("train/loss")) == STEPS
    with pytest.raises(ValueError, match="stop_on: unknown fire: choose from failing, warning, asked_labels"):
        StrategicTelemetry(stop_on=["fire"])


def test_a_loop_asks_whether_to_stop(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Telemetry(model, tmp_path, optimizer, 1, [MemoryBackend()], stop_on="nonfinite") as telemetry:
        for step in range(1, 50):
            with telemetry.step():
                loss = model(torch.full((2, 3), math.nan if step == POISONED else 1.0)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            telemetry.log({"loss": loss.item()})
            if telemetry.should_stop():
                break
            time.sleep(0.02)
    assert POISONED <= step < 49
    assert "values are not finite" in telemetry.stopped


def test_status_follows_what_a_run_has_written(tmp_path: Path) -> None:
    train(tmp_path, Poison(), backends=[TensorBoardBackend()], logging_dir=tmp_path / "logs")
    (found,) = status.look([tmp_path])
    assert (found.state, found.verdict, found.code) == ("ended", "failing", status.FAILING)
    assert found.alerts[-1]["title"]

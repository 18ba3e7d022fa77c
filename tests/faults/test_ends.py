"""However a process ends, what was measured before is shown, and it ends as it would have."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import LOGGED, MEASURED, assert_every_step, run, scenario, steps_of, wrote
from scenarios import RAISES
from support.programs import started, wait_until
from support.tiny_training import Outcome, outcome, progress, rows

SEEN = 5
PROMPT = 15.0  # half of what telemetry may take to write out what is left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_the_middle_costs_at_most_the_last_due_step(number: signal.Signals, tmp_path: Path) -> None:
    with started(scenario("slow_steps", tmp_path), tmp_path) as program:
        wait_until(lambda: wrote(tmp_path, MEASURED[0], SEEN) or program.process.poll() is not None)
        program.process.send_signal(number)
        ended = program.wait()
    assert ended.status == -number, ended.said
    last = max(progress(tmp_path))  # noted before telemetry hears that the step has ended
    assert last >= SEEN
    found = steps_of(tmp_path)
    for tag in MEASURED:
        assert found[tag] in (list(range(1, last + 1)), list(range(1, last))), tag
    assert found[LOGGED] == list(range(1, max(found[LOGGED]) + 1))
    assert max(found[LOGGED]) >= last - 1


def test_sigterm_while_the_end_of_training_is_written(tmp_path: Path) -> None:
    """The handler must not end the process under the thread that writes."""
    steps = 20
    ended = run("terminated_while_writing", tmp_path)
    assert ended.status == -signal.SIGTERM, ended.said
    assert_every_step(tmp_path, range(1, steps + 1))


def test_an_exception_in_the_training_loop(tmp_path: Path) -> None:
    ended = run("training_raises", tmp_path)
    assert ended.status == 1
    assert ended.said.rstrip().endswith("ZeroDivisionError: the fault of this test")
    assert ended.said.count("Traceback") == 1
    assert list(progress(tmp_path)) == list(range(1, RAISES))
    assert_every_step(tmp_path, range(1, RAISES))
    assert ended.at - progress(tmp_path)[RAISES - 1] < PROMPT


def test_forked_data_loaders(tmp_path: Path, untouched: Callable[..., Outcome]) -> None:
    steps = 24
    ended = run("forked_loaders", tmp_path)
    assert ended.status == 0, ended.said
    assert outcome(tmp_path) == untouched(steps=steps, dataset=rows(16))
    assert_every_step(tmp_path, range(1, steps + 1))  # of the only event file
    loaders = json.loads((tmp_path / "loaders.json").read_text())
    assert len(loaders["seen"]) >= 2 * 3  # two in each epoch
    assert loaders["left"] == []
    assert not [pid for pid in loaders["seen"] if Path(f"/proc/{pid}/stat").exists()]
    assert ended.at - progress(tmp_path)[steps] < PROMPT


def test_a_forked_copy_of_the_process_ends_at_once(tmp_path: Path) -> None:
    ended = run("forked_child_exits", tmp_path)
    assert ended.status == 0, ended.said
    (seconds,) = json.loads((tmp_path / "seconds.json").read_text())
    assert seconds < PROMPT
    assert_every_step(tmp_path, range(1, 21))

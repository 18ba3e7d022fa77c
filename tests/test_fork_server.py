"""A program that is a fork of the server is as one with an interpreter of its own: it starts, is told and ends so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.programs import BRIEF_FORK, FORK, started, wait_until

SAYS = """
import atexit, os, sys, threading, time
atexit.register(print, "exit hook")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
print(sys.argv[1:], os.getcwd(), os.environ["ASKED"], __name__, sys.stdin.read())
"""
FORKS = pytest.mark.parametrize("fork", [FORK, BRIEF_FORK], ids=["whole", "brief"])


def run(python: tuple[str, ...], code: str, directory: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [*python, "-c", code, "a b", "é"],
        input="typed",
        env={**os.environ, "ASKED": "for", "PYTHONUNBUFFERED": "1"},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.rstrip().rpartition("\n")[2]


@FORKS
@pytest.mark.parametrize(
    "end",
    ["", "raise ValueError('of its own')", "sys.exit(3)", "sys.exit('said')", "sys.exit()", "os.kill(os.getpid(), 9)"],
)
def test_it_is_told_and_ends_as_any_other(end: str, fork: tuple[str, ...], tmp_path: Path) -> None:
    ended = run(fork, SAYS + end, tmp_path)
    assert ended == run((sys.executable,), SAYS + end, tmp_path)
    assert "typed" in ended[1] or "kill" in end


@FORKS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_it(fork: tuple[str, ...], number: signal.Signals) -> None:
    code = f"""
import signal, sys, time
signal.signal({int(number)}, lambda *_: sys.exit(5))
print("ready", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([*fork, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(60) == 5


def test_what_has_imported_torch_is_not_imported_again(tmp_path: Path) -> None:
    assert run(FORK, "import sys; print('torch' in sys.modules, 'wandb' in sys.modules)", tmp_path)[1] == "True False\n"


def test_a_program_goes_with_who_has_asked_for_it(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([*FORK, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    wait_until(lambda: not psutil.pid_exists(pid))


def test_a_program_goes_with_the_context_that_started_it(tmp_path: Path) -> None:
    with started(["-c", "import time; time.sleep(600)"], tmp_path) as program:
        assert psutil.pid_exists(program.process.pid)
        with pytest.raises(AssertionError, match="no end after"):
            program.wait(0.1)
    assert program.process.returncode == -signal.SIGKILL


def test_the_hubs_cache_is_where_its_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    code = "from huggingface_hub import constants; print(constants.HF_HOME)"
    assert run(FORK, code, tmp_path)[1] == f"{tmp_path / 'hub'}\n"

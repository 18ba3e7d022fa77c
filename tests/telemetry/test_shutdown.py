"""A process that ends while telemetry runs: everything flushed is written, and it ends as it would have without."""

from __future__ import annotations

import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
from support.programs import FORK
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

ENDS_WITHIN = 60.0
STEPS = 5
RECORDS = f"""
import sys, os, signal, threading, time, ctypes
from pathlib import Path
import torch
from telemetry.backends.base import Run
from telemetry.backends.tensorboard import TensorBoardBackend
from telemetry.delivery.recorder import Recorder
from telemetry.records import Sum

class Slow(TensorBoardBackend):
    def write(self, step, records):
        time.sleep(0.05)
        super().write(step, records)

def record():
    recorder = Recorder([Slow()])
    recorder.open(Run(Path(sys.argv[1])))
    for step in range(1, {STEPS} + 1):
        recorder.metric("outputs/steps", Sum(torch.tensor(10 * step)))
        recorder.flush(step)
    return recorder

def ready():
    print("ready", flush=True)
"""
NO_RECORDS = "record = lambda: None\n"


def start(body: str, directory: Path, with_telemetry: bool = True) -> subprocess.Popen[str]:
    """A Python process with ``record()``, which records five steps and closes nothing, and ``ready()``."""
    script = RECORDS + ("" if with_telemetry else NO_RECORDS) + textwrap.dedent(body)
    return subprocess.Popen(
        [*FORK, "-c", script, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], terminate: bool = False) -> tuple[int, str, str]:
    """Exit status, output and errors of a process, told to end when it is ready."""
    try:
        said = ""
        if terminate:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said == "ready\n", process.communicate(timeout=ENDS_WITHIN)[1]
            process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=ENDS_WITHIN)
        return process.returncode, said + output, errors
    finally:
        process.kill()
        process.wait()


def written(directory: Path) -> dict[int, float]:
    """Step → value of the tag in the event files, each once."""
    found: dict[int, float] = {}
    for file in sorted(directory.rglob("*tfevents*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == "outputs/steps" and value.HasField("simple_value"):
                    assert event.step not in found
                    found[event.step] = value.simple_value
    return found


ALL_STEPS = {step: 10.0 * step for step in range(1, STEPS + 1)}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("record()", 0),
        ("record()\nraise ValueError('of its own')", 1),
        ("record()\nsys.exit(3)", 3),
        ("recorder = record()\nrecorder.close()", 0),
    ],
    ids=["returns", "raises", "exits", "closes"],
)
def test_a_process_that_ends_by_itself_writes_everything(body: str, status: int, tmp_path: Path) -> None:
    code, _, errors = end(start(body, tmp_path))
    assert code == status
    assert ("ValueError: of its own" in errors) == ("raise" in body)
    assert written(tmp_path) == ALL_STEPS


SLEEPS = "time.sleep(600)"
# A mutex that is locked twice: the thread never comes back to the interpreter, whatever signal comes.
STUCK_IN_C = """
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
libc.pthread_mutex_lock(mutex)
ready()
libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("body", [f"record()\nready()\n{SLEEPS}", f"record()\n{STUCK_IN_C}"], ids=["sleeps", "in C"])
@pytest.mark.parametrize("with_telemetry", [True, False])
def test_sigterm_ends_it_as_ever_and_everything_is_written(body: str, with_telemetry: bool, tmp_path: Path) -> None:
    code, _, errors = end(start(body, tmp_path, with_telemetry), terminate=True)
    assert code == -signal.SIGTERM
    assert errors == ""
    assert written(tmp_path) == (ALL_STEPS if with_telemetry else {})


OWN_HANDLER = """
def own(number, frame):
    print("own handler", flush=True)
    sys.exit(7)
"""
INSTALL = "signal.signal(signal.SIGTERM, own)"


@pytest.mark.parametrize("order", [f"{INSTALL}\nrecord()", f"record()\n{INSTALL}"], ids=["before", "after"])
def test_a_handler_of_the_programs_own_is_left_alone(order: str, tmp_path: Path) -> None:
    code, output, _ = end(start(f"{OWN_HANDLER}\n{order}\nready()\n{SLEEPS}", tmp_path), terminate=True)
    assert code == 7
    assert output == "ready\nown handler\n"
    assert written(tmp_path) == ALL_STEPS  # at the interpreter's exit


def test_a_handler_that_calls_the_one_before_it_still_ends_the_process(tmp_path: Path) -> None:
    body = f"""
    record()
    before = signal.getsignal(signal.SIGTERM)
    def own(number, frame):
        print("own handler", flush=True)
        before(number, frame)
    {INSTALL}
    ready()
    {SLEEPS}
    """
    code, output, _ = end(start(body, tmp_path), terminate=True)
    assert code == -signal.SIGTERM
    assert output == "ready\nown handler\n"
    assert written(tmp_path) == ALL_STEPS


USES_ASYNCIO = """
import asyncio
async def later():
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, print, "interrupted")
asyncio.run(later())
"""


@pytest.mark.parametrize("touch", [USES_ASYNCIO, "signal.set_wakeup_fd(-1)"], ids=["asyncio", "no pipe"])
def test_sigterm_ends_it_after_others_have_taken_the_wake_up_pipe(touch: str, tmp_path: Path) -> None:
    code, _, _ = end(start(f"record()\n{touch}\nready()\n{SLEEPS}", tmp_path), terminate=True)
    assert code == -signal.SIGTERM
    assert written(tmp_path) == ALL_STEPS


def test_sigterm_ends_it_where_another_library_looks_at_it_first(tmp_path: Path) -> None:
    body = f"""
    record()
    import faulthandler
    # Of all threads it would walk the frames while they go on, and now and then end in a segmentation fault.
    faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)
    ready()
    {SLEEPS}
    """
    code, _, errors = end(start(body, tmp_path), terminate=True)
    assert code == -signal.SIGTERM
    assert "most recent call first" in errors
    assert written(tmp_path) == ALL_STEPS


NO_THREADS = """
def refuse(_thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
"""
NO_DESCRIPTORS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
"""


@pytest.mark.parametrize(
    "body",
    [f"{NO_THREADS}\nrecord()", f"record().close()\n{NO_THREADS}", f"{NO_DESCRIPTORS}\nrecord()"],
    ids=["no threads", "no threads later", "no descriptors"],
)
def test_sigterm_ends_it_where_threads_or_descriptors_have_run_out(body: str, tmp_path: Path) -> None:
    code, _, errors = end(start(f"{body}\nready()\n{SLEEPS}", tmp_path), terminate=True)
    assert code == -signal.SIGTERM
    assert "Exception ignored" not in errors


def test_other_signals_than_sigterm_end_nothing(tmp_path: Path) -> None:
    body = """
    record()
    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    print("alive", seen)
    """
    code, output, _ = end(start(body, tmp_path))
    assert (code, output) == (0, "alive [1]\n")
    assert written(tmp_path) == ALL_STEPS


@pytest.mark.parametrize("with_telemetry", [True, False])
def test_a_forked_child_ends_by_sigterm_and_its_parent_goes_on(with_telemetry: bool, tmp_path: Path) -> None:
    body = """
    recorder = record()
    child = os.fork()
    if child == 0:
        time.sleep(600)
    os.kill(child, signal.SIGTERM)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    time.sleep(0.5)
    print("parent goes on")
    """
    code, output, _ = end(start(body, tmp_path, with_telemetry))
    assert (code, output) == (0, "child -15\nparent goes on\n")
    assert written(tmp_path) == (ALL_STEPS if with_telemetry else {})


def test_a_forked_child_that_exits_waits_for_nothing(tmp_path: Path) -> None:
    body = """
    recorder = record()
    child = os.fork()
    if child == 0:
        began = time.monotonic()
        sys.exit(0)
    began = time.monotonic()
    assert os.waitpid(child, 0)[1] == 0
    print("quick" if time.monotonic() - began < 10 else "slow")
    """
    code, output, _ = end(start(body, tmp_path))
    assert (code, output) == (0, "quick\n")
    assert written(tmp_path) == ALL_STEPS


def test_sigterm_with_a_backend_that_blocks_ends_within_the_bound(tmp_path: Path) -> None:
    """The backend beside it has everything; the process does not wait longer than telemetry is allowed to."""
    body = f"""
    from telemetry import shutdown
    shutdown.TERMINATE_SECONDS = 2.0
    class Blocks(TensorBoardBackend):
        name = "blocks"
        def write(self, step, records):
            time.sleep(600)
    both = [Blocks(), Slow()]
    recorder = Recorder(both)
    recorder.open(Run(Path(sys.argv[1])))
    for step in range(1, {STEPS} + 1):
        recorder.metric("outputs/steps", Sum(torch.tensor(10 * step)))
        recorder.flush(step)
    ready()
    time.sleep(600)
    """
    code, _, _ = end(start(body, tmp_path), terminate=True)
    assert code == -signal.SIGTERM
    assert written(tmp_path) == ALL_STEPS

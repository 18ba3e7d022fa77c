"""Runs that report to W&B with the real client, as a program: ``wandb_runs.py DIRECTORY URL``.

Each scenario is a fork, so that the imports are paid once and all run at the same time. It leaves in ``DIRECTORY/NAME``
what the memory backend saw of it (``seen.pickle``), the client's files and what it logged (``said.txt``).
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from support.programs import wait_until
from support.tiny_training import train
from support.wandb_server import Server, client_environment
from transformers import TrainerCallback
from wandb_facts import (
    CHECKPOINT,
    CRASHED,
    END,
    ENVIRONMENT_TOKEN,
    EVERY,
    GO,
    HUB_TOKEN,
    OTHER_KEY,
    PASSWORD,
    SAID,
    SEEN,
    STAND_IN,
    STEPS,
    WAITS,
    WAITS_AT,
)

import telemetry.backends.wandb.backend
import telemetry.backends.wandb.client
import telemetry.backends.wandb.values
import telemetry.delivery.recorder
from telemetry import StrategicTelemetry, TensorBoardBackend, WandbBackend
from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.delivery.recorder import Recorder
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table

PATIENCE = 90.0
RATE = 8000

Scenario = Callable[[Path], None]


class WaitsForGo(TrainerCallback):
    """Holds training up behind a step until the test says go, or has not for long."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WAITS_AT:
            (self._directory / WAITS).touch()
            wait_until((self._directory / GO).exists)


def training(directory: Path) -> None:
    """A real Trainer with everything on, and secrets wherever they may be."""
    sys.argv = ["train.py", "--hub_token", HUB_TOKEN, f"--db_password={PASSWORD}", "--lr", "0.01"]
    os.environ["SOME_SERVICE_TOKEN"] = ENVIRONMENT_TOKEN
    memory = MemoryBackend()
    watching = StrategicTelemetry(
        logging_steps=1, backends=[memory, TensorBoardBackend(), WandbBackend()], logging_dir=directory / "logs"
    )
    train(
        directory,
        [watching, WaitsForGo(directory)],
        steps=STEPS,
        run_name=f"with {ENVIRONMENT_TOKEN}",
        hub_token=HUB_TOKEN,
        lr_scheduler_kwargs={"api_key": OTHER_KEY},
        lr_scheduler_type="constant",
    )
    keep(directory, memory)


def records_of(step: int) -> list[Record]:
    """Every kind of record."""
    sound = Clip(np.sin(np.arange(800, dtype=np.float32) * step), RATE, f"speaker {step}")
    loud = Clip(np.array([3.0, np.nan, -0.5], np.float32), RATE, "loud")
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3) + step
    clip, mel = Audio("zero_shot/clip_0/generated", (sound,)), Image("zero_shot/clip_0/mel", picture)
    odd = [float("nan"), float("inf"), -float("inf")][step % 3]
    return [
        *(Scalar("outputs/loss/total", 1 / step), Scalar("outputs/accuracy/text", 0.1 * step), Scalar("odd", odd)),
        *(clip, mel, Audio("inputs/reference", (sound, loud)), Image("attention/mass", picture[..., 0])),
        Table(
            "zero_shot/clips", ("sample", "cer", "sound", "mel"), (("a", 0.5 * step, clip, mel), ("b", None, None, mel))
        ),
        Table("health/checks", ("rule", "found"), (("eos", step if step < 2 else "nothing"),)),
        Alert("health/eos", "no end of stream", f"at step {step}", "error"),
        Alert("health/nan", "no end of stream", f"at step {step}", "info"),
    ]


def everything(directory: Path) -> None:
    """Every kind of record, on three steps."""
    memory = MemoryBackend()
    recorder = opened(directory, [memory, WandbBackend()])
    for step in (1, 2, 3):
        recorder.write(step, records_of(step))
    recorder.close()
    keep(directory, memory)


def everything_offline(directory: Path) -> None:
    """The same without a key."""
    del os.environ["WANDB_API_KEY"], os.environ["WANDB_MODE"]
    os.environ["HOME"] = str(directory)
    everything(directory)


def attempt(directory: Path, start: int, end: int) -> Recorder:
    """Steps of one attempt: each its numbers, a table, and what the Trainer logs, of the attempt that begins there."""
    recorder = opened(directory, [TensorBoardBackend(), WandbBackend()], start)
    for step in range(start + EVERY, end + 1, EVERY):
        recorder.write(step, [Scalar("x", float(step)), Table("t", ("step", "of"), ((step, start),))])
        recorder.write(step, [Scalar("train/of", float(start))])
    return recorder


def crashed_and_resumed(directory: Path) -> None:
    """Killed at step 212, once everything is on the server; goes on from checkpoint 200."""
    if not forked(lambda: killed_behind_the_checkpoint(directory)):
        raise AssertionError("it was to be killed")
    attempt(directory, CHECKPOINT, END).close()


def crashed_and_not_rewound(directory: Path) -> None:
    """The same with a server that cannot take rows back."""
    init = wandb.init

    def refuses_to_rewind(**arguments: Any) -> Any:
        if "resume_from" in arguments:
            raise wandb.errors.UsageError("rewinding is not enabled")
        return init(**arguments)

    wandb.init = refuses_to_rewind
    crashed_and_resumed(directory)


def killed_behind_the_checkpoint(directory: Path) -> None:
    recorder = attempt(directory, 0, CRASHED)
    assert recorder.drain(PATIENCE)
    server = Server(Path(os.environ[STAND_IN]))
    wait_until(lambda: has_all(server, os.environ["WANDB_PROJECT"]), unready=(KeyError, IndexError, ValueError))
    os.kill(os.getpid(), signal.SIGKILL)


def has_all(server: Server, project: str) -> bool:
    """Whether everything up to the crash has reached the server."""
    (run,) = [run for run in server.runs() if run.project == project]
    return run.points("train/of")[-1][0] == run.tables("t")[-1].rows[-1][0] == CRASHED


def joined(directory: Path) -> None:
    """The user's own run: telemetry is a guest."""
    run = wandb.init(project="mine", id="mine", dir=str(directory), config={"own": 1})
    recorder = opened(directory, [WandbBackend(trainer_logs=False)])
    recorder.write(7, [Scalar("outputs/loss/total", 0.5), Scalar("train/loss", 0.25)])
    recorder.close()
    assert wandb.run is run
    run.log({"after": 1.0})
    run.finish()


def rows_of_the_owner(directory: Path) -> None:
    """The user numbers rows by training's steps, before and after telemetry's of the step, and after training."""
    run = wandb.init(project="rows_of_the_owner", dir=str(directory))
    recorder = opened(directory, [WandbBackend()])
    for step in range(1, STEPS + 1):
        run.log({"mine": step}, step=step)
        recorder.write(step, [Scalar("x", float(step)), Table("t", ("step",), ((step,),))])
        recorder.write(step, [Scalar("train/of", float(step))])
        assert recorder.drain(PATIENCE)
        run.log({"late": step}, step=step)
    recorder.close()
    run.log({"mine": STEPS + 1}, step=STEPS + 1)
    run.finish()


def each_its_own(directory: Path) -> None:
    """A training inside of another."""
    outer, inner = opened(directory / "outer", [WandbBackend()]), opened(directory / "inner", [WandbBackend()])
    for recorder, steps in ((outer, (1, 2)), (inner, (1, 2, 3)), (outer, (3,))):
        for step in steps:
            recorder.write(step, [Scalar("x", float(step))])
            assert recorder.drain(PATIENCE)
    inner.close()
    outer.write(4, [Scalar("x", 4.0)])
    outer.close()


def finished_in_between(directory: Path) -> None:
    """By the user, who had begun it."""
    wandb.init(project="finished_in_between", dir=str(directory))
    recorder = opened(directory, [WandbBackend()])
    for step in (1, 2, 3):
        recorder.write(step, [Scalar("x", float(step)), Table("t", ("step",), ((step,),))])
        assert recorder.drain(PATIENCE)
        if step == 2:
            wandb.finish()
    recorder.close()
    assert wandb.run is None


def two_ranks(directory: Path) -> None:
    """A training on two ranks, of which one reports."""
    on_two_ranks(directory, every_rank=False)


def two_ranks_that_write(directory: Path) -> None:
    """A training on two ranks, each a writer of the one run."""
    on_two_ranks(directory, every_rank=True)


def on_two_ranks(directory: Path, every_rank: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    children = [started(lambda rank=rank: one_rank(directory, rank, every_rank)) for rank in (0, 1)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def one_rank(directory: Path, rank: int, every_rank: bool) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    memory = MemoryBackend()
    backends = [memory, WandbBackend(every_rank=every_rank)]
    watching = StrategicTelemetry(["inputs"], logging_steps=1, backends=backends, logging_dir=directory / "logs")
    train(directory, [watching], steps=3, ddp_backend="gloo")
    if rank == 0:
        keep(directory, memory)
    torch.distributed.destroy_process_group()


def opened(directory: Path, backends: list[Any], start: int = 0) -> Recorder:
    recorder = Recorder(backends)
    recorder.open(Run(directory / "logs", start, "a run", {"lr": 0.1, "model": {"layers": 2}}, directory / "output"))
    return recorder


def keep(directory: Path, memory: MemoryBackend) -> None:
    (directory / SEEN).write_bytes(pickle.dumps(dict(memory.records)))


SCENARIOS: tuple[Scenario, ...] = (
    training,
    everything,
    everything_offline,
    crashed_and_resumed,
    crashed_and_not_rewound,
    joined,
    rows_of_the_owner,
    each_its_own,
    finished_in_between,
    two_ranks,
    two_ranks_that_write,
)


def started(action: Callable[[], None]) -> int:
    """A fork that does something; its exit status is 0 when that raised nothing."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        action()
        status = 0
    except BaseException:
        logging.exception("it failed")
        raise
    finally:
        os._exit(status)


def forked(action: Callable[[], None]) -> int:
    """Exit status of a fork."""
    return os.waitpid(started(action), 0)[1]


def in_directory(scenario: Scenario, directory: Path, url: str) -> Iterator[int]:
    """Start a scenario with a directory, a log and a client of its own."""

    def run() -> None:
        directory.mkdir()
        said = os.open(directory / SAID, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update(client_environment(url, directory / "client"), WANDB_PROJECT=scenario.__name__)
        del os.environ["WANDB_DIR"]
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
        scenario(directory)

    yield started(run)


def main() -> None:
    # All scenarios share few cores: what is tested is what arrives, not the bounds on waiting for it.
    telemetry.delivery.recorder.DRAIN_SECONDS = 2 * PATIENCE
    root, url = Path(sys.argv[1]), sys.argv[2]
    children = {
        child: scenario.__name__
        for scenario in SCENARIOS
        for child in in_directory(scenario, root / scenario.__name__, url)
    }
    failed = [name for child, name in children.items() if os.waitpid(child, 0)[1] != 0]
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()

"""The training script where W&B's server cannot be reached: it starts at once, ends well, and keeps the run on disk."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support import programs
from support.wandb_server import client_environment
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import trainer.train_v2_ddp
from trainer.demo.prepare import Demonstration

START_SECONDS = 5.0
STEPS = 3


@pytest.fixture
def dead_address() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_the_script_trains_as_if_the_server_were_there(
    tiny_model_path: Path, demo: Demonstration, dead_address: str, tmp_path: Path
) -> None:
    command = [
        *(str(trainer.train_v2_ddp.__file__), "--model_path", str(tiny_model_path)),
        *("--train_data_file", str(demo.train_file), "--output_dir", str(tmp_path / "output")),
        *("--logging_dir", str(tmp_path / "logs"), "--max_steps", str(STEPS), "--report_to", "tensorboard", "wandb"),
        *("--enable_strategic_logging", "--strategic_logging_components", "inputs"),
        *("--strategic_logging_steps", "1"),
    ]
    ended = programs.run(
        command, tmp_path, CUDA_VISIBLE_DEVICES="", **client_environment(dead_address, tmp_path / "client")
    )
    assert ended.status == 0, ended.said[-3000:]
    assert ended.said.count("wandb sync --include-online") == 1
    (events,) = (tmp_path / "logs").glob("*tfevents*")
    opened, *written = EventFileLoader(str(events)).Load()
    assert {event.step for event in written if event.summary.value} >= set(range(1, STEPS + 1))
    first = min(event.wall_time for event in written if event.step == 1 and event.summary.value)
    assert first - opened.wall_time < START_SECONDS
    (run,) = (path for path in (tmp_path / "client").glob("**/offline-run-*") if path.is_dir())
    assert any(file.stat().st_size > 1000 for file in run.glob("*.wandb"))

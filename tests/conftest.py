"""Shared by all tests."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from support import fork_server

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # of this process and those that it starts: tests run side by side, on small models

hypothesis.settings.register_profile("no deadline", deadline=None)  # an example takes as long as the machine is busy
hypothesis.settings.load_profile("no deadline")

TESTS = Path(__file__).parent
# Those that take the longest begin, so that no worker is left with one in the end; slowest first.
SLOWEST_FIRST = (
    "distributed/test_bit_identity.py",
    "faults/test_wandb_faults.py",
    "faults/test_resume.py",
    "trainer/test_higgs_trainer.py",
    "test_demo_run.py",
    "trainer/test_train_script.py",
    "telemetry/backends/test_wandb.py",
    "faults/test_backend_faults.py",
    "telemetry/test_shutdown.py",
    "faults/test_ends.py",
    "telemetry/test_reduction.py",
    "telemetry/callbacks/test_alone_on_a_trainer.py",
    "trainer/test_demo.py",
    "faults/test_rank_faults.py",
    "distributed/test_conditioning_on_ranks.py",
    "distributed/test_fault_on_one_rank.py",
    "distributed/test_ranks_equal_one_process.py",
    "telemetry/callbacks/test_isolation.py",
    "trainer/test_loss.py",
    "telemetry/backends/test_tensorboard.py",
    "telemetry/callbacks/test_clip_log.py",
    "distributed/test_clips_on_ranks.py",
    "distributed/test_trl_on_ranks.py",
    "telemetry/backends/test_wandb_server.py",
    "faults/test_endurance.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        forks = fork_server.serving()
        os.environ[fork_server.ADDRESS] = forks.__enter__()
        config.add_cleanup(lambda: forks.__exit__(None, None, None))
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":  # where tests run
        importlib.import_module("trainer")  # makes an installed torchaudio importable before transformers imports it


@pytest.hookimpl(trylast=True)  # after the order was made random: inside of a file it stays so
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(SLOWEST_FIRST)}
    gone = [str(path) for path in places if not path.exists()]
    if gone:
        raise pytest.UsageError(f"SLOWEST_FIRST in {__file__} names files that are gone: {', '.join(gone)}")
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Keep what was imported out of every later collection: each Trainer makes one at its end, of half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_logging_directory() -> Iterator[None]:
    """No test finds the logging directory that the training script has named for the Trainer in another."""
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    yield
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)

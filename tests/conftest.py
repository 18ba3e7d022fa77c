"""Shared by all tests."""

from __future__ import annotations

import importlib
import os

import pytest
from support import fork_server

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, on models that one thread is enough for


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        forks = fork_server.serving()
        os.environ[fork_server.ADDRESS] = forks.__enter__()
        config.add_cleanup(lambda: forks.__exit__(None, None, None))
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":  # where tests run
        importlib.import_module("trainer")  # makes an installed torchaudio importable before transformers imports it

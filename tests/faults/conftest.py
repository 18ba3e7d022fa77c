"""What a training is without telemetry and without a fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_training import Outcome, train


@pytest.fixture
def untouched(tmp_path: Path) -> Callable[..., Outcome]:
    """Trains as a scenario does, with nothing to watch it."""
    (directory := tmp_path / "untouched").mkdir()
    return lambda **arguments: train(directory, **arguments)

"""Runs programs in processes of their own, and reads what they leave behind."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from support import programs
from support.programs import Ended
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.util.tensor_util import make_ndarray

HERE = Path(__file__).parent
LOGS = "logs"

# What the callbacks measure of each due step of the tiny text model, one tag of each; and what the Trainer logs.
MEASURED = ("inputs/tokens/total", "outputs/loss/text", "gradients/total_norm", "telemetry/step_seconds")
LOGGED = "train/loss"


def scenario(name: str, directory: Path) -> list[str]:
    """The arguments of one scenario."""
    return [str(HERE / "scenarios.py"), name, str(directory)]


def run(name: str, directory: Path) -> Ended:
    """Run a scenario to its end."""
    return programs.run(scenario(name, directory), directory)


def on_two_ranks(name: str, directory: Path) -> Ended:
    """Run a scenario on two ranks, by torchrun."""
    return programs.run(programs.on_ranks(scenario(name, directory)), directory)


def points(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → ``(step, value)`` in the order of an event file, twice where it is there twice."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.tensor.dtype == DT_FLOAT and not value.tensor.tensor_shape.dim:
                found[value.tag].append((event.step, float(make_ndarray(value.tensor))))
    return found


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What is in a run's only event file."""
    (path,) = (directory / LOGS).iterdir()
    return points(path)


def steps_of(directory: Path) -> dict[str, list[int]]:
    """Tag → steps in the order of a run's only event file."""
    return {tag: [step for step, _ in found] for tag, found in scalars(directory).items()}


def steps_in_files(directory: Path, tag: str) -> list[int]:
    """Steps that hold a tag in the event files of all attempts of a run, in their order."""
    paths = sorted((directory / LOGS).iterdir()) if (directory / LOGS).is_dir() else []
    return [step for path in paths for step, _ in points(path).get(tag, ())]


def wrote(directory: Path, tag: str, step: int) -> bool:
    """Whether a step is in the event files of a run already. There is none before the first."""
    return step < 1 or step in steps_in_files(directory, tag)


def assert_every_step(directory: Path, steps: Sequence[int]) -> None:
    """Each of these steps is there once, in order, of every callback and of the Trainer; finite."""
    found = scalars(directory)
    for tag in (*MEASURED, LOGGED):
        assert [step for step, _ in found[tag]] == list(steps), tag
        assert all(math.isfinite(value) for _, value in found[tag]), tag

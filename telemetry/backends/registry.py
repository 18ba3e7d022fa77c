"""Every backend by its name. Nothing of a backend is imported before it is made."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telemetry.backends.base import Backend


@dataclass(frozen=True)
class Registered:
    """One backend.

    Attributes:
        home: module and class, with a colon between them.
        opened: how people open what it shows, as Markdown.
        extra: of this package, brings its client; "" where it needs none.
        reported: whether it is a destination that ``--report_to`` names.
        in_all: whether ``--report_to all`` means it too.
    """

    home: str
    opened: str
    extra: str = ""
    reported: bool = True
    in_all: bool = False


BACKENDS = {
    "console": Registered("telemetry.backends.console:ConsoleBackend", "the log", reported=False),
    "tensorboard": Registered(
        "telemetry.backends.tensorboard:TensorBoardBackend",
        "`tensorboard --logdir DIRECTORY`, or `python -m dashboards report DIRECTORY`",
        in_all=True,
    ),
    "wandb": Registered(
        "telemetry.backends.wandb:WandbBackend",
        "the run's page; `python -m dashboards wandb` makes the workspace",
        extra="wandb",
        in_all=True,
    ),
    "trackio": Registered(
        "telemetry.backends.trackio:TrackioBackend", "`trackio show --project PROJECT`", extra="trackio"
    ),
    "memory": Registered(
        "telemetry.backends.memory:MemoryBackend", "its `records`, in a notebook or test", reported=False
    ),
}
DESTINATIONS = tuple(name for name, backend in BACKENDS.items() if backend.reported)

ALERT_TO = "STRATEGIC_TELEMETRY_ALERT_TO"


def make_backend(name: str, **options: Any) -> Backend:
    """Make the backend of a name, with those of the options that it takes."""
    module, _, cls = BACKENDS[name].home.partition(":")
    made = getattr(importlib.import_module(module), cls)
    taken = inspect.signature(made).parameters
    return made(**{option: value for option, value in options.items() if option in taken})


def backends_for(report_to: Sequence[str], *, trainer_logs: bool = True, every_rank: bool = False) -> list[Backend]:
    """Make the console and the destinations that ``--report_to`` names.

    Args:
        report_to: any of :data:`DESTINATIONS`, ``all`` and ``none``.
        trainer_logs: whether ``train/``, ``eval/`` and ``test/`` are sent where the Trainer has a callback for that.
        every_rank: whether every rank writes, where a destination takes several writers.

    Raises:
        ValueError: for a name that is no destination.
    """
    if unknown := set(report_to) - {*DESTINATIONS, "all", "none"}:
        raise ValueError(f"unknown destinations {sorted(unknown)}: choose from {', '.join(DESTINATIONS)}, all, none")
    named = [name for name in DESTINATIONS if name in report_to or ("all" in report_to and BACKENDS[name].in_all)]
    return [make_backend(name, trainer_logs=trainer_logs, every_rank=every_rank) for name in ("console", *named)]


def default_backends(report_to: Sequence[str] = ()) -> list[Backend]:
    """Make the console and the destinations that a Trainer reports to, TensorBoard where there are none.

    The Trainer's own callbacks report what it logs: that is not sent a second time.

    Args:
        report_to: as in ``TrainingArguments``. What is not one of :data:`DESTINATIONS` is left to the Trainer.
    """
    return backends_for([name for name in DESTINATIONS if name in report_to] or ["tensorboard"], trainer_logs=False)


def followers(alert_to: Sequence[str]) -> list[Backend]:
    """Make what follows every run beside its destinations: its files for programs, and where its alerts are sent to."""
    from telemetry.backends.run_files import RunFiles

    return [RunFiles(), *_alerts(alert_to)]


def alert_addresses(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the addresses that alerts go to, each checked; by default those in ``STRATEGIC_TELEMETRY_ALERT_TO``.

    Raises:
        ImportError: when there is one, and Apprise is not installed.
        ValueError: for what is no address. The message does not show it.
    """
    if given is None:
        given = os.environ.get(ALERT_TO, "").split()
    found = (given,) if isinstance(given, str) else tuple(given)
    _alerts(found)
    return found


def _alerts(addresses: Sequence[str]) -> list[Backend]:
    if not addresses:
        return []
    from telemetry.backends.alerts import AlertBackend

    return [AlertBackend(addresses)]

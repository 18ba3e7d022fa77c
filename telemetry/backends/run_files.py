"""What other programs read of a run: ``health.json``, what is known now, and ``alerts.jsonl``, every alert so far."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telemetry.backends.base import Run
from telemetry.catalogue import CHECKS, HEALTH_FILE, VERDICTS
from telemetry.charts import is_headline
from telemetry.records import Alert, Record, Scalar, Table

VERSION = 1
ALERTS_FILE = "alerts.jsonl"
SECONDS = 1.0  # from one writing of health.json to the next, where nothing in it is urgent


class RunFiles:
    """Keeps both files in the run's output directory, and ``health.json`` in every checkpoint too.

    ``health.json`` is replaced as a whole when something is recorded: whoever opens it reads all of it. Where steps
    come quicker than once a second, only a verdict that changes, an alert and the end are written at once: what a
    process that is killed leaves lacks the last second at most. A line of ``alerts.jsonl`` is one alert; a resumed run
    goes on with the file that is there.
    """

    name = "files"

    def __init__(self) -> None:
        self.step_time: float | None = None
        self._directory = Path()
        self._replaced = -math.inf
        self._known: dict[str, Any] = {}
        self._checks: dict[str, list[dict[str, Any]]] = {}

    def open(self, run: Run) -> None:
        """Say that a run has begun."""
        self._directory = run.output_dir or run.logging_dir
        self._directory.mkdir(parents=True, exist_ok=True)
        self._known = {
            "version": VERSION,
            "run": run.name,
            "state": "running",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "logging_dir": str(run.logging_dir),
            "started": time.time(),
            "time": time.time(),
            "step": run.starting_step,
            "verdict": None,
            "checks": [],
            "numbers": {},
        }
        self._replace(self._directory)

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Keep alerts, verdicts and the numbers that tell most."""
        at = self.step_time or time.time()
        alerts = [_line(step, at, self._known["run"], record) for record in records if isinstance(record, Alert)]
        for record in records:
            if isinstance(record, Table) and record.tag in CHECKS:
                self._checks[record.tag] = [_check(record.tag, record.columns, row) for row in record.rows]
            elif isinstance(record, Scalar) and is_headline(record.tag):
                self._known["numbers"][record.tag] = {"step": step, "value": _number(record.value)}
        checks = [check for tag in CHECKS for check in self._checks.get(tag, ())]
        worst = max((VERDICTS.index(check["verdict"]) for check in checks), default=None)
        before = self._known["verdict"]
        self._known |= {
            "time": at,
            "step": max(step, self._known["step"]),
            "verdict": None if worst is None else VERDICTS[worst],
            "checks": sorted(checks, key=lambda check: -VERDICTS.index(check["verdict"])),
        }
        if alerts:
            with (self._directory / ALERTS_FILE).open("a", encoding="utf-8") as file:
                file.writelines(alerts)
        now = time.monotonic()
        if alerts or self._known["verdict"] != before or now - self._replaced >= SECONDS:
            self._replace(self._directory)
            self._replaced = now

    def saved(self, directory: Path) -> None:
        """Leave what is known in a checkpoint that has been saved."""
        if directory.is_dir():  # it may have been rotated away
            self._replace(directory)

    def close(self) -> None:
        """Say that the run has ended."""
        self._known |= {"state": "ended", "time": time.time()}
        self._replace(self._directory)

    def _replace(self, directory: Path) -> None:
        file = directory / HEALTH_FILE
        unfinished = file.with_name(f".{HEALTH_FILE}.{os.getpid()}")
        unfinished.write_text(json.dumps(self._known, indent=1, ensure_ascii=False), encoding="utf-8")
        unfinished.replace(file)


def _line(step: int, at: float, run: str, alert: Alert) -> str:
    where = {"version": VERSION, "time": at, "run": run, "step": step}
    said = {"level": alert.level, "title": alert.title, "text": alert.text}
    return json.dumps(where | said, ensure_ascii=False) + "\n"


def _check(tag: str, columns: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    """One row of a table of verdicts, by its columns' names."""
    cells = {column.replace(" ", "_"): cell for column, cell in zip(columns, row, strict=True)}
    return {"of": tag.split("/", 1)[0], **cells}


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)

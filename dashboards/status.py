"""Is it well? Every run of a directory in a few lines, or as JSON, with an exit code that says the same."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from dashboards.headlines import Number, headlines
from dashboards.runs import NothingToShowError, Run, read_runs
from telemetry.catalogue import CHECKS, HEALTH_FILE, VERDICTS
from telemetry.charts import HEADLINES
from telemetry.records import Alert, Table
from telemetry.tfrecord import DamagedError

VERSION = 1
WELL, WARNING, FAILING, NO_DATA = range(4)
SHOWN_ALERTS = 5
LEAST_SILENCE = 120.0
"""Seconds without a word after which a run counts as silent, if its longest pause so far is no third of them."""
_REFRESH_SECONDS = 2.0
_STYLES = {"ok": "green", "warning": "yellow", "failing": "bold red", None: "dim"}
_ARROWS = {"better": ("▲ better", "green"), "worse": ("▼ worse", "red"), "same": ("= same", "dim"), "": ("", "dim")}


@dataclass(frozen=True)
class Status:
    """What is known of one run.

    Attributes:
        name: of the run.
        directory: where it was found.
        state: ``running``; ``ended``; ``killed``, its process on this machine is gone and has not closed its files;
            ``silent``, it has said nothing for much longer than it ever has; ``empty``, nothing is recorded.
        since: when it last said something, in seconds since the epoch.
        step: the last one recorded.
        verdict: the worst of ``checks``; None where nothing has been judged.
        checks: rows of the tables of verdicts, worst first.
        numbers: what is looked at first.
        alerts: the last ones.
        faults: what could not be read.
    """

    name: str
    directory: str
    state: str
    since: float | None
    step: int
    verdict: str | None
    checks: list[dict[str, Any]]
    numbers: list[Number]
    alerts: list[dict[str, Any]]
    faults: list[str]

    @property
    def code(self) -> int:
        """Exit code: a run that was killed or fell silent is a warning at least."""
        if self.verdict is None:
            return NO_DATA
        lost = self.state in ("killed", "silent")
        return max(VERDICTS.index(self.verdict), WARNING if lost else WELL)


def look(directories: Sequence[Path], now: float | None = None) -> list[Status]:
    """Return the status of every run in directories: by their event files, else by a ``health.json``."""
    now = time.time() if now is None else now
    return [status for directory in directories for status in _look(directory, now)]


def exit_code(statuses: Sequence[Status]) -> int:
    """Return the worst of the runs that something is known of."""
    known = [status.code for status in statuses if status.code != NO_DATA]
    return max(known, default=NO_DATA)


def as_json(statuses: Sequence[Status]) -> str:
    """Return what programs read: see ``docs/alerts.md``."""
    said = {"version": VERSION, "exit_code": exit_code(statuses), "runs": [asdict(status) for status in statuses]}
    return json.dumps(said, indent=1, ensure_ascii=False)


def show(directories: Sequence[Path], console: Console) -> int:
    """Print the status once; returns the exit code."""
    statuses = look(directories)
    console.print(_picture(statuses))
    return exit_code(statuses)


def follow(directories: Sequence[Path], console: Console) -> int:
    """Keep the status on the terminal until every run has ended, or Ctrl-C; returns the exit code."""
    statuses = look(directories)
    with Live(_picture(statuses), console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        sizes = _sizes(directories)
        while not statuses or any(status.state in ("running", "silent", "empty") for status in statuses):
            time.sleep(_REFRESH_SECONDS)
            if sizes != (sizes := _sizes(directories)) or statuses != look(directories):
                statuses = look(directories)
            live.update(_picture(statuses), refresh=True)
    return exit_code(statuses)


def _sizes(directories: Sequence[Path]) -> dict[Path, int]:
    found = {}
    for directory in directories:
        for path in directory.rglob("*tfevents*"):
            with contextlib.suppress(OSError):
                found[path] = path.stat().st_size
    return found


# What is known


def _look(directory: Path, now: float) -> Iterator[Status]:
    try:
        runs = read_runs([directory])
    except NothingToShowError as error:
        files = sorted(directory.rglob(HEALTH_FILE)) if directory.is_dir() else []
        files = [file for file in files if not file.parent.name.startswith("checkpoint-")]
        yield from map(_of_file, files)
        if not files:
            yield Status(directory.name, str(directory), "empty", None, 0, None, [], [], [], [str(error)])
        return
    for run in runs:
        yield _of_run(run, now)


def _of_run(run: Run, now: float) -> Status:
    checks, faults = _checks(run)
    worst = max((VERDICTS.index(check["verdict"]) for check in checks), default=None)
    return Status(
        name=run.name,
        directory=str(run.directory),
        state=_state(run, now),
        since=run.last_time,
        step=run.last_step,
        verdict=None if worst is None else VERDICTS[worst],
        checks=sorted(checks, key=lambda check: -VERDICTS.index(check["verdict"])),
        numbers=list(headlines(run.scalars)),
        alerts=list(_alerts(run)),
        faults=[*run.faults, *faults],
    )


def _state(run: Run, now: float) -> str:
    if run.ended:
        return "ended"
    newest = max(run.directory.glob("*tfevents*"), key=lambda path: path.name).name
    host, _, pid = newest.split(".tfevents.")[-1].partition(".")[2].rpartition(".")
    if host == socket.gethostname() and pid.isdigit() and not _is_alive(int(pid)):
        return "killed"
    silence = max(LEAST_SILENCE, 3 * run.longest_pause)
    return "silent" if run.last_time is not None and now - run.last_time > silence else "running"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _checks(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the newest tables of verdicts, and what of them could not be read."""
    found, faults = [], []
    for tag in CHECKS:
        if stored := run.media.get(tag):
            try:
                table = stored[-1].record()
            except (DamagedError, OSError) as error:
                faults.append(f"{tag}: {error}")
                continue
            if isinstance(table, Table):
                rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
                named = [{name.replace(" ", "_"): cell for name, cell in row.items()} for row in rows]
                found += [{"of": tag.split("/", 1)[0], **row} for row in named if row.get("verdict") in VERDICTS]
    return found, faults


def _alerts(run: Run) -> Iterator[dict[str, Any]]:
    stored = sorted(
        (one for tag in run.media if tag.endswith("/alerts") for one in run.media[tag]), key=lambda a: a.step
    )
    for one in stored[-SHOWN_ALERTS:]:
        with contextlib.suppress(DamagedError, OSError):
            if isinstance(alert := one.record(), Alert):
                yield {"step": one.step, "level": alert.level, "title": alert.title, "text": alert.text}


def _of_file(path: Path) -> Status:
    """The status that a run keeps beside its checkpoints, where it has no event file."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        state = "killed" if known["state"] == "running" and _is_gone(known) else known["state"]
        numbers = [
            Number(tag, one["step"], one["value"], None, "")
            for tags in HEADLINES
            for tag in [next((tag for tag in tags if tag in known["numbers"]), "")]
            if (one := known["numbers"].get(tag))
        ]
        return Status(
            known["run"], str(path.parent), state, known["time"], known["step"], known["verdict"], known["checks"],
            numbers, [], [],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"{path} is damaged: {error}"
        return Status(path.parent.name, str(path.parent), "empty", None, 0, None, [], [], [], [fault])


def _is_gone(known: Mapping[str, Any]) -> bool:
    return known["host"] == socket.gethostname() and not _is_alive(int(known["pid"]))


# What is shown


def _picture(statuses: Sequence[Status]) -> RenderableType:
    return Group(*(part for status in statuses for part in _run(status)))


def _run(status: Status) -> Iterator[RenderableType]:
    since = (
        "" if status.since is None else time.strftime(", last heard of %Y-%m-%d %H:%M:%S", time.localtime(status.since))
    )
    verdict = status.verdict or "no verdict yet"
    yield Text.assemble(
        (verdict.upper(), _STYLES[status.verdict]), "  ", (_printable(status.name), "bold"),
        f": {status.state}, step {status.step}{since}",
    )  # fmt: skip
    bad = [check for check in status.checks if check["verdict"] != "ok"]
    for check in bad:
        mark = (f"  {check['verdict']:>7}  ", _STYLES[check["verdict"]])
        yield Text.assemble(mark, _printable(f"{check.get('finding', '')}: {check.get('evidence', '')}"))
        if check.get("what_to_do"):
            yield Text(_printable(f"           → {check['what_to_do']}"), style="dim")
    if status.checks and not bad:
        yield Text(f"  all {len(status.checks)} checks are ok", style="green")
    if status.numbers:
        grid = Grid.grid(padding=(0, 2))
        for number in status.numbers:
            arrow, style = _ARROWS[number.direction]
            before = "" if number.before is None else f"was {_short(number.before)}"
            place = Text(f"step {number.step}", style="dim")
            grid.add_row(
                "", _printable(number.tag), _short(number.value), Text(before, "dim"), Text(arrow, style), place
            )
        yield grid
    for fault in status.faults:
        yield Text(_printable(f"  {fault}"), style="yellow")


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)

"""What every destination of records answers to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from telemetry.catalogue import is_the_trainers
from telemetry.records import Record, Scalar


@dataclass(frozen=True)
class Run:
    """One training run, as a backend needs to know it.

    Attributes:
        logging_dir: where files of this run go.
        starting_step: the Trainer's global step when the run (re)starts: 0 for a fresh one, the checkpoint's step
            after a resume. Records at later steps that an earlier attempt left are superseded.
        name: what to call the run.
        config: arguments, model and data, as plain JSON values without secrets.
        defaults: dotted names of ``config`` that nobody set or that say little: a page of comparison leaves them out.
        output_dir: where the checkpoints are; None when there are none.
        rank: of this process. Only a backend whose ``every_rank`` is true is opened on ranks other than 0.
        launch_id: letters and digits that name this (re)start, the same on every rank where such a backend is.
    """

    logging_dir: Path
    starting_step: int = 0
    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    output_dir: Path | None = None
    rank: int = 0
    launch_id: str = ""
    defaults: frozenset[str] = frozenset()


class Backend(Protocol):
    """Shows the records of a run. One writer per run: only rank 0 opens one, but see :func:`is_on_every_rank`.

    Every method is called on a thread of this backend's own, and may take its time: nobody waits for it but its own
    records, of which the oldest are dropped and counted when too many wait. At the end of training all backends
    together have 30 seconds.

    Any method may raise: that is reported once, the records of a failed :meth:`write` are counted as lost, and after
    repeated failures the backend is left out. A backend never raises for the content of a record that another backend
    can show.

    A backend may have more than this, each for itself:

    - ``dropped_records: int``: records lost so far that :meth:`write` could not know of.
    - ``catch_up(last: bool) -> bool``: do some of what :meth:`write` has put off. Called when nothing waits to be
      written, and again at once where it returns True; with ``last`` before :meth:`close`: what is then not done is
      lost, and counted in ``dropped_records``.
    - ``abandon()``: called on another thread when :meth:`close` or what comes before it takes too long. Let go of
      whatever keeps the process from ending.
    - ``saved(directory: Path)``: a checkpoint has been saved, after what was recorded until then has been written.
    - ``step_time: float | None``: before :meth:`write` set to when the step ended, in seconds since the epoch.
    - ``newest_step: int``: set to the step that is handed over, which may be written much later.
    - ``every_rank: bool``: see :func:`is_on_every_rank`.
    """

    name: str

    def open(self, run: Run) -> None:
        """Get ready. Called once, before the first :meth:`write`."""

    def write(self, step: int, records: Sequence[Record]) -> int | None:
        """Show the records of one step. Steps never decrease; a step may be written more than once.

        Returns:
            How many of the records were lost; None for none.
        """

    def close(self) -> None:
        """Write out what is left and let go of files. Called once; no :meth:`write` follows."""


def is_on_every_rank(backend: Backend) -> bool:
    """Whether a backend (its attribute ``every_rank``) is opened on every rank.

    It is given each rank's own scalars, before ranks are brought together, under ``rank_<r>/``.
    """
    return bool(getattr(backend, "every_rank", False))


def without_the_trainers(records: Sequence[Record]) -> list[Record]:
    """The records that are no numbers which the Trainer logs."""
    return [record for record in records if not (isinstance(record, Scalar) and is_the_trainers(record.tag))]

"""What earlier attempts of a run have written, so that a resumed one goes on in the same run without a step twice.

W&B numbers a run's rows itself (``_step``); a checkpoint knows the Trainer's step only. A file beside the checkpoints
keeps both, row by row: JSON lines, a header first, then ``[trainer's step, row, digest of the row's tags]``. A row that
comes again supersedes all rows after it, so the file is only ever appended to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from telemetry.backends.locks import is_locked, lock, unlock

FILE = "wandb_run.jsonl"

logger = logging.getLogger(__name__)


@dataclass
class Attempts:
    """A W&B run as the file has it.

    Attributes:
        run_id: W&B's id.
        project: the project that the run is in.
        rows: row → the Trainer's step that it is of, and the digest of its tags.
    """

    run_id: str
    project: str
    rows: dict[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Attempts | None:
        """What the file says; None where there is none, or where it is no such file."""
        try:
            header, *lines = (directory / FILE).read_text(encoding="utf-8").splitlines()
            said = json.loads(header)
            attempts = cls(said["id"], said["project"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        for line in lines:
            try:
                step, row, tags = json.loads(line)
            except (ValueError, TypeError):  # the last line of a process that was killed
                continue
            attempts.add(int(step), int(row), int(tags))
        return attempts

    @staticmethod
    def forget(directory: Path) -> None:
        """A fresh run begins in the directory: what the file says is of another, which may be under way."""
        if is_locked(directory / FILE):
            return
        with contextlib.suppress(OSError):
            (directory / FILE).unlink()

    def add(self, step: int, row: int, tags: int) -> None:
        """A row has been written: those after it are of a run that was rewound."""
        if self.rows and row <= next(reversed(self.rows)):
            self.rows = {held: of for held, of in self.rows.items() if held < row}
        self.rows[row] = (step, tags)

    def last_row(self, step: int) -> int | None:
        """The last row of a step or of earlier ones; None when there is none."""
        return max((row for row, (of, _) in self.rows.items() if of <= step), default=None)

    def last_step(self, end: int | None = None) -> int:
        """The latest step that has a row, before row ``end`` if one is given; -1 when there is none."""
        return max((of for row, (of, _) in self.rows.items() if end is None or row < end), default=-1)

    def rows_after(self, step: int, end: int) -> set[tuple[int, int]]:
        """Step and digest of each row of a step after this one, before row ``end``.

        A table that had to wait for the server has its row after those of later steps.
        """
        return {(of, tags) for row, (of, tags) in self.rows.items() if of > step and row < end}


class AttemptsFile:
    """Keeps the file. A disk that fails costs the file, never a row: that is said once."""

    def __init__(self, directory: Path, run_id: str, project: str, resumed: bool) -> None:
        self._file: IO[str] | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / FILE).open("a", encoding="utf-8", buffering=1)
            if not lock(self._file.fileno()):
                self._file.close()
                raise OSError("another run is under way in the directory")
            if not resumed:
                self._file.truncate(0)
        except OSError as error:
            self._fail(error)
        if not resumed:
            self._write(json.dumps({"id": run_id, "project": project}))
        else:
            self._write("")  # ends a line that a killed process has left torn

    def add(self, step: int, row: int, tags: int) -> None:
        """Note whose row it is."""
        self._write(f"[{step}, {row}, {tags}]")

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            unlock(self._file.fileno())
            self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(f"{line}\n")
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._file = None
        logger.warning("cannot write %s (%s): resuming will begin a W&B run of its own", FILE, error)


def digest(tags: Iterable[str]) -> int:
    """A number that tells rows of one step apart."""
    return zlib.crc32("\n".join(sorted(tags)).encode())

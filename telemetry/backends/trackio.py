"""The Trackio destination: a database on this machine, and a dashboard that needs no account and no network."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

from telemetry.backends.base import Run, without_the_trainers
from telemetry.backends.encoding import Shown, encode_png, encode_wav
from telemetry.records import Alert, Audio, Cell, Clip, Image, Record, Scalar, Table

DEFAULT_PROJECT = "huggingface"  # as transformers' own callback
AXIS = "train/global_step"

logger = logging.getLogger(__name__)


class TrackioBackend(Shown):
    """Shows records in Trackio: ``trackio show --project PROJECT`` opens them.

    Joins the run that is active where training begins (the user's, or that of the Trainer's own callback), whose end is
    its owner's, or opens one and finishes it. Runs of its own are kept under ``TRACKIO_DIR``, in the project
    ``TRACKIO_PROJECT`` (``huggingface`` by default). One that is resumed is a run of its own, in the group of the
    first: Trackio takes no step back.

    Args:
        trainer_logs: whether to show ``train/``, ``eval/`` and ``test/``; False where the Trainer's own callback does.
    """

    name = "trackio"

    def __init__(self, trainer_logs: bool = True) -> None:
        super().__init__("Trackio")
        self._trainer_logs = trainer_logs
        self._run: Any = None
        self._owned = True

    def open(self, run: Run) -> None:
        """Begin a run, or join the one that is active.

        Raises:
            ImportError: when Trackio is not installed.
        """
        if importlib.util.find_spec("trackio") is None:
            raise ImportError("Trackio is not installed: pip install trackio")
        import trackio

        active = trackio.context_vars.current_run.get()
        self._owned = active is None
        if active is not None:
            self._run = active
            for key, value in run.config.items():
                active.config.setdefault(key, value)
            logger.info("telemetry goes to the Trackio run that is active: %s", active.name)
            return
        name = run.name or "run"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or DEFAULT_PROJECT,
            name=f"{name} from step {run.starting_step}" if run.starting_step else name,
            group=name,
            config=dict(run.config),
            embed=False,
        )

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Show the records of one step.

        Raises:
            RuntimeError: before :meth:`open`.
        """
        if self._run is None:
            raise RuntimeError("write() before open()")
        if not self._trainer_logs:
            records = without_the_trainers(records)
        others = [record for record in records if not isinstance(record, Alert)]
        values = {tag: value for made in self.made(others, _values) for tag, value in made.items()}
        if values:  # rows of a joined run that are not ours are numbered in their own way: what all share is the axis
            self._run.log(values if self._owned else {**values, AXIS: step}, step=step)
        for record in records:
            if isinstance(record, Alert):
                self._alert(step, record)

    def close(self) -> None:
        """Write out what is left."""
        if self._run is not None and self._owned:
            self._run.finish()

    def _alert(self, step: int, alert: Alert) -> None:
        from trackio import AlertLevel

        level = {"info": AlertLevel.INFO, "warning": AlertLevel.WARN, "error": AlertLevel.ERROR}[alert.level]
        self._run.alert(title=alert.title, text=alert.text, level=level, step=step)


def _values(record: Scalar | Table | Audio | Image) -> dict[str, Any]:
    """Tag → value. Clips of one tag are numbered from the second on: a Trackio value is one clip."""
    import trackio

    if isinstance(record, Scalar):
        return {record.tag: record.value}
    if isinstance(record, Table):
        rows = [[_cell(cell) for cell in row] for row in record.rows]
        return {record.tag: trackio.Table(columns=list(record.columns), data=rows)}
    if isinstance(record, Audio):
        return {
            record.tag if number == 1 else f"{record.tag}/{number}": _sound(clip)
            for number, clip in enumerate(record.clips, 1)
            if clip.samples.size
        }
    return {record.tag: _picture(record)}


def _cell(cell: Cell) -> Any:
    """Pictures are shown in their cell; sounds have a place of their own, which the cell names."""
    return _picture(cell) if isinstance(cell, Image) else f"see {cell.tag}" if isinstance(cell, Audio) else cell


def _sound(clip: Clip) -> Any:
    import trackio

    wav = encode_wav(clip)
    samples = wav.samples[:, 0] if wav.samples.shape[1] == 1 else wav.samples
    return trackio.Audio(samples, wav.label, clip.sampling_rate)


def _picture(image: Image) -> Any:
    import trackio

    encode_png(image.pixels)  # raises for what is no picture
    return trackio.Image(image.pixels, caption=image.caption or None)

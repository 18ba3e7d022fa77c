"""The records of a step as the values that ``run.log`` takes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import wandb
from PIL import Image as PillowImage

from telemetry.backends.encoding import Shown, encode_png, encode_wav
from telemetry.backends.wandb.tables import Tables
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table


class Values(Shown):
    """Makes W&B's values of records.

    A sound or picture that is a cell of a table of the same step is shown there, and not sent again under its own tag.
    """

    def __init__(self) -> None:
        super().__init__("W&B")
        self._tables = Tables()

    def shows(self, step: int, records: Sequence[Record]) -> dict[str, Any]:
        """Tag → value of what is not a number."""
        values = self.made(self.parts(records), lambda record: self._value(step, record))
        return {tag: value for made in values for tag, value in made.items()}

    def parts(self, records: Sequence[Record]) -> list[Table | Audio | Image]:
        """What is shown under a tag of its own, and is no number."""
        in_tables = _media_of_tables(records)
        return [one for one in records if not isinstance(one, Scalar | Alert) and one.tag not in in_tables]

    def begin_tables_again(self, tags: Iterable[str] | None = None) -> None:
        """Have the tables of some tags begin again, or all: what was made last was not taken."""
        self._tables.begin_again(tags)

    def _value(self, step: int, record: Table | Audio | Image) -> Mapping[str, Any]:
        if isinstance(record, Table):
            growing = self._tables.for_rows(record)
            if not record.rows:
                return {}
            try:
                return {growing.key: growing.grown(step, record, self._medium)}
            except (TypeError, ValueError):
                growing.begin_again()  # it may hold some of the rows
                raise
        if isinstance(record, Audio):
            sounds = [self._sound(record.tag, clip) for clip in record.clips if clip.samples.size]
            return {record.tag: sounds} if sounds else {}
        return {record.tag: _picture(record)}

    def _medium(self, cell: Audio | Image) -> Any:
        if isinstance(cell, Image):
            return _picture(cell)
        return self._sound(cell.tag, next(clip for clip in cell.clips if clip.samples.size))

    def _sound(self, tag: str, clip: Clip) -> Any:
        wav = encode_wav(clip)
        if wav.is_changed:
            self.warn_once(f"{tag} samples", f"{tag} was changed to be heard. {wav.label}")
        return wandb.Audio(wav.samples, sample_rate=int(clip.sampling_rate), caption=wav.label or None)


def _media_of_tables(records: Iterable[Record]) -> set[str]:
    """Tags of sounds and pictures that are shown whole in a table's cell: of several clips a cell plays the first."""
    cells = [cell for record in records if isinstance(record, Table) for row in record.rows for cell in row]
    return {cell.tag for cell in cells if isinstance(cell, Image) or (isinstance(cell, Audio) and len(cell.clips) == 1)}


def _picture(image: Image) -> Any:
    # As a finished picture: of an array the client guesses what its numbers mean.
    with PillowImage.open(io.BytesIO(encode_png(image.pixels))) as picture:
        return wandb.Image(picture.copy(), caption=image.caption or None)

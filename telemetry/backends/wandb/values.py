"""The records of a step as the values that ``run.log`` takes."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import wandb
from PIL import Image as PillowImage

from telemetry.backends.encoding import encode_png, encode_wav
from telemetry.backends.wandb.tables import Tables
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table

logger = logging.getLogger(__name__)


class Values:
    """Makes W&B's values of records.

    A sound or picture that is a cell of a table of the same step is shown there, and not sent again under its own tag.

    Attributes:
        unshown_records: records that W&B has no way to show. A warning names each of their tags once.
    """

    def __init__(self) -> None:
        self.unshown_records = 0
        self._tables = Tables()
        self._warned: set[str] = set()

    def shows(self, step: int, records: Sequence[Record]) -> dict[str, Any]:
        """Tag → value of what is not a number. A record that cannot be shown does not keep the others away."""
        values: dict[str, Any] = {}
        in_tables = _media_of_tables(records)
        for record in records:
            if isinstance(record, Scalar | Alert) or record.tag in in_tables:
                continue
            try:
                values.update(self._value(step, record))
            except (TypeError, ValueError, OverflowError) as error:
                self.unshown_records += 1
                self._warn_once(record.tag, f"W&B cannot show {record.tag}: {error}")
        return values

    def begin_tables_again(self) -> None:
        """Have every table begin again: what was made last was not taken."""
        self._tables.begin_again()

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
        caption = " ".join(filter(None, (clip.caption, *wav.remarks)))
        if wav.clipped or wav.nonfinite:
            self._warn_once(f"{tag} samples", f"{tag} was changed to be heard. {caption}")
        return wandb.Audio(wav.samples, sample_rate=int(clip.sampling_rate), caption=caption or None)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)


def _media_of_tables(records: Iterable[Record]) -> set[str]:
    """Tags of sounds and pictures that are shown whole in a table's cell: of several clips a cell plays the first."""
    cells = [cell for record in records if isinstance(record, Table) for row in record.rows for cell in row]
    return {cell.tag for cell in cells if isinstance(cell, Image) or (isinstance(cell, Audio) and len(cell.clips) == 1)}


def _picture(image: Image) -> Any:
    # As a finished picture: of an array the client guesses what its numbers mean.
    with PillowImage.open(io.BytesIO(encode_png(image.pixels))) as picture:
        return wandb.Image(picture.copy(), caption=image.caption or None)

"""The records of a run as summary values: what is said once per tag, and what keeps tags apart."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary

from telemetry.backends.encoding import encode_wav
from telemetry.backends.tensorboard.markdown import alert_markdown, escape, table_markdown, table_texts, visible
from telemetry.backends.tensorboard.values import (
    audio_value,
    image_value,
    scalar_description,
    scalar_value,
    text_value,
)
from telemetry.catalogue import describe
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table

logger = logging.getLogger(__name__)

_PAGES: dict[type, str] = {
    Scalar: "scalars",
    Table: "text",
    Alert: "text",
    Audio: "audio",
    Image: "images",
}


class Summaries:
    """Turns records into summary values.

    The first value of a tag carries its description: TensorBoard shows that one and no later one. A tag belongs to one
    page; a record for another page under a tag in use goes to ``<tag>/<page>``, where it can be seen.

    Attributes:
        unshown_records: records that could not be turned into a value. A warning names each of their tags once.
    """

    def __init__(self) -> None:
        self.unshown_records = 0
        self._pages: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._described: set[str] = set()
        self._warned: set[str] = set()

    def encode(self, records: Iterable[Record]) -> list[Summary.Value]:
        """The values of one step. A record that cannot be shown is counted and does not keep the others away."""
        values: list[Summary.Value] = []
        for record in records:
            try:
                values += self._values(record)
            except (TypeError, ValueError, OverflowError) as error:
                self.unshown_records += 1
                self._warn_once(record.tag, f"TensorBoard cannot show {record.tag}: {error}")
        return values

    def describe_again(self) -> None:
        """Describe every tag anew: the values that carried the descriptions were lost."""
        self._described.clear()

    def _values(self, record: Record) -> list[Summary.Value]:
        tag = self._tag(record)
        remarks: list[str] = []
        if isinstance(record, Audio):
            value, remarks = self._audio(tag, record)
        else:
            value = _stateless_value(record)
        if value is None:
            return []
        value.tag = tag
        if tag in self._described:
            return [value]
        self._described.add(tag)
        description = _description(record, remarks)
        if isinstance(record, Scalar):
            return [scalar_description(tag, description), value]
        value.metadata.summary_description = description
        return [value]

    def _tag(self, record: Record) -> str:
        """The record's tag, or one beside it where another page has the tag."""
        page = _PAGES[type(record)]
        taken = self._pages.setdefault(record.tag, page)
        if taken == page:
            return record.tag
        tag = f"{record.tag}/{page}"
        self._warn_once(tag, f"TensorBoard shows {record.tag} under {taken}: its {page} are at {tag}")
        return tag

    def _audio(self, tag: str, record: Audio) -> tuple[Summary.Value | None, list[str]]:
        """Every clip in its place with what there is to say about each, or None when all are empty.

        The audio page fails for the number of a clip that some step lacks, and numbers say which reference belongs to
        which target: a place once used is kept by an empty clip.
        """
        if not any(clip.samples.size for clip in record.clips):
            return None, []
        self._places[tag] = max(self._places.get(tag, 0), len(record.clips))
        missing = Clip(np.zeros(0, np.float32), record.clips[0].sampling_rate)
        clips = record.clips + (missing,) * (self._places[tag] - len(record.clips))
        wavs = [encode_wav(clip) for clip in clips]
        labels = [" ".join(filter(None, (clip.caption, *wav.remarks))) for clip, wav in zip(clips, wavs, strict=True)]
        numbered = [f"Clip {number}: {label}" for number, label in enumerate(labels, 1) if label]
        if any(wav.clipped or wav.nonfinite for wav in wavs):
            self._warn_once(f"{tag} samples", f"{tag} was changed to be heard. {' '.join(numbered)}")
        return audio_value(wavs, labels), numbered

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)


def _stateless_value(record: Scalar | Table | Image | Alert) -> Summary.Value | None:
    if isinstance(record, Scalar):
        return scalar_value(record)
    if isinstance(record, Image):
        return image_value(record)
    if isinstance(record, Table):
        columns, *rows = texts = table_texts(record)
        return text_value(table_markdown(texts), {"columns": columns, "rows": rows}) if columns else None
    said = {"title": visible(record.title), "text": visible(record.text), "level": record.level}
    return text_value(alert_markdown(record), said)


def _description(record: Record, remarks: list[str]) -> str:
    note = record.note if isinstance(record, Scalar) else record.caption if isinstance(record, Image) else ""
    return "<br>".join(escape(line) for line in (describe(record.tag, note), *remarks) if line)

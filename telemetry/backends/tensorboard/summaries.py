"""The records of a run as summary values: what is said once per tag, and what keeps tags apart."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary

from telemetry.backends.encoding import Shown, encode_wav
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

_PAGES: dict[type, str] = {
    Scalar: "scalars",
    Table: "text",
    Alert: "text",
    Audio: "audio",
    Image: "images",
}


class Summaries(Shown):
    """Turns records into summary values.

    The first value of a tag carries its description: TensorBoard shows that one and no later one. A tag belongs to one
    page; a record for another page under a tag in use goes to ``<tag>/<page>``, where it can be seen.
    """

    def __init__(self) -> None:
        super().__init__("TensorBoard")
        self._pages: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._described: set[str] = set()

    def encode(self, records: Iterable[Record]) -> list[Summary.Value]:
        """The values of one step."""
        return [value for values in self.made(records, self._values) for value in values]

    def describe_again(self) -> None:
        """Describe every tag anew: the values that carried the descriptions were lost."""
        self._described.clear()

    def _values(self, record: Record) -> list[Summary.Value]:
        tag = self._tag(record)
        if isinstance(record, Scalar) and tag in self._described:
            return [scalar_value(tag, record.value)]
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
        self.warn_once(tag, f"TensorBoard shows {record.tag} under {taken}: its {page} are at {tag}")
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
        numbered = [f"Clip {number}: {wav.label}" for number, wav in enumerate(wavs, 1) if wav.label]
        if any(wav.is_changed for wav in wavs):
            self.warn_once(f"{tag} samples", f"{tag} was changed to be heard. {' '.join(numbered)}")
        return audio_value(wavs), numbered


def _stateless_value(record: Scalar | Table | Image | Alert) -> Summary.Value | None:
    if isinstance(record, Scalar):
        return scalar_value(record.tag, record.value)
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

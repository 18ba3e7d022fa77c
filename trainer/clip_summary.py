"""How generated speech compares at the end of training: voices that were trained on, and others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

TABLE = "zero_shot/clips_by_speaker"


class ClipSummary:
    """A telemetry backend that keeps the newest table of clips by speaker, for the end of the run.

    Args:
        training_voices: speakers of the training data.
    """

    name = "clip summary"

    def __init__(self, training_voices: Collection[str]) -> None:
        self._training_voices = frozenset(training_voices)
        self._rows: list[dict[str, Any]] = []

    def open(self, run: Any) -> None:
        """Nothing to get ready."""

    def write(self, step: int, records: Sequence[Any]) -> None:
        """Keep the table, where there is one among the records of a step."""
        for record in records:
            if record.tag == TABLE:
                self._rows = [dict(zip(record.columns, row, strict=True)) for row in record.rows]

    def close(self) -> None:
        """Nothing to close."""

    def lines(self) -> Iterator[str]:
        """A line for the training voices and one for the others, where clips of them were compared."""
        for name, chosen in (
            ("training voices", lambda row: row["speaker"] in self._training_voices),
            ("other voices", lambda row: row["speaker"] not in self._training_voices),
        ):
            rows = [row for row in self._rows if chosen(row) and None not in map(row.get, _DISTANCES)]
            if rows:
                own, other = (_mean(rows, distance) for distance in _DISTANCES)
                clips = sum(row["clips"] for row in rows)
                yield (
                    f"generated clips of {name}: mel distance to their targets {own:.1f} dB, to another sample's "
                    f"target {other:.1f} dB ({clips} clips)"
                )


_DISTANCES = ("mel_distance", "mel_distance_shuffled")


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(row[name] * row["clips"] for row in rows) / sum(row["clips"] for row in rows))

"""Which sounds may leave for backends: voice clips are personal data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from telemetry.records import Audio, Clip, Image, Record, Scalar, Table

LEFT_OUT = "sound is off"


@dataclass(frozen=True)
class SoundPolicy:
    """What may be heard, asked by the recorder for everything that leaves for a backend.

    Args:
        enabled: False keeps every number and no sound, nor a picture that sound could be made from.
        max_clips: clips a tag and step; the first ones are kept.
        max_seconds: of one clip; the rest is cut off and the caption says so.

    Raises:
        ValueError: when a bound is below 1 clip, or not above 0 seconds.
    """

    enabled: bool = True
    max_clips: int = 8
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.max_clips < 1 or not self.max_seconds > 0:
            raise ValueError(f"a sound policy needs at least 1 clip of above 0 seconds, got {self}")

    def allowed(self, records: Sequence[Record]) -> list[Record]:
        """The records of one step without what must not be heard. What is allowed is returned as it is."""
        heard: Counter[str] = Counter()
        kept = (record if type(record) is Scalar else self._allowed(record, heard) for record in records)
        return [record for record in kept if record is not None]

    def _allowed(self, record: Record, heard: Counter[str]) -> Record | None:
        if isinstance(record, Table):
            return self._table(record)
        return self._medium(record, heard) if isinstance(record, Audio | Image) else record

    def _table(self, table: Table) -> Table:
        if not table.media:
            return table
        heard: Counter[str] = Counter()
        rows = (
            tuple((self._medium(cell, heard) or LEFT_OUT) if isinstance(cell, Audio | Image) else cell for cell in row)
            for row in table.rows
        )
        return replace(table, rows=tuple(rows))

    def _medium(self, medium: Audio | Image, heard: Counter[str]) -> Audio | Image | None:
        if isinstance(medium, Audio):
            return self._heard(medium, heard)
        return medium if self.enabled or not medium.voice else None

    def _heard(self, audio: Audio, heard: Counter[str]) -> Audio | None:
        if not self.enabled or (audio.clips and heard[audio.tag] >= self.max_clips):
            return None
        kept = audio.clips[: self.max_clips - heard[audio.tag]]
        clips = tuple(map(self._clip, kept))
        heard[audio.tag] += len(clips)
        cut = len(clips) < len(audio.clips) or any(new is not old for new, old in zip(clips, kept, strict=True))
        return replace(audio, clips=clips) if cut else audio

    def _clip(self, clip: Clip) -> Clip:
        most = max(1, int(self.max_seconds * clip.sampling_rate))
        if len(clip.samples) <= most:
            return clip
        seconds = len(clip.samples) / clip.sampling_rate
        said = f"first {self.max_seconds:g} s of {seconds:.1f} s"
        # A copy: a cut view would keep the whole recording in memory.
        return replace(clip, samples=clip.samples[:most].copy(), caption=", ".join(filter(None, (clip.caption, said))))

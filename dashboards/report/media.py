"""Texts, sounds and pictures of runs, the newest first, as far as a page has room."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import soundfile

from dashboards.report.numbers import natural
from dashboards.runs import AUDIO, IMAGES, TEXT, Run, Stored, unescape
from telemetry.records import Alert, Table, held_bytes
from telemetry.tfrecord import DamagedError

AUDIO_BYTES = 4 * 2**20
IMAGE_BYTES = 2 * 2**20
TEXT_BYTES = 2**20
LONGEST_CLIP = 2**25
"""Samples of all channels. A few bytes of FLAC can state days of silence."""

LARGEST_PICTURE = 2**26
"""Pixels. A few bytes of PNG can state more than a browser has room for."""

STEPS_OF_A_TEXT = 5
ALERTS = 200


@dataclass(frozen=True)
class ClipView:
    """One clip, as FLAC: lossless, and half as large as in the event file.

    Attributes:
        label: what there is to say about it.
        seconds: its length.
        sampling_rate: in hertz.
        source: ``data:`` URI.
    """

    label: str
    seconds: float
    sampling_rate: int
    source: str


@dataclass(frozen=True)
class Picture:
    """A picture as ``data:`` URI. Sizes are in pixels."""

    width: int
    height: int
    source: str


Document: TypeAlias = Table | Alert | str
"""A table or an alert; Markdown where it is neither."""

Sound: TypeAlias = tuple[ClipView | None, ...]
"""The clips of a tag at a step; an empty place among them is None."""

Content = TypeVar("Content")


@dataclass(frozen=True)
class Item(Generic[Content]):
    """Content with where it comes from, and the bytes that it takes in the page.

    ``tag`` is as recorded, without the name of a page at its end.
    """

    run: int
    tag: str
    step: int
    content: Content
    nbytes: int


@dataclass(frozen=True)
class Shelf(Generic[Content]):
    """What of one kind is in the page.

    Attributes:
        items: newest step first, tags in order within a step.
        total: how many there are in the event files.
        unreadable: how many could not be read.
    """

    items: tuple[Item[Content], ...]
    total: int
    unreadable: int

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""
        return sum(item.nbytes for item in self.items)


@dataclass(frozen=True)
class Media:
    """Everything of some runs that is not a number over steps."""

    documents: Shelf[Document]
    alerts: Shelf[Document]
    sounds: Shelf[Sound]
    pictures: Shelf[Picture]


def collect(runs: Sequence[Run]) -> Media:
    """What of these runs has room."""
    alerts = {tag for run in runs for tag, stored in run.media.items() if _are_alerts(stored)}
    texts = [(number, stored) for number, stored in _of_kind(runs, TEXT) if stored[0].tag not in alerts]
    recent = [(number, stored[-STEPS_OF_A_TEXT:]) for number, stored in texts]
    said = [(number, stored[-ALERTS:]) for number, stored in _of_kind(runs, TEXT) if stored[0].tag in alerts]
    return Media(
        documents=_shelf(runs, recent, _document, TEXT_BYTES, texts),
        alerts=_shelf(runs, said, _document, TEXT_BYTES),
        sounds=_shelf(runs, _of_kind(runs, AUDIO), _sound, AUDIO_BYTES),
        pictures=_shelf(runs, _of_kind(runs, IMAGES), _picture, IMAGE_BYTES),
    )


Numbered = tuple[int, Sequence[Stored]]


def _of_kind(runs: Sequence[Run], kind: str) -> list[Numbered]:
    return [
        (number, stored) for number, run in enumerate(runs) for stored in run.media.values() if stored[0].kind == kind
    ]


def _are_alerts(stored: Sequence[Stored]) -> bool:
    """Whether the newest text that can be read is an alert."""
    if stored[0].kind != TEXT:
        return False
    for one in reversed(stored):
        try:
            return isinstance(one.record(), Alert)
        except (DamagedError, OSError):
            continue
    return False


def _shelf(
    runs: Sequence[Run],
    candidates: Sequence[Numbered],
    decode: Callable[[Stored], tuple[Content, int]],
    room: int,
    everything: Sequence[Numbered] | None = None,
) -> Shelf[Content]:
    """As many as there is room for, those of the newest step of every run first."""
    items: list[Item[Content]] = []
    unreadable = 0
    for together in _newest_first(candidates):
        fitted = False
        for number, stored in together:
            try:
                content, nbytes = decode(stored)
            except Exception:  # noqa: BLE001  (whatever a decoder does with bytes of any provenance)
                unreadable += 1
                continue
            if nbytes <= room:
                room -= nbytes
                items.append(Item(number, recorded_tag(stored, runs[number]), stored.step, content, nbytes))
                fitted = True
        if items and not fitted:
            break  # whatever is older is less worth the time that decoding takes
    total = sum(len(stored) for _number, stored in everything or candidates)
    return Shelf(tuple(sorted(items, key=lambda item: (item.run, -item.step, natural(item.tag)))), total, unreadable)


def _newest_first(candidates: Sequence[Numbered]) -> Iterator[list[tuple[int, Stored]]]:
    """What belongs to the newest step of each run, then to the second newest of each, and so on."""
    by_step: dict[int, dict[int, list[Stored]]] = {}
    for number, stored in candidates:
        for one in stored:
            by_step.setdefault(number, {}).setdefault(one.step, []).append(one)
    queues = [(number, [steps[step] for step in sorted(steps, reverse=True)]) for number, steps in by_step.items()]
    for rank in range(max((len(queue) for _number, queue in queues), default=0)):
        yield [
            (number, one)
            for number, queue in queues
            if rank < len(queue)
            for one in sorted(queue[rank], key=lambda stored: natural(stored.tag))
        ]


def recorded_tag(stored: Stored, run: Run) -> str:
    """The tag without the page's name, which stands at its end where another page has the tag too."""
    tag = stored.tag.removesuffix(f"/{stored.kind}")
    return tag if tag in run.tags else stored.tag


def _document(stored: Stored) -> tuple[Document, int]:
    record = stored.record()
    if record is not None:
        return record, held_bytes(record)
    markdown = "\n\n".join(_bytes(part).decode("utf-8", "replace") for part in stored.load().ravel())
    return markdown, len(markdown)


def _sound(stored: Stored) -> tuple[Sound, int]:
    array = stored.load()
    pairs = array.reshape(-1, array.shape[-1] if array.ndim == 2 else 1)
    clips = tuple(_clip(_bytes(pair[0]), _bytes(pair[1]) if len(pair) > 1 else b"") for pair in pairs)
    return clips, sum(len(clip.source) for clip in clips if clip)


def _clip(data: bytes, label: bytes) -> ClipView | None:
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        if sound.frames * sound.channels > LONGEST_CLIP:
            raise ValueError(f"{sound.frames:,} samples in {sound.channels} channels")
        samples, rate = sound.read(dtype="int16", always_2d=True), sound.samplerate
    if not len(samples):
        return None
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="FLAC", subtype="PCM_16")
    source = data_uri("audio/flac", stream.getvalue())
    return ClipView(unescape(label.decode("utf-8", "replace")), len(samples) / rate, rate, source)


def _picture(stored: Stored) -> tuple[Picture, int]:
    _width, _height, *pictures = (_bytes(part) for part in stored.load().ravel())
    if not pictures or pictures[0][:8] != b"\x89PNG\r\n\x1a\n" or pictures[0][12:16] != b"IHDR":
        raise ValueError("no PNG")
    # What the picture itself states: that is the room that a browser makes.
    width, height = struct.unpack_from(">II", pictures[0], 16)
    if not 0 < width * height <= LARGEST_PICTURE:
        raise ValueError(f"a picture of {width} × {height}")
    source = data_uri("image/png", pictures[0])
    return Picture(width, height, source), len(source)


def _bytes(part: object) -> bytes:
    if not isinstance(part, bytes):
        raise ValueError(f"expected bytes, got {type(part).__name__}")
    return part


def data_uri(kind: str, data: bytes) -> str:
    """Data as a URI that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

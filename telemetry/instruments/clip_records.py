"""What is shown and kept of the clips of one evaluation: table, sounds, spectrograms, metrics, WAV files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import soundfile
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from telemetry.catalogue import find
from telemetry.instruments.clip_numbers import NUMBERS, HeardClip
from telemetry.measures.audio import FRAME_SECONDS, MEL_RANGE_DB, log_mel, seconds
from telemetry.records import Audio, Cell, Clip, Image, Mean, Record, Table

SINCE = "since before training"
COLUMNS = (
    "sample", "speaker", "language", "target text", "transcript", "reference", "target", "generated", "teacher-forced",
    "spectrogram", "ended by", *NUMBERS, SINCE,
)  # fmt: skip
KINDS = ("reference", "target", "generated", "teacher_forced")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_NAME_LENGTH = 60
_DPI = 100
_WIDTH, _ROW_HEIGHT, _MARGIN = 8.0, 1.6, 0.5  # inches


@dataclass(frozen=True)
class MeasuredClip:
    """A clip, its transcript (None where nothing transcribes) and its numbers by name."""

    clip: HeardClip
    said: str | None
    numbers: Mapping[str, Mean]


def metrics(clips: Sequence[MeasuredClip]) -> Iterator[tuple[str, Mean]]:
    """Tag and value of every number of every clip, over all and by language. Values of one tag are to be merged."""
    for measured in clips:
        language = measured.clip.language
        for name, value in measured.numbers.items():
            yield f"zero_shot/{name}", value
            if _LANGUAGE.fullmatch(language):  # anything else is free text and no part of a tag
                yield f"zero_shot/language_{language.lower()}/{name}", value


Baseline: TypeAlias = dict[str, tuple[float | None, ...]]
"""The numbers of every sample's clip before the first step, in the order of :data:`NUMBERS`."""


def baseline(clips: Sequence[MeasuredClip]) -> Baseline:
    """What later clips of the same samples are compared with. Samples that share an id cannot be told apart."""
    count = Counter(measured.clip.sample_id for measured in clips)
    return {one.clip.sample_id: _results(one.numbers) for one in clips if count[one.clip.sample_id] == 1}


def shown(clips: Sequence[MeasuredClip], before: Baseline, with_media: bool = True) -> Iterator[Record]:
    """The tables, and the sounds and pictures that stand in them.

    Args:
        clips: of one evaluation.
        before: of the same samples before training; empty where that is not known.
        with_media: whether there are sounds and pictures.
    """
    rows = []
    for index, measured in enumerate(clips):
        media = _media(index, measured.clip) if with_media else ()
        yield from media
        rows.append(_row(measured, media or (None,) * (len(KINDS) + 1), before.get(measured.clip.sample_id)))
    yield Table("zero_shot/clips", COLUMNS, tuple(rows))
    yield Table("zero_shot/clips_by_speaker", ("speaker", "clips", *NUMBERS), tuple(_by_speaker(clips)))


def save(clips: Sequence[HeardClip], directory: Path, step: int, rank: int) -> None:
    """Write clips as 16-bit WAV: what the model says under ``step_<step>``, the data set's own once, beside it.

    Raises:
        OSError: when they cannot be written.
    """
    for index, clip in enumerate(clips):
        name = f"rank{rank}-{index}-{_file_name(clip.sample_id)}"
        made = directory / f"step_{step}"
        _write(made / f"{name}-generated.wav", clip.generated)
        _write(made / f"{name}-teacher_forced.wav", clip.teacher_forced)
        for kind, own in (("reference", clip.reference), ("target", clip.target)):
            path = directory / "dataset" / f"{name}-{kind}.wav"
            if not path.exists():
                _write(path, own)


def _media(index: int, clip: HeardClip) -> tuple[Audio | Image, ...]:
    place = f"zero_shot/clip_{index}"
    # One clip under every tag, an empty one where there is none: the audio tab of TensorBoard fails on a tag whose
    # number of clips changes.
    sounds = tuple(Audio(f"{place}/{kind}", (_captioned(getattr(clip, kind), clip),)) for kind in KINDS)
    compared = {kind: getattr(clip, kind) for kind in ("reference", "target", "generated")}
    return *sounds, spectrogram_image(f"{place}/spectrogram", compared, clip.sample_id)


def _captioned(sound: Clip, clip: HeardClip) -> Clip:
    caption = ", ".join(filter(None, (clip.sample_id, clip.speaker, clip.language)))
    return Clip(sound.samples, sound.sampling_rate, caption)


def _row(measured: MeasuredClip, media: Sequence[Cell], before: Sequence[float | None] | None) -> tuple[Cell, ...]:
    clip, numbers = measured.clip, _results(measured.numbers)
    return (
        clip.sample_id,
        clip.speaker or None,
        clip.language or None,
        clip.target_text or None,
        measured.said,
        *media,
        clip.speech.ending,
        *numbers,
        _change(numbers, before) if before else None,
    )


def _change(now: Sequence[float | None], before: Sequence[float | None]) -> str | None:
    """How far each number has moved that both have and of which one way is better; None where there is none."""
    moved = []
    for name, value, old in zip(NUMBERS, now, before, strict=True):
        entry = find(f"zero_shot/{name}")
        if entry is None or entry.better is None or value is None or old is None:
            continue
        better = (value > old) == (entry.better == "higher")
        verdict = "same" if value == old else "better" if better else "worse"
        moved.append(f"{name} {value - old:+.3g} {verdict}" if value != old else f"{name} {verdict}")
    return ", ".join(moved) or None


def _results(numbers: Mapping[str, Mean]) -> tuple[float | None, ...]:
    return tuple(numbers[name].result() if name in numbers else None for name in NUMBERS)


def _by_speaker(clips: Sequence[MeasuredClip]) -> Iterator[tuple[Cell, ...]]:
    for speaker in sorted({measured.clip.speaker for measured in clips}):
        own = [measured for measured in clips if measured.clip.speaker == speaker]
        merged: dict[str, Mean] = {}
        for measured in own:
            for name, value in measured.numbers.items():
                merged[name] = merged[name].merge(value) if name in merged else value
        yield speaker or "not named", len(own), *_results(merged)


def _file_name(sample_id: str) -> str:
    """An id as part of a file name: it comes from the data file."""
    return re.sub(r"[^\w-]+", "_", sample_id)[:_NAME_LENGTH] or "sample"


def _write(path: Path, clip: Clip) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.clip(clip.samples, -1, 1), clip.sampling_rate, subtype="PCM_16")


def spectrogram_image(tag: str, clips: Mapping[str, Clip], caption: str = "") -> Image:
    """Mel spectrograms of clips, one above the other on one time axis, each named by its key.

    Brightness is dB below the clip's own peak. A clip without samples has an empty row.
    """
    height = _ROW_HEIGHT * len(clips) + _MARGIN
    # Not pyplot, which keeps its figures and belongs to the main thread; no automatic layout, which draws twice.
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(clips), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.07, right=0.98, bottom=_MARGIN / height, top=1 - 0.05 / height, hspace=0.08)
    for axis, (name, clip) in zip(axes, clips.items(), strict=True):
        axis.set_ylabel(f"{name}\n(mel)", fontsize=8)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
        if len(clip.samples):
            mel = log_mel(clip.samples, clip.sampling_rate)
            extent = (0.0, len(mel) * FRAME_SECONDS, 0.0, float(mel.shape[1]))
            axis.imshow(mel.T, origin="lower", aspect="auto", extent=extent, vmin=-MEL_RANGE_DB, vmax=0, cmap="magma")
    longest = max((seconds(clip.samples, clip.sampling_rate) for clip in clips.values()), default=0.0)
    axes[-1].set_xlim(0, longest or 1.0)
    axes[-1].set_xlabel(f"seconds; from {-MEL_RANGE_DB:g} dB (dark) to the clip's peak (bright)", fontsize=8)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return Image(tag, pixels, caption, voice=True)

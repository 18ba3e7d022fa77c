"""What a destination makes of records: sound and pictures as files in memory, and a count of what it cannot show."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import soundfile
from PIL import Image as PillowImage

from telemetry.once import Once
from telemetry.records import Clip, Record

RecordT = TypeVar("RecordT", bound=Record)
MadeT = TypeVar("MadeT")

logger = logging.getLogger(__name__)

_FULL_SCALE = 32767  # of a float sample at 1.0, so that -1.0 and 1.0 are equally far from silence
_INTEGER_FULL_SCALE = 32768  # of integers, so that 16-bit samples stay as they are


class Shown:
    """What a destination makes of records. One that it cannot show does not keep the others away.

    Args:
        destination: what it is called.

    Attributes:
        unshown_records: how many it could not show. A warning names each of their tags once.
    """

    def __init__(self, destination: str) -> None:
        self.unshown_records = 0
        self._destination = destination
        self._once = Once(logger)

    def made(self, records: Iterable[RecordT], make: Callable[[RecordT], MadeT]) -> Iterator[MadeT]:
        """What ``make`` makes of each record that can be shown."""
        for record in records:
            try:
                yield make(record)
            except (TypeError, ValueError, OverflowError) as error:
                self.unshown_records += 1
                self.warn_once(record.tag, f"{self._destination} cannot show {record.tag}: {error}")

    def warn_once(self, key: str, message: str) -> None:
        """Log a warning the first time its key comes up."""
        self._once.say(key, "%s", message)


@dataclass(frozen=True)
class Wav:
    """A clip as a 16-bit PCM WAV file.

    Attributes:
        data: the whole file.
        samples: int16 of shape ``[frames, channels]``.
        caption: what the clip's says.
        clipped: finite samples beyond full scale, written at full scale.
        nonfinite: NaN and infinite samples, written as silence.
    """

    data: bytes
    samples: np.ndarray
    caption: str
    clipped: int
    nonfinite: int

    @property
    def is_changed(self) -> bool:
        """Whether the clip's samples could not be written as they are."""
        return bool(self.clipped or self.nonfinite)

    @property
    def label(self) -> str:
        """The caption, and what listeners should know about how the clip was changed."""
        remarks = [self.caption] if self.caption else []
        if not len(self.samples):
            remarks.append("This clip is empty.")
        if self.nonfinite:
            remarks.append(f"{self.nonfinite} samples were NaN or infinite and are silent here.")
        if self.clipped:
            remarks.append(f"{self.clipped} samples were beyond full scale and are clipped here.")
        return " ".join(remarks)


def encode_wav(clip: Clip) -> Wav:
    """A clip as a 16-bit WAV file. Floats are full scale at ±1, integers at their type's range.

    Raises:
        TypeError: when samples are neither floats nor integers.
        ValueError: when samples are not ``[samples]`` or ``[samples, channels]``, or the sampling rate is not positive.
    """
    samples = np.asarray(clip.samples)
    if samples.ndim not in (1, 2):
        raise ValueError(f"audio samples must be [samples] or [samples, channels], got shape {samples.shape}")
    if clip.sampling_rate < 1:
        raise ValueError(f"a sampling rate must be positive, got {clip.sampling_rate}")
    channels = samples.shape[1] if samples.ndim == 2 and samples.shape[1] else 1
    pcm, clipped, nonfinite = _pcm16(samples)
    pcm = pcm.reshape(-1, channels)
    stream = io.BytesIO()
    soundfile.write(stream, pcm, int(clip.sampling_rate), format="WAV", subtype="PCM_16")
    return Wav(stream.getvalue(), pcm, clip.caption, clipped, nonfinite)


def _pcm16(samples: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Samples as int16, how many were clipped, and how many were not finite."""
    if np.issubdtype(samples.dtype, np.integer):
        return _integers_to_pcm16(samples), 0, 0
    if not np.issubdtype(samples.dtype, np.floating):
        raise TypeError(f"audio samples must be floats or integers, got {samples.dtype}")
    finite = np.isfinite(samples)
    # Single precision holds 24 bits, more than the 16 that are written, and halves the work.
    scaled = np.where(finite, samples, 0).astype(np.float32)
    clipped = int(np.count_nonzero(np.abs(scaled) > 1))
    pcm = np.rint(np.clip(scaled, -1, 1) * _FULL_SCALE).astype(np.int16)
    return pcm, clipped, int(samples.size - np.count_nonzero(finite))


def _integers_to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Integers of any width scaled from their type's range, unsigned ones around its middle."""
    limits = np.iinfo(samples.dtype)
    half = (int(limits.max) - int(limits.min) + 1) // 2
    middle = int(limits.min) + half
    scaled = np.rint((samples.astype(np.float64) - middle) * (_INTEGER_FULL_SCALE / half))
    return np.clip(scaled, -_INTEGER_FULL_SCALE, _FULL_SCALE).astype(np.int16)


def encode_png(pixels: np.ndarray) -> bytes:
    """A picture as a PNG file, lossless and lightly compressed: a stronger setting takes longer and saves little.

    Args:
        pixels: uint8 of shape ``[height, width, 3]`` or ``[height, width]``.

    Raises:
        TypeError: when pixels are not uint8: what a float is meant to be cannot be known.
        ValueError: when the shape is another one, or the picture has no pixels.
    """
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels must be uint8, got {pixels.dtype}")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
        raise ValueError(f"pixels must be [height, width, 3] or [height, width], got shape {pixels.shape}")
    stream = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(pixels)).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()

"""Reads audio files: the header alone, the samples at the rate that a model wants, and a key for caches."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import soundfile
import soxr

from telemetry import printable

AudioPath: TypeAlias = str | os.PathLike[str]

_BLOCK_BYTES = 1 << 20
_BLOCK_FRAMES = 1 << 18
_LOUDEST = 100.0  # 40 dB over full scale: integers that were written as floats
_CONVERT = "which is not read: convert it to WAV or FLAC (`ffmpeg -i FILE FILE.wav`)"
_OTHERS = (
    (4, b"ftyp", f"is MPEG-4 audio (m4a, mp4), {_CONVERT}"),
    (0, b"\x1a\x45\xdf\xa3", f"is Matroska audio (webm, mkv), {_CONVERT}"),
    (0, b"\xff\xf1", f"is AAC audio, {_CONVERT}"),
    (0, b"\xff\xf9", f"is AAC audio, {_CONVERT}"),
    (0, b"#!amr", f"is AMR audio, {_CONVERT}"),
    (0, b"\x30\x26\xb2\x75", f"is Windows Media audio, {_CONVERT}"),
    (0, b"version https://git-lfs", "is a pointer of Git LFS, not the audio itself: get it with `git lfs pull`"),
    (0, b"<!doctype html", "is a web page, not audio: download the file itself"),
    (0, b"<html", "is a web page, not audio: download the file itself"),
)
_FLOAT_SUBTYPES = frozenset({"FLOAT", "DOUBLE"})
_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's SF_COUNT_MAX: a stream whose header does not state its length


class AudioError(ValueError):
    """An audio file that cannot be used. The message names the file and what is wrong with it."""

    def __str__(self) -> str:
        return printable(super().__str__(), kept="")


class AudioMissingError(AudioError):
    """There is no readable file at the path."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file states: ``frames`` samples per channel at ``sampling_rate`` hertz."""

    frames: int
    sampling_rate: int
    channels: int

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.frames / self.sampling_rate


def probe_audio(path: AudioPath) -> AudioInfo:
    """What the header states. Reads nothing else.

    Raises:
        AudioMissingError: when there is no such file, or it is a directory or cannot be opened.
        AudioError: when the file is empty, is not readable audio, has no samples, or does not state its length.
    """
    with _opened(path) as sound:
        return _info(sound, path)


def check_audio(path: AudioPath) -> AudioInfo:
    """:func:`probe_audio`, and for formats that can hold them (float WAV and the like) a search for NaN and infinity.

    Integer and compressed formats cannot hold non-finite samples: of these only the header is read.

    Raises:
        AudioMissingError, AudioError: as :func:`probe_audio`, for non-finite samples, with their number, and for
            samples far beyond full scale.
    """
    with _opened(path) as sound:
        info = _info(sound, path)
        if sound.subtype in _FLOAT_SUBTYPES:
            count, peak = 0, 0.0
            for block in _blocks(sound):
                finite = np.isfinite(block)
                count += int(block.size - finite.sum())
                peak = max(peak, float(np.abs(block, where=finite, out=np.zeros_like(block)).max(initial=0.0)))
            _refuse_nonfinite(count, info, path)
            if peak > _LOUDEST:
                raise AudioError(
                    f"{path}: samples reach {peak:g}, where full scale is 1: divide them by their full scale"
                )
        return info


def read_audio(path: AudioPath, sampling_rate: int | None) -> np.ndarray:
    """The samples of an audio file of any rate and number of channels.

    Args:
        path: a file in a format that libsndfile reads (WAV, FLAC, OGG, MP3, ...).
        sampling_rate: hertz to resample to (soxr, its very high quality setting), or None for the file's own.

    Returns:
        float32 ``[samples]``: the mean of the channels, full scale at ±1. Resampling can overshoot that a little.
        An MP3 or WAV that was cut short gives the samples that are there.

    Raises:
        AudioMissingError: when there is no such file, or it is a directory or cannot be opened.
        AudioError: when the file is empty, is not readable audio, has no samples, has non-finite samples, or is too
            short to leave one at the rate.
        ValueError: when ``sampling_rate`` is not positive.
    """
    if sampling_rate is not None and sampling_rate <= 0:
        raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
    with _opened(path) as sound:
        info = _info(sound, path)
        channels = np.concatenate([np.zeros((0, info.channels), np.float32), *_blocks(sound)])
    if not channels.size:
        raise AudioError(f"{path}: holds no samples, though its header states {info.frames}")
    _refuse_nonfinite(_count_nonfinite(channels), info, path)
    mono = channels.mean(axis=1, dtype=np.float64).astype(np.float32)
    if sampling_rate is None or sampling_rate == info.sampling_rate:
        return mono
    resampled = soxr.resample(mono, info.sampling_rate, sampling_rate, quality="VHQ")
    if not resampled.size:
        raise AudioError(f"{path}: is {info.seconds:.2g} s long, so that no sample is left of it at {sampling_rate} Hz")
    return resampled


def content_key(path: AudioPath) -> str:
    """SHA-256 of the file's bytes in hexadecimal: equal for equal files, whatever their names.

    Raises:
        AudioMissingError: when there is no such file, or it is a directory or cannot be opened.
        AudioError: when the file is empty.
    """
    digest = hashlib.sha256()
    with _stream(path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _opened(path: AudioPath) -> Iterator[soundfile.SoundFile]:
    with _stream(path) as stream:
        try:
            with soundfile.SoundFile(stream) as sound:
                yield sound
        except soundfile.LibsndfileError as error:
            reason = _what_it_is(stream) or f"is not readable audio ({error.error_string.rstrip('.')})"
            raise AudioError(f"{path}: {reason}") from error
        except TypeError as error:  # soundfile asks for the rate and channels of *.raw
            raise AudioError(f"{path}: is not readable audio (raw samples without a header)") from error


def _blocks(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """The samples, ``[frames, channels]`` at a time: room is made for what is there, not for what a header states."""
    while len(block := sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
        yield block


def _what_it_is(stream: BinaryIO) -> str:
    """What a file is that is none of the formats read here, with what to do; "" where that is not known."""
    try:
        stream.seek(0)
        beginning = stream.read(64)
    except (OSError, ValueError):
        return ""
    for at, magic, what in _OTHERS:
        if beginning[at : at + len(magic)].lower() == magic.lower():
            return what
    return ""


def _stream(path: AudioPath) -> BinaryIO:
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise AudioMissingError(f"{path}: is a directory, not an audio file")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            raise AudioMissingError(f"{path}: is a device or a pipe, not an audio file")
        if status.st_size == 0:
            raise AudioError(f"{path}: is an empty file (0 bytes)")
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise AudioMissingError(f"{path}: no such file") from error
    except AudioError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte or half a surrogate pair in the name
        raise AudioMissingError(f"{path}: cannot be opened ({error})") from error


def _info(sound: soundfile.SoundFile, path: AudioPath) -> AudioInfo:
    if sound.frames == 0:
        raise AudioError(f"{path}: holds no samples")
    if sound.frames == _UNKNOWN_FRAMES:
        raise AudioError(f"{path}: does not state its length (written to a pipe?)")
    return AudioInfo(frames=sound.frames, sampling_rate=sound.samplerate, channels=sound.channels)


def _count_nonfinite(samples: np.ndarray) -> int:
    return int(samples.size - np.isfinite(samples).sum())


def _refuse_nonfinite(count: int, info: AudioInfo, path: AudioPath) -> None:
    if count:
        raise AudioError(f"{path}: {count} of {info.frames * info.channels} samples are NaN or infinite")

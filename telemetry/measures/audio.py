"""What a waveform is by its signal alone: level, silence, clipping, mel spectrogram, distance to another.

Waveforms are float ``[samples]``, full scale at ±1. Numpy only: this runs on the host.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

FRAME_SECONDS = 0.02
SILENCE_DB = -50.0
CLIPPED_AT = 0.999
MEL_BANDS = 64
MEL_WINDOW_SECONDS = 0.04
MEL_RANGE_DB = 60.0


def seconds(samples: np.ndarray, sampling_rate: int) -> float:
    """Length of a waveform in seconds."""
    return len(samples) / sampling_rate


def level_db(samples: np.ndarray) -> float:
    """Root mean square relative to full scale, in dB; -inf for digital silence and no samples, NaN where one is NaN."""
    if not len(samples):
        return -math.inf
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return -math.inf if power == 0 else 10 * math.log10(power)


def silent_seconds(samples: np.ndarray, sampling_rate: int) -> float:
    """Time in frames of 20 ms whose level is below -50 dB of full scale; a last piece of a frame counts as its length.

    A frame that holds NaN or infinity is not silent.
    """
    size = max(round(FRAME_SECONDS * sampling_rate), 1)
    whole = len(samples) // size * size
    pieces = [*samples[:whole].reshape(-1, size), *([samples[whole:]] if len(samples) > whole else [])]
    return sum(len(piece) for piece in pieces if level_db(piece) < SILENCE_DB) / sampling_rate


def silence_fraction(samples: np.ndarray, sampling_rate: int) -> float | None:
    """Share of the time that is silent (:func:`silent_seconds`); None for no samples."""
    return silent_seconds(samples, sampling_rate) / seconds(samples, sampling_rate) if len(samples) else None


def clipping_fraction(samples: np.ndarray) -> float | None:
    """Share of the samples at or beyond 0.999 of full scale; None for no samples."""
    return float(np.mean(np.abs(samples) >= CLIPPED_AT)) if len(samples) else None


def log_mel(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Mel spectrogram in dB below its own peak: loudness does not count, and nothing lies below -60 dB.

    Hann windows of 40 ms every 20 ms, 64 bands up to half the sampling rate.

    Returns:
        float64 ``[frames, bands]``; at least one frame.
    """
    size = max(round(MEL_WINDOW_SECONDS * sampling_rate), 16)
    hop = max(round(FRAME_SECONDS * sampling_rate), 8)
    padded = np.pad(np.asarray(samples, dtype=np.float64), (size // 2, size // 2 + hop))
    frames = sliding_window_view(padded, size)[: max(len(samples), 1) : hop] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, _fft_size(size))) ** 2 @ _mel_filters(_fft_size(size), sampling_rate)
    peak = max(float(power.max()), np.finfo(np.float64).tiny)
    return np.maximum(10 * np.log10(np.maximum(power / peak, 10 ** (-MEL_RANGE_DB / 10))), -MEL_RANGE_DB)


def mel_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Distance of two mel spectrograms (:func:`log_mel`) after dynamic time warping, in dB.

    The root mean square difference over the bands, averaged along the best alignment. Symmetric steps, a diagonal one
    counting double, so that the sum over a path divided by both lengths is an average whatever the path (Sakoe, Chiba
    1978, "Dynamic programming algorithm optimization for spoken word recognition",
    https://doi.org/10.1109/TASSP.1978.1163055).

    Args:
        ours, theirs: ``[frames, bands]`` with at least one frame each.
    """
    squares = (ours**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * ours @ theirs.T
    local = np.sqrt(np.maximum(squares, 0) / ours.shape[1])
    return _warped(local) / sum(local.shape)


def _warped(local: np.ndarray) -> float:
    """Smallest sum along a path through a cost matrix, worked out one antidiagonal at a time."""
    rows, columns = local.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(rows + columns - 1):
        row = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        column = diagonal - row
        cost = local[row, column]
        straight = np.minimum(total[row, column + 1], total[row + 1, column]) + cost
        total[row + 1, column + 1] = np.minimum(straight, total[row, column] + 2 * cost)
    return float(total[rows, columns])


def _fft_size(window: int) -> int:
    return 1 << (window - 1).bit_length()


@functools.lru_cache(maxsize=8)
def _mel_filters(fft_size: int, sampling_rate: int) -> np.ndarray:
    """``[bins, bands]``: triangles, their centres equally spaced in mel, each reaching to its neighbours' centres."""
    # 2595 log10(1 + f / 700): O'Shaughnessy's scale, as HTK has it.
    top = 2595 * math.log10(1 + sampling_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MEL_BANDS + 2) / 2595) - 1)
    bins = np.linspace(0, sampling_rate / 2, fft_size // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def narrow_band(samples: np.ndarray, sampling_rate: int, above: float = 4000.0) -> bool:
    """Whether less than a thousandth of the power lies above 4 kHz, as of a telephone's sound that was resampled."""
    power, frequencies = _average_power(samples, sampling_rate)
    total = float(power.sum())
    return bool(total > 0 and float(power[frequencies > above].sum()) < 1e-3 * total)


def spectral_flatness(samples: np.ndarray, sampling_rate: int) -> float:
    """Geometric over arithmetic mean of the average power spectrum: near 1 for white noise, near 0 for speech.

    NaN for digital silence. Johnston 1988, "Transform coding of audio signals using perceptual noise criteria".
    """
    power, _ = _average_power(samples, sampling_rate)
    if not power.sum() > 0:
        return math.nan
    floor = np.maximum(power, np.finfo(np.float64).tiny)
    return float(np.exp(np.mean(np.log(floor))) / np.mean(floor))


def ends_abruptly(samples: np.ndarray, sampling_rate: int) -> bool:
    """Whether the last 20 ms are as loud as the clip as a whole, less 6 dB: speech that was cut off."""
    last = samples[-max(round(FRAME_SECONDS * sampling_rate), 1) :]
    return level_db(last) > max(level_db(samples) - 6.0, SILENCE_DB)


def _average_power(samples: np.ndarray, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Power of every frequency but the lowest, averaged over windows of 40 ms, and the frequencies in hertz."""
    size = _fft_size(max(round(MEL_WINDOW_SECONDS * sampling_rate), 16))
    padded = np.pad(np.asarray(samples, dtype=np.float64), (0, max(0, size - len(samples))))
    frames = sliding_window_view(padded, size)[:: size // 2] * np.hanning(size)
    power = (np.abs(np.fft.rfft(frames, axis=1)) ** 2).mean(axis=0)
    return power[1:], np.fft.rfftfreq(size, 1 / sampling_rate)[1:]

"""Brings clips to the rate that a model listens at."""

from __future__ import annotations

import numpy as np
import soxr


def resampled(samples: np.ndarray, sampling_rate: int, wanted: int) -> np.ndarray:
    """float32 ``[samples]`` at the ``wanted`` rate in hertz."""
    heard = np.ascontiguousarray(samples, dtype=np.float32)
    return heard if sampling_rate == wanted else soxr.resample(heard, sampling_rate, wanted)

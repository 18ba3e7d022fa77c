"""What a speaker encoder, a transcriber and an opinion scorer have to do. Any object with these methods will do."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class SpeakerEncoder(Protocol):
    """Tells voices apart."""

    def embed(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        """The voice of a clip as a vector: a small angle between two vectors means the same speaker.

        Called on the training thread between steps, in a place where random numbers may be drawn without a trace.

        Args:
            samples: float32 ``[samples]``, mono, full scale at ±1.
            sampling_rate: in hertz.

        Returns:
            float ``[size]``.

        Raises:
            ValueError: when the clip is too short to tell.
        """


class Transcriber(Protocol):
    """Writes down what is said."""

    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> str:
        """The words of a clip.

        Called on the training thread between steps, in a place where random numbers may be drawn without a trace.

        Args:
            samples: float32 ``[samples]``, mono, full scale at ±1.
            sampling_rate: in hertz.
            language: code of the language, where it is known.
        """


class OpinionScorer(Protocol):
    """Says how good people would find the sound."""

    def score(self, samples: np.ndarray, sampling_rate: int) -> float:
        """The mean opinion of a clip, from 1 (bad) to 5 (excellent).

        Called on the training thread between steps, in a place where random numbers may be drawn without a trace.

        Args:
            samples: float32 ``[samples]``, mono, full scale at ±1.
            sampling_rate: in hertz.

        Raises:
            ValueError: when the clip cannot be judged.
        """

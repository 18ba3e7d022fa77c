"""Speaker vectors from an x-vector model of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

from telemetry.speech.resampling import resampled

_HEAD = ("projector.", "tdnn.", "feature_extractor.", "layer_weights")


class XVectorEncoder:
    """Speaker vectors of WavLM, wav2vec 2.0, UniSpeech-SAT, ... for speaker verification.

    The model is held in float32 on the CPU: evaluating a few clips is quick there, and training keeps its memory.

    Args:
        path: a directory or hub id with an x-vector model and its feature extractor.

    Raises:
        OSError, ValueError: when there is none, or the checkpoint has no trained x-vector head.
    """

    def __init__(self, path: str) -> None:
        self._extractor: Any = AutoFeatureExtractor.from_pretrained(path)
        model, info = AutoModelForAudioXVector.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        untrained = sorted(name for name in info["missing_keys"] if name.startswith(_HEAD))
        if untrained:  # transformers only warns, and cosines of random projections look like similarities
            raise ValueError(f"the checkpoint has no x-vector head ({', '.join(untrained[:3])} are missing)")
        self._model: Any = model.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        """See :class:`telemetry.speech.base.SpeakerEncoder`."""
        rate = int(self._extractor.sampling_rate)
        heard = resampled(samples, sampling_rate, rate)
        frames = int(self._model._get_feat_extract_output_lengths(torch.tensor(len(heard))))
        # Statistics over the frames that the time-delay layers leave: a deviation needs two of them.
        if int(self._model._get_tdnn_output_lengths(frames)) < 2:
            raise ValueError(f"{len(heard) / rate:.2f} s are too short to tell a voice")
        inputs = self._extractor(heard, sampling_rate=rate, return_tensors="pt")
        vector: np.ndarray = self._model(**inputs).embeddings[0].float().numpy()
        return vector

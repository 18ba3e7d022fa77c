"""Transcripts from a speech recognition model of transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from transformers import pipeline

from telemetry.speech.resampling import resampled

_WHISPER_SECONDS = 30.0


class PipelineTranscriber:
    """transformers' ``automatic-speech-recognition`` pipeline: Whisper, wav2vec 2.0 with CTC, ...

    The model is held in float32 on the CPU, as :class:`telemetry.speech.speaker.XVectorEncoder` holds its own.

    Args:
        path: a directory or hub id.

    Raises:
        OSError, ValueError: when there is no such model, or jiwer, which counts the errors, is not installed.
    """

    def __init__(self, path: str) -> None:
        if importlib.util.find_spec("jiwer") is None:
            raise ValueError("word error rates need jiwer: pip install 'strategic-telemetry[speech]'")
        self._pipeline: Any = pipeline("automatic-speech-recognition", model=path, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> str:
        """See :class:`telemetry.speech.base.Transcriber`. Only multilingual Whisper models are told the language."""
        rate = int(self._pipeline.feature_extractor.sampling_rate)
        heard = resampled(samples, sampling_rate, rate)
        said = self._pipeline({"raw": heard, "sampling_rate": rate}, **self._options(len(heard) / rate, language))
        return str(said["text"])

    def _options(self, seconds: float, language: str | None) -> dict[str, Any]:
        if self._pipeline.type != "seq2seq_whisper":
            return {}
        options: dict[str, Any] = {"return_timestamps": True} if seconds > _WHISPER_SECONDS else {}
        known = getattr(self._pipeline.model.generation_config, "lang_to_id", None) or {}
        code = (language or "").lower().split("-")[0]
        if f"<|{code}|>" in known:
            options["generate_kwargs"] = {"language": code, "task": "transcribe"}
        return options

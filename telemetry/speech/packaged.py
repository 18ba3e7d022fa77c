"""Listeners whose weights come with a package from the index: nothing is downloaded when they are made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from telemetry.speech.resampling import resampled

RATE = 16_000
_FULL_SCALE = 2**15 - 1


class _Packaged:
    """Copied and pickled by being made again: what holds the weights can be neither."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class Resemblyzer(_Packaged):
    """Speaker vectors of Resemblyzer's voice encoder (Wan et al., "Generalized End-to-End Loss", 2018).

    The package is read for its weights and not imported, which would need a voice activity detector with a compiler:
    ``pip install --no-deps Resemblyzer``. Silence is not cut out. Trained on recorded English; synthetic voices lie
    closer together than those of people.

    Raises:
        ValueError: when the package is not installed.
    """

    WINDOW, STEP = 160, 77  # frames of 10 ms: 1.6 s, and 1.3 windows a second

    def __init__(self) -> None:
        from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

        weights = _file_of("resemblyzer", "pretrained.pt", "pip install --no-deps Resemblyzer")
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        with torch.device("meta"):  # which draws no random numbers: a training may run
            self._lstm = nn.LSTM(40, 256, 3, batch_first=True)
            self._linear = nn.Linear(256, 256)
        parts = nn.ModuleDict({"lstm": self._lstm, "linear": self._linear}).to_empty(device="cpu")
        parts.load_state_dict({name: value for name, value in state.items() if name.startswith(("lstm.", "linear."))})
        parts.eval().requires_grad_(False)
        filters = mel_filter_bank(201, 40, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
        window = window_function(400, "hann")
        self._mel: Callable[[np.ndarray], np.ndarray] = lambda heard: spectrogram(
            heard, window, 400, 160, power=2.0, pad_mode="constant", mel_filters=filters
        )

    @torch.no_grad()
    def embed(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        """See :class:`telemetry.speech.base.SpeakerEncoder`: the mean over windows, of length 1."""
        heard = resampled(samples, sampling_rate, RATE)
        if len(heard) < RATE // 2:
            raise ValueError(f"{len(heard) / RATE:.2f} s are too short to tell a voice")
        level = float(np.sqrt(np.mean(np.square(heard, dtype=np.float64))))
        if not level:
            raise ValueError("there is nothing but silence")
        heard = heard * max(10**-1.5 / level, 1.0)  # what is softer than -30 dB is made as loud
        frames = self._mel(heard).T
        windows = max(1, round((len(frames) - self.WINDOW) / self.STEP) + 1)
        missing = (windows - 1) * self.STEP + self.WINDOW - len(frames)
        frames = np.pad(frames, ((0, max(0, missing)), (0, 0))).astype(np.float32)
        parts = np.stack([frames[at * self.STEP : at * self.STEP + self.WINDOW] for at in range(windows)])
        _, (hidden, _) = self._lstm(torch.from_numpy(parts))
        vectors = nn.functional.normalize(self._linear(hidden[-1]).relu(), dim=1).mean(dim=0)
        made: np.ndarray = nn.functional.normalize(vectors, dim=0).numpy()
        return made


class PocketSphinx(_Packaged):
    """PocketSphinx with its own model of American English: other languages are not understood.

    It errs far more than a neural recognizer, so that changes say more than values.

    Raises:
        ValueError: when PocketSphinx, or jiwer, which counts the errors, is not installed.
    """

    def __init__(self) -> None:
        for name in ("pocketsphinx", "jiwer"):
            _installed(name, "pip install 'strategic-telemetry[listeners]'")
        from pocketsphinx import Decoder

        self._make: Callable[[], Any] = lambda: Decoder(samprate=RATE, loglevel="FATAL")

    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> str:
        """See :class:`telemetry.speech.base.Transcriber`.

        Raises:
            ValueError: for another language than English.
        """
        if language is not None and not language.lower().startswith("en"):
            raise ValueError(f"PocketSphinx's own model hears English, and not {language}")
        heard = np.clip(resampled(samples, sampling_rate, RATE), -1, 1) * _FULL_SCALE
        if not len(heard):
            return ""
        decoder = self._make()  # one that has heard other clips hears this one otherwise
        decoder.start_utt()
        decoder.process_raw(heard.astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        said = decoder.hyp()
        return "" if said is None else str(said.hypstr)


class Dnsmos(_Packaged):
    """DNSMOS P.835, the overall opinion that people would have (Reddy et al., ICASSP 2022), by ``speechmos``' weights.

    It was made for noise suppression of recorded speech: 1 is bad and 5 excellent, and synthetic voices are judged by
    their sound alone.

    Raises:
        ValueError: when ``speechmos`` or ONNX Runtime is not installed.
    """

    SECONDS = 9.01
    CURVE = (-0.06766283, 1.11546468, 0.04602535)  # from the network's number to what people say, as published

    def __init__(self) -> None:
        mend = "pip install 'strategic-telemetry[listeners]'"
        weights = _file_of("speechmos", "dnsmos_models/sig_bak_ovr.onnx", mend)
        _installed("onnxruntime", mend)
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1  # beside a training
        self._network = onnxruntime.InferenceSession(str(weights), settings, providers=["CPUExecutionProvider"])

    def score(self, samples: np.ndarray, sampling_rate: int) -> float:
        """See :class:`telemetry.speech.base.OpinionScorer`: the mean over seconds; a short clip is repeated."""
        heard = np.clip(resampled(samples, sampling_rate, RATE), -1, 1)
        if not len(heard):
            raise ValueError("the clip is empty")
        window = int(self.SECONDS * RATE)
        while len(heard) < window:  # as speechmos does it: doubled, and then every second of what there is
            heard = np.concatenate([heard, heard])
        begins = range(0, (int(len(heard) // RATE - self.SECONDS) + 1) * RATE, RATE)
        parts = [part for begin in begins if len(part := heard[begin : begin + window]) == window]
        raw = [float(self._network.run(None, {"input_1": part[None]})[0][0][2]) for part in parts]
        return float(np.mean(np.polyval(self.CURVE, raw)))


def _installed(module: str, mend: str) -> Any:
    found = importlib.util.find_spec(module)
    if found is None:
        raise ValueError(f"{module} is not installed: {mend}.")
    return found


def _file_of(package: str, name: str, mend: str) -> Path:
    """A file of a package that is not imported."""
    places = _installed(package, mend).submodule_search_locations
    path = next((Path(place) / name for place in places or () if (Path(place) / name).exists()), None)
    if path is None:
        raise ValueError(f"{package} {importlib.metadata.version(package)} has no {name}: {mend}.")
    return path

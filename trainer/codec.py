"""Loads an audio tokenizer (codec) and turns waveforms into codes.

Two kinds are supported: ``HiggsAudioV2TokenizerModel`` and the demonstration codec.

transformers imports torchaudio wherever it is installed. The package therefore calls :func:`import_torchaudio` before
anything else, and functions here import transformers when they are called.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedAudioTokenizerBase

logger = logging.getLogger(__name__)

SUPPORTED_MODEL_TYPES = ("higgs_audio_v2_tokenizer", "demonstration_codec")

_MEND = (
    "give a directory made by save_pretrained, or the hub id of Higgs Audio v2 tokenizer weights for transformers, "
    "such as bosonai/higgs-audio-v2-tokenizer"
)


def import_torchaudio() -> None:
    """Import torchaudio, without its compiled extension where that cannot be loaded.

    The Linux wheels of torchaudio on PyPI are linked against CUDA: beside a CPU-only torch their extension cannot be
    loaded, and torchaudio cannot be imported, although transformers uses only its resampling, which is plain Python.
    A torchaudio that can be imported is left alone.

    Raises:
        ImportError: when torchaudio is not installed.
    """
    try:
        importlib.import_module("torchaudio")
    except OSError as error:
        _import_torchaudio_without_extension()
        logger.info("using torchaudio without its compiled extension, which cannot be loaded here: %s", error)


def _import_torchaudio_without_extension() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]  # what the failed import has left
    extension = _extension_stand_in()
    sys.modules[extension.__name__] = extension
    torchaudio: Any = importlib.import_module("torchaudio")
    torchaudio._extension = extension


def _extension_stand_in() -> ModuleType:
    """What ``torchaudio._extension`` says of itself in a torchaudio that was built without compiled code."""
    extension: Any = ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension._IS_ALIGN_AVAILABLE = False
    extension._check_cuda_version = lambda: None
    extension._load_lib = lambda lib: False
    extension.fail_if_no_align = _fail_when_called
    return extension


def _fail_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{function.__name__} needs torchaudio's compiled extension, which cannot be loaded here")

    return fail


def load_audio_tokenizer(path: str, device: torch.device | str | None = None) -> PreTrainedAudioTokenizerBase:
    """The audio tokenizer saved in a directory or on the hub, in float32, for inference only.

    Args:
        path: a directory or a hub id.
        device: where to put it; the CPU when None.

    Raises:
        ValueError: when there is no audio tokenizer at ``path``, or none of a supported kind. Names the path, what
            is wrong and what to do.
    """
    importlib.import_module("trainer.demo.codec")  # makes the demonstration codec known to transformers
    from transformers import AutoModelForAudioTokenization

    config = _read_config(path)
    if config.model_type == "higgs_audio_v2_tokenizer":
        try:
            import_torchaudio()
        except ImportError as error:
            mend = "install the build that matches your torch, or pip install 'strategic-telemetry[codec]'"
            raise ValueError(f"the audio tokenizer at {path!r} needs torchaudio: {mend}") from error
    try:
        codec = AutoModelForAudioTokenization.from_pretrained(path, config=config, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"cannot load the weights of the audio tokenizer at {path!r}: {error}; {_MEND}") from error
    return codec.to(device or "cpu").eval().requires_grad_(False)


def _read_config(path: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    directory = Path(path)
    if directory.is_file():
        raise ValueError(f"the audio tokenizer path {path!r} is a file; {_MEND}")
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise ValueError(f"the directory {path!r} has no config.json: it holds no audio tokenizer; {_MEND}")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        if directory.is_dir():
            raise ValueError(f"the audio tokenizer configuration in {path!r} is unusable: {error}; {_MEND}") from error
        reason = "no such directory, and no hub model of that name can be reached"
        raise ValueError(f"no audio tokenizer at {path!r}: {reason}; {_MEND}") from error
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        kinds = " or ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"{path!r} holds a model of type {config.model_type!r}, not {kinds}; {_MEND}")
    return config


def codec_sampling_rate(codec: PreTrainedAudioTokenizerBase) -> int:
    """Samples a second of the waveforms that the codec takes and gives."""
    return int(codec.config.sample_rate)


def codec_num_codebooks(codec: PreTrainedAudioTokenizerBase) -> int:
    """Codes of one frame."""
    return int(codec.config.num_quantizers)


def codec_frame_rate(codec: PreTrainedAudioTokenizerBase) -> float:
    """Frames of codes a second."""
    return codec_sampling_rate(codec) / int(codec.config.hop_length)


def encode_waveform(codec: PreTrainedAudioTokenizerBase, samples: np.ndarray) -> Tensor:
    """The codes of one waveform.

    Args:
        codec: from :func:`load_audio_tokenizer`.
        samples: float32 ``[n]`` at the codec's sampling rate.

    Returns:
        int64 ``[num_codebooks, frames]`` on the CPU.

    Raises:
        ValueError: when ``samples`` is not a waveform of that shape, is empty, or has non-finite values (counted).
    """
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f"expected a mono waveform of shape [n] with n > 0, got {list(samples.shape)}")
    if nonfinite := int(samples.size - np.isfinite(samples).sum()):
        raise ValueError(f"the waveform has {nonfinite} non-finite values among its {samples.size} samples")
    waveform = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    with torch.inference_mode():
        codes: Tensor = codec.encode(waveform[None, None].to(codec.device)).audio_codes[0]
    return codes.to("cpu", torch.int64).clone()

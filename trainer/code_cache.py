"""Audio codes on disk: every clip is encoded once, whatever the number of runs, ranks and samples that use it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from trainer.audio import content_key, read_audio
from trainer.codec import codec_sampling_rate, encode_waveform

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Beside the hub's own cache, so that ``HF_HOME`` moves both."""
    return Path(constants.HF_HOME) / "strategic_telemetry" / "audio_codes"


class CodeCache:
    """Codes of audio files, keyed by the file's content and the codec's weights.

    Args:
        codec: encodes what is not there yet.
        directory: where codes are kept; shared by all ranks and runs.
    """

    def __init__(self, codec: Any, directory: Path | None = None) -> None:
        self._codec = codec
        self._directory = (directory or default_cache_dir()) / codec_key(codec)
        self._directory.mkdir(parents=True, exist_ok=True)

    def encode(self, paths: Iterable[Path]) -> dict[Path, Tensor]:
        """Codes of every path: int64 ``[codebooks, frames]``.

        Ranks share the encoding of what is missing; a progress bar on rank 0 shows it. Every rank must call this.
        """
        files = {path: self._directory / f"{content_key(path)}.safetensors" for path in dict.fromkeys(paths)}
        state = PartialState()
        codes = _read(files)
        missing = [path for path in files if path not in codes]
        self._fill(missing[state.process_index :: state.num_processes], files, show=state.is_main_process)
        state.wait_for_everyone()
        codes |= _read({path: files[path] for path in missing})
        # Ranks on other machines may not share the directory.
        elsewhere = [path for path in missing if path not in codes]
        self._fill(elsewhere, files, show=state.is_local_main_process)
        codes |= _read({path: files[path] for path in elsewhere})
        if state.is_main_process:
            logger.info("%d clips: %d encoded now, the others were in %s", len(files), len(missing), self._directory)
        return {path: codes[path] for path in files}

    def _fill(self, paths: Sequence[Path], files: dict[Path, Path], show: bool) -> None:
        if not paths:
            return
        rate = codec_sampling_rate(self._codec)
        for path in tqdm(paths, desc="encoding audio", unit="clip", disable=not show, dynamic_ncols=True):
            codes = encode_waveform(self._codec, read_audio(path, rate))
            partial = files[path].with_suffix(f".{os.getpid()}.partial")
            save_file({"codes": codes.to(torch.int32).contiguous()}, str(partial))
            partial.replace(files[path])


def _read(files: Mapping[Path, Path]) -> dict[Path, Tensor]:
    """The codes that are there; a file that cannot be read (a full disk, a copy cut short) counts as not there."""
    codes = {}
    for path, file in files.items():
        try:
            codes[path] = load_file(str(file))["codes"].long()
        except FileNotFoundError:
            continue
        except (SafetensorError, KeyError) as error:
            logger.warning("encoding %s again: its cached codes in %s are unreadable (%s)", path, file, error)
    return codes


def codec_key(codec: Any) -> str:
    """A hash of a codec's configuration and weights, the same wherever it was loaded from."""
    digest = hashlib.sha256(type(codec).__name__.encode())
    digest.update(json.dumps(_settings(json.loads(codec.config.to_json_string(use_diff=False)))).encode())
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _settings(config: Any) -> Any:
    """A configuration, and every one inside it, without where and by what it was loaded."""
    if not isinstance(config, dict):
        return config
    return {
        key: _settings(value) for key, value in config.items() if key not in ("_name_or_path", "transformers_version")
    }

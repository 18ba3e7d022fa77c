"""Audio codes on disk: every clip is encoded once, whatever the number of runs, ranks and samples that use it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import constants
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
        unique = list(dict.fromkeys(paths))
        files = {path: self._directory / f"{content_key(path)}.safetensors" for path in unique}
        state = PartialState()
        missing = [path for path in unique if not files[path].exists()]
        self._fill(missing[state.process_index :: state.num_processes], files, show=state.is_main_process)
        state.wait_for_everyone()
        # Ranks on other machines may not share the directory.
        self._fill([path for path in unique if not files[path].exists()], files, show=state.is_local_main_process)
        if state.is_main_process:
            logger.info("%d clips: %d encoded now, the others were in %s", len(unique), len(missing), self._directory)
        return {path: load_file(str(files[path]))["codes"].long() for path in unique}

    def _fill(self, paths: Sequence[Path], files: dict[Path, Path], show: bool) -> None:
        if not paths:
            return
        rate = codec_sampling_rate(self._codec)
        for path in tqdm(paths, desc="encoding audio", unit="clip", disable=not show, dynamic_ncols=True):
            codes = encode_waveform(self._codec, read_audio(path, rate))
            partial = files[path].with_suffix(f".{os.getpid()}.partial")
            save_file({"codes": codes.to(torch.int32).contiguous()}, str(partial))
            partial.replace(files[path])


def codec_key(codec: Any) -> str:
    """A hash of a codec's configuration and weights."""
    digest = hashlib.sha256(type(codec).__name__.encode())
    digest.update(codec.config.to_json_string(use_diff=False).encode() if _stable(codec) else b"")
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _stable(codec: Any) -> bool:
    return hasattr(codec.config, "to_json_string")

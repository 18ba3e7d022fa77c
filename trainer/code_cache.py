"""Audio codes on disk: every clip is encoded once, whatever the number of runs, ranks and samples that use it."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
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
from trainer.codec import codec_num_codebooks, codec_sampling_rate, encode_waveform

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Beside the hub's own cache, so that ``HF_HOME`` moves both."""
    return Path(constants.HF_HOME) / "strategic_telemetry" / "audio_codes"


class _UnusableError(Exception):
    """Codes that are not those that were written. The message says why."""


class CodeCache:
    """Codes of audio files, keyed by the file's content and the codec's weights.

    What is read is checked: its checksum, which is of this clip and this codec, its shape, its kind and its range.

    Args:
        codec: encodes what is not there yet.
        directory: where codes are kept; shared by all ranks and runs.
    """

    def __init__(self, codec: Any, directory: Path | None = None) -> None:
        self._codec = codec
        self._key = codec_key(codec)
        self._directory = (directory or default_cache_dir()) / self._key
        self._directory.mkdir(parents=True, exist_ok=True)

    def encode(self, paths: Iterable[Path]) -> dict[Path, Tensor]:
        """Codes of every path: int64 ``[codebooks, frames]``.

        Ranks share the encoding of what is missing; a progress bar on rank 0 shows it. Every rank must call this.
        """
        files = {path: self._directory / f"{content_key(path)}.safetensors" for path in dict.fromkeys(paths)}
        state = PartialState()
        codes = self._read(files)
        missing = [path for path in files if path not in codes]
        self._fill(missing[state.process_index :: state.num_processes], files, show=state.is_main_process)
        state.wait_for_everyone()
        codes |= self._read({path: files[path] for path in missing})
        # Ranks on other machines may not share the directory.
        elsewhere = [path for path in missing if path not in codes]
        self._fill(elsewhere, files, show=state.is_local_main_process)
        codes |= self._read({path: files[path] for path in elsewhere})
        if lost := [path for path in files if path not in codes]:
            raise OSError(f"{self._directory} does not give back what was just written there: the codes of {lost[0]}")
        if state.is_main_process:
            logger.info("%d clips: %d encoded now, the others were in %s", len(files), len(missing), self._directory)
        return {path: codes[path] for path in files}

    def _fill(self, paths: Sequence[Path], files: dict[Path, Path], show: bool) -> None:
        if not paths:
            return
        rate = codec_sampling_rate(self._codec)
        for path in tqdm(paths, desc="encoding audio", unit="clip", disable=not show, dynamic_ncols=True):
            codes = encode_waveform(self._codec, read_audio(path, rate))
            held = codes.to(torch.int32).contiguous()
            # Other processes, on other machines too, may be about to write the same clip.
            partial = files[path].with_suffix(f".{uuid.uuid4().hex}.partial")
            try:
                save_file({"codes": held, "checksum": self._checksum(held, files[path])}, str(partial))
                partial.replace(files[path])
            finally:
                partial.unlink(missing_ok=True)

    def _read(self, files: Mapping[Path, Path]) -> dict[Path, Tensor]:
        """The codes that are there; a file that cannot be used (a full disk, a flipped bit) counts as not there."""
        codes = {}
        for path, file in files.items():
            try:
                codes[path] = self._checked(load_file(str(file)), file)
            except FileNotFoundError:
                continue
            except (SafetensorError, KeyError, OSError, ValueError, _UnusableError) as error:
                logger.warning("encoding %s again: its cached codes in %s are unreadable (%s)", path, file, error)
        return codes

    def _checked(self, held: Mapping[str, Tensor], file: Path) -> Tensor:
        codes = held["codes"]
        books, size = codec_num_codebooks(self._codec), int(self._codec.config.codebook_size)
        if codes.dtype != torch.int32 or codes.dim() != 2 or codes.shape[0] != books or codes.shape[1] == 0:
            raise _UnusableError(f"{codes.dtype} of shape {list(codes.shape)}, not int32 of [{books}, frames]")
        if int(codes.min()) < 0 or int(codes.max()) >= size:
            raise _UnusableError(f"codes from {int(codes.min())} to {int(codes.max())}, in codebooks of {size}")
        if "checksum" not in held:
            raise _UnusableError("written without a checksum")
        if not torch.equal(held["checksum"], self._checksum(codes, file)):
            raise _UnusableError("they do not fit their checksum")
        return codes.long()

    def _checksum(self, codes: Tensor, file: Path) -> Tensor:
        """Of codes, for a clip and a codec."""
        digest = hashlib.sha256(f"{self._key} {file.stem} {list(codes.shape)} ".encode())
        digest.update(codes.numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


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

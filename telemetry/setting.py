"""What a door knows of a run before it begins, and what all doors derive in the same way."""

from __future__ import annotations

import contextlib
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from telemetry.backends.base import Backend
from telemetry.catalogue import TRAINER_SECTIONS
from telemetry.redaction import redact, redact_arguments


@dataclass(frozen=True)
class Setting:
    """What a door knows of a run before it begins.

    Attributes:
        output_dir: where the run keeps its files.
        logging_dir: where files for readers go, unless a member says otherwise.
        default_backends: makes the backends of a run whose members name none.
        config: makes what is shown of the run's configuration, as plain JSON values without secrets.
        name: of the run.
        starting_step: optimizer steps made before, by an earlier attempt.
        rank, world_size: of this process, and of how many.
        device: where batches go.
        compiled: whether the model is compiled, so that hooks would become part of its graph.
        autocast: the precision that training computes in by autocast.
        progress: whether progress bars are wanted.
        tokens_across_ranks: whether losses that are divided by a count of tokens are divided by that of all ranks.
        processor: decodes token ids, itself or by its ``tokenizer``.
        show_batches: begins to call a function with every batch that the trainer prepares, and the names of its labels;
            returns what ends that.
        within: the part of whatever logging directory that is this run's own, where a search makes several.
        max_grad_norm: what the trainer clips the norm of all gradients to; 0 where it does not.
        defaults: finds the dotted names of ``config`` that nobody set or that say little.
        is_running: whether the training is still under way; False once it was left without its end being told.
    """

    output_dir: Path
    logging_dir: Path
    default_backends: Callable[[], Sequence[Backend]]
    config: Callable[[], Mapping[str, Any]]
    name: str = ""
    starting_step: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compiled: bool = False
    autocast: torch.dtype | None = None
    progress: bool = True
    tokens_across_ranks: bool = True
    processor: Any = None
    show_batches: Callable[[Callable[[Any, Any], None]], Callable[[], None]] = lambda _see: _nothing
    within: str = ""
    is_running: Callable[[], bool] = lambda: True
    max_grad_norm: float = 0.0
    defaults: Callable[[], frozenset[str]] = frozenset


def _nothing() -> None:
    pass


def default_logging_dir(output_dir: Path) -> Path:
    """Return ``TENSORBOARD_LOGGING_DIR``, or ``runs/telemetry`` in the output directory: the same after a resume."""
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return logs_directory(chosen, "TENSORBOARD_LOGGING_DIR") if chosen else output_dir / "runs" / "telemetry"


def local_directory(path: str | Path, named: str) -> Path:
    """Return a directory of this machine.

    Args:
        path: may begin with ``~``; ``$NAMES`` are taken as they are, as the Trainer takes them.
        named: what the user has set, for the message.

    Raises:
        ValueError: for a URL: a place elsewhere would be a local folder of that name.
    """
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(path), re.IGNORECASE) and not Path(path).drive:
        raise ValueError(
            f"{named}={path}: telemetry writes to directories of this machine. Give it one, and copy it as it grows "
            "(`gsutil rsync`, `aws s3 sync`, `hf upload`), or mount the bucket"
        )
    return Path(path).expanduser()


def logs_directory(path: str | Path, named: str) -> Path:
    """As :func:`local_directory`, with environment variables filled in: where the logs go is for telemetry to say."""
    return local_directory(os.path.expandvars(path), named)


def run_config(arguments: Mapping[str, Any], model: nn.Module, loaders: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return training arguments, the command line, the model's configuration and what data there is, without secrets.

    Args:
        arguments: of any kinds; what is not a plain JSON value is shown as text.
        model: its ``config`` is taken where it is one of transformers'.
        loaders: data loaders by their use (``train``, ``eval``); None for one that there is not.
    """
    config: dict[str, Any] = dict(arguments)
    config["command"] = shlex.join(redact_arguments(sys.argv))
    model_config: Any = getattr(model, "config", None)
    if hasattr(model_config, "to_diff_dict"):
        config["model"] = model_config.to_diff_dict()
    data = {use: _data_summary(loader) for use, loader in loaders.items() if loader is not None}
    if data:
        config["data"] = data
    return redact(config)


def model_defaults(model: nn.Module) -> frozenset[str]:
    """Return the names under which :func:`run_config` shows settings of a model that are those of its class."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return frozenset()
    try:
        return frozenset(_alike(config.to_diff_dict(), type(config)().to_dict(), "model."))
    except Exception:  # noqa: BLE001  (a class of anybody's, which may need arguments)
        return frozenset()


def _alike(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _alike(value, default, f"{prefix}{name}.")
        elif name in defaults and type(value) is type(default) and value == default:
            yield f"{prefix}{name}"


def _data_summary(batches: Any) -> dict[str, Any]:
    """What kind of data set a data loader reads, and how many samples and batches a rank it has."""
    dataset = getattr(batches, "dataset", None)
    summary: dict[str, Any] = {"dataset": type(dataset).__name__}
    for name, of in (("samples", dataset), ("batches", batches)):
        with contextlib.suppress(TypeError):  # a stream has no length
            summary[name] = len(of)  # type: ignore[arg-type]
    return summary


def logged_numbers(logs: Mapping[str, Any], within: str = "") -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers of what a trainer logs by their tags, and by their tags why the rest is left out.

    Takes numbers of Python and NumPy, tensors of one value on the CPU, and mappings of them. A tensor on another device
    is left out: reading it would make training wait.
    """
    numbers: dict[str, float] = {}
    others: dict[str, str] = {}
    for key, value in logs.items():
        name = f"{within}{key}"
        if isinstance(value, Mapping):
            inner = logged_numbers(value, f"{name}/")
            numbers |= inner[0]
            others |= inner[1]
        elif name == "step":
            continue
        elif isinstance(value, torch.Tensor) and (value.device.type != "cpu" or hasattr(value, "full_tensor")):
            where = "ranks" if hasattr(value, "full_tensor") else value.device.type
            others[trainer_tag(name)] = f"it was logged as a tensor on {where}: log its .item()"
        else:
            try:
                numbers[trainer_tag(name)] = _number(value)
            except Exception:  # noqa: BLE001  (whatever its conversion raises, the others are numbers)
                others[trainer_tag(name)] = f"what was logged is no number: {redact(_shown(value))}"
    return numbers, others


def _number(value: Any) -> float:
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        value = value.item()  # with no warning of several dimensions or of a gradient, and of a complex one as it is
    if isinstance(value, str | bytes):
        raise TypeError("text that looks like a number is text")
    return float(value)


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)[:60]  # of a long list the beginning
    except Exception:  # noqa: BLE001  (whatever it raises, an integer too long to be written out among it)
        return type(value).__name__


def trainer_tag(name: str) -> str:
    """Return the tag of a number that a trainer logs: ``eval_loss`` is ``eval/loss``, ``loss`` is ``train/loss``."""
    default, *prefixes = TRAINER_SECTIONS
    for prefix in prefixes:
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name[len(prefix) + 1 :]}"
    return f"{default}/{name}"

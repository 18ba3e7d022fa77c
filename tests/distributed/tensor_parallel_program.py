"""Trains a tiny model in one process, or in two that hold a part of each of its layers: tensor parallelism, on CPUs.

``tensor_parallel_program.py DIRECTORY WATCHED``: WATCHED is 0 for a training without telemetry.

What telemetry has shown, ``{tag: {step: value}}``, and reasons are left in the directory as ``shown``; the parameters
of rank R after training as ``weights.R``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from support import models
from support.programs import Keeper
from support.text_training import training
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar, Table


def main(directory: Path, watched: bool) -> None:
    """Train, and keep what was shown and what was trained."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    more: dict[str, Any] = {}
    if ranks > 1:
        dist.init_process_group("gloo")
        more["ddp_backend"] = "gloo"
        ParallelismConfig._validate_accelerator = lambda *_: None  # type: ignore[method-assign]  # refuses CPUs alone
    backend, said = MemoryBackend(), list[str]()
    callbacks = [StrategicTelemetry(logging_steps=1, backends=[backend])] if watched else []
    run = training(
        model(directory, ranks, rank), directory, callbacks, steps=3, accumulation=2, max_grad_norm=0.5,
        **more,
    )  # fmt: skip
    run.trainer.remove_callback(run.snapshots)  # type: ignore[arg-type]
    with Keeper("telemetry", said):
        run.trainer.train()
    torch.save({name: local(one) for name, one in run.trainer.model.named_parameters()}, directory / f"weights.{rank}")
    if watched and rank == 0:
        scalars = {tag for tag in backend.tags() if any(isinstance(one, Scalar) for _, one in backend.records[tag])}
        shown = {
            "absent": dict(backend.last("telemetry/absent", Table).rows),
            "checks": backend.last("setup/checks", Table).rows,
            "said": said,
            "values": {tag: backend.scalars(tag) for tag in sorted(scalars)},
        }
        (directory / "shown").write_text(json.dumps(shown))
    if ranks > 1:
        dist.destroy_process_group()


def model(directory: Path, ranks: int, rank: int) -> Any:
    """The same weights, whole or of every layer this rank's part."""
    whole = models.make("llama")
    if ranks == 1:
        return whole
    if rank == 0:
        whole.save_pretrained(directory / "checkpoint")
    dist.barrier()
    config = DistributedConfig(tp_size=ranks)
    return LlamaForCausalLM.from_pretrained(directory / "checkpoint", distributed_config=config)


def local(parameter: Any) -> torch.Tensor:
    """This rank's part of a parameter."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")

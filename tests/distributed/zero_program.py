"""Trains under DeepSpeed's ZeRO, or DDP, on every rank of a torchrun, on CPUs: ``zero_program.py DIRECTORY STAGE``.

Stage 0 is DDP. Weights, data and optimizer are the same.

What telemetry has shown, ``{tag: {step: value}}``, notes and reasons are left in the directory as ``shown``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from support import models
from support.text_training import training

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar, Table


def main(directory: str, stage: str) -> None:
    """Train, and keep what was shown."""
    if stage != "0":  # accelerate knows DeepSpeed with accelerators alone: without one every rank would be the only one
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]
    zero = {"stage": int(stage), "stage3_param_persistence_threshold": 0}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    backend = MemoryBackend()
    engine: dict[str, Any] = {"use_cpu": True} if stage == "0" else {"use_cpu": False, "deepspeed": config}
    run = training(
        models.make("llama"), Path(directory), [StrategicTelemetry(logging_steps=1, backends=[backend])], steps=3,
        accumulation=2, max_grad_norm=0.5, ddp_backend="gloo", **engine,
    )  # fmt: skip
    run.trainer.remove_callback(run.snapshots)  # type: ignore[arg-type]
    run.trainer.train()
    if dist.get_rank() == 0:
        scalars = {tag for tag in backend.tags() if any(isinstance(one, Scalar) for _, one in backend.records[tag])}
        absent = dict(backend.last("telemetry/absent", Table).rows)
        notes = [one.note for _, one in backend.records.get("gradients/total_norm", []) if isinstance(one, Scalar)]
        shown = {
            "engine": type(run.trainer.model_wrapped).__name__, "notes": notes, "absent": absent,
            "values": {tag: backend.scalars(tag) for tag in sorted(scalars)},
        }  # fmt: skip
        Path(directory, "shown").write_text(json.dumps(shown))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

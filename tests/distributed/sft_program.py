"""Trains by TRL's SFTTrainer, alone or on every rank of a torchrun: ``sft_program.py DIRECTORY``.

What telemetry has shown, ``{tag: {step: value}}``, is left in the directory as ``shown-<number of ranks>``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import torch.distributed as dist
from support.trl_training import SENTENCES, train

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar

PASSES = 4  # of an optimizer step, on all ranks


def main(directory: str) -> None:
    """Train, and keep what was shown."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PASSES // ranks, "optim": "sgd"}
    backend = MemoryBackend()
    watching = StrategicTelemetry(logging_steps=1, backends=[backend])
    train("SFT", {"text": SENTENCES}, Path(directory) / f"run-{ranks}", [watching], **sizes)
    if rank == 0:
        tags = [tag for tag in backend.tags() if any(isinstance(one, Scalar) for _, one in backend.records[tag])]
        Path(directory, f"shown-{ranks}").write_text(json.dumps({tag: backend.scalars(tag) for tag in tags}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

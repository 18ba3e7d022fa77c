"""Trains under DDP and DeepSpeed's ZeRO on every rank of a torchrun, on CPUs: ``zero_program.py DIRECTORY``.

Weights, data and optimizer are the same in every training. What telemetry has shown of each, ``{name: Shown}``, is left
in the directory as ``shown``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from support import models
from support.text_training import training
from transformers import TrainerCallback, training_args

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar, Table

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
# A factor by which the first steps overflow: each halves it.
OVERFLOWING = {"fp16": {"enabled": True, "initial_scale_power": 17, "hysteresis": 1}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        stage: of ZeRO; 0 for DDP.
        config: what DeepSpeed's has beyond the stage.
        zero: what the stage's own has.
        watched: whether telemetry is there.
        passed_over: of DDP, the first steps whose update is left out.
        steps: how many.
        model: what is other than of the model that all others train.
    """

    stage: int
    config: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    watched: bool = True
    passed_over: int = 0
    steps: int = 4
    model: Mapping[str, Any] = field(default_factory=dict)


RUNS = {
    "ddp": Run(0),
    **{f"float32-{stage}": Run(stage) for stage in (1, 2, 3)},
    **{f"unwatched-{stage}": Run(stage, watched=False) for stage in (1, 2, 3)},
    **{f"bf16-{stage}": Run(stage, BF16) for stage in (1, 2, 3)},
    "bf16-1-summed-in-float32": Run(1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    **{f"odd-{stage}": Run(stage, model={"mlp_bias": True, "intermediate_size": 33}) for stage in (0, 1, 2, 3)},
    **{f"fp16-{stage}": Run(stage, FP16) for stage in (1, 2, 3)},
    **{f"overflowing-{stage}": Run(stage, OVERFLOWING, steps=6) for stage in (1, 2, 3)},
    **{f"offloaded-{stage}": Run(stage, zero=OFFLOADED) for stage in (1, 2, 3)},
}


@dataclass(frozen=True)
class Shown:
    """What a training has shown, on rank 0.

    Attributes:
        engine: the class of what the Trainer calls.
        optimizer: that of what DeepSpeed has put in the place of the optimizer.
        parameters: MD5 of them all after the last step.
        values: tag → step → value.
        tags: all, of scalars and of anything else.
        notes: of the total norms.
        absent: tag → reason.
        overflowed: steps that the Trainer logs no finite norm of.
    """

    engine: str
    optimizer: str
    parameters: str
    values: Mapping[str, Mapping[int, float]]
    tags: list[str]
    notes: list[str | None]
    absent: Mapping[str, str]
    overflowed: int


@dataclass
class PassingOver(TrainerCallback):
    """Leaves the update out of the first steps, as of such as overflow."""

    steps: int

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step < self.steps:
            model.zero_grad(set_to_none=True)


def train(run: Run, directory: Path) -> Shown:
    """Train, and keep what was shown."""
    zero = {"stage": run.stage, "stage3_param_persistence_threshold": 0, **run.zero}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    # Offloaded, an optimizer of torch's is one that DeepSpeed wants to be told to take.
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config |= {"zero_force_ds_cpu_optimizer": False, **run.config}
    engine: dict[str, Any] = {"use_cpu": not run.stage, "deepspeed": config if run.stage else None}
    engine |= {dtype: True for dtype in ("bf16", "fp16") if dtype in run.config}
    backend = MemoryBackend()
    watching: list[TrainerCallback] = [StrategicTelemetry(logging_steps=1, backends=[backend])] if run.watched else []
    callbacks = [*watching, PassingOver(run.passed_over)]
    made = training(
        models.make("llama", **run.model), directory, callbacks, steps=run.steps, accumulation=2, max_grad_norm=0.5,
        ddp_backend="gloo", lr_scheduler_type="constant", learning_rate=1e-3, **engine,
    )  # fmt: skip
    made.trainer.remove_callback(made.snapshots)  # type: ignore[arg-type]
    made.trainer.train()
    scalars = {tag for tag in backend.tags() if any(isinstance(one, Scalar) for _, one in backend.records[tag])}
    tables = [one for _, one in backend.records.get("telemetry/absent", []) if isinstance(one, Table)]
    return Shown(
        type(made.trainer.model_wrapped).__name__,
        type(getattr(made.trainer.model_wrapped, "optimizer", None)).__name__,
        _digest(made.trainer.model, run.stage),
        {tag: backend.scalars(tag) for tag in sorted(scalars)},
        sorted(backend.tags()),
        [one.note for _, one in backend.records.get("gradients/total_norm", []) if isinstance(one, Scalar)],
        dict(tables[-1].rows) if tables else {},  # type: ignore[arg-type]
        sum(not math.isfinite(entry.get("grad_norm", 0.0)) for entry in made.trainer.state.log_history),
    )


def _digest(model: Any, stage: int) -> str:
    parameters = list(model.parameters())
    if stage == 3:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameters):
            return _digest(model, 0)
    digest = hashlib.md5(usedforsecurity=False)
    for one in parameters:
        digest.update(one.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _forget() -> None:
    """What accelerate keeps for a process: the next training is another's."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def main(directory: str, *names: str) -> None:
    """Train all there are, or those named, and keep what was shown."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses float16 on CPUs for want of fast kernels. Torch's slow ones compute what it asks for.
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.float16]
    # The Trainer asks for a GPU where no use_cpu is said, which would keep DeepSpeed away.
    training_args.is_torch_bf16_gpu_available = lambda: True
    dist.init_process_group("gloo")
    prepare = PartialState._prepare_backend
    shown: dict[str, Shown] = {}

    def keep(name: str, run: Run) -> None:
        # accelerate knows DeepSpeed with accelerators alone: without one every rank would be the only one
        gloo = lambda *_: ("gloo", DistributedType.MULTI_CPU)  # noqa: E731
        PartialState._prepare_backend = gloo if run.stage else prepare  # type: ignore[method-assign]
        shown[name] = train(run, Path(directory, name))
        _forget()

    for name, run in RUNS.items():
        if not names or name in names:
            keep(name, run)
    for count in sorted({one.overflowed for one in shown.values()} - {0}):
        keep(f"ddp-passing-over-{count}", Run(0, passed_over=count, steps=6))
    if dist.get_rank() == 0:
        Path(directory, "shown").write_text(json.dumps({name: asdict(one) for name, one in shown.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How parameters are spread over ranks: the one place that knows FSDP, FSDP2, DTensor and DeepSpeed's ZeRO."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def forwards_are_collective(model: nn.Module) -> bool:
    """Whether a forward pass waits for other ranks: parameters sharded by FSDP2, FSDP, tensor parallelism or ZeRO-3."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return False
    return is_fsdp1(model) or any(_mesh(one) is not None or is_zero3(one) for one in model.parameters())


def is_fsdp1(model: nn.Module) -> bool:
    """Whether any part of a model is wrapped by FSDP1, which keeps parameters in flat shards."""
    return any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())


def fsdp2_modules(model: nn.Module) -> list[Any]:
    """Return the modules of a model that FSDP2 shards and gathers one by one."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_zero3(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO-3 has taken a parameter apart: it gives each an id."""
    return hasattr(parameter, "ds_id")


def is_zero(parameter: nn.Parameter) -> bool:
    """Whether a parameter belongs to an optimizer of DeepSpeed's ZeRO, of any stage."""
    return is_zero3(parameter) or hasattr(parameter, "_hp_mapping")


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """Return a parameter's gradient, of ZeRO-3 this rank's shard; None where there is none. Gathers nothing."""
    if parameter.grad is not None or not is_zero3(parameter):
        return parameter.grad
    from deepspeed.utils import safe_get_local_grad

    gradient: Tensor | None = safe_get_local_grad(parameter)
    return gradient


def own_part(tensor: Tensor, is_main: bool) -> Tensor | None:
    """Return this rank's part of a sum over ranks, so that a replicated tensor counts once.

    Of a sharded tensor (FSDP2's ``DTensor``) every rank has its own shard, as a plain local tensor; of a tensor that
    all ranks hold alike (DDP) rank 0 has the whole, and the others nothing: None.
    """
    mesh = _mesh(tensor)
    if mesh is None:
        return tensor.detach() if is_main else None
    placements = tensor.placements  # type: ignore[attr-defined]
    # Along a mesh dimension that repeats the shard, its first rank counts.
    first = all(place.is_shard() or mesh.get_local_rank(dim) == 0 for dim, place in enumerate(placements))
    return tensor.detach().to_local() if first else None  # type: ignore[attr-defined]


def _mesh(tensor: Tensor) -> Any:
    """The device mesh of a ``DTensor``, known by this attribute: its module need not be importable."""
    return getattr(tensor, "device_mesh", None)

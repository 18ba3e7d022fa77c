"""How parameters are spread over ranks: the one place that knows FSDP, FSDP2, DTensor and DeepSpeed's ZeRO."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether this process is one of several, or may be: its group has been formed."""
    return dist.is_available() and dist.is_initialized()


def forwards_are_collective(model: nn.Module) -> bool:
    """Whether a forward pass waits for other ranks: parameters sharded by FSDP2, FSDP, tensor parallelism or ZeRO-3."""
    if not is_distributed() or dist.get_world_size() == 1:
        return False
    return is_fsdp1(model) or any(_mesh(one) is not None or is_zero3(one) for one in model.parameters())


def is_fsdp1(model: nn.Module) -> bool:
    """Whether any part of a model is wrapped by FSDP1, which keeps parameters in flat shards."""
    return any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())


def ranks_of_a_batch(model: nn.Module) -> tuple[int, int]:
    """Return this rank's place among those that are given the same batch, and their number: tensor parallelism.

    0 and 1 where every rank has a batch of its own. transformers says the number, and lays such ranks out side by side.
    Else a mesh has a dimension called ``tp``, or no names, and splits a parameter that FSDP2 does not.
    """
    if not is_distributed():
        return 0, 1
    known = getattr(model, "tp_size", None)
    if isinstance(known, int) and known > 1 and not dist.get_world_size() % known:
        return dist.get_rank() % known, known
    mesh, dim = next(_splits(model), (None, 0))
    if mesh is None or (mesh.mesh_dim_names is None and fsdp2_modules(model)):
        return 0, 1
    return mesh.get_local_rank(dim), mesh.size(dim)


def is_split(module: nn.Module) -> bool:
    """Whether ranks that :func:`are given the same batch <ranks_of_a_batch>` each have a part of a module."""
    return any(_splits(module))


def _splits(module: nn.Module) -> Iterator[tuple[Any, int]]:
    """Meshes, and their dimensions, by which tensor parallelism splits parameters; FSDP2's too that has no names."""
    for one in module.parameters():
        for dim in range(mesh.ndim) if (mesh := _mesh(one)) is not None else ():
            if not one.placements[dim].is_replicate() and (mesh.mesh_dim_names or ("tp",) * mesh.ndim)[dim] == "tp":  # type: ignore[attr-defined]
                yield mesh, dim


def is_split_unsaid(parameter: nn.Parameter) -> bool:
    """Whether a parameter may be a part of one, as Megatron and DeepSpeed's AutoTP mark it: a plain tensor."""
    return is_distributed() and bool(getattr(parameter, "tensor_model_parallel", False))


def is_unsummed(gradient: Tensor) -> bool:
    """Whether a gradient is a summand on each rank: a ``DTensor`` that is added up where it is next used."""
    return _mesh(gradient) is not None and any(place.is_partial() for place in gradient.placements)  # type: ignore[attr-defined]


def split_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient that each rank has whole, of a parameter that ranks share out, split as that is. Sends nothing.

    So DTensor leaves the gradient of an embedding that is split by rows. Any other gradient is returned as it is.
    """
    if _mesh(gradient) is None or not all(place.is_replicate() for place in gradient.placements):  # type: ignore[attr-defined]
        return gradient
    return gradient.detach().redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def fsdp2_modules(model: nn.Module) -> list[Any]:
    """Return the modules of a model that FSDP2 shards and gathers one by one."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_gathered(model: nn.Module) -> bool:
    """Whether FSDP2 has whole parameters in the model, in the place of the shards that an optimizer holds."""
    return bool(fsdp2_modules(model)) and any(_mesh(one) is None for one in model.parameters())


def is_zero3(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO-3 has taken a parameter apart: it gives each an id."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter that other ranks may have parts of; ZeRO-3 leaves an empty one."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_zero(parameter: nn.Parameter) -> bool:
    """Whether a parameter belongs to an optimizer of DeepSpeed's ZeRO, of any stage."""
    return is_zero3(parameter) or hasattr(parameter, "_hp_mapping")


def is_offloaded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO steps a parameter, as far as it is this rank's, on the host."""
    if is_zero3(parameter):
        return bool(getattr(getattr(parameter, "_z3_optimizer", None), "offload_optimizer", False))
    return bool(getattr(getattr(parameter, "_hp_mapping", None), "use_offload", False))


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """Return a parameter's gradient, of ZeRO this rank's part; None where there is none. Gathers nothing.

    Of one that is offloaded there is none: it may still be on its way to the host, and the way back would wait.

    ZeRO-1 and 2 have one from the last backward pass to their optimizer's step: averaged over ranks, with the factor of
    a loss scaler.
    """
    if not is_zero(parameter):
        return parameter.grad
    if is_offloaded(parameter):
        return None
    if is_zero3(parameter):
        return parameter.grad if parameter.grad is not None else _of_zero3(parameter, "safe_get_local_grad")
    part: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if part is None:
        return None
    try:
        gradient: Tensor = part.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
    except (ValueError, LookupError):  # before a backward pass, or after the optimizer's step
        return None
    flat, at = gradient.detach().reshape(-1), part.lp_fragment_address
    return flat if flat.numel() == at.numel else flat.narrow(0, at.start, at.numel)


def own_value(parameter: nn.Parameter, is_main: bool) -> Tensor | None:
    """Return this rank's part of a parameter as :func:`own_part` does; of ZeRO, of what its optimizer steps.

    Of ZeRO-3 that steps on the host, of what its forward passes take.
    """
    if is_zero3(parameter):
        return _as_forward_takes_it(parameter) if is_offloaded(parameter) else _of_zero3(parameter, _ZERO3_STEPS)
    if is_zero(parameter):
        part: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if part is None else part.hp_fragment.detach()
    return own_part(parameter, is_main)


def is_elsewhere(parameter: nn.Parameter) -> bool:
    """Whether other ranks alone have a parameter's gradient: ZeRO-1 and 2 cut all, laid end to end, by ranks."""
    return getattr(parameter, "_hp_mapping", parameter) is None


_ZERO3_STEPS = "safe_get_local_fp32_param"


def _of_zero3(parameter: nn.Parameter, name: str) -> Tensor | None:
    utils = importlib.import_module("deepspeed.utils")
    found: Tensor | None = getattr(utils, name)(parameter)
    return None if found is None else _without_padding(parameter, found)


def _as_forward_takes_it(parameter: Any) -> Tensor | None:
    part = parameter.ds_tensor
    return _without_padding(parameter, part) if part.numel() == part.ds_numel else None  # else it is on a disk


def _without_padding(parameter: Any, part: Tensor) -> Tensor:
    """What a rank has of ZeRO-3 of a parameter itself: to all ranks it gives as much, the last ones' filled up."""
    at = dist.get_rank(getattr(parameter, "ds_process_group", None)) * part.numel()
    return part.detach().narrow(0, 0, max(0, min(part.numel(), parameter.ds_numel - at)))


def own_part(tensor: Tensor, is_main: bool) -> Tensor | None:
    """Return this rank's part of a sum over ranks, so that a replicated tensor counts once.

    Of a sharded tensor (a ``DTensor``: FSDP2, tensor parallelism) every rank has its own shard, as a plain local
    tensor; of a tensor that all ranks hold alike (DDP) rank 0 has the whole, and the others nothing: None. Not for one
    that :func:`is_unsummed`.
    """
    mesh = _mesh(tensor)
    if mesh is None:
        return tensor.detach() if is_main else None
    placements = tensor.placements  # type: ignore[attr-defined]
    # Along a mesh dimension that repeats the shard, its first rank counts; so does, of meshes that each hold the whole
    # (of FSDP2 beside tensor parallelism, one for each place in the layers), the one with rank 0. A shard of a packed
    # weight does not call itself one (``_StridedShard.is_shard()`` is False).
    first = all(not place.is_replicate() or mesh.get_local_rank(dim) == 0 for dim, place in enumerate(placements))
    first = first and not int(mesh.mesh.min())
    return tensor.detach().to_local() if first else None  # type: ignore[attr-defined]


def _mesh(tensor: Tensor) -> Any:
    """The device mesh of a ``DTensor``, known by this attribute: its module need not be importable."""
    return getattr(tensor, "device_mesh", None)

"""Norms of many tensors at once: a pure function that does not wait for the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from telemetry.measures._support import sum_dtype, undisturbed, value_pieces

# A float32 sum on the CPU loses about a percent over 5e7 values; over pieces of this size it keeps five digits.
# Accelerators sum in blocks of such a size by themselves.
_CPU_PIECE_ELEMENTS = 2**16


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The squared L2 norm of each tensor, before any reduction over ranks.

    Each is summed in float32 (bfloat16 and float16 too; float64 for float64 tensors), by one ``torch._foreach_norm``
    per device and dtype, which is what ``torch.nn.utils.clip_grad_norm_`` uses. A NaN or infinity gives that, and so
    does a norm beyond float32, as it would when clipping.

    Args:
        tensors: floating or complex tensors of any shapes. Of a ``DTensor`` the local shard is taken, so that the sum
            over the ranks that share it is the whole; a replicated one must be counted once by the caller. Of a sparse
            tensor the coalesced values (coalescing is the one case that may wait for the device).

    Returns:
        float64 ``[len(tensors)]`` (float32 on "mps") on the device of the first; empty, on the CPU, for no tensors.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    device = tensors[0].device
    with undisturbed(device):
        dense = [_as_real(_as_dense(tensor)) for tensor in tensors]
        squares = list(dense)
        for indices in _by_device_and_dtype(dense).values():
            for index, square in zip(indices, _group_squares([dense[i] for i in indices]), strict=True):
                squares[index] = square
        dtype = sum_dtype(device)
        return torch.stack([square.to(device, dtype, non_blocking=True) for square in squares])


def _as_dense(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "to_local", None)  # a DTensor, known by its method: its module need not be importable
    tensor = local() if local is not None else tensor
    if tensor.layout == torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout == torch.strided else tensor.values()


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    groups = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.device, tensor.dtype].append(index)
    return groups


def _group_squares(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Squared norms, 0-d each, of tensors on one device in one dtype."""
    device, dtype = tensors[0].device, torch.promote_types(tensors[0].dtype, torch.float32)
    if device.type != "cpu":
        return _norms(tensors, dtype).square().unbind()
    parts = [list(value_pieces(tensor, _CPU_PIECE_ELEMENTS)) for tensor in tensors]
    squares = _norms([piece for pieces in parts for piece in pieces], dtype).square()
    return [part.sum() for part in squares.split([len(pieces) for pieces in parts])]


def _norms(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Norms accumulated in ``dtype`` as a vector in the dtype of sums; empty for no tensors."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    norms: tuple[Tensor, ...] = torch._foreach_norm(tensors, 2, dtype=dtype)
    return torch.stack(norms).to(sum_dtype(norms[0].device))

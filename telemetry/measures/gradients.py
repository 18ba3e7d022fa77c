"""Statistics of many tensors at once: pure functions that do not wait for the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from telemetry.measures._support import piece_elements, sum_dtype, undisturbed, value_pieces

# A float32 sum on the CPU loses about a percent over 5e7 values; over pieces of this size it keeps five digits.
_CPU_PIECE_ELEMENTS = 2**16
# Of a sweep: a piece of 1 MiB stays in the processor's second-level cache.
_SWEEP_ELEMENTS = 2**18

SQUARES, ABSMAX, ZEROS, NONFINITE = range(4)
"""The columns of :func:`gradient_statistics`."""


def gradient_statistics(tensors: Sequence[Tensor]) -> Tensor:
    """Squared norm, largest magnitude, zeros and non-finite values of each tensor, before any reduction over ranks.

    Every value is read from memory once on the CPU: all four are taken of a piece while it lies in the cache. On other
    devices the two norms are one ``torch._foreach_norm`` each, and the counts are taken piece by piece.

    Norms and magnitudes are computed in float32 (bfloat16 and float16 too; float64 for float64 tensors), as by
    ``torch.nn.utils.clip_grad_norm_``. A NaN or infinity gives that in the first two columns, and so does a squared
    norm beyond float32. Counts are exact.

    Args:
        tensors: floating or complex tensors of any shapes. Of a ``DTensor`` the local shard is taken; of a sparse
            tensor the coalesced values (coalescing is the one case that may wait for the device). A complex number
            counts as two values.

    Returns:
        float64 ``[len(tensors), 4]`` (float32 on "mps") on the device of the first tensor: columns :data:`SQUARES`,
        :data:`ABSMAX`, :data:`ZEROS`, :data:`NONFINITE`. An empty tensor has zeros. On the CPU for no tensors.
    """
    if not tensors:
        return torch.zeros(0, 4, dtype=torch.float64)
    device = tensors[0].device
    with undisturbed(device):
        dense = [_as_real(_as_dense(tensor)) for tensor in tensors]
        rows = list(dense)
        for indices in _by_device_and_dtype(dense).values():
            group = [dense[index] for index in indices]
            swept = _cpu_rows(group) if group[0].device.type == "cpu" else device_rows(group)
            for index, row in zip(indices, swept, strict=True):
                rows[index] = row
        dtype = sum_dtype(device)
        return torch.stack([row.to(device, dtype, non_blocking=True) for row in rows])


def device_rows(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Rows ``[4]`` of :func:`gradient_statistics` for real, dense tensors on one device in one dtype, in few launches.

    For accelerators; it computes the same anywhere.
    """
    device, dtype = tensors[0].device, _computed_in(tensors[0])
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return [torch.zeros(4, dtype=sum_dtype(device), device=device)] * len(tensors)
    counts = torch.stack([_device_counts(tensor) for tensor in filled])
    norms = _norms(filled, dtype).square()
    largest = _norms(filled, dtype, torch.inf)
    found = iter(torch.cat([norms[:, None], largest[:, None], counts], dim=1).unbind())
    none = torch.zeros(4, dtype=counts.dtype, device=device)
    return [next(found) if tensor.numel() else none for tensor in tensors]


def _device_counts(tensor: Tensor) -> Tensor:
    """``[zeros, non-finite]`` of one tensor that is not empty."""
    pieces = []
    for piece in value_pieces(tensor, piece_elements(tensor.device)):
        nonfinite = torch.count_nonzero(piece * 0)  # 0 · x is 0 for a finite x and NaN for any other
        pieces.append(torch.stack([piece.numel() - torch.count_nonzero(piece), nonfinite]))
    return torch.stack(pieces).sum(0).to(sum_dtype(tensor.device))


def _cpu_rows(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """In NumPy, whose comparisons and counts are vectorised where torch's are not: a CPU tensor is host memory.

    NumPy works on one core; the tensors are shared out to as many threads as torch has.
    """
    threads = torch.get_num_threads()
    if threads == 1 or sum(tensor.numel() for tensor in tensors) <= _SWEEP_ELEMENTS:
        rows = list(map(_cpu_row, tensors))
    else:
        # Large ones first: whoever is done takes the next.
        order = sorted(range(len(tensors)), key=lambda index: -tensors[index].numel())
        with ThreadPoolExecutor(threads) as pool:
            found = dict(zip(order, pool.map(_cpu_row, [tensors[index] for index in order]), strict=True))
        rows = [found[index] for index in range(len(tensors))]
    return torch.from_numpy(np.stack(rows)).unbind()


@torch.no_grad()
def _cpu_row(tensor: Tensor) -> np.ndarray:
    flags = np.empty(min(_SWEEP_ELEMENTS, tensor.numel()), dtype=np.bool_)
    row = np.zeros(4)
    with np.errstate(all="ignore"):
        for piece in _sweep_pieces(tensor.detach()):
            squares, largest, zeros, nonfinite = _piece_statistics(piece, flags[: piece.size])
            row += (squares, 0, zeros, nonfinite)
            row[ABSMAX] = np.maximum(row[ABSMAX], largest)  # NaN stays
    return row


def _sweep_pieces(tensor: Tensor) -> Iterator[np.ndarray]:
    """Flat pieces, in the dtype to compute in; views where that is the tensor's own."""
    dtype = _computed_in(tensor)
    if tensor.is_contiguous() and tensor.dtype == dtype and tensor.numel():
        flat = np.from_dlpack(tensor.view(-1))
        yield from (flat[start : start + _SWEEP_ELEMENTS] for start in range(0, flat.size, _SWEEP_ELEMENTS))
    else:
        for piece in value_pieces(tensor, _SWEEP_ELEMENTS):
            yield np.from_dlpack(piece.to(dtype).contiguous())


def _piece_statistics(values: np.ndarray, flags: np.ndarray) -> tuple[float, float, int, int]:
    """One piece's four statistics. Overwrites ``flags``, of the piece's size."""
    low, high = values.min(), values.max()
    zeros = np.count_nonzero(np.equal(values, 0, out=flags))
    nonfinite: int | np.integer = 0
    if not (np.isfinite(low) and np.isfinite(high)):  # both are NaN where any value is
        nonfinite = values.size - np.count_nonzero(np.isfinite(values, out=flags))
    return float(np.dot(values, values)), float(np.maximum(-low, high)), int(zeros), int(nonfinite)


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


def cosine(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """Cosine between two vectors, each given in parts.

    Args:
        first, second: real tensors on one device, part by part of equal shapes; None for a part that is zero.

    Returns:
        float64 ``[2]`` (float32 on "mps"): the cosine, and 1; or 0 and 0 where a vector is zero, which has no
        direction. A value that is not finite makes the cosine NaN. On the CPU where all parts are None.
    """
    device = next((part.device for part in (*first, *second) if part is not None), torch.device("cpu"))
    with undisturbed(device):
        none = torch.zeros((), dtype=sum_dtype(device), device=device)
        product = sum(
            ((one.float() * other.float()).sum(dtype=none.dtype) for one, other in _both(first, second)), none
        )
        norms = [
            sum((part.float().square().sum(dtype=none.dtype) for part in parts if part is not None), none).sqrt()
            for parts in (first, second)
        ]
        size = norms[0] * norms[1]
        return torch.stack([torch.where(size == 0, none, product / size), (size != 0).to(none.dtype)])


def _both(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(first, second, strict=True):
        if one is not None and other is not None:
            yield one, other


def _as_dense(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "to_local", None)  # a DTensor, known by its method: its module need not be importable
    tensor = local() if local is not None else tensor
    if tensor.layout == torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout == torch.strided else tensor.values()


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _computed_in(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    groups = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.device, tensor.dtype].append(index)
    return groups


def _group_squares(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Squared norms, 0-d each, of tensors on one device in one dtype."""
    dtype = _computed_in(tensors[0])
    if tensors[0].device.type != "cpu":
        return _norms(tensors, dtype).square().unbind()
    parts = [list(value_pieces(tensor, _CPU_PIECE_ELEMENTS)) for tensor in tensors]
    squares = _norms([piece for pieces in parts for piece in pieces], dtype).square()
    return [part.sum() for part in squares.split([len(pieces) for pieces in parts])]


def _norms(tensors: list[Tensor], dtype: torch.dtype, order: float = 2) -> Tensor:
    """Norms accumulated in ``dtype`` as a vector in the dtype of sums; empty for no tensors."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    norms: tuple[Tensor, ...] = torch._foreach_norm(tensors, order, dtype=dtype)
    return torch.stack(norms).to(sum_dtype(norms[0].device))

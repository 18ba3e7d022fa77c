"""Statistics of many tensors at once: pure functions that do not wait for the device."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from telemetry.measures import fused_gradients
from telemetry.measures._support import piece_elements, sum_dtype, undisturbed, value_pieces
from telemetry.once import Once

logger = logging.getLogger(__name__)

# A piece of 1 MiB stays in the processor's cache, and a float32 sum over so few values keeps five digits.
_SWEEP_ELEMENTS = 2**18

SQUARES, ABSMAX, ZEROS, NONFINITE = range(4)
"""The columns of :func:`gradient_statistics`."""

Measure = Callable[[list[Tensor]], Tensor]
"""Measures real, dense tensors on one device in one dtype: a row of each."""

_once = Once(logger)
_unfused: set[tuple[torch.device, torch.dtype]] = set()  # where the fused sweep has failed


def gradient_statistics(tensors: Sequence[Tensor]) -> Tensor:
    """Squared norm, largest magnitude, zeros and non-finite values of each tensor, before any reduction over ranks.

    On the CPU all four are taken of a piece while it lies in the cache. On a GPU with Triton two launches read each
    value once (:mod:`telemetry.measures.fused_gradients`). On other devices and without Triton the two norms are one
    ``torch._foreach_norm`` each, and the counts are taken piece by piece.

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
    return _grouped(tensors, _way_to_rows, 4)


def _way_to_rows(tensor: Tensor) -> Measure:
    if tensor.device.type == "cpu":
        return _cpu_rows
    return _fused_rows if fused_gradients.takes(tensor) else device_rows


def _fused_rows(tensors: list[Tensor]) -> Tensor:
    """Measure like :func:`device_rows`, in one sweep where Triton runs."""
    place = tensors[0].device, tensors[0].dtype
    if place not in _unfused:
        try:
            return fused_gradients.fused_rows(tensors)
        except Exception as error:  # noqa: BLE001  (whatever Triton lacks here, there is another way)
            _unfused.add(place)
            message = "One sweep over all gradients has failed, so that more, slower kernels measure them: %r"
            _once.say("unfused", message, error, level=logging.INFO)
    return device_rows(tensors)


def device_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Rows ``[4]`` of :func:`gradient_statistics` for real, dense tensors on one device in one dtype, in few launches.

    For accelerators; it computes the same anywhere.
    """
    device, dtype = tensors[0].device, _computed_in(tensors[0])
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros(len(tensors), 4, dtype=sum_dtype(device), device=device)
    counts = torch.stack([_device_counts(tensor) for tensor in filled])
    norms = _norms(filled, dtype).square()
    largest = _norms(filled, dtype, torch.inf)
    found = iter(torch.cat([norms[:, None], largest[:, None], counts], dim=1).unbind())
    none = torch.zeros(4, dtype=counts.dtype, device=device)
    return torch.stack([next(found) if tensor.numel() else none for tensor in tensors])


def _device_counts(tensor: Tensor) -> Tensor:
    """``[zeros, non-finite]`` of one tensor that is not empty."""
    pieces = []
    for piece in value_pieces(tensor, piece_elements(tensor.device)):
        nonfinite = torch.count_nonzero(piece * 0)  # 0 · x is 0 for a finite x and NaN for any other
        pieces.append(torch.stack([piece.numel() - torch.count_nonzero(piece), nonfinite]))
    return torch.stack(pieces).sum(0).to(sum_dtype(tensor.device))


@torch.no_grad()
def _cpu_rows(tensors: Sequence[Tensor]) -> Tensor:
    """In NumPy, whose comparisons and counts are vectorised where torch's are not: a CPU tensor is host memory."""
    with np.errstate(all="ignore"):
        return torch.tensor([_cpu_row(tensor) for tensor in tensors], dtype=torch.float64)


def _cpu_row(tensor: Tensor) -> tuple[float, float, int, int]:
    squares, largest, zeros, nonfinite = 0.0, 0.0, 0, 0
    for piece in value_pieces(tensor.detach(), _SWEEP_ELEMENTS):
        values = _as_array(piece)
        most = float(np.maximum(-values.min(), values.max()))  # NaN where any value is
        if not math.isfinite(most):
            nonfinite += values.size - int(np.count_nonzero(np.isfinite(values)))
        squares += float(np.dot(values, values))
        largest = largest if math.isnan(largest) or largest > most else most
        zeros += int(np.count_nonzero(values == 0))
    return squares, largest, zeros, nonfinite


@torch.no_grad()
def _cpu_square(tensor: Tensor) -> float:
    pieces = (_as_array(piece) for piece in value_pieces(tensor.detach(), _SWEEP_ELEMENTS))
    with np.errstate(all="ignore"):
        return sum((float(np.dot(values, values)) for values in pieces), 0.0)


def _as_array(piece: Tensor) -> np.ndarray:
    return np.from_dlpack(piece.to(_computed_in(piece)).contiguous())


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The squared L2 norm of each tensor, before any reduction over ranks.

    Each is summed in float32 (bfloat16 and float16 too; float64 for float64 tensors), as by
    ``torch.nn.utils.clip_grad_norm_``. A NaN or infinity gives that, and so does a squared norm beyond float32.

    Args:
        tensors: floating or complex tensors of any shapes. Of a ``DTensor`` the local shard is taken, so that the sum
            over the ranks that share it is the whole; a replicated one must be counted once by the caller. Of a sparse
            tensor the coalesced values (coalescing is the one case that may wait for the device).

    Returns:
        float64 ``[len(tensors)]`` (float32 on "mps") on the device of the first; empty, on the CPU, for no tensors.
    """
    return _grouped(tensors, lambda _tensor: _group_squares)


def squared_norms_of_parts(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The squared L2 norm of each of the parts that a flat tensor is made of, as of :func:`squared_norms`.

    Args:
        values: float32 or float64 ``[sum of sizes]``; used up.
        sizes: of the parts, none of them 0.
    """
    with undisturbed(values.device):
        if values.device.type != "cpu":
            return _norms(list(values.split(list(sizes))), values.dtype).square()
        array = np.from_dlpack(values)
        with np.errstate(all="ignore"):
            np.square(array, out=array)
            squares = np.add.reduceat(array, np.cumsum([0, *sizes[:-1]]))  # pairwise: a float32 sum keeps six digits
        return torch.from_numpy(squares.astype(np.float64))


def _grouped(tensors: Sequence[Tensor], way: Callable[[Tensor], Measure], *row: int) -> Tensor:
    """``[len(tensors), *row]``: each tensor measured its ``way``, those of one on one device in one dtype together."""
    if not tensors:
        return torch.zeros(0, *row, dtype=torch.float64)
    device = tensors[0].device
    with undisturbed(device):
        dense = [_as_real(_as_dense(tensor)) for tensor in tensors]
        groups = defaultdict(list)
        for index, tensor in enumerate(dense):
            groups[tensor.device, tensor.dtype, way(tensor)].append(index)
        measured = [
            measure([dense[index] for index in indices]).to(device, sum_dtype(device), non_blocking=True)
            for (_, _, measure), indices in groups.items()
        ]
        if len(measured) == 1:
            return measured[0]
        rows = list(dense)
        for indices, values in zip(groups.values(), measured, strict=True):
            for index, own in zip(indices, values.unbind(), strict=True):
                rows[index] = own
        return torch.stack(rows)


def _group_squares(tensors: list[Tensor]) -> Tensor:
    if tensors[0].device.type == "cpu":
        return torch.tensor([_cpu_square(tensor) for tensor in tensors], dtype=torch.float64)
    return _norms(tensors, _computed_in(tensors[0])).square()


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

        def product(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> Tensor:
            parts = (
                (one, other) for one, other in zip(ours, theirs, strict=True) if one is not None and other is not None
            )
            return sum(((one.float() * other.float()).sum(dtype=none.dtype) for one, other in parts), none)

        size = product(first, first).sqrt() * product(second, second).sqrt()
        cosine = torch.where(size == 0, none, product(first, second) / size)
        return torch.stack([cosine, (size != 0).to(none.dtype)])


def _as_dense(tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor and tensor.layout == torch.strided:  # the common case, of many
        return tensor
    local = getattr(tensor, "to_local", None)  # a DTensor, known by its method: its module need not be importable
    tensor = local() if local is not None else tensor
    if tensor.layout == torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout == torch.strided else tensor.values()


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _computed_in(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _norms(tensors: list[Tensor], dtype: torch.dtype, order: float = 2) -> Tensor:
    """Norms accumulated in ``dtype`` as a vector in the dtype of sums."""
    norms: tuple[Tensor, ...] = torch._foreach_norm(tensors, order, dtype=dtype)
    return torch.stack(norms).to(sum_dtype(norms[0].device))

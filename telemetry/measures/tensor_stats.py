"""Statistics of one tensor of any kind: pure functions that never wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from telemetry.measures._support import piece_elements, sum_dtype, undisturbed, value_pieces


class TensorStats(NamedTuple):
    """Counts, sums and extremes of one tensor: 0-d float64 tensors (float32 on "mps") on its device.

    ``Mean(total, finite)`` and ``Spread(finite, mean, deviations)`` of :mod:`telemetry.records` combine them over
    microbatches and ranks.

    Attributes:
        values: how many.
        finite: values that are neither NaN nor infinite; what follows is over these alone.
        nonfinite: values that are NaN or infinite.
        zeros: values that are exactly zero.
        total: their sum.
        mean: their mean, 0 when there is none.
        deviations: sum of their squared distances from it.
        minimum: +inf when there is no finite value.
        maximum: -inf when there is no finite value.
    """

    values: Tensor
    finite: Tensor
    nonfinite: Tensor
    zeros: Tensor
    total: Tensor
    mean: Tensor
    deviations: Tensor
    minimum: Tensor
    maximum: Tensor


def tensor_statistics(tensor: Tensor) -> TensorStats:
    """Statistics of all values of a tensor, summed in float64 without a float64 copy of the whole.

    Args:
        tensor: strided, of any shape and dtype: bool as 0 and 1, complex by magnitude. Integers beyond ±2**53 are
            rounded to float64.
    """
    device = tensor.device
    with undisturbed(device):
        pieces = [_piece_statistics(piece) for piece in value_pieces(tensor, piece_elements(device))]
        count, none, low, high = (
            torch.full((), value, dtype=sum_dtype(device), device=device)
            for value in (tensor.numel(), 0.0, torch.inf, -torch.inf)
        )
        if not pieces:
            return TensorStats(count, none, none, none, none, none, none, low, high)
        columns = torch.stack(pieces)
        finite, zeros, total, deviations = columns[:, :4].sum(0)
        mean = total / finite.clamp(min=1)
        each, own = columns[:, 0], columns[:, 2] / columns[:, 0].clamp(min=1)
        deviations = deviations + (each * (own - mean).square()).sum()
        return TensorStats(
            values=count,
            finite=finite,
            nonfinite=count - finite,
            zeros=zeros,
            total=total,
            mean=mean,
            deviations=deviations,
            minimum=columns[:, 4].amin(),
            maximum=columns[:, 5].amax(),
        )


def first_values(tensor: Tensor, n: int = 8) -> Tensor:
    """The first ``n`` values (fewer if there are fewer), flat, on the tensor's device: a copy that keeps no other."""
    with undisturbed(tensor.device):
        if tensor.dim() == 0 or tensor.numel() == 0:
            return tensor.reshape(-1)[:n].clone()
        while tensor.dim() > 1 and tensor[0].numel() >= n:
            tensor = tensor[0]
        rows = -(-n // tensor[0].numel())  # cut before flattening, which copies a tensor that is not contiguous
        return tensor[:rows].reshape(-1)[:n].clone()


def _piece_statistics(piece: Tensor) -> Tensor:
    """``[finite, zeros, total, deviations, minimum, maximum]`` of the values of a flat piece that is not empty."""
    values = _as_real(piece)
    kept = values.nan_to_num(0.0, 0.0, 0.0)
    is_finite = values * 0.0 == 0.0  # 0 · x is 0 for a finite x and NaN for any other
    finite = torch.count_nonzero(is_finite)
    total = kept.sum()
    mean = total / finite.clamp(min=1)
    found = (
        finite,
        values.numel() - torch.count_nonzero(values),
        total,
        (kept.sub_(mean).square_() * is_finite).sum(),
        values.nan_to_num(torch.inf, torch.inf, torch.inf).amin(),
        values.nan_to_num(-torch.inf, -torch.inf, -torch.inf).amax(),
    )
    return torch.stack([value.to(values.dtype) for value in found])


def _as_real(piece: Tensor) -> Tensor:
    dtype = sum_dtype(piece.device)
    if piece.is_complex():
        # Widened first: the magnitude of a finite complex number may be beyond its own dtype.
        piece = piece.to(torch.complex128 if dtype == torch.float64 else torch.complex64).abs()
    return piece.to(dtype)

"""Statistics of one tensor of any kind: pure functions that never wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from telemetry.measures._support import piece_elements, sum_dtype, undisturbed, value_pieces


class TensorStats(NamedTuple):
    """Counts, sums and extremes of one tensor, on the host.

    ``Mean(total, finite)`` and ``Spread(finite, mean, deviations)`` of :mod:`telemetry.records` combine them over
    microbatches and ranks.

    Attributes:
        values: how many.
        finite: values that are neither NaN nor infinite; what follows is over these alone.
        zeros: values that are exactly zero.
        total: their sum.
        deviations: sum of their squared distances from their mean.
        minimum: +inf when there is no finite value.
        maximum: -inf when there is no finite value.
    """

    values: float
    finite: float
    zeros: float
    total: float
    deviations: float
    minimum: float
    maximum: float

    @property
    def nonfinite(self) -> float:
        """Values that are NaN or infinite."""
        return self.values - self.finite

    @property
    def mean(self) -> float:
        """Of the finite values, 0 when there is none."""
        return self.total / max(self.finite, 1.0)


def tensor_statistics(tensor: Tensor) -> Tensor:
    """Measure all values of a tensor, summed in float64 without a float64 copy of the whole.

    Args:
        tensor: strided, of any shape and dtype: bool as 0 and 1, complex by magnitude. Integers beyond ±2**53 are
            rounded to float64.

    Returns:
        float64 ``[7]`` (float32 on "mps") on its device: the fields of :class:`TensorStats` in their order.
    """
    device = tensor.device
    with undisturbed(device):
        pieces = [_piece_statistics(piece) for piece in value_pieces(tensor, piece_elements(device))]
        if len(pieces) == 1:
            return pieces[0]
        if not pieces:
            nothing = torch.zeros(len(TensorStats._fields), dtype=sum_dtype(device), device=device)
            nothing[-2], nothing[-1] = torch.inf, -torch.inf
            return nothing
        columns = torch.stack(pieces)
        values, finite, zeros, total, deviations = columns[:, :5].sum(0)
        each, own = columns[:, 1], columns[:, 3] / columns[:, 1].clamp(min=1)
        mean = total / finite.clamp(min=1)
        deviations = deviations + (each * (own - mean).square()).sum()
        return torch.stack([values, finite, zeros, total, deviations, columns[:, 5].amin(), columns[:, 6].amax()])


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
    """:class:`TensorStats` of the values of a flat piece that is not empty."""
    values = _as_real(piece)
    count = torch.full((), values.numel(), dtype=values.dtype, device=values.device)
    zeros = count - torch.count_nonzero(values)
    if not (piece.is_floating_point() or piece.is_complex()):  # in fewer passes: all are finite
        spread, mean = torch.var_mean(values, correction=0)
        return torch.stack([count, count, zeros, mean * count, spread * count, *torch.aminmax(values)])
    kept = values.nan_to_num(0.0, 0.0, 0.0)
    is_finite = values * 0.0 == 0.0  # 0 · x is 0 for a finite x and NaN for any other
    finite = torch.count_nonzero(is_finite).to(values.dtype)
    total = kept.sum()
    deviations = (kept.sub_(total / finite.clamp(min=1)).square_() * is_finite).sum()
    low = values.nan_to_num(torch.inf, torch.inf, torch.inf).amin()
    high = values.nan_to_num(-torch.inf, -torch.inf, -torch.inf).amax()
    return torch.stack([count, finite, zeros, total, deviations, low, high])


def _as_real(piece: Tensor) -> Tensor:
    dtype = sum_dtype(piece.device)
    if piece.is_complex():
        # Widened first: the magnitude of a finite complex number may be beyond its own dtype.
        piece = piece.to(torch.complex128 if dtype == torch.float64 else torch.complex64).abs()
    return piece.to(dtype)

"""How large what a network gives is, over the positions that count: pure functions that never wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from telemetry.measures._support import piece_elements, row_pieces, sum_dtype, undisturbed


class ActivationTotals(NamedTuple):
    """Sums over the values of the positions that count, on the host.

    Attributes:
        values: how many.
        squares: sum of squares; NaN or infinite where a value is.
        zeros: values that are exactly zero.
        nonfinite: values that are NaN or infinite.
        absmax: largest magnitude, a maximum and no sum; -inf without a value.
    """

    values: float
    squares: float
    zeros: float
    nonfinite: float
    absmax: float


SQUARES = ActivationTotals._fields.index("squares")


def served_rows(served: Tensor, real: Tensor, rows: int) -> Tensor:
    """Which rows of a network's input count, where it is given its positions one after the other.

    Args:
        served: bool ``[batch, sequence]``, positions that it is given.
        real: bool ``[batch, sequence]``: not padding.
        rows: how many there are.

    Returns:
        bool ``[rows]``.
    """
    # Sorted instead of indexed by a mask, which would wait for the device to learn how many there are.
    order = torch.argsort(served.reshape(-1).to(torch.int8), descending=True, stable=True)
    return (real & served).reshape(-1)[order[:rows]]


def activation_totals(output: Tensor, counts: Tensor) -> Tensor:
    """Sums over the rows that count.

    Args:
        output: floating ``[rows, hidden]``.
        counts: bool ``[rows]``.

    Returns:
        float64 ``[5]`` (float32 on "mps"): the fields of :class:`ActivationTotals` in their order.
    """
    device = output.device
    with undisturbed(device):
        dtype = sum_dtype(device)
        pieces = [_row_totals(piece.to(dtype)) for piece in row_pieces(output.detach(), piece_elements(device))]
        if not pieces:
            nothing = torch.zeros(len(ActivationTotals._fields), dtype=dtype, device=device)
            nothing[-1] = -torch.inf
            return nothing
        sums, largest = (parts[0] if len(parts) == 1 else torch.cat(parts, -1) for parts in zip(*pieces, strict=True))
        found = torch.where(counts, sums, 0.0).sum(dim=1)
        return torch.cat([found, torch.where(counts, largest, -torch.inf).amax(dim=0, keepdim=True)])


def _row_totals(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[4, rows]``, values, squares, zeros and non-finite values; ``[rows]``, the largest magnitudes."""
    nonzero = torch.count_nonzero(rows, dim=-1)
    odd = torch.count_nonzero(rows - rows, dim=-1)  # x - x is 0 for a finite x and NaN for any other
    values = torch.full_like(nonzero, rows.shape[-1])
    sums = [one.to(rows.dtype) for one in (values, rows.square().sum(dim=-1), values - nonzero, odd)]
    return torch.stack(sums), rows.abs().amax(dim=-1)


def counted_squares(rows: Tensor, counts: Tensor) -> Tensor:
    """The sum of squares, 0-d, of the rows that count; arguments as for :func:`activation_totals`."""
    device = rows.device
    with undisturbed(device):
        pieces = row_pieces(rows.detach(), piece_elements(device))
        squares = [piece.to(sum_dtype(device)).square().sum(dim=-1) for piece in pieces]
        if not squares:
            return torch.zeros((), dtype=sum_dtype(device), device=device)
        return torch.where(counts, torch.cat(squares), 0.0).sum()

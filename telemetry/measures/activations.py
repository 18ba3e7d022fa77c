"""How large what a network gives is, over the positions that count: pure functions that never wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from telemetry.measures._support import piece_elements, row_pieces, sum_dtype, undisturbed


class ActivationTotals(NamedTuple):
    """Sums over the values of the positions that count: 0-d, float64 (float32 on "mps").

    Attributes:
        values: how many.
        squares: sum of squares; NaN or infinite where a value is.
        absmax: largest magnitude, a maximum and no sum; -inf without a value.
        zeros: values that are exactly zero.
        nonfinite: values that are NaN or infinite.
    """

    values: Tensor
    squares: Tensor
    absmax: Tensor
    zeros: Tensor
    nonfinite: Tensor


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


def activation_totals(output: Tensor, counts: Tensor) -> ActivationTotals:
    """Sums over the rows that count.

    Args:
        output: floating ``[rows, hidden]``.
        counts: bool ``[rows]``.
    """
    device = output.device
    with undisturbed(device):
        dtype = sum_dtype(device)
        count = counts.sum().to(dtype)
        pieces = [_row_totals(piece.to(dtype)) for piece in row_pieces(output.detach(), piece_elements(device))]
        if not pieces:
            none = torch.zeros((), dtype=dtype, device=device)
            return ActivationTotals(none, none, none - torch.inf, none, none)
        squares, largest, zeros, nonfinite = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return ActivationTotals(
            values=count * output.shape[-1],
            squares=torch.where(counts, squares, 0.0).sum(),
            absmax=torch.where(counts, largest, -torch.inf).amax(),
            zeros=torch.where(counts, zeros, 0).sum().to(dtype),
            nonfinite=torch.where(counts, nonfinite, 0).sum().to(dtype),
        )


def _row_totals(rows: Tensor) -> tuple[Tensor, ...]:
    finite = torch.isfinite(rows).sum(dim=-1)
    zeros = (rows == 0).sum(dim=-1)
    return rows.square().sum(dim=-1), rows.abs().amax(dim=-1), zeros, rows.shape[-1] - finite


def counted_squares(rows: Tensor, counts: Tensor) -> Tensor:
    """The sum of squares, 0-d, of the rows that count; arguments as for :func:`activation_totals`."""
    device = rows.device
    with undisturbed(device):
        pieces = row_pieces(rows.detach(), piece_elements(device))
        squares = [piece.to(sum_dtype(device)).square().sum(dim=-1) for piece in pieces]
        if not squares:
            return torch.zeros((), dtype=sum_dtype(device), device=device)
        return torch.where(counts, torch.cat(squares), 0.0).sum()

"""Which keys a few query rows see, from the masks that attention kernels take: pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from telemetry.measures._support import undisturbed


@dataclass(frozen=True)
class RowMask:
    """What some query rows see.

    Attributes:
        allowed: bool ``[batch, 1 or heads, rows, keys]``.
        bias: float32 of the same shape, added to the logits; None where nothing is.
    """

    allowed: Tensor
    bias: Tensor | None = None


def given_mask_rows(mask: Tensor, rows: Tensor) -> RowMask:
    """Rows of a mask that holds every query.

    Args:
        mask: ``[1 or batch, 1 or heads, queries, keys]``: bool, True where a key is seen; or floating, added to the
            logits, where ``-inf`` and its dtype's most negative number hide a key.
        rows: int64 ``[batch, rows]``, query positions.

    Raises:
        ValueError: for a mask of another shape, or of integers.
    """
    if mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"not a mask of queries by keys: {mask.dtype} {list(mask.shape)}")
    with undisturbed(mask.device):
        heads, keys = mask.shape[1], mask.shape[3]
        index = rows[:, None, :, None].expand(-1, heads, -1, keys)
        picked = mask.expand(rows.shape[0], -1, -1, -1).gather(2, index)
        if picked.dtype == torch.bool:
            return RowMask(picked)
        # Half of the most negative number: beyond any bias that is meant, and what hides may have been added to.
        return RowMask(picked > torch.finfo(mask.dtype).min / 2, picked.float())


def ruled_mask_rows(
    rows: Tensor,
    keys: int,
    causal: bool,
    real: Tensor | None = None,
    window: int | None = None,
    segments: Tensor | None = None,
) -> RowMask:
    """Rows of a mask that is given by rules, as flash attention applies them. There are as many queries as keys.

    Args:
        rows: int64 ``[batch, rows]``, query positions.
        keys: number of keys.
        causal: whether a query sees no key after it.
        real: bool ``[batch, keys]``: padding, which is taken out before attention; None without any.
        window: keys that a query sees with itself on each side, counted without padding; None for all.
        segments: int64 ``[keys]``: packed sequences, which do not see each other; None for one.
    """
    with undisturbed(rows.device):
        at = torch.arange(keys, device=rows.device)
        distance = rows[:, :, None] - at
        allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if real is not None:
            allowed = allowed & real[:, None, :]
        if window is not None:
            if real is not None:
                place = real.long().cumsum(dim=1)
                distance = place.gather(1, rows)[:, :, None] - place[:, None, :]
            allowed = allowed & (distance.abs() < window)
        if segments is not None:
            allowed = allowed & (segments[rows][:, :, None] == segments)
        return RowMask(allowed[:, None])


def segments_of_lengths(cumulative: Tensor, keys: int) -> Tensor:
    """int64 ``[keys]``: the packed sequence of each position.

    Args:
        cumulative: int ``[sequences + 1]``, where each begins and the last ends (``cu_seqlens``).
    """
    at = torch.arange(keys, device=cumulative.device, dtype=cumulative.dtype)
    return torch.searchsorted(cumulative.contiguous(), at, right=True)


def segments_of_positions(position_ids: Tensor) -> Tensor:
    """int64 ``[keys]``: the packed sequence of each position; one begins wherever the smallest position id is.

    Args:
        position_ids: int ``[1, keys]``.
    """
    flat = position_ids.reshape(-1)
    return (flat == flat.min()).long().cumsum(0)


def sequence_starts(real: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """int64 ``[batch, sequence]``: the first real position of the sequence that each position is in.

    Args:
        real: bool ``[batch, sequence]``: not padding.
        position_ids: int ``[1 or batch, sequence]``: where they do not rise, a packed sequence begins.
    """
    with undisturbed(real.device):
        begins = real & (real.long().cumsum(dim=1) == 1)
        if position_ids is not None:
            falls = torch.zeros_like(real)
            falls[:, 1:] = (position_ids[:, 1:] <= position_ids[:, :-1]).expand(real.shape[0], -1)
            begins = begins | (falls & real)
        at = torch.arange(real.shape[1], device=real.device).expand_as(real)
        return torch.where(begins, at, 0).cummax(dim=1).values

"""What a model predicts token by token, and sums of it: pure functions that never wait for the device.

All of them run under ``torch.no_grad`` with autocast off, change no input and no random state, and launch only work
whose shapes are known beforehand.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from telemetry.measures._support import piece_elements, row_pieces, sum_dtype, undisturbed

_LOWEST_LOG_PROBABILITY = -200.0  # exp(-200) is exactly 0 in float32: such an entry adds 0 · -200, never 0 · -inf
_LARGEST_VOCABULARY = 2**24  # integers up to here are exact in float32, which ids and counts are computed in


class TokenStats(NamedTuple):
    """Statistics of every predicted token; all tensors have the shape of the targets and lie on the logits' device.

    Attributes:
        nll: float32, nats: minus the log probability of the target. 0 where there is no target.
        entropy: float32, nats: of the predicted distribution. 0 where there is no target.
        rank: int64: vocabulary entries ahead of the target, those with a larger logit and those with an equal logit
            and a lower id. 0 means predicted; below 5, among the five most likely. The vocabulary's size where there
            is no target or the logits are not finite: never a hit.
        prediction: int64: the id of the largest logit, the lowest one of equals. Always a valid id.
        probe_probability: float32: probability of ``probe_id`` at every position with or without a target; None when
            no id was asked for.
    """

    nll: Tensor
    entropy: Tensor
    rank: Tensor
    prediction: Tensor
    probe_probability: Tensor | None = None


def token_statistics(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, probe_id: int | None = None
) -> TokenStats:
    """Loss, entropy, rank and prediction of every token, without a float32 copy of the logits.

    Works through the rows in pieces of bounded size, so that the extra memory does not grow with the batch. The
    arithmetic is float32 (float64 for float64 logits).

    Args:
        logits: ``[..., vocab]`` of any floating dtype and any strides. ``-inf`` is a masked entry: probability 0.
        targets: int64 ``[...]``. Positions that are ``ignore_index`` or outside ``[0, vocab)`` have no target; mask
            by ``targets != ignore_index``.
        ignore_index: the label of positions without a target.
        probe_id: also report the probability of this id (end of stream).

    Returns:
        Statistics of the targets' shape. A row whose log-sum-exp is not finite (a NaN, +inf, or nothing but -inf) has
        NaN for nll, entropy and probe probability, and no hit.

    Raises:
        ValueError: when the shapes do not fit, the vocabulary is empty or has more than 2**24 entries, or ``probe_id``
            is outside of it.
    """
    vocab = _checked_vocab(logits, targets, probe_id)
    with undisturbed(logits.device):
        flat = targets.reshape(-1)
        pieces: list[tuple[Tensor, ...]] = []
        start = 0
        for rows in row_pieces(logits, piece_elements(logits.device)):
            labels = flat[start : start + rows.shape[0]]
            pieces.append(_piece_statistics(rows, labels, labels != ignore_index, probe_id))
            start += rows.shape[0]
        if not pieces:
            pieces.append(_piece_statistics(logits.reshape(0, vocab), flat, flat != ignore_index, probe_id))
        return TokenStats(*(torch.cat(column).reshape(targets.shape) for column in zip(*pieces, strict=True)))


def masked_totals(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Totals and counts of the values that ``mask`` lets through, by column.

    Args:
        values: ``[..., columns]`` of any real dtype; or several such, ``[several, ..., columns]``.
        mask: bool ``[..., columns]``: True where the value counts.

    Returns:
        ``(total, count)``: float64 ``[columns]`` or ``[several, columns]``, and ``[columns]`` (float32 on "mps"). A
        NaN counts only where the mask is True.
    """
    with undisturbed(values.device):
        dtype = sum_dtype(values.device)
        kept = torch.where(mask, values.to(dtype), 0.0)
        several, summed = values.dim() - mask.dim(), range(mask.dim())  # of the tensors with one more dimension before
        total = kept.unsqueeze(several).sum([several + at for at in summed])
        return total, mask.unsqueeze(0).sum([*summed], dtype=dtype)


def histogram_of_ids(ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """How often each id occurs, by column.

    Args:
        ids: int64 ``[..., columns]``. Ids outside ``[0, size)`` are not counted.
        mask: bool ``[..., columns]``: True where the id counts.
        size: number of ids.

    Returns:
        Counts, float64 ``[columns, size]`` (float32 on "mps").
    """
    with undisturbed(ids.device):
        columns = ids.shape[-1]
        kept = torch.where(mask & (ids >= 0) & (ids < size), ids, size)  # one bin more takes what does not count
        kept = kept.reshape(ids.shape[:-1].numel(), columns).t()
        counts = torch.zeros(columns, size + 1, dtype=sum_dtype(ids.device), device=ids.device)
        counts.scatter_add_(1, kept, torch.ones((), dtype=counts.dtype, device=ids.device).expand(kept.shape))
        return counts[:, :size]


def _checked_vocab(logits: Tensor, targets: Tensor, probe_id: int | None) -> int:
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}: one row per target")
    vocab = logits.shape[-1]
    if not 0 < vocab <= _LARGEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab} entries; from 1 to {_LARGEST_VOCABULARY} can be measured")
    if probe_id is not None and not 0 <= probe_id < vocab:
        raise ValueError(f"probe_id {probe_id} is outside the vocabulary of {vocab}")
    return vocab


def _piece_statistics(rows: Tensor, labels: Tensor, labelled: Tensor, probe_id: int | None) -> tuple[Tensor, ...]:
    """Statistics of ``rows`` ``[n, vocab]`` for ``labels`` ``[n]``, as in :class:`TokenStats`.

    ``labelled`` is False at ``ignore_index``.
    """
    vocab = rows.shape[-1]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    valid = labelled & (labels >= 0) & (labels < vocab)
    targets = labels.clamp(0, vocab - 1).unsqueeze(-1)

    log_probabilities = torch.log_softmax(rows, -1)
    target_log_probability = log_probabilities.gather(-1, targets).squeeze(-1)
    log_probabilities.clamp_(min=_LOWEST_LOG_PROBABILITY)
    probabilities = torch.softmax(rows, -1)
    probe = () if probe_id is None else (probabilities[:, probe_id].to(torch.float32, copy=True),)
    entropy = -probabilities.mul_(log_probabilities).sum(-1)
    rank, prediction = (_cpu_ranks if rows.device.type == "cpu" else _ranks)(rows, targets)
    poisoned = entropy.isnan()  # log_softmax spreads a log-sum-exp that is not finite over its whole row
    return (
        torch.where(valid, torch.where(poisoned, torch.nan, -target_log_probability), 0.0).float(),
        torch.where(valid, entropy, 0.0).float(),
        torch.where(valid & ~poisoned, rank, vocab),
        prediction,
        *probe,
    )


def _ranks(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of each row are ahead of its target ``[n, 1]``, and its largest: int64 ``[n]`` each."""
    own, ids = rows.gather(-1, targets), torch.arange(rows.shape[-1], device=rows.device)
    return ((rows > own) | ((rows == own) & (ids < targets))).sum(-1), rows.argmax(-1)


def _cpu_ranks(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_ranks`, in NumPy, which compares five times as fast: a CPU tensor is host memory."""
    values: np.ndarray = np.from_dlpack(rows.detach())
    at: np.ndarray = np.from_dlpack(targets)
    own = np.take_along_axis(values, at, axis=1)
    ahead, equal = _counted(values > own), values == own
    tied = np.flatnonzero(_counted(equal) > 1)
    if tied.size:
        ahead[tied] += _counted(equal[tied] & (np.arange(values.shape[1]) < at[tied]))
    return torch.from_numpy(ahead.astype(np.int64)), torch.from_numpy(values.argmax(axis=1))


def _counted(flags: np.ndarray) -> np.ndarray:
    """int32 ``[n]``: how many of each row are true."""
    counts: np.ndarray = flags.view(np.int8).sum(axis=1, dtype=np.int32)
    return counts

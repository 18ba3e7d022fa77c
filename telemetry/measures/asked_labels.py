"""What a loss really asks of logits, read from its gradient with respect to them.

The gradient of a cross-entropy is ``w (p - onehot(y))``: its only negative entry is at the label *y* that the loss asks
for, and every other entry over its probability is the weight *w* that the token has in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CLEAR = 4.0  # how far below every other entry that of the label lies: smoothed labels give each a share


@dataclass(frozen=True)
class Top:
    """The two likeliest ids of each row of logits: ``ids`` int64 and ``probabilities`` float32, both ``[..., 2]``."""

    ids: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Asked:
    """What a loss asks of each row of logits ``[...]``.

    Attributes:
        labels: int64, the id that the row is to predict; meaningless where the row is not ``clear``.
        weights: float32, of the row in the loss; 0 where the loss asks nothing of it.
        supervised: bool, whether the loss asks anything.
        clear: bool, whether it asks for one id.
    """

    labels: Tensor
    weights: Tensor
    supervised: Tensor
    clear: Tensor


def top_two(logits: Tensor) -> Top:
    """Keep of logits ``[..., V]`` what :func:`asked_labels` needs of them later."""
    values, ids = logits.float().topk(min(2, logits.shape[-1]), dim=-1)
    probabilities = (values - logits.float().logsumexp(-1, keepdim=True)).exp()
    if ids.shape[-1] == 1:
        ids, probabilities = ids.expand(*ids.shape[:-1], 2), probabilities.expand(*ids.shape[:-1], 2)
    return Top(ids, probabilities)


def asked_labels(gradient: Tensor, top: Top) -> Asked:
    """Read what a loss asks for.

    Args:
        gradient: ``[..., V]``, of the loss with respect to the logits.
        top: of the same logits.
    """
    least, ids = gradient.topk(min(2, gradient.shape[-1]), dim=-1, largest=False)
    label, lowest, second = ids[..., 0], least[..., 0].float(), least[..., -1].float()
    supervised = lowest < 0
    clear = supervised & (lowest < _CLEAR * second.clamp(max=0))
    likeliest = top.ids[..., 0] == label
    # Of the likeliest id that is not the label, the gradient is the weight times its probability; where the label
    # itself is the likeliest, its own is the weight times what is left.
    other = gradient.gather(-1, top.ids[..., :1]).squeeze(-1).float()
    of_other = other / top.probabilities[..., 0].clamp(min=1e-12)
    of_label = -lowest / (1 - top.probabilities[..., 0]).clamp(min=1e-6)
    weights = torch.where(supervised, torch.where(likeliest, of_label, of_other), 0.0)
    return Asked(label, weights, supervised, clear)


def offset_matches(asked: Asked, tokens: Tensor, real: Tensor, offsets: int) -> Tensor:
    """Count the rows that are asked for the token so many places further on.

    Args:
        asked: of rows ``[batch, sequence]``.
        tokens: int64 ``[batch, sequence]``, what the model was given.
        real: bool ``[batch, sequence]``, where there is a token.
        offsets: how many: 0, 1, ...

    Returns:
        float64 ``[offsets]``.
    """
    counts = []
    for offset in range(offsets):
        upto = tokens.shape[1] - offset
        if upto <= 0:
            counts.append(tokens.new_zeros((), dtype=torch.float64))
            continue
        same = (asked.labels[:, :upto] == tokens[:, offset:]) & real[:, offset:] & asked.clear[:, :upto]
        counts.append(same.sum(dtype=torch.float64))
    return torch.stack(counts)


def codebook_matches(asked: Asked, codes: Tensor, real: Tensor, offset: int) -> Tensor:
    """Count the rows of each codebook that are asked for the code which each codebook has so many places further on.

    Args:
        asked: of rows ``[batch, sequence, C]``.
        codes: int64 ``[batch, sequence, C]``.
        real: bool ``[batch, sequence]``.
        offset: the places.

    Returns:
        float64 ``[C, C]``: codebook of the row, codebook of the code.
    """
    upto = codes.shape[1] - offset
    labels, clear = asked.labels[:, :upto, :, None], asked.clear[:, :upto, :, None]
    same = (labels == codes[:, offset:, None, :]) & clear & real[:, offset:, None, None]
    return same.sum(dim=(0, 1), dtype=torch.float64)

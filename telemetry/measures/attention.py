"""Where a few sampled queries of an attention layer look: pure functions that never wait for the device.

Only the sampled rows of the attention matrix are worked out, in float32, from the rotated queries and the keys
that the kernel was given. The whole matrix is never made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from telemetry.measures._support import piece_elements, undisturbed
from telemetry.measures.attention_masks import RowMask

KINDS = ("text", "reference", "target")
REFERENCE, TARGET = KINDS.index("reference"), KINDS.index("target")


@dataclass(frozen=True)
class QuerySample:
    """Query positions to look at: ``rows`` of every sequence.

    Attributes:
        rows: int64 ``[batch, rows]``, positions.
        kinds: bool ``[batch, rows, kinds]``: what is at each; all False for a row that is not used.
    """

    rows: Tensor
    kinds: Tensor


class AttentionRows(NamedTuple):
    """What each sampled query does, head by head: float32 ``[batch, heads, rows]``.

    Attributes:
        mass: ``[batch, heads, rows, kinds]``, attention on each kind of key.
        entropy: of the row, in nats.
        sink: attention on the first token of the query's sequence.
        max_logit: the largest logit of a key that is seen; -inf where none is.
        visible: int64 ``[batch, 1 or heads, rows]``, keys that are seen.
    """

    mass: Tensor
    entropy: Tensor
    sink: Tensor
    max_logit: Tensor
    visible: Tensor


class AttentionTotals(NamedTuple):
    """Sums over sampled queries, in float64 on the host, that combine over microbatches and ranks.

    Attributes:
        mass: ``[kinds, kinds of keys]``, attention from each kind to each, mean over heads, summed over queries.
        queries: ``[kinds]``, queries of each kind.
        entropy: mean over heads, summed over queries.
        fraction: entropy over the largest possible one, and how many queries have such.
        sink: mean over heads, summed over queries.
        nonfinite: rows (one for each query and head) with a value that is not finite.
        max_logit: a maximum and no sum; -inf without a query.
        heads: ``[heads]``, attention from target to reference, summed over queries.
    """

    mass: np.ndarray
    queries: np.ndarray
    entropy: float
    fraction: tuple[float, float]
    sink: float
    nonfinite: float
    max_logit: float
    heads: np.ndarray


def sample_queries(kinds: Tensor, queries: int, generator: torch.Generator) -> QuerySample:
    """A random sample of each sequence's positions, as many of each kind as of any other where it has so many.

    Args:
        kinds: bool ``[batch, sequence, kinds]``, what is at each position; padding is nothing.
        queries: positions of a sequence, over the kinds that it is shared out to.
        generator: on the device of ``kinds``; the only source of randomness.
    """
    with undisturbed(kinds.device):
        sequence, count = kinds.shape[1:]
        order = torch.rand(kinds.shape[:2], generator=generator, device=kinds.device)
        of_kind = torch.arange(count, device=kinds.device)
        rows, used = [], []
        for kind, size in enumerate(_shares(queries, count)):
            picked = torch.where(kinds[..., kind], order, -1.0).topk(min(size, sequence), dim=1)
            rows.append(picked.indices)
            used.append((picked.values >= 0).unsqueeze(-1) & (of_kind == kind))
        return QuerySample(torch.cat(rows, dim=1), torch.cat(used, dim=1))


def _shares(queries: int, kinds: int) -> Sequence[int]:
    return [queries // kinds + (kind < queries % kinds) for kind in range(kinds)]


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: RowMask,
    key_kinds: Tensor,
    starts: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> AttentionRows:
    """The sampled rows of ``softmax(softcap · tanh(query · keyᵀ · scaling / softcap) + bias)`` and what they say.

    Args:
        query: ``[batch, heads, queries, size]``, rotated.
        key: ``[batch, key heads, keys, size]``; each serves ``heads / key heads`` consecutive query heads.
        rows: int64 ``[batch, rows]``, query positions.
        mask: what these rows see.
        key_kinds: bool ``[batch, keys, kinds]``.
        starts: int64 ``[batch, rows]``, the first key of the sequence that each row is in.
        scaling: of the dot products.
        softcap: bounds the logits before the bias is added; None without.
    """
    with undisturbed(query.device):
        batch, heads, _, size = query.shape
        count = rows.shape[1]
        group = heads // key.shape[1]
        picked = query.detach().gather(2, rows[:, None, :, None].expand(-1, heads, -1, size))
        picked = picked.reshape(batch, key.shape[1], group * count, size)
        parts: list[list[tuple[Tensor, ...]]] = []
        limit = piece_elements(query.device)
        for b, h in _pieces(batch, key.shape[1], group * count * key.shape[2], limit):
            scores = picked[b, h].float() @ key.detach()[b, h].float().transpose(-1, -2)
            scores = scores.view(scores.shape[0], -1, count, key.shape[2]).mul_(scaling)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            seen = slice(h.start * group, h.stop * group) if mask.allowed.shape[1] > 1 else slice(None)
            piece = _row_values(scores, _piece_of(mask, b, seen), key_kinds[b], starts[b])
            if h.start == 0:
                parts.append([])
            parts[-1].append(piece)
        joined = [_joined(part, 1) for part in parts]
        mass, entropy, sink, largest = _joined(joined, 0)
        return AttentionRows(mass, entropy, sink, largest, mask.allowed.sum(dim=-1))


def _joined(parts: Sequence[tuple[Tensor, ...]], dim: int) -> tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(pieces, dim=dim) for pieces in zip(*parts, strict=True))


def _pieces(batch: int, heads: int, elements: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of heads, each with at most ``limit`` elements where one head of one sample has fewer."""
    samples = max(1, limit // (heads * elements))
    together = heads if heads * elements <= limit else max(1, limit // elements)
    for first in range(0, batch, samples):
        for head in range(0, heads, together):
            yield slice(first, min(first + samples, batch)), slice(head, min(head + together, heads))


def _piece_of(mask: RowMask, samples: slice, heads: slice) -> RowMask:
    bias = None if mask.bias is None else mask.bias[samples, heads]
    return RowMask(mask.allowed[samples, heads], bias)


def _row_values(logits: Tensor, mask: RowMask, key_kinds: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
    """Mass, entropy, sink and largest logit of rows ``[batch, heads, rows, keys]``, which are used up."""
    if mask.bias is not None:
        logits = logits.add_(mask.bias)
    hidden = ~mask.allowed
    logits = logits.masked_fill_(hidden, -torch.inf)
    largest = logits.amax(dim=-1)
    logarithms = logits.log_softmax(dim=-1)
    weights = logarithms.exp()
    mass = weights @ key_kinds[:, None].to(weights.dtype)
    sink = weights.gather(-1, starts[:, None, :, None].expand(-1, weights.shape[1], -1, 1)).squeeze(-1)
    # 0 · log 0 is 0, and log 0 is -inf where a key is hidden.
    entropy = -(weights.mul_(logarithms.masked_fill_(hidden, 0.0))).sum(dim=-1)
    return mass, entropy, sink, largest


def attention_totals(values: AttentionRows, kinds: Tensor) -> AttentionTotals:
    """Sum host copies over the sampled queries. A row that sees no key at all does not count.

    Args:
        values: of the sampled rows, on the host; masses on an encoder's keys are of one kind.
        kinds: bool ``[batch, rows, kinds]``: what is at each row, as of :class:`QuerySample`, on the host.
    """
    mass, entropy, sink, largest = (
        np.asarray(part, dtype=np.float64) for part in (values.mass, values.entropy, values.sink, values.max_logit)
    )
    visible = np.asarray(values.visible)
    sees, spread = np.all(visible > 0, axis=1), np.all(visible > 1, axis=1)
    of_kind = np.asarray(kinds) & np.expand_dims(sees, -1)
    used = of_kind.any(axis=-1)
    with np.errstate(all="ignore"):
        finite = np.isfinite(entropy) & np.isfinite(largest)
        fraction = (entropy / np.log(visible)).mean(axis=1)

    def total(of_rows: np.ndarray, rows: np.ndarray = used) -> float:
        return float(of_rows[rows].sum())

    all_kinds = mass.shape[-1] > TARGET
    to_reference = mass[..., REFERENCE].swapaxes(1, 2)[of_kind[..., TARGET]] if all_kinds else mass[:0, :, 0, 0]
    by_query = mass.mean(axis=1)
    return AttentionTotals(
        mass=np.stack([by_query[of_kind[..., kind]].sum(axis=0) for kind in range(of_kind.shape[-1])]),
        queries=of_kind.sum(axis=(0, 1), dtype=np.float64),
        entropy=total(entropy.mean(axis=1)),
        fraction=(total(fraction, used & spread), float((used & spread).sum())),
        sink=total(sink.mean(axis=1)),
        nonfinite=float((~finite & used[:, None]).sum()),
        max_logit=float(np.where(used[:, None], largest, -np.inf).max(initial=-np.inf)),
        heads=to_reference.sum(axis=0),
    )

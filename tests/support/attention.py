"""What a model's attention does in a step, worked out position by position."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("text", "reference", "target")
Kinds = Sequence[Sequence[str]]


@dataclass
class Attention:
    """The attention of one layer: plain lists ``[batch][head][query][key]``."""

    weights: list
    logits: list


def attention_of(model: Any, attentions: Sequence[nn.Module], batch: Mapping[str, Any]) -> list[Attention]:
    """The whole attention of some modules, from an eager forward pass and, for the logits, from their projections."""
    implementation = model.config._attn_implementation
    calls: dict[nn.Module, dict[str, Any]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: calls.update({m: {"args": args} | kwargs}), with_kwargs=True
        )
        for module in attentions
    ]
    training = model.training
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model.eval()(**batch, output_attentions=True).attentions
            found = [
                Attention(weights[module.layer_idx].tolist(), _logits(module, calls[module]).tolist())
                for module in attentions
            ]
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(implementation)
        model.train(training)
    return found


def _logits(module: Any, call: Mapping[str, Any]) -> Tensor:
    hidden = call["hidden_states"] if "hidden_states" in call else call["args"][0]
    shape = (*hidden.shape[:2], -1, module.head_dim)
    query, key = module.q_proj(hidden).view(shape), module.k_proj(hidden).view(shape)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *call["position_embeddings"])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double()) * module.scaling
    cap = getattr(module, "attn_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


class AttentionSums:
    """Attention of one layer over microbatches, every real position a query, one row at a time."""

    def __init__(self) -> None:
        self._mass: dict[tuple[str, str], list[float]] = {pair: [] for pair in itertools.product(KINDS, repeat=2)}
        self._there: set[str] = set()
        self._entropy: list[float] = []
        self._fraction: list[float] = []
        self._sink: list[float] = []
        self._logits: list[float] = []
        self.heads: dict[int, list[float]] = {}

    def add(self, attention: Attention, kinds: Kinds) -> None:
        """One microbatch; ``kinds[sample][position]`` is "padding" or one of KINDS."""
        for sample, row_kinds in enumerate(kinds):
            self._there.update(kind for kind in row_kinds if kind in KINDS)
            first = next(at for at, kind in enumerate(row_kinds) if kind != "padding")
            for at, kind in enumerate(row_kinds):
                if kind != "padding":
                    self._add_query(attention, sample, at, kind, row_kinds, first)

    def _add_query(
        self, attention: Attention, sample: int, at: int, kind: str, kinds: Sequence[str], first: int
    ) -> None:
        rows = [head[at] for head in attention.weights[sample]]
        for to in KINDS:
            masses = [sum(w for w, other in zip(row, kinds, strict=True) if other == to) for row in rows]
            self._mass[kind, to].append(sum(masses) / len(masses))
            if (kind, to) == ("target", "reference"):
                for head, mass in enumerate(masses):
                    self.heads.setdefault(head, []).append(mass)
        entropies = [-sum(w * math.log(w) for w in row if w > 0) for row in rows]
        self._entropy.append(sum(entropies) / len(entropies))
        visible = max(sum(w > 0 for w in row) for row in rows)
        if visible > 1:
            self._fraction.append(self._entropy[-1] / math.log(visible))
        self._sink.append(sum(row[first] for row in rows) / len(rows))
        for head, row in enumerate(rows):
            self._logits += [logit for w, logit in zip(row, attention.logits[sample][head][at], strict=True) if w > 0]

    def values(self, layer: int) -> dict[str, float]:
        """Tag → value."""
        prefix = f"attention/layer_{layer}"
        found = {
            f"{prefix}/{query}_to_{key}": _mean(masses)
            for (query, key), masses in self._mass.items()
            if masses and key in self._there
        }
        return found | {
            f"{prefix}/entropy": _mean(self._entropy),
            f"{prefix}/entropy_fraction": _mean(self._fraction),
            f"{prefix}/sink": _mean(self._sink),
            f"{prefix}/max_logit": max(self._logits),
            f"{prefix}/nonfinite": 0.0,
        }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def real_kinds(batch: Mapping[str, Tensor]) -> list[list[str]]:
    """Kinds of a batch of text."""
    return [["text" if real else "padding" for real in row] for row in batch["attention_mask"].tolist()]

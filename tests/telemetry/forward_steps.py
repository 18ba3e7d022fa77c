"""One watched step of any model, and what its attention does in it, worked out position by position."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import SharedAttentionLoggerCallback

KINDS = ("text", "reference", "target")
Kinds = Sequence[Sequence[str]]


@dataclass
class Step:
    """What a step gave and what telemetry showed of it."""

    backend: MemoryBackend
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def scalars(self, section: str) -> dict[str, float]:
        """Tag → value of the one step."""
        tags = [tag for tag in self.backend.tags() if tag.startswith(f"{section}/")]
        return {tag: value for tag in tags for value in self.backend.scalars(tag).values()}


def watched_step(
    model: Any, batches: Sequence[Mapping[str, Any]], directory: Path, watch: bool = True, step: int = 1, **options: Any
) -> Step:
    """Forward and backward of some microbatches as one due step; a forward pass that raises is gone on from."""
    result = Step(MemoryBackend())
    callback = SharedAttentionLoggerCallback(1, [result.backend], **options)
    arguments = TrainingArguments(output_dir=str(directory), report_to=[], use_cpu=True)
    event: Any = (arguments, TrainerState(global_step=step - 1), TrainerControl())
    if watch:
        callback.on_train_begin(*event, model=model)
        callback.on_step_begin(*event)
    model.zero_grad()
    for batch in batches:
        loss = model(**batch).logits.float().square().mean()
        loss.backward()
        result.losses.append(loss.item())
    result.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    event[1].global_step = step
    if watch:
        callback.on_step_end(*event)
        callback.on_train_end(*event)
    return result


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


def text_batch(*lengths: int, left: bool = False) -> dict[str, Tensor]:
    """Sequences of token ids, padded to the longest."""
    most = max(lengths)
    ids, mask = [], []
    for row, length in enumerate(lengths):
        real, fill = [1 + (7 * row + 5 * at) % 27 for at in range(length)], [0] * (most - length)
        ids.append([*fill, *real] if left else [*real, *fill])
        mask.append([*fill, *[1] * length] if left else [*[1] * length, *fill])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

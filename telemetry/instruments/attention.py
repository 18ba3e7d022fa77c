"""Shared attention: do text, reference and target look at each other?"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import BatchView
from telemetry.instruments.attention_images import heads_image, mass_image
from telemetry.instruments.base import NO_POSITIONS, Instrument, Step, probed_layers
from telemetry.measures.attention import (
    KINDS,
    REFERENCE,
    TARGET,
    AttentionRows,
    AttentionTotals,
    QuerySample,
    attention_rows,
    attention_totals,
    sample_queries,
)
from telemetry.measures.attention_masks import sequence_starts
from telemetry.probes.attention import AttentionCall, UnmeasurableError, watch_attention
from telemetry.probes.forward import Microbatch
from telemetry.probes.sharding import is_split
from telemetry.records import Max, Mean, Means, Metric, PresentMean, PresentSum

DEFAULT_QUERIES = 64
UNHEARD = "no reference or no target audio in the step"
SPLIT = "each rank has some heads of a layer, and sums over ranks do not say which"
NOT_SEEN = "its attention does not go through transformers' AttentionInterface"


class AttentionInstrument(Instrument):
    """Everything under ``attention/``, from a sample of each sequence's queries.

    Args:
        layers: indices of the layers to look into; by default the first, the middle and the last.
        queries: how many positions of each sequence are looked at, shared out evenly to text, reference and target.

    Raises:
        ValueError: for a layer below 0, or fewer than one query.
    """

    def __init__(self, layers: Sequence[int] | None = None, queries: int = DEFAULT_QUERIES) -> None:
        if any(index < 0 for index in layers or ()):
            raise ValueError(f"layers are counted from 0, got {list(layers or ())}")
        if queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        self._layers = layers
        self._queries = queries
        self._generator: torch.Generator | None = None
        self._batch: Mapping[bool, AttendedBatch] = {}  # by whether keys are an encoder's
        self._laid_out = False  # whether any microbatch of the step is
        self._expected: set[int] = set()
        self._failed: set[int] = set()
        self._measured: set[int] = set()
        self._split: set[int] = set()  # layers of which each rank has some heads

    def begin(self, step: Step) -> None:
        """A due step begins: watch the layers."""
        self._forget()
        layers = probed_layers(step, self._layers, "attention")
        self._expected = {layer.index for layer in layers}
        shared = step.batches < step.world_size
        self._split = {layer.index for layer in layers if shared and is_split(layer.attention)}
        if layers:
            watch_attention(step.watch, self, layers, lambda call: self._observe(step, call))

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """The model is about to run: choose the queries to look at."""
        self._batch = {}
        if not self._expected or microbatch.view is None:
            return
        if self._generator is None or self._generator.device != microbatch.view.real.device:
            # One of its own, on the device: numbers drawn on the host would have to be waited for.
            self._generator = torch.Generator(microbatch.view.real.device).manual_seed(step.number)
        self._laid_out = True
        decoded = microbatch.view.decoded_from
        kinds = _kinds(microbatch.view, _hears(step))[:, decoded:]
        sample = sample_queries(kinds, self._queries, self._generator)
        starts = _starts(microbatch, microbatch.view.real[:, decoded:])
        self._batch = {False: AttendedBatch(sample, kinds, kinds, starts.gather(1, sample.rows))}
        if decoded:
            encoded = microbatch.view.real[:, :decoded]
            first = encoded.long().argmax(dim=1, keepdim=True).expand_as(sample.rows)
            self._batch |= {True: AttendedBatch(sample, kinds, encoded.unsqueeze(-1), first)}

    def finish(self, step: Step) -> None:
        """The due step has ended: hand over what was measured."""
        for layer in self._expected - self._measured - self._failed:
            step.recorder.absent(f"attention/layer_{layer}", NOT_SEEN if self._laid_out else NO_POSITIONS)
        if self._measured:
            step.recorder.show({}, partial(_show_images, sorted(self._measured)))
        self._forget()

    def _forget(self) -> None:
        self._batch, self._generator = {}, None
        self._laid_out = False
        self._expected = set()
        self._failed, self._measured, self._split = set(), set(), set()

    def _observe(self, step: Step, call: AttentionCall) -> None:
        batch = self._batch.get(call.across)
        if batch is None:
            return
        prefix = f"attention/layer_{call.layer}{'/cross' if call.across else ''}"
        try:
            rows = batch.rows(call)
        except UnmeasurableError as reason:
            if not call.across:
                self._failed.add(call.layer)
            step.recorder.absent(prefix, str(reason))
            return
        if not call.across:
            self._measured.add(call.layer)
        split = call.layer in self._split
        if step.repeats_batch and not split:
            return  # whole, as on the rank that counts
        tensors = {**rows._asdict(), "kinds": batch.sample.kinds, "keys": batch.keys}
        step.recorder.defer(tensors, partial(_add, prefix, call.across, split))


@dataclass(frozen=True)
class AttendedBatch:
    """What is looked at in one microbatch.

    Attributes:
        sample: the queries.
        kinds: bool ``[batch, sequence, kinds]``, what is at each position.
        key_kinds: bool ``[batch, keys, kinds]``: the same, or an encoder's positions, of one kind.
        starts: int64 ``[batch, rows]``, where the sequence of keys of each query begins.
    """

    sample: QuerySample
    kinds: Tensor
    key_kinds: Tensor
    starts: Tensor

    @functools.cached_property
    def keys(self) -> Tensor:
        """int64 ``[kinds]``: keys of each kind."""
        return self.key_kinds.sum(dim=(0, 1))

    def rows(self, call: AttentionCall) -> AttentionRows:
        """What the sampled queries do in one layer.

        Raises:
            UnmeasurableError: when its attention cannot be worked out again exactly.
        """
        if call.query.shape[2] != self.kinds.shape[1] or call.query.shape[0] != self.kinds.shape[0]:
            raise UnmeasurableError("its queries are not the positions of the batch")
        if call.across and call.key.shape[2] != self.key_kinds.shape[1]:
            raise UnmeasurableError("its keys are not the encoder's positions in the batch")
        rows = self.sample.rows
        return attention_rows(
            call.query, call.key, rows, call.row_mask(rows), self.key_kinds, self.starts, call.scaling, call.softcap
        )


def _hears(step: Step) -> bool:
    return step.family is not None and "audio" in step.family.modalities


def _kinds(view: BatchView, hears: bool) -> Tensor:
    """bool ``[batch, sequence, kinds]``: what is at each position. A model without audio knows text alone."""
    if not hears:
        return view.text.unsqueeze(-1)
    none = torch.zeros_like(view.text)
    known = view.audio is not None and view.audio.labelled  # else nobody knows which audio is which
    audio = (view.audio.reference, view.audio.target) if view.audio is not None and known else (none, none)
    return torch.stack((view.text, *audio), dim=-1)


def _starts(microbatch: Microbatch, real: Tensor) -> Tensor:
    """int64 ``[batch, sequence]``: the first position of each position's own sequence."""
    positions = microbatch.inputs.get("position_ids")
    known = isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == real.shape[1]
    return sequence_starts(real, positions if known else None)


def _add(prefix: str, across: bool, split: bool, host: Mapping[str, Tensor], emit: Emitter) -> None:
    """Add what the sampled queries of a microbatch do in a layer."""
    totals = attention_totals(AttentionRows(*(host[name] for name in AttentionRows._fields)), host["kinds"])
    for tag, value in _spread(totals) if across else _metrics(totals, host["keys"].tolist()):
        emit.metric(f"{prefix}/{tag}", value)
    if not across and not split and len(totals.queries) == len(KINDS):
        emit.metric(f"{prefix}/heads", Means(torch.from_numpy(totals.heads), totals.queries[TARGET]))


def _metrics(totals: AttentionTotals, keys: Sequence[int]) -> Iterator[tuple[str, Metric]]:
    kinds = KINDS[: len(totals.queries)]
    for (q, query), (k, key) in itertools.product(enumerate(kinds), repeat=2):
        yield f"{query}_to_{key}", PresentMean(totals.mass[q, k], totals.queries[q], keys[k])
    yield from _spread(totals)


def _spread(totals: AttentionTotals) -> Iterator[tuple[str, Metric]]:
    queries = totals.queries.sum()
    yield "entropy", Mean(totals.entropy, queries)
    yield "entropy_fraction", Mean(*totals.fraction)
    yield "sink", Mean(totals.sink, queries)
    yield "max_logit", Max(totals.max_logit)
    yield "nonfinite", PresentSum(totals.nonfinite, queries)


def _show_images(layers: Sequence[int], _host: Mapping[str, Tensor], emit: Emitter) -> None:
    """Draw all ranks' attention; of what no rank has, nothing."""
    masses = {layer: _mass(layer, emit) for layer in layers}
    if any(np.isfinite(mass).sum() > 1 for mass in masses.values()):
        emit.record(mass_image(masses))
    else:
        emit.absent("attention/mass", "the step has positions of one kind only")
    heads = {layer: means for layer in layers if (means := _heads(layer, emit)) is not None}
    if heads:
        emit.record(heads_image(heads))
    else:
        heard = any(np.isfinite(mass[TARGET, REFERENCE]) for mass in masses.values())
        emit.absent("attention/heads", SPLIT if heard else UNHEARD)


def _mass(layer: int, emit: Emitter) -> np.ndarray:
    """``[kinds, kinds]``, NaN where there is none."""
    tags = (f"attention/layer_{layer}/{query}_to_{key}" for query, key in itertools.product(KINDS, repeat=2))
    metrics = [emit.merged(tag) for tag in tags]
    values = [None if metric is None else metric.result() for metric in metrics]
    return np.array([np.nan if value is None else value for value in values]).reshape(len(KINDS), -1)


def _heads(layer: int, emit: Emitter) -> np.ndarray | None:
    metric, mass = (emit.merged(f"attention/layer_{layer}/{tag}") for tag in ("heads", "target_to_reference"))
    there = mass is not None and mass.result() is not None
    return metric.results() if there and isinstance(metric, Means) else None

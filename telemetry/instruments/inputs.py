"""Inputs: is the data what I think it is?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import IGNORE_INDEX, NO_LABELS, BatchView
from telemetry.families.chat import ChatFormat, decoded
from telemetry.instruments.base import COMPILED, NO_POSITIONS, NOT_KNOWN, LastMicrobatchInstrument, Step
from telemetry.measures.tensor_stats import TensorStats, first_values, tensor_statistics
from telemetry.probes.forward import Microbatch
from telemetry.records import Audio, Cell, Clip, Max, Mean, Metric, Min, Spread, Sum, Table

SHOWN_SAMPLES = 2
SHOWN_CLIPS = 4
NO_TEXT_LABELS = "no labels are known of its token ids"
NOT_DATA = frozenset({"num_items_in_batch"})  # the Trainer's own, for the loss
TENSOR_COLUMNS = (
    "tensor", "shape", "dtype", "device", "min", "max", "mean", "std", "zero fraction", "non-finite", "first values",
)  # fmt: skip
SEQUENCE_COLUMNS = ("sample", "span", "tokens", "supervised", "text")


class InputInstrument(LastMicrobatchInstrument):
    """Everything under ``inputs/``: token shares, supervision, invalid ids, tensor statistics, spans and sound.

    Scalars cover every microbatch of the step; tables and audio show its last one.
    """

    def __init__(self) -> None:
        self._statistics: dict[str, Tensor] = {}  # of the last microbatch's tensors

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Measure one microbatch."""
        super().inputs(step, microbatch)
        recorder = step.recorder
        if microbatch.view is not None:
            metrics = itertools.chain(_view_metrics(microbatch.view), _mask_metrics(microbatch))
            for tag, value in metrics:
                if step.says(f"inputs/{tag}"):
                    recorder.metric(f"inputs/{tag}", value)
            if microbatch.view.text_labels is None:
                recorder.absent("inputs/supervised/text_fraction", NO_TEXT_LABELS)
            if microbatch.view.audio is not None and not microbatch.view.audio.labelled:
                for name in ("tokens/reference_audio", "tokens/target_audio", "supervised/audio"):
                    recorder.absent(f"inputs/{name}_fraction", NO_LABELS)
        self._statistics = {name: tensor_statistics(tensor) for name, tensor in _tensors(microbatch)}
        recorder.defer(self._statistics, _add_statistics)

    def look(self, step: Step, microbatch: Microbatch | None) -> None:
        """Show the last microbatch."""
        statistics, self._statistics = self._statistics, {}
        if microbatch is None:
            if not step.watch.usable:
                step.recorder.absent("inputs", COMPILED)
            return
        _show_tensors(step, microbatch, statistics)
        self._show_sequences(step, microbatch)
        for kind in ("reference", "target"):
            self._show_audio(step, microbatch, kind)

    def _show_sequences(self, step: Step, microbatch: Microbatch) -> None:
        view = microbatch.view
        if view is None:
            step.recorder.absent("inputs/sequence", NOT_KNOWN if step.family is None else NO_POSITIONS)
            return
        tokenizer = step.tokenizer
        samples = [microbatch.sample_id(row) for row in range(min(SHOWN_SAMPLES, view.input_ids.shape[0]))]

        def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
            rows = tuple((sample, *span) for row, sample in enumerate(samples) for span in _spans(host, row, tokenizer))
            emit.record(Table("inputs/sequence", SEQUENCE_COLUMNS, rows))

        step.recorder.show(_span_tensors(view, len(samples)), build)

    def _show_audio(self, step: Step, microbatch: Microbatch, kind: str) -> None:
        tag = f"inputs/{kind}"
        # One clip a sample: a sample without one keeps its place, so that a player shows the same row at every step.
        sources = [
            (_caption(microbatch, row, metadata), next(iter(metadata.get(kind) or ()), None))
            for row, metadata in enumerate(microbatch.metadata[:SHOWN_CLIPS])
        ]
        present = [waveform for _, waveform in sources if waveform is not None]
        if not step.is_main:
            return
        if not step.sound.enabled:
            step.recorder.absent(tag, "sound is off")
            return
        if not present:
            step.recorder.absent(tag, f"the batch carries no {kind} waveform")
            return
        silence = np.zeros(0, dtype=np.float32)
        rate = present[0].sampling_rate

        def build(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            clips = tuple(
                Clip(silence, rate, caption) if source is None else Clip(source.samples, source.sampling_rate, caption)
                for caption, source in sources
            )
            emit.record(Audio(tag, clips))

        step.recorder.show({}, build)


def _add_statistics(host: Mapping[str, Tensor], emit: Emitter) -> None:
    for name, values in host.items():
        for kind, value in _tensor_metrics(TensorStats(*values.tolist())):
            emit.metric(f"inputs/tensor/{name}/{kind}", value)


def _show_tensors(step: Step, microbatch: Microbatch, statistics: Mapping[str, Tensor]) -> None:
    named = list(_tensors(microbatch))
    statics = [(name, tuple(one.shape), one.dtype, one.device) for name, one in named]
    tensors = {f"{name}/first": first_values(one) for name, one in named}
    tensors |= {f"{name}/stats": values for name, values in statistics.items()}

    def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
        rows = tuple(
            (name, str(shape), str(dtype).removeprefix("torch."), str(device), *_tensor_row(host, name))
            for name, shape, dtype, device in statics
        )
        emit.record(Table("inputs/tensors", TENSOR_COLUMNS, rows))

    step.recorder.show(tensors, build)


def _mask_metrics(microbatch: Microbatch) -> Iterator[tuple[str, Metric]]:
    """What the attention mask hides between positions that it shows: padding lies at the ends."""
    mask, ids = microbatch.inputs.get("attention_mask"), microbatch.inputs.get("input_ids")
    if isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.dim() == 2 and mask.shape == ids.shape:
        shown = mask.bool()
        before = shown.cumsum(1)
        yield "tokens/hidden_fraction", Mean((~shown & (before > 0) & (before < before[:, -1:])).sum(), mask.numel())


def _view_metrics(view: BatchView) -> Iterator[tuple[str, Metric]]:
    positions = view.positions
    text = view.text.sum()
    yield "tokens/total", Sum(positions)
    yield "tokens/text_fraction", Mean(text, positions)
    yield "tokens/padding_fraction", Mean(positions - view.real.sum(), positions)
    if view.text_labels is not None:
        supervised = (view.text_labels != IGNORE_INDEX) & view.text
        if view.audio is None:
            taught = (view.text_labels != IGNORE_INDEX).any(dim=1)
            yield "supervised/samples_fraction", Mean(taught.sum(), len(taught))
        yield "supervised/text_fraction", Mean(supervised.sum(), text)
    if view.audio is not None and view.audio.labelled:
        audio = view.audio.reference | view.audio.target
        yield "tokens/reference_audio_fraction", Mean(view.audio.reference.sum(), positions)
        yield "tokens/target_audio_fraction", Mean(view.audio.target.sum(), positions)
        taught = (view.audio.labels != IGNORE_INDEX).flatten(1).any(dim=1)
        if view.text_labels is not None:
            taught = taught | (view.text_labels != IGNORE_INDEX).any(dim=1)
        yield "supervised/samples_fraction", Mean(taught.sum(), len(taught))
        coded = audio if view.audio.embedded is None else audio & ~view.audio.embedded
        labelled, held = view.audio.labels != IGNORE_INDEX, view.audio.held
        if held is None:
            yield "supervised/audio_fraction", Mean(labelled.sum(), coded.sum() * view.audio.codebooks)
        else:
            yield "supervised/audio_fraction", Mean((labelled & held).sum(), held.sum())
    yield "invalid_ids", Sum(_invalid_ids(view))


def _invalid_ids(view: BatchView) -> Tensor:
    """How many ids and labels lie outside their vocabulary."""
    faults = _outside(view.input_ids, view.vocabulary).sum()
    if view.text_labels is not None:
        faults = faults + (_outside(view.text_labels, view.vocabulary) & (view.text_labels != IGNORE_INDEX)).sum()
    if view.audio is not None:
        labels = view.audio.labels
        faults = faults + _outside(view.audio.codes, view.audio.vocabulary).sum()
        faults = faults + (_outside(labels, view.audio.vocabulary) & (labels != IGNORE_INDEX)).sum()
    return faults


def _outside(ids: Tensor, vocabulary: int) -> Tensor:
    return ids.clamp(0, vocabulary - 1) != ids


def _tensors(microbatch: Microbatch) -> Iterator[tuple[str, Tensor]]:
    known = {**microbatch.inputs, **microbatch.withheld}
    return ((name, value) for name, value in known.items() if isinstance(value, Tensor) and name not in NOT_DATA)


def _tensor_metrics(stats: TensorStats) -> Iterator[tuple[str, Metric]]:
    yield "min", Min(stats.minimum)
    yield "max", Max(stats.maximum)
    yield "mean", Mean(stats.total, stats.finite)
    yield "std", Spread(stats.finite, stats.mean, stats.deviations)
    yield "zero_fraction", Mean(stats.zeros, stats.values)
    yield "nonfinite", Sum(stats.nonfinite)


def _tensor_row(host: Mapping[str, Tensor], name: str) -> tuple[Cell, ...]:
    stats = dict(_tensor_metrics(TensorStats(*host[f"{name}/stats"].tolist())))
    nonfinite = stats.pop("nonfinite").result()
    values = [stats[kind].result() for kind in ("min", "max", "mean", "std", "zero_fraction")]
    first = " ".join(_short(value) for value in host[f"{name}/first"].tolist())
    return (*values, None if nonfinite is None else int(nonfinite), first)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _span_tensors(view: BatchView, samples: int) -> dict[str, Tensor]:
    """What the sequence table needs of the first ``samples`` rows. Kinds: 0 padding, 1 text, 2 reference, 3 target.

    Positions that the model does not have are -1.
    """
    kinds = view.text.long()
    supervised = torch.zeros_like(view.real)
    clips = torch.zeros_like(kinds)
    if view.text_labels is not None:
        supervised = supervised | (view.text_labels != IGNORE_INDEX)
    if view.audio is not None:
        kinds = kinds + 2 * view.audio.reference.long() + 3 * view.audio.target.long()
        supervised = supervised | (view.audio.labels != IGNORE_INDEX).any(dim=-1)
        clips = view.audio.starts.long().cumsum(dim=1)
    if view.exists is not None:
        kinds = kinds.masked_fill(~view.exists, -1)
    fields = {"ids": view.input_ids, "kinds": kinds, "supervised": supervised, "clips": clips}
    return {name: tensor[:samples].clone() for name, tensor in fields.items()}


def _spans(host: Mapping[str, Tensor], row: int, tokenizer: Any) -> Iterator[tuple[Cell, ...]]:
    """Span, tokens, supervised and text of one sample, in order."""
    ids: list[int] = host["ids"][row].tolist()
    kinds: list[int] = host["kinds"][row].tolist()
    clips: list[int] = host["clips"][row].tolist()
    supervised: list[bool] = host["supervised"][row].tolist()
    roles = _roles(ids, tokenizer)

    def key(position: int) -> tuple[Any, ...]:
        if kinds[position] >= 2:  # a clip is one span: its stream's begin is never supervised
            return kinds[position], clips[position]
        return kinds[position], roles[position], supervised[position]

    for _, group in groupby(range(len(ids)), key):
        span = list(group)
        if kinds[span[0]] < 0:
            continue
        name = ("padding", roles[span[0]] or "text", "reference audio", "target audio")[kinds[span[0]]]
        marked = any(supervised[position] for position in span)
        yield name, len(span), "yes" if marked else "no", _text([ids[position] for position in span], tokenizer)


def _roles(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The role whose turn each position lies in; "" outside any."""
    roles = [""] * len(ids)
    chat = ChatFormat.of(tokenizer)
    if chat is not None:
        for turn in chat.turns(ids, tokenizer)[0]:
            roles[turn.start : turn.end] = [turn.role] * (turn.end - turn.start)
    return roles


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    """Decoded with special tokens visible; a token repeated in a row is shown once with its count."""
    if not hasattr(tokenizer, "decode"):
        return " ".join(map(str, ids))
    runs = [(token, len(list(group))) for token, group in groupby(ids)]
    parts: list[str] = []
    plain: list[int] = []
    for token, count in runs:
        if count < 4:
            plain.extend([token] * count)
            continue
        parts.extend([decoded(tokenizer, plain)] if plain else [])
        parts.append(f"{decoded(tokenizer, [token])}×{count} ")
        plain = []
    return "".join([*parts, decoded(tokenizer, plain) if plain else ""])


def _caption(microbatch: Microbatch, row: int, metadata: Mapping[str, Any]) -> str:
    known = [metadata.get(name) for name in ("speaker", "language")]
    return ", ".join([microbatch.sample_id(row), *(str(value) for value in known if value)])

"""Outputs: what does the model predict, per modality and per codebook, and is that what its loss is made of?"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import IGNORE_INDEX, NO_LABELS, AudioView, Divided, Overruled, Stream, each_logits
from telemetry.families.chat import decoded
from telemetry.families.fused import SAMPLE
from telemetry.instruments.base import COMPILED, Instrument, Step
from telemetry.instruments.hardest import SampleLosses
from telemetry.measures.token_stats import TokenStats, histogram_of_ids, masked_totals, token_statistics
from telemetry.probes.forward import Microbatch, Reading
from telemetry.records import Mean, Metric, Perplexity, Table, UsedFraction

SHOWN_SAMPLES = 4
ENDS = 10
TOTAL, MODEL = "outputs/loss/total", "outputs/loss/model"
PARTIAL = "a part of it could not be measured"
PART_SAMPLED = "the loss is fused with the head, and of its many tokens a sample was read"
SOME = (
    f"The loss is fused with the head. Logits were computed again: of at most {SAMPLE:,} supervised tokens of a pass, "
    "an even sample where it has more."
)
UNREAD = "no part of the model's loss could be read"
NO_LOSS = "the model returned no loss"
ONLY_ENDS = "nothing that it predicts is an entry of the codebook: begins and ends of stream, or tokens of others"
MANY_ENDS = 0.5
UNCHECKED = "The model returned no loss to compare it with."
WITHHELD = (
    "By the batch's labels, as the model's own loss would read them: the trainer keeps them from it, and what it "
    "minimizes may be more than their cross-entropy (label smoothing, a loss of its own)."
)
MEANS = ("loss", "accuracy", "top5", "entropy")
COLUMNS = ("sample", "stream", "supervised", "accuracy", "target", "predicted")

# How far rounding takes a loss of a dtype from the same loss added up otherwise, as a share of it. Where a compiled
# model is handed over, its loss may be made of logits that were never rounded to the dtype in which it returns them.
_ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
_FINE, _COMPILED = 1e-4, 1e-2
_SMALL = 0.1  # nats: of a loss below this, rounding is no share any more


class CheckedMean(Metric):
    """A mean, ``total`` over ``count``, that holds only where it has been read right in all passes on all ranks.

    Args:
        total, count: of the mean.
        unread: passes of which a part was not read.
        wrong: passes in which it differs from what the model returned.
        read, returned: sums over those passes of what was read, and of what the model returned.
        sampled: passes of which a part was read from some of its tokens.
    """

    ops = ("sum",) * 7

    def __init__(
        self,
        total: Any,
        count: Any,
        unread: Any = 0,
        wrong: Any = 0,
        read: Any = 0,
        returned: Any = 0,
        sampled: Any = 0,
    ) -> None:
        super().__init__(total, count, unread, wrong, read, returned, sampled)

    def _result(self, total: np.ndarray, count: np.ndarray, *faults: np.ndarray) -> float | None:  # type: ignore[override]
        unread, wrong, _, _, sampled = faults
        return float(total) / float(count) if count > 0 and not (unread or wrong or sampled) else None

    def fault(self, family: str) -> str:
        """Say why there is no mean; "" where there is one. Call it on host copies."""
        _, _, unread, wrong, read, returned, sampled = map(float, self.components)
        if unread or not wrong:
            return PARTIAL if unread else PART_SAMPLED if sampled else ""
        return (
            f"family {family} reads a loss of {read / wrong:.7g} where the model returned {returned / wrong:.7g}: it "
            "misreads the model, or the loss is more than the cross-entropy of what it declares, or at a temperature"
        )


class _Compared(Metric):
    """Two numbers of a step that are compared in words, and the passes of which they are not known."""

    ops = ("sum", "sum", "sum")
    shown = False


@dataclass(frozen=True)
class _Pass:
    """How the loss of one pass is to be read.

    Attributes:
        tensors: 0-d each, by tag: the loss that the model returned, and each part of it that no stream shows.
        read: 0-d, the loss added up from streams and parts; None where there are none.
        partial: whether a part of it was not read.
        rounding: share of it that two right sums may differ by.
        counted: whether the trainer has it divided by the tokens of the whole step, so that passes add up.
        withheld: whether the model was not given all labels that were read, so that its loss is another.
        sampled: 0-d, whether a part of it was read from some of its tokens; None where all of it was.
    """

    tensors: dict[str, Tensor]
    read: Tensor | None
    partial: bool
    rounding: float
    counted: bool
    withheld: bool
    sampled: Tensor | None = None

    def checked(self) -> CheckedMean:
        """Compare what was read with what the model returned, without waiting for either; the count is left out."""
        read, returned = self.read, None if self.withheld else self.tensors.get(MODEL)
        if self.partial or read is None:
            return CheckedMean(0, 0, self.partial or returned is not None)
        sampled = torch.zeros_like(read) if self.sampled is None else self.sampled.to(read)
        if returned is None:
            return CheckedMean(read, 0, sampled=sampled)
        returned = returned.to(read)
        most = torch.maximum(read.abs(), returned.abs()).clamp(min=_SMALL)
        finite = returned.isfinite()  # of a mean over nothing it is not, say: there is nothing to compare
        wrong = finite & ~((read - returned).abs() <= self.rounding * most) & ~sampled.bool()
        total = torch.where(finite, read.where(~wrong, 0.0), returned)
        return CheckedMean(total, 0, 0, wrong, read.where(wrong, 0.0), returned.where(wrong, 0.0), sampled)


class OutputInstrument(Instrument):
    """Everything under ``outputs/``, reduced on the device as soon as a pass has ended.

    Scalars cover every microbatch of the step; the table shows its last one. Every pass's loss, added up again from
    what its family declares, is compared with the loss that the model returned: where they differ, the total is
    withheld on all ranks.
    """

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        self._readings: list[Reading] = []
        self._last: tuple[Microbatch, list[_Shown]] | None = None
        self._codebooks: set[str] = set()
        self._samples = SampleLosses()

    def begin(self, step: Step) -> None:
        """Begin with nothing."""
        self._passes, self._readings, self._last, self._codebooks = [], [], None, set()
        self._samples.begin()

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Forget the microbatch before; measure which stream ends are supervised."""
        self._last = None
        audio = microbatch.view.audio if microbatch.view is not None else None
        if audio is not None and audio.labelled:
            step.recorder.metric("outputs/eos/supervised", _supervised_ends(audio))
        elif audio is not None:
            step.recorder.absent("outputs/eos/supervised", NO_LABELS)

    def outputs(self, step: Step, microbatch: Microbatch, reading: Reading) -> None:
        """Measure every stream, and what the loss is made of."""
        for one in reading.absent:
            step.recorder.absent(f"outputs/loss/{one.name}", one.why)
        withheld = WITHHELD if microbatch.withheld else ""
        shares: list[Tensor] = []
        shown: list[_Shown] = []
        for stream, stats in statistics_of(reading.streams):
            totals, counts = _totals(stream, stats)
            some = SOME if stream.each is not None and stream.rows is not None else ""
            note = " ".join(filter(None, (some, withheld)))
            tensors = {"totals": totals, "counts": counts, **_further(stream, stats)}
            step.recorder.defer(tensors, functools.partial(_add, stream.group, stream.names, note))
            shares.append(_share(stream, totals[0], counts))
            self._samples.stream(stream, stats, microbatch)
            shown += _Shown.of(stream, stats)
            self._codebooks.update(stream.names if stream.group == "audio" else ())
        self._samples.microbatch(step, microbatch)
        self._last = microbatch, shown
        self._passes.append(_pass(microbatch, reading, shares))
        self._readings.append(Reading(divided=reading.divided, overruled=reading.overruled))

    def finish(self, step: Step) -> None:
        """Add the passes' losses up; show the last microbatch's predictions."""
        passes, readings, last, codebooks = self._passes, self._readings, self._last, sorted(self._codebooks)
        if passes:
            self._samples.finish(step)
        self.begin(step)
        _say_divided(step, [one for reading in readings for one in reading.divided], len(readings))
        _say_overruled(step, [one for reading in readings for one in reading.overruled])
        if passes:
            _compare(step, passes)
            step.recorder.show({}, functools.partial(_say_of_ends, codebooks))
        elif not step.watch.usable:
            step.recorder.absent("outputs", COMPILED)
        if last is not None and last[1]:
            _show(step, *last)


def statistics_of(streams: Iterable[Stream]) -> Iterator[tuple[Stream, TokenStats]]:
    """Measure the tokens of every stream, those that take turns in the same logits at once."""
    for whole, together in each_logits(streams):
        stats = token_statistics(whole.logits, whole.predicted, probe_id=whole.eos_id)
        yield from ((stream, stats) for stream in together)


def _totals(stream: Stream, stats: TokenStats) -> tuple[Tensor, Tensor]:
    """Sums over supervised tokens of everything that has a mean, and their counts, of each sequence.

    float64 ``[4, sequences]`` in the order of :data:`MEANS`, and ``[sequences]``.
    """
    rank = stats.rank
    columns = torch.stack([stats.nll, (rank == 0).to(stats.nll.dtype), (rank < 5).to(stats.nll.dtype), stats.entropy])
    total, count = masked_totals(columns.reshape(len(MEANS), -1, len(stream.names)), _supervised(stream))
    return (total, count) if stream.each is None else (total * stream.each, count * stream.each)


def _further(stream: Stream, stats: TokenStats) -> dict[str, Tensor]:
    """What else is measured of a stream: ends that it could predict, and how often it predicts each entry."""
    tensors = {}
    if stream.eos_id is not None and stats.probe_probability is not None:
        ends = _by_sequence(stream.predicted == stream.eos_id if stream.ends is None else stream.ends, stream)
        tensors["ends"] = torch.stack(masked_totals(_by_sequence(stats.probe_probability, stream), ends))
    if stream.group == "audio":
        tensors["predicted"] = _predicted_entries(stream, stats)
    return tensors


def _add(group: str, names: Sequence[str], note: str, host: Mapping[str, Tensor], emit: Emitter) -> None:
    """Add what was measured of a stream in a microbatch, for its group and for each of its sequences."""
    counts = host["counts"].tolist()
    for name, totals in zip(MEANS, host["totals"].tolist(), strict=True):
        emit.metric(f"outputs/{name}/{group}", Mean(math.fsum(totals), math.fsum(counts)), note)
        for own, total, count in zip(names, totals, counts, strict=True) if name != "entropy" else ():
            if own != group:
                emit.metric(f"outputs/{name}/{own}", Mean(total, count), note)
    if "ends" in host:
        probabilities, ends = host["ends"].tolist()
        emit.metric("outputs/eos/probability", Mean(math.fsum(probabilities), math.fsum(ends)), note)
    for own, predicted in zip(names, host.get("predicted", ()), strict=False):
        emit.metric(f"outputs/{own}/used_fraction", UsedFraction(predicted), note)
        emit.metric(f"outputs/{own}/perplexity", Perplexity(predicted), note)


def _predicted_entries(stream: Stream, stats: TokenStats) -> Tensor:
    """float64 ``[sequences, entries]``: how often each entry of the codebooks is predicted."""
    predicted = _by_sequence(stats.prediction, stream)
    first, size = stream.entries or (0, stream.logits.shape[-1])
    counts = histogram_of_ids(predicted - first, _supervised(stream), size)
    special = (stream.bos_id, stream.eos_id if stream.ends is None else None)
    return _without(counts, {one for one in special if one is not None})


def _say_of_ends(codebooks: Sequence[str], _host: Mapping[str, Tensor], emit: Emitter) -> None:
    """Say what codebooks that predict few of their entries are measured over; why some are not."""
    for name in codebooks:
        tags = [f"outputs/{name}/{kind}" for kind in ("used_fraction", "perplexity")]
        use, predicted = emit.merged(tags[0]), emit.merged(f"outputs/accuracy/{name}")
        if use is None or predicted is None or not predicted.components[1]:
            continue
        share = 1 - float(np.asarray(use.components[0]).sum()) / float(predicted.components[1])
        for tag in tags:
            if share == 1:
                emit.absent(tag, ONLY_ENDS)
            elif share > MANY_ENDS:
                emit.notes[tag] = f"{share:.0%} of its predictions are no entries of the codebook, and left out."


def _by_sequence(values: Tensor, stream: Stream) -> Tensor:
    """``[tokens, sequences]``."""
    return values.reshape(-1, len(stream.names))


def _supervised(stream: Stream) -> Tensor:
    """bool ``[tokens, sequences]``; a label outside the vocabulary is a data fault, counted in inputs/invalid_ids."""
    targets = _by_sequence(stream.predicted, stream)
    return (targets >= 0) & (targets < stream.logits.shape[-1])


def _without(counts: Tensor, ids: set[int]) -> Tensor:
    """Counts ``[codebooks, vocabulary]`` without the columns of some ids: those of the codebook's own entries."""
    edges = [-1, *sorted(ids), counts.shape[1]]
    return torch.cat([counts[:, edge + 1 : following] for edge, following in itertools.pairwise(edges)], dim=1)


def _supervised_ends(audio: AudioView) -> Mean:
    """Of every codebook of every target clip, how many have the first EOS there, and with a label."""
    is_end = audio.is_end & audio.target.unsqueeze(-1)
    repeated = torch.zeros_like(is_end)
    repeated[:, 1:] = is_end[:, :-1] & ~audio.starts[:, 1:].unsqueeze(-1)
    taught = is_end & ~repeated & (audio.labels == audio.eos_id)
    clip = audio.starts.long().cumsum(dim=1).unsqueeze(-1).expand_as(taught)
    if audio.after is not None:
        taught = torch.cat([taught, (audio.after == audio.eos_id).unsqueeze(1)], dim=1)
        clip = torch.cat([clip, clip[:, -1:]], dim=1)
    ends = torch.zeros_like(clip[:, :1]).repeat(1, clip.shape[1] + 1, 1)  # by clip; a clip has an end once
    ends = ends.scatter_reduce(1, clip, taught.long(), reduce="amax")
    return Mean(ends.sum(), (audio.starts & audio.target).sum() * audio.codebooks)


# -- the loss ---------------------------------------------------------------------------------------------------------


def _share(stream: Stream, total: Tensor, count: Tensor) -> Tensor:
    """What a stream adds to the loss of its pass: a 0-d tensor, 0 where nothing is supervised."""
    by = count if stream.denominator is None else stream.denominator
    by = by.to(total).clamp(min=1) if isinstance(by, Tensor) else max(by, 1)
    return stream.weight * (total / by).sum()


def _pass(microbatch: Microbatch, reading: Reading, shares: Sequence[Tensor]) -> _Pass:
    tensors = {f"outputs/loss/{part.name}": part.value.detach().clone() for part in reading.parts}
    read = [*shares, *tensors.values()]
    if reading.loss is not None and not any(one.in_loss for one in reading.absent):
        for rest in reading.rests:
            left = reading.loss - torch.stack([one.to(reading.loss) for one in read]).sum()
            tensors[f"outputs/loss/{rest.name}"] = left
            read.append(left)
    rounding = _FINE
    if reading.loss is not None:
        tensors[MODEL] = reading.loss
        # Logits that were computed again are rounded to a dtype of their own.
        again = [stream.logits.dtype for stream in reading.streams if stream.each is not None]
        rounding = max(_ROUNDING.get(dtype, _FINE) for dtype in (reading.loss.dtype, *again))
    some = [stream.each > 1 for stream in reading.streams if stream.each is not None]
    return _Pass(
        tensors,
        torch.stack([one.to(read[0]) for one in read]).sum() if read else None,
        partial=any(one.in_loss for one in reading.absent),
        rounding=rounding if reading.watched else max(rounding, _COMPILED),
        counted=microbatch.inputs.get("num_items_in_batch") is not None,
        withheld=bool(microbatch.withheld),
        sampled=torch.stack(some).any() if some else None,
    )


def _compare(step: Step, passes: Sequence[_Pass]) -> None:
    """Add the losses of a step up, compared with what the model returned."""
    recorder, family = step.recorder, step.family.name if step.family is not None else ""
    tags = {tag for one in passes for tag in one.tensors}
    read, returned = any(one.read is not None for one in passes), MODEL in tags
    if not returned:
        recorder.absent(MODEL, NO_LOSS)
    elif not read and not any(one.partial for one in passes):
        recorder.absent(TOTAL, UNREAD)
    # Passes add up where the trainer has counted the tokens of all; so do ranks, unless each has counted its own.
    ranks = step.batches if step.tokens_across_ranks else 1
    count = 1 / ranks if any(one.counted for one in passes) else len(passes)
    note = WITHHELD if any(one.withheld for one in passes) else "" if returned else UNCHECKED
    for one in passes:
        for tag, value in one.tensors.items():
            recorder.metric(tag, Mean(value, 0))
        if read or one.partial:
            recorder.metric(TOTAL, one.checked(), note)
    for tag in tags:
        recorder.metric(tag, Mean(0, count))
    if read:
        recorder.metric(TOTAL, CheckedMean(0, count))

    def say(_host: Mapping[str, Tensor], emit: Emitter) -> None:
        total = emit.merged(TOTAL)
        fault = total.fault(family) if isinstance(total, CheckedMean) else ""
        if fault:
            emit.absent(TOTAL, fault)
        if fault not in ("", PARTIAL, PART_SAMPLED):
            recorder.say_once(f"fault:{TOTAL}", "%s is withheld: %s", TOTAL, fault)

    recorder.show({}, say)


def _say_divided(step: Step, divided: Sequence[Divided], passes: int) -> None:
    """Say which parts of the loss are not divided by their own tokens, in a step of which all passes were read."""
    recorder, names = step.recorder, list(dict.fromkeys(one.name for one in divided))
    shared = step.batches if step.tokens_across_ranks else 1
    for name in names:
        own = [one for one in divided if one.name == name]
        for one in own:
            recorder.metric(f"outputs/divided/{name}", _Compared(one.tokens, 0, 0))
        recorder.metric(f"outputs/divided/{name}", _Compared(0, own[-1].by / shared, passes - len(own)))

    def say(_host: Mapping[str, Tensor], emit: Emitter) -> None:
        for name in names:
            tokens, by, unread = (round(float(one)) for one in _merged(emit, f"outputs/divided/{name}"))
            if tokens != by and not unread:
                said = "the trainer divides the loss of %s by %d, where %d of its tokens are supervised in the step"
                recorder.say_once(
                    f"divided:{name}",
                    f"{said}: it is %.4g times its mean",
                    name,
                    by,
                    tokens,
                    tokens / by if by else math.inf,
                )

    if names:
        recorder.show({}, say)


def _say_overruled(step: Step, overruled: Sequence[Overruled]) -> None:
    recorder, said = step.recorder, {one.asked: one.done for one in overruled}
    for one in overruled:
        recorder.metric(f"outputs/overruled/{one.asked}", _Compared(one.asks, one.does, 0))

    def say(_host: Mapping[str, Tensor], emit: Emitter) -> None:
        for asked, done in said.items():
            asks, does = (round(float(one)) for one in _merged(emit, f"outputs/overruled/{asked}")[:2])
            if asks:
                recorder.say_once(f"overruled:{asked}", "%s, but %s", asked.format(asks), done.format(does))

    if said:
        recorder.show({}, say)


def _merged(emit: Emitter, tag: str) -> Sequence[Any]:
    found = emit.merged(tag)
    return (0, 0, 0) if found is None else found.components


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """The first samples of a stream.

    Attributes:
        names, group: its own.
        tokens: ``[samples, positions, sequences, 3]``: target, prediction, hit.
        each: 0-d, how many tokens each of them stands for; None where all are shown.
    """

    names: tuple[str, ...]
    group: str
    tokens: Tensor
    each: Tensor | None

    @classmethod
    def of(cls, stream: Stream, stats: TokenStats) -> list[_Shown]:
        """Nothing for a stream whose tokens are not laid out by samples."""
        shape = stream.targets.shape
        if len(shape) - (not isinstance(stream.name, str)) < 2:
            return []
        tokens = torch.stack([stream.predicted, stats.prediction, (stats.rank == 0).long()], dim=-1)
        if stream.rows is not None:  # positions without logits have no target
            everywhere = tokens.new_full((*shape, 3), IGNORE_INDEX)
            everywhere.flatten(0, 1).index_copy_(0, stream.rows, tokens)
            tokens = everywhere
        tokens = tokens.reshape(shape[0], -1, len(stream.names), 3)[:SHOWN_SAMPLES]
        return [cls(stream.names, stream.group, tokens, stream.each)]


def _show(step: Step, microbatch: Microbatch, shown: Sequence[_Shown]) -> None:
    tokenizer = step.tokenizer
    streams = [(str(at), one.names, one.group) for at, one in enumerate(shown)]
    samples = [microbatch.sample_id(row) for row in range(max(len(one.tokens) for one in shown))]

    def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
        rows = tuple(
            (sample, cells[0] + _of_some(host.get(f"each {at}")), *cells[1:])
            for row, sample in enumerate(samples)
            for at, names, group in streams
            if row < len(host[at])
            for k, name in enumerate(names)
            for cells in _prediction_rows(name, group, host[at][row, :, k], tokenizer)
        )
        emit.record(Table("outputs/predictions", COLUMNS, rows))

    tensors = {str(at): one.tokens for at, one in enumerate(shown)}
    tensors |= {f"each {at}": one.each for at, one in enumerate(shown) if one.each is not None}
    step.recorder.show(tensors, build)


def _of_some(each: Tensor | None) -> str:
    """What is said of a stream whose tokens were sampled; nothing of another."""
    return "" if each is None or each <= 1 else f" (1 of {float(each):.3g})"


def _prediction_rows(
    name: str, group: str, tokens: Tensor, tokenizer: Any
) -> Iterator[tuple[str, int, float, str, str]]:
    """Stream, supervised tokens, accuracy, target and prediction of what is supervised: text decoded, and its ids."""
    targets, predicted, hits = tokens[tokens[:, 0] != IGNORE_INDEX].t().tolist()
    if not targets:
        return
    accuracy = round(sum(hits) / len(hits), 4)
    if group == "text":
        texts = [decoded(tokenizer, ids) if hasattr(tokenizer, "decode") else str(ids) for ids in (targets, predicted)]
        yield name, len(targets), accuracy, *texts
        yield f"{name} tokens", len(targets), accuracy, _ends(targets), _ends(predicted)
    else:
        yield name.replace("_", " "), len(targets), accuracy, _ends(targets), _ends(predicted)


def _ends(tokens: Sequence[int]) -> str:
    """The first and last ten tokens."""
    if len(tokens) <= 2 * ENDS:
        return " ".join(map(str, tokens))
    return " ".join([*map(str, tokens[:ENDS]), "…", *map(str, tokens[-ENDS:])])

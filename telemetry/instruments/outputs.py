"""Outputs: what does the model predict, per modality and per codebook?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import IGNORE_INDEX, AudioView, Head, shift_labels
from telemetry.instruments.base import Instrument, Step
from telemetry.measures.token_stats import TokenStats, histogram_of_ids, masked_totals, token_statistics
from telemetry.probes.forward import Microbatch
from telemetry.records import Cell, Mean, Metric, Perplexity, SumOfMeans, Table, UsedFraction

SHOWN_SAMPLES = 4
ENDS = 10
NO_LOGITS = "the model computed no logits for it (a fused loss, or no such head)"
NOT_SHOWN = "a compiled model does not show its logits for it"
COLUMNS = ("sample", "stream", "supervised", "accuracy", "target", "predicted")


class OutputInstrument(Instrument):
    """Everything under ``outputs/``, reduced on the device as soon as a head has computed its logits.

    Scalars cover every microbatch of the step; the table shows its last one.
    """

    def __init__(self) -> None:
        self._last: Microbatch | None = None
        self._predictions: dict[str, tuple[Tensor, TokenStats]] = {}
        self._modalities: set[str] = set()
        self._labelled: set[str] = set()
        self._total: SumOfMeans | None = None

    def begin(self, step: Step) -> None:
        """Begin with nothing."""
        self._last = None
        self._predictions.clear()
        self._modalities.clear()
        self._labelled.clear()
        self._total = None

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Forget the microbatch before; measure which stream ends are supervised."""
        self._last = microbatch
        self._predictions.clear()
        if microbatch.view is None:
            return
        if microbatch.view.text_labels is not None:
            self._labelled.add("text")
        if microbatch.view.audio is not None:
            self._labelled.add("audio")
            step.recorder.metric("outputs/eos/supervised", _supervised_ends(microbatch.view.audio))

    def outputs(self, step: Step, microbatch: Microbatch, head: Head, logits: Tensor) -> None:
        """Measure one head's logits of one microbatch."""
        self._modalities.add(head.modality)
        view, labels, family = microbatch.view, _labels(microbatch, head), step.family
        if view is None or labels is None or family is None:
            return
        targets = shift_labels(labels)
        rows = family.rows(view, head, logits)
        if rows is None and targets.shape[:2] != logits.shape[:2]:
            step.recorder.absent(f"outputs/loss/{head.modality}", "the logits do not cover every position")
            return
        audio = view.audio if head.modality == "audio" else None
        targets, stats = _statistics(logits, targets, rows, None if audio is None else audio.eos_id)
        self._predictions[head.modality] = (targets, stats)
        vocabulary = logits.shape[-1] // head.codebooks
        for tag, value in self._metrics(step, head, targets, stats, audio, vocabulary):
            step.recorder.metric(f"outputs/{tag}", value)

    def finish(self, step: Step) -> None:
        """Show the last microbatch's predictions; say which modality was not seen."""
        missing = self._expected_modalities(step) - self._modalities
        for modality in missing:
            reason = NO_LOGITS if step.watch.usable else NOT_SHOWN
            step.recorder.absent(f"outputs/loss/{modality}", reason)
        self._emit_total(step, partial=bool(missing & self._labelled))
        microbatch, predictions = self._last, dict(self._predictions)
        self.begin(step)
        if microbatch is not None and predictions:
            self._show(step, microbatch, predictions)

    def _emit_total(self, step: Step, partial: bool) -> None:
        """The trained loss, unless a part of it was not seen: a sum of the rest would be mistaken for it."""
        if partial:
            step.recorder.absent("outputs/loss/total", "a part of it could not be measured")
        elif self._total is not None:
            step.recorder.metric("outputs/loss/total", self._total)

    def _expected_modalities(self, step: Step) -> set[str]:
        family = step.family
        return {head.modality for head in family.heads()} if family is not None else set()

    def _metrics(
        self, step: Step, head: Head, targets: Tensor, stats: TokenStats, audio: AudioView | None, vocabulary: int
    ) -> Iterator[tuple[str, Metric]]:
        mask = (targets >= 0) & (targets < vocabulary)  # a label outside is a data fault, counted in inputs/invalid_ids
        columns = {
            "loss": stats.nll,
            "accuracy": (stats.rank == 0).float(),
            "top5": (stats.rank < 5).float(),
            "entropy": stats.entropy,
        }
        for name, values in columns.items():
            total, count = masked_totals(_by_codebook(values, head), _by_codebook(mask, head))
            yield f"{name}/{head.modality}", Mean(total.sum(), count.sum())
            if name == "loss":
                term = self._term(step, head, total, count)
                self._total = term if self._total is None else self._total.merge(term)
            if head.modality == "audio" and name != "entropy":
                for k in range(head.codebooks):
                    yield f"{name}/codebook_{k}", Mean(total[k], count[k])
        if audio is not None:
            yield from _audio_metrics(targets, stats, audio, mask)

    def _term(self, step: Step, head: Head, total: Tensor, count: Tensor) -> SumOfMeans:
        """One head's terms of the trained loss, at their places among all heads' terms."""
        heads = step.family.heads() if step.family is not None else [head]
        before = sum(other.codebooks for other in _until(heads, head))
        behind = sum(other.codebooks for other in heads) - before - head.codebooks
        padded = [torch.nn.functional.pad(vector, (before, behind)) for vector in (total, count)]
        return SumOfMeans(*padded)

    def _show(self, step: Step, microbatch: Microbatch, predictions: Mapping[str, tuple[Tensor, TokenStats]]) -> None:
        tokenizer = step.tokenizer
        tensors: dict[str, Tensor] = {}
        samples: list[str] = []
        for modality, (targets, stats) in predictions.items():
            rows = min(SHOWN_SAMPLES, targets.shape[0])
            samples = [microbatch.sample_id(row) for row in range(rows)]
            shown = {"targets": targets, "predicted": stats.prediction, "hits": stats.rank == 0}
            tensors.update({f"{modality}/{name}": tensor[:rows] for name, tensor in shown.items()})

        def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
            rows = tuple(
                (sample, *cells)
                for row, sample in enumerate(samples)
                for cells in _prediction_rows(host, row, tokenizer)
            )
            emit.record(Table("outputs/predictions", COLUMNS, rows))

        step.recorder.show(tensors, build)


def _labels(microbatch: Microbatch, head: Head) -> Tensor | None:
    if microbatch.view is None:
        return None
    if head.modality == "text":
        return microbatch.view.text_labels
    return None if microbatch.view.audio is None else microbatch.view.audio.labels


def _statistics(
    logits: Tensor, targets: Tensor, rows: Tensor | None, probe_id: int | None
) -> tuple[Tensor, TokenStats]:
    """Targets and statistics of every position; where ``rows`` names those that have logits, of these alone."""
    if rows is None:
        return targets, token_statistics(logits.reshape(*targets.shape, -1), targets, probe_id=probe_id)
    own = targets.flatten(0, 1)[rows]
    logits = logits.reshape(*own.shape, -1)
    predicted = targets.new_full(targets.shape, IGNORE_INDEX)
    predicted.flatten(0, 1).index_copy_(0, rows, own)
    stats = token_statistics(logits, own, probe_id=probe_id)
    return predicted, stats.placed(rows, targets.shape, logits.shape[-1])


def _until(heads: Sequence[Head], head: Head) -> list[Head]:
    position = next(index for index, other in enumerate(heads) if other.modality == head.modality)
    return list(heads[:position])


def _by_codebook(values: Tensor, head: Head) -> Tensor:
    """``[batch, sequence]`` of text as ``[batch, sequence, 1]``; audio has its codebooks last already."""
    return values if head.modality == "audio" else values.unsqueeze(-1)


def _audio_metrics(targets: Tensor, stats: TokenStats, audio: AudioView, mask: Tensor) -> Iterator[tuple[str, Metric]]:
    ends = targets == audio.eos_id
    if stats.probe_probability is not None:
        total, count = masked_totals(stats.probe_probability, ends)
        yield "eos/probability", Mean(total.sum(), count.sum())
    counts = _without(histogram_of_ids(stats.prediction, mask, audio.vocabulary), {audio.bos_id, audio.eos_id})
    for k in range(audio.codebooks):
        yield f"codebook_{k}/used_fraction", UsedFraction(counts[k])
        yield f"codebook_{k}/perplexity", Perplexity(counts[k])


def _without(counts: Tensor, ids: set[int]) -> Tensor:
    """Counts ``[codebooks, vocabulary]`` without the columns of some ids: those of the codebook's own entries."""
    edges = [-1, *sorted(ids), counts.shape[1]]
    return torch.cat([counts[:, edge + 1 : following] for edge, following in itertools.pairwise(edges)], dim=1)


def _supervised_ends(audio: AudioView) -> Mean:
    """Of the first EOS of every codebook of every target clip, how many have a label."""
    is_end = (audio.codes == audio.eos_id) & audio.target.unsqueeze(-1)
    repeated = torch.zeros_like(is_end)
    repeated[:, 1:] = is_end[:, :-1] & ~audio.starts[:, 1:].unsqueeze(-1)
    ends = is_end & ~repeated
    return Mean((ends & (audio.labels == audio.eos_id)).sum(), ends.sum())


def _prediction_rows(host: Mapping[str, Tensor], row: int, tokenizer: Any) -> Iterator[tuple[Cell, ...]]:
    """Stream, supervised tokens, accuracy, target and prediction of one sample: text decoded, then every stream."""
    if "text/targets" in host:
        targets, predicted, accuracy = _supervised(host, "text", row)
        if targets:
            decode = getattr(tokenizer, "decode", str)
            yield "text", len(targets), accuracy, decode(targets), decode(predicted)
            yield "text tokens", len(targets), accuracy, _ends(targets), _ends(predicted)
    if "audio/targets" in host:
        for k in range(host["audio/targets"].shape[-1]):
            targets, predicted, accuracy = _supervised(host, "audio", row, k)
            if targets:
                yield f"codebook {k}", len(targets), accuracy, _ends(targets), _ends(predicted)


def _supervised(
    host: Mapping[str, Tensor], modality: str, row: int, codebook: int | None = None
) -> tuple[list[int], list[int], float]:
    targets, predicted, hits = (host[f"{modality}/{name}"][row] for name in ("targets", "predicted", "hits"))
    if codebook is not None:
        targets, predicted, hits = targets[:, codebook], predicted[:, codebook], hits[:, codebook]
    mask = targets != IGNORE_INDEX
    accuracy = hits[mask].double().mean().item() if bool(mask.any()) else 0.0
    return targets[mask].tolist(), predicted[mask].tolist(), round(accuracy, 4)


def _ends(tokens: Sequence[int]) -> str:
    """The first and last ten tokens."""
    if len(tokens) <= 2 * ENDS:
        return " ".join(map(str, tokens))
    return " ".join([*map(str, tokens[:ENDS]), "…", *map(str, tokens[-ENDS:])])

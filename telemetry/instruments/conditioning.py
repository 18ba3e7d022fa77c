"""Conditioning: how much of the audio loss does the reference voice take away, and how much do the words?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telemetry.delivery.recorder import MAX_FAILURES, Emitter
from telemetry.families.base import IGNORE_INDEX, NO_LABELS, AudioView, BatchView, Family, Stream
from telemetry.families.references import Swap, swap_references
from telemetry.instruments.base import LastMicrobatchInstrument, Step, training_precision
from telemetry.instruments.outputs import statistics_of
from telemetry.measures.token_stats import masked_totals
from telemetry.probes.forward import Microbatch, streams_of, watched_aside
from telemetry.probes.quiet import set_aside
from telemetry.records import Mean

TRAINING = "zero_shot/conditioning"
EVALUATION = "zero_shot/conditioning/eval"
_DONE = "done"

NOTHING_PREDICTED = "no label follows a reference that can be swapped, or the model's output holds no audio logits"
NO_SPEAKERS = "The batch does not name all speakers: another sample with another reference counts as another speaker."


@dataclass(frozen=True)
class _Comparison:
    """A batch under its own references, under swapped ones, and under none.

    Attributes:
        family, microbatch: how the runs' outputs are read.
        runs: name of the loss → keyword arguments for the model.
        counted: bool ``[batch, sequence, C]``: the targets that every run predicts from what it may see.
        swap: which samples could be swapped.
        note: what speakers were told apart by.
        words: whether the last run, of the batch with each other's text, is one.
    """

    family: Family
    microbatch: Microbatch
    runs: Mapping[str, Mapping[str, Any]]
    counted: Tensor
    swap: Swap
    note: str
    words: bool


class ConditioningInstrument(LastMicrobatchInstrument):
    """What swapping and hiding references does to the audio loss, on training and evaluation batches.

    Runs the model aside, without gradients, in eval mode, after the step's update: four forward passes over the last
    microbatch, the last of them with the text of another sample. Only samples whose reference can be swapped count, and
    in all losses. Where a forward pass needs every rank, ranks agree on it first.

    Args:
        every: measure every so many due steps, beginning with the first, and at every evaluation; 0 never.

    Raises:
        ValueError: when ``every`` is negative.
    """

    def __init__(self, every: int) -> None:
        if every < 0:
            raise ValueError(f"conditioning_every must not be negative, got {every}")
        self.every = every
        self._refusals = 0  # in a row

    def look(self, step: Step, microbatch: Microbatch | None) -> None:
        """Measure the last microbatch."""
        runs = step.family is not None and step.family.swaps_references
        with set_aside(step.model) if runs else contextlib.nullcontext():
            self._measure(step, TRAINING, lambda: microbatch)

    def evaluation(self, step: Step, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measure the first evaluation batch."""
        with set_aside(step.model):  # around the reading too, which takes random numbers
            section = f"{EVALUATION}/{step.evaluation_set}" if step.evaluation_set else EVALUATION
            self._measure(step, section, lambda: _first(step, batches))

    def _measure(self, step: Step, section: str, take: Callable[[], Microbatch | None]) -> None:
        """Go from forward pass to forward pass, each together with all ranks that it needs."""
        stages = _stages(step, section, take)
        agreed, stage = True, ""
        while agreed and stage != _DONE:
            stage = ""
            try:
                stage = next(stages, "")
            finally:  # a rank that fails in between says no, and nobody waits in a pass for it
                agreed = step.lockstep.agree(stage != "", section)
                self._refusals += not agreed
        if agreed:
            self._refusals = 0
        else:
            self._say_refused(step, section, able=stage != "")

    def _say_refused(self, step: Step, section: str, able: bool) -> None:
        if able:
            step.recorder.absent(f"{section}/gain", "ranks could not all run the model together")
        if step.lockstep.needed and self._refusals >= MAX_FAILURES:
            self.every = 0  # a rank that has failed every time is switched off by now, and would be waited for


def _stages(step: Step, section: str, take: Callable[[], Microbatch | None]) -> Iterator[str]:
    """Measures a batch; stops in front of every forward pass, and when all is done."""
    comparison = _compare(step, section, take())
    if comparison is None:
        return
    losses = {}
    for name, inputs in comparison.runs.items():
        yield name
        loss, predicted = _loss(step, comparison, inputs)
        losses[name] = masked_totals(loss, comparison.counted & predicted)
    _emit(step, section, losses, comparison)
    yield _DONE


def _first(step: Step, batches: Iterable[Mapping[str, Any]]) -> Microbatch | None:
    batch = next(iter(batches), None)
    if batch is None or step.family is None:
        return None
    inputs = {name: value for name, value in batch.items() if name != "metadata"}
    return Microbatch(inputs, step.family.view(inputs), batch.get("metadata") or ())


def _compare(step: Step, section: str, microbatch: Microbatch | None) -> _Comparison | None:
    """What is to be run; None where nothing can be measured, and the reason is said."""
    family = step.family
    if family is not None and family.swaps_references and microbatch is not None:
        with training_precision(step):
            known = microbatch.known
            inputs = family.coded(known)
        if inputs is not known:
            microbatch = Microbatch(inputs, family.view(inputs), microbatch.metadata)
    audio = microbatch.view.audio if microbatch is not None and microbatch.view is not None else None
    if family is None or not family.swaps_references or microbatch is None or audio is None:
        can = family is not None and family.swaps_references
        reason = "the batch has no audio" if can else "references of this kind of model cannot be changed"
        step.recorder.absent(f"{section}/gain", reason)
        return None
    if "input_ids" not in microbatch.inputs or not audio.labelled:
        embedded = "the model is given embeddings in the place of token ids"
        step.recorder.absent(f"{section}/gain", embedded if audio.labelled else NO_LABELS)
        return None
    speakers = _speakers(microbatch, audio.codes.shape[0])
    reason = _why_hopeless(speakers)
    if reason and not step.lockstep.needed:  # else other ranks need this one's forward passes
        step.recorder.absent(f"{section}/gain", reason)
        return None
    comparison = _comparison(family, microbatch, audio, speakers)
    if not comparison.words:
        step.recorder.absent(_text_tag(section), "the text is given as embeddings, or not by itself")
    return comparison


def _speakers(microbatch: Microbatch, batch: int) -> list[object]:
    known = [sample.get("speaker") for sample in microbatch.metadata[:batch]]
    return [*known, *[None] * (batch - len(known))]


def _why_hopeless(speakers: list[object]) -> str:
    """Why nothing can be swapped, as far as it shows without looking at the device."""
    if len(speakers) < 2:
        return "a batch of one sample has no other reference to swap in"
    return "all samples of the batch have one speaker" if None not in speakers and len(set(speakers)) == 1 else ""


def _comparison(family: Family, microbatch: Microbatch, audio: AudioView, speakers: list[object]) -> _Comparison:
    swap, inputs = swap_references(audio, speakers), microbatch.known
    predicted = (audio.labels >= 0) & (audio.labels < audio.vocabulary)
    # Hidden from all others, a position still carries its own code on: what it predicts is not without the reference.
    before = torch.ones_like(audio.reference)
    before[:, 1:] = audio.reference[:, :-1]
    predicted = predicted if audio.held is None else predicted & audio.held
    counted = predicted & swap.swapped[:, None, None] & ~before.unsqueeze(-1)
    runs: dict[str, Mapping[str, Any]] = {
        "own": family.swap_reference(inputs, None),
        "swapped": family.swap_reference(inputs, swap.codes),
        "none": family.hide_reference(inputs, audio.reference),
    }
    words = _with_other_words(runs["own"], microbatch.view)
    runs["words"] = runs["own"] if words is None else words  # as many runs on every rank
    note = NO_SPEAKERS if None in speakers else ""
    return _Comparison(family, microbatch, runs, counted, swap, note, words is not None)


def _text_tag(section: str) -> str:
    return "zero_shot" + section.removeprefix(TRAINING) + "/text_gain"


def _with_other_words(own: Mapping[str, Any], view: BatchView | None) -> Mapping[str, Any] | None:
    """A batch whose samples have the next one's text, repeated or cut to the length of their own.

    Of text that is supervised, where there is any: that of the target. None where token ids are not the text's.
    """
    ids = own.get("input_ids")
    if view is None or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    text, length = view.text[:, : ids.shape[1]], ids.shape[1]
    if view.text_labels is not None:
        taught = text & (view.text_labels[:, :length] != IGNORE_INDEX)
        text = torch.where(taught.any(), taught, text)
    rank, count = text.long().cumsum(dim=1) - 1, text.sum(dim=1)
    streams = ids.new_zeros(ids.shape[0], length + 1).scatter_(1, torch.where(text, rank, length), ids)
    partner = torch.arange(1, ids.shape[0] + 1, device=ids.device) % ids.shape[0]
    others = streams[partner].gather(1, rank.clamp(min=0) % count[partner].clamp(min=1)[:, None])
    return {**own, "input_ids": torch.where(text & (count[partner] > 0)[:, None], others, ids)}


def _loss(step: Step, comparison: _Comparison, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """float32 ``[batch, sequence, C]``, nats, of every code where it stands, and bool ``[C]``: which are predicted."""
    losses = torch.zeros_like(comparison.counted, dtype=torch.float32)
    predicted = [False] * losses.shape[-1]
    microbatch = comparison.microbatch
    first = microbatch.view.decoded_from if microbatch.view is not None else 0
    with watched_aside(comparison.family, microbatch.view) as seen:
        outputs = step.model(**inputs)
        streams = streams_of(comparison.family, {**microbatch.known, **inputs}, outputs, seen)
        for stream, stats in statistics_of(streams):
            if stream.group == "audio":
                columns = [int(name.removeprefix("codebook_")) for name in stream.names]
                _place(losses[:, first:], columns, stream, stats.nll)
                predicted = [known or k in columns for k, known in enumerate(predicted)]
    return losses, torch.tensor(predicted, device=losses.device)


def _place(losses: Tensor, columns: Sequence[int], stream: Stream, nll: Tensor) -> None:
    """Write a stream's losses to where the codes stand that it predicts."""
    if stream.rows is not None:
        everywhere = nll.new_zeros(stream.targets.shape)
        everywhere.flatten(0, 1).index_copy_(0, stream.rows, nll)
        nll = everywhere
    nll = nll.reshape(*losses.shape[:2], len(columns))
    if stream.alignment != "aligned":  # predicted one position earlier
        nll = torch.cat([torch.zeros_like(nll[:, :1]), nll[:, :-1]], dim=1)
    first = columns[0]
    losses[..., first : first + len(columns)] = nll.to(losses.device)


def _metrics(losses: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Mean]]:
    """Tag and value of what becomes of the loss; ``losses``: sums and counts ``[codebooks]`` under each reference."""
    (own, count), (swapped, _), (none, _) = (losses[name] for name in ("own", "swapped", "none"))
    tokens, gain = count.sum(), swapped - own
    yield "gain", Mean(gain.sum(), tokens)
    yield "gain_without", Mean((none - own).sum(), tokens)
    for k in range(len(gain)):
        yield f"codebook_{k}/gain", Mean(gain[k], count[k])
    for name, loss in (("own", own), ("swapped", swapped), ("none", none)):
        yield f"loss_{name}", Mean(loss.sum(), tokens)


def _emit(step: Step, section: str, losses: Mapping[str, tuple[Tensor, Tensor]], comparison: _Comparison) -> None:
    """Values, or why there are none: only the host sees whether a sample could be swapped."""
    names, note, swap, words = tuple(losses), comparison.note, comparison.swap, comparison.words

    def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
        if not int(host["samples/present"]):
            emit.absent(f"{section}/gain", "no sample of the batch has reference audio")
        elif not int(host["samples/swapped"]):
            emit.absent(f"{section}/gain", "no sample of the batch has another speaker's reference to swap in")
        elif not float(host["own"][1].sum()):
            emit.absent(f"{section}/gain", NOTHING_PREDICTED)
        else:
            for tag, value in _metrics({name: (host[name][0], host[name][1]) for name in names}):
                emit.metric(f"{section}/{tag}", value, note)
            if words:
                (own, count), (other, _) = host["own"], host["words"]
                emit.metric(_text_tag(section), Mean((other - own).sum(), count.sum()))

    samples = {"samples/present": swap.present.sum(), "samples/swapped": swap.swapped.sum()}
    step.recorder.defer({name: torch.stack(totals) for name, totals in losses.items()} | samples, build)

"""Set-up: what the loss really asks for, read from its gradient on the first due step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter, Recorder
from telemetry.families.base import BOOK, BatchView, Stream, each_logits
from telemetry.instruments.base import Instrument, Step
from telemetry.measures.asked_labels import Asked, Top, asked_labels, codebook_matches, offset_matches, top_two
from telemetry.probes.forward import Microbatch, Reading
from telemetry.records import Mean, Means, Scalar, Sum

OFFSETS = 4
UNSEEN = "the loss is not computed from logits that the model returns (fused or compiled)"


class HiddenSum(Sum):
    """A total that is an ingredient of what is shown on rank 0."""

    shown = False


class HiddenMean(Mean):
    """A mean that is an ingredient of what is shown on rank 0."""

    shown = False


class FirstStep(Instrument):
    """An instrument that looks at the first due step of every training, and at no other."""

    def __init__(self) -> None:
        self._seen: weakref.ref[Recorder] | None = None
        self.looks = False

    def begin(self, step: Step) -> None:
        """Find out whether this is the first."""
        self.looks = self._seen is None or self._seen() is not step.recorder
        self._seen = weakref.ref(step.recorder)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen no training."""
        return vars(self) | {"_seen": None, "looks": False}


@dataclass(frozen=True)
class _Rows:
    """The rows of logits of one stream, and what they are to predict: everything ``[batch, sequence, C]``.

    Attributes:
        names: of its sequences.
        place: brings rows ``[...]`` to their positions; those without one are filled.
        predicted: the declared labels, at the position that predicts them.
        tokens: what the model was given; None where labels are another sequence.
        real: bool ``[batch, sequence]``, where there is a token.
        reference: bool ``[batch, sequence]``: audio that is given and not declared to be learnt.
    """

    names: tuple[str, ...]
    place: Callable[[Tensor, Any], Tensor]
    predicted: Tensor
    tokens: Tensor | None
    real: Tensor
    reference: Tensor | None


class AskedLabels(FirstStep):
    """Reads dL/dlogits of every microbatch of the first due step, stream by stream, as soon as backward has it.

    For each stream: which label the loss asks for at which offset and of whose codebook, with what weight, and over
    which positions. It sees what a trainer's own loss does. Nothing of ``[batch, sequence, vocabulary]`` is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._offered: set[str] = set()
        self._heard: set[str] = set()
        self._unweighed: set[str] = set()

    def begin(self, step: Step) -> None:
        """Begin with nothing."""
        super().begin(step)
        self._offered, self._heard, self._unweighed = set(), set(), set()

    def outputs(self, step: Step, microbatch: Microbatch, reading: Reading) -> None:
        """Wait for the gradient of every stream's logits."""
        if not self.looks:
            return
        streams = [whole for whole, _ in each_logits(reading.streams)]
        tops = {_key(stream): top_two(stream.logits) for stream in streams}
        offered = reading.on_gradients(partial(step.watch.call, self, self._hear, step, microbatch.view, tops))
        self._offered |= {name for stream in streams for name in stream.names} if offered else set()
        counted = microbatch.known.get("num_items_in_batch") is not None
        # What a loss is divided by otherwise, the family says: a mean over several sequences, say.
        self._unweighed |= {
            name for one in streams if one.denominator is not None and not counted for name in one.names
        }
        for one in streams if counted else ():
            for name, share in _due(one):
                step.recorder.metric(f"setup/weight_due/{name}", HiddenSum(share))

    def _hear(
        self, step: Step, view: BatchView | None, tops: Mapping[str, Top], streams: Callable[[], Iterable[Stream]]
    ) -> None:
        """Reduce the gradient of some streams' logits."""
        for stream, _ in each_logits(streams()):
            top = tops.get(_key(stream))
            if top is None or top.ids.shape[:-1] != stream.logits.shape[:-1]:
                continue
            asked = asked_labels(stream.logits, top)
            self._heard.update(stream.names)
            for tag, value in _measured(stream, asked, view):
                step.recorder.metric(tag, value)

    def finish(self, step: Step) -> None:
        """Show what was asked for, once a step."""
        if not self.looks:
            return
        if not self._heard:
            step.recorder.absent("setup/asked", UNSEEN)
            return
        for name in self._offered - self._heard:  # no gradient has come to its logits, while some came to others'
            step.recorder.metric(f"setup/weight_sum/{name}", HiddenSum(0.0))
        step.recorder.metric("setup/ranks", HiddenSum(1.0))
        weighed = sorted(self._offered - self._unweighed)
        each = not step.tokens_across_ranks  # whether every rank's loss is divided by what that rank has counted
        fp16 = step.autocast == torch.float16  # a loss scaler multiplies every gradient
        step.recorder.show({}, partial(_show, sorted(self._offered), [] if fp16 else weighed, each))


def _key(stream: Stream) -> str:
    return "/".join(stream.names)


def _measured(stream: Stream, asked: Asked, view: BatchView | None) -> Iterable[tuple[str, Any]]:
    """Hidden tags and values of one gradient."""
    block = len(stream.names)
    weights = asked.weights.reshape(-1, block).double().sum(0) / stream.weight
    for k, name in enumerate(stream.names):
        yield f"setup/weight_sum/{name}", HiddenSum(weights[k])
    declared = stream.predicted.reshape(-1, block)
    clear, supervised = asked.clear.reshape(-1, block), asked.supervised.reshape(-1, block)
    labels = asked.labels.reshape(-1, block)
    known = declared >= 0
    yield (
        f"setup/declared/{stream.group}",
        HiddenMean((clear & known & (labels == declared)).sum(), (clear & known).sum()),
    )
    yield f"setup/undeclared/{stream.group}", HiddenMean((supervised & ~known).sum(), supervised.sum())
    rows = _rows(stream, view)
    if rows is None or rows.tokens is None:
        return
    placed = Asked(
        rows.place(asked.labels, -1), rows.place(asked.weights, 0), rows.place(asked.supervised, False),
        rows.place(asked.clear, False),
    )  # fmt: skip
    if stream.alignment == "given_shifted":  # what follows the last position the model is not given
        here = torch.arange(placed.clear.shape[1], device=placed.clear.device) < placed.clear.shape[1] - 1
        placed = replace(placed, clear=placed.clear & here[None, :, None])
    for k in range(block):
        own = Asked(*(part[..., k] for part in (placed.labels, placed.weights, placed.supervised, placed.clear)))
        counts = offset_matches(own, rows.tokens[..., k], rows.real, OFFSETS)
        yield f"setup/offsets/{stream.names[k]}", Means(counts, own.clear.sum())
    if block > 1:
        yield f"setup/codebooks/{_key(stream)}", Means(codebook_matches(placed, rows.tokens, rows.real, 1), 1)
    following = placed.supervised[:, :-1]
    padding = following & ~rows.real[:, 1:, None]
    yield f"setup/on_padding/{stream.group}", HiddenMean(padding.sum(), following.sum())
    if rows.reference is not None:
        on_reference = following & rows.reference[:, 1:, None]
        yield f"setup/on_reference/{stream.group}", HiddenMean(on_reference.sum(), following.sum())


def _rows(stream: Stream, view: BatchView | None) -> _Rows | None:
    """Where the rows of a stream stand along the sequence that the model was given; None where that is not known."""
    if view is None or stream.alignment == "aligned":
        return None
    block = isinstance(stream.name, tuple)
    shape = tuple(stream.labels.shape if block else (*stream.labels.shape, 1))
    if len(shape) != 3:
        return None
    tokens = view.input_ids[..., None] if stream.group == "text" else _codes(stream, view)
    decoded = slice(view.decoded_from, None)
    if tokens is None or tuple((tokens := tokens[:, decoded]).shape) != shape:
        return None
    index = stream.rows

    def place(values: Tensor, fill: Any) -> Tensor:
        values = values if block else values[..., None]
        if index is None:
            return values
        room = values.new_full((shape[0] * shape[1], shape[2]), fill)
        return room.index_copy(0, index, values.reshape(-1, shape[2])).view(shape)

    audio = view.audio
    is_audio = audio.reference | audio.target if audio is not None else None
    real = view.real if stream.group == "text" or is_audio is None else is_audio
    reference = audio.reference if stream.group == "audio" and audio is not None else None
    reference = None if reference is None else reference[:, decoded]
    return _Rows(stream.names, place, stream.predicted, tokens, real[:, decoded], reference)


def _codes(stream: Stream, view: BatchView) -> Tensor | None:
    """The codes of a stream's codebooks, ``[batch, sequence, C]``.

    None where its names do not say which they are, and where audio is given without codes.
    """
    books = [int(name[len(BOOK) :]) for name in stream.names if name.startswith(BOOK) and name[len(BOOK) :].isdigit()]
    if (
        view.audio is None
        or view.audio.embedded is not None
        or len(books) < len(stream.names)
        or max(books) >= view.audio.codebooks
    ):
        return None
    return view.audio.codes[..., books[0] : books[-1] + 1] if books == list(range(books[0], books[-1] + 1)) else None


def _due(stream: Stream) -> Iterable[tuple[str, Tensor]]:
    """Name, and the share of what the trainer has counted that a sequence has supervised in this pass."""
    if stream.denominator is None:
        return
    counts = (stream.predicted >= 0).reshape(-1, len(stream.names)).sum(0)
    shares = counts / torch.as_tensor(stream.denominator, device=counts.device).clamp(min=1)
    yield from zip(stream.names, shares.expand(len(stream.names)), strict=True)


def _show(names: list[str], weighed: list[str], each: bool, host: Mapping[str, Tensor], emit: Emitter) -> None:
    """Scalars of what all ranks have seen."""
    ranks = _result(emit, "setup/ranks") or 1.0
    for name in weighed:
        total = _result(emit, f"setup/weight_sum/{name}")
        due = _result(emit, f"setup/weight_due/{name}")
        due = 1.0 if due is None else due / ranks if each else due
        if total is not None and due > 0:
            emit.record(Scalar(f"setup/loss_weight/{name}", total / ranks / due))
    shown: dict[str, list[tuple[float, int, float]]] = {}
    for name in names:
        shares = _results(emit, f"setup/offsets/{name}")
        if shares is not None and shares.max() > 0:
            group = "text" if name == "text" else "audio"
            best = int(shares.argmax())
            shown.setdefault(group, []).append((float(shares[1]), best, float(shares[best])))
    for group, found in shown.items():
        worst = min(found)
        emit.record(Scalar(f"setup/asked/{group}/next", worst[0]))
        emit.record(Scalar(f"setup/asked/{group}/offset", float(worst[1])))
        emit.record(Scalar(f"setup/asked/{group}/at_offset", worst[2]))
    for group in ("text", "audio"):
        for what, tag in (("declared", "declared"), ("undeclared", "undeclared"), ("padding", "on_padding"),
                          ("reference", "on_reference")):  # fmt: skip
            value = _result(emit, f"setup/{tag}/{group}")
            if value is not None:
                emit.record(Scalar(f"setup/asked/{group}/{what}", value))
    for tag in [tag for tag in emit.metrics if tag.startswith("setup/codebooks/")]:
        counts = _results(emit, tag)
        if counts is not None and counts.sum() > 0:
            told = counts.max(1) > 0
            own = (counts.argmax(1) == range(len(counts))) & told
            emit.record(Scalar("setup/asked/audio/own_codebook", float(own.sum() / max(1, told.sum()))))


def _result(emit: Emitter, tag: str) -> float | None:
    metric = emit.merged(tag)
    return None if metric is None else metric.result()


def _results(emit: Emitter, tag: str) -> Any:
    metric = emit.merged(tag)
    return metric.results() if isinstance(metric, Means) else None

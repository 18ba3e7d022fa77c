"""Every way in which a family may misread a speech model is noticed: the loss that it adds up is not the model's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.speech_models import (
    CODEBOOKS,
    DELAY,
    IGNORED,
    csm,
    csm_codes,
    csm_waveforms,
    dia,
    dia_batch,
    moshi,
    moshi_batch,
    taught,
    train,
)
from torch import Tensor

from telemetry import OutputLoggerCallback
from telemetry.backends.memory import MemoryBackend
from telemetry.families import CsmFamily, DiaFamily, Family, MoshiFamily, Stream, base, reads
from telemetry.families.base import shift_labels
from telemetry.records import Table

Change = Callable[[Stream], Stream]

MODELS: dict[str, tuple[Callable[[], Any], type[Family], Callable[[], Mapping[str, Tensor]]]] = {
    "csm, waveforms": (
        csm,
        CsmFamily,
        lambda: csm_waveforms([(3, 4, taught(4, 2))], [(5, 2, [IGNORED] * 3), (2, 5, taught(5))]),
    ),
    "csm, codes": (csm, CsmFamily, lambda: csm_codes((2, 3), (0, 5))),
    "dia": (dia, DiaFamily, lambda: dia_batch((4, 2, 3), (6, 0, 4))),
    "moshi": (moshi, MoshiFamily, lambda: moshi_batch(5, 3)),
}


def later(stream: Stream) -> Stream:
    """Labels shifted once more than they are."""
    return replace(stream, labels=shift_labels(stream.labels))


def padded(stream: Stream) -> Stream:
    """Padding and prompts counted, as the code 1."""
    labels = stream.labels.masked_fill(stream.labels == IGNORED, 1)
    return replace(stream, labels=labels, denominator=labels.numel())


def own_mean(stream: Stream) -> Stream:
    """Of each codebook a mean of its own."""
    return replace(stream, denominator=None)


def swapped(stream: Stream) -> Stream:
    """The last two codebooks taken for each other."""
    *first, one, other = range(stream.labels.shape[-1])
    return replace(stream, labels=stream.labels[..., [*first, other, one]])


def other_view(stream: Stream) -> Stream:
    """Rows of samples and codebooks (or positions) taken the other way round."""
    logits = stream.logits
    return replace(stream, logits=logits.transpose(0, 1).contiguous().view(logits.shape))


def undelayed(stream: Stream) -> Stream:
    """Labels moved back by the delay, though the logits predict delayed ones."""
    moved = [_rolled(stream.labels[..., k], delay) for k, delay in enumerate(DELAY)]
    return replace(stream, labels=torch.stack(moved, dim=-1))


def not_delayed(stream: Stream) -> Stream:
    """All codebooks but the first a position too early."""
    first, others = stream.labels[..., :1], stream.labels[..., 1:]
    return replace(stream, labels=torch.cat([first, shift_labels(others)], dim=-1))


def other_rows(stream: Stream) -> Stream:
    """Rows of supervised frames taken from the end."""
    assert stream.rows is not None
    return replace(stream, rows=stream.rows.flip(0))


def frame_major(stream: Stream) -> Stream:
    """Codebooks read where frames lie."""
    logits = stream.logits
    return replace(stream, logits=logits.reshape(logits.shape[1], logits.shape[0], -1).transpose(0, 1))


def unflattened(stream: Stream) -> Stream:
    """``[batch · codebooks, frames]`` taken for ``[codebooks, batch, frames]``."""
    batch, frames, codebooks, _ = stream.logits.shape
    as_given = stream.logits.transpose(1, 2).reshape(batch * codebooks, frames, -1)
    return replace(stream, logits=as_given.unflatten(0, (codebooks, batch)).permute(1, 2, 0, 3))


def _rolled(labels: Tensor, by: int) -> Tensor:
    for _ in range(by):
        labels = shift_labels(labels)
    return labels


# Model, group of streams by the number of their names, and what is done to them.
MISREADINGS: list[tuple[str, int, Change]] = [
    *((kind, 1, change) for kind in ("csm, waveforms", "csm, codes") for change in (later, padded, own_mean)),
    *(
        (kind, CODEBOOKS - 1, change)
        for kind in ("csm, waveforms", "csm, codes")
        for change in (later, swapped, own_mean, other_rows, frame_major)
    ),
    *(("dia", len(DELAY), change) for change in (later, padded, own_mean, swapped, unflattened, undelayed)),
    ("moshi", 1, later),
    *(("moshi", CODEBOOKS, one) for one in (later, padded, own_mean, swapped, other_view, not_delayed)),
]


@pytest.mark.parametrize(("kind", "names", "change"), MISREADINGS)
def test_a_misreading_withholds_the_total(
    kind: str, names: int, change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, family, batch = MODELS[kind]

    class Misread(family):  # type: ignore[misc, valid-type]
        def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Any) -> Iterator[Any]:
            for one in super().streams(inputs, outputs, seen):
                mine = isinstance(one, Stream) and len(one.names) == names
                yield change(one) if mine else one

    model, backend = make(), MemoryBackend()
    monkeypatch.setattr(base, "_READERS", dict(base._READERS))
    reads(type(model).__name__)(Misread)
    train(model, [batch()], tmp_path, [OutputLoggerCallback(1, [backend])], steps=1, accumulation=1)
    assert list(backend.scalars("outputs/loss/model")) == [1]
    assert backend.scalars("outputs/loss/total") == {}
    said = {str(tag): str(why) for tag, why in backend.last("telemetry/absent", Table).rows}
    found = re.match(
        r"family Misread reads a loss of ([\d.]+) where the model returned ([\d.]+): ", said["outputs/loss/total"]
    )
    assert found is not None, said
    assert float(found[2]) == pytest.approx(backend.scalars("outputs/loss/model")[1], rel=1e-5)
    assert list(backend.scalars("outputs/accuracy/audio")) == [1]

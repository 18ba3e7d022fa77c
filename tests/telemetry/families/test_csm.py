"""Csm on the real Trainer: every stream, against codes and logits that are gone through one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.speech_models import (
    AUDIO,
    AUDIO_END,
    CODEBOOKS,
    IGNORED,
    SAMPLES,
    Batch,
    Tokens,
    csm,
    csm_codes,
    csm_waveforms,
    of_step,
    shown,
    taught,
    train,
)
from support.steps import Snapshots

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend

STEPS, ACCUMULATION = 4, 2
NO_CONTEXT = [IGNORED] * 3


def waveforms(left: bool) -> list[Batch]:
    """Text and audio of unequal lengths: some frames are not for the depth decoder, one clip has no label."""
    return [
        csm_waveforms([(3, 4, taught(4)), (2, 3, taught(3, 2))], [(5, 2, NO_CONTEXT), (2, 5, taught(5))], left=left),
        csm_waveforms([(2, 1, taught(1))], [(6, 6, taught(6, 3))], left=left),
        csm_waveforms([(4, 3, taught(3))], left=left),
    ]


def codes(left: bool) -> list[Batch]:
    return [
        csm_codes((2, 3), (4, 1), left=left),
        csm_codes((0, 5), (3, 2), left=left, seed=3),
        csm_codes((1, 2), left=left, seed=5),
    ]


KINDS = {
    "waveforms, right": lambda: waveforms(False),
    "waveforms, left": lambda: waveforms(True),
    "codes, right": lambda: codes(False),
    "codes, left": lambda: codes(True),
}


def labels_of(model: Any, batch: Batch) -> list[list[list[int]]]:
    """What the model learns at every position and codebook: by row, waveforms encoded clip by clip."""
    if batch["labels"].dim() == 3:
        return batch["labels"].tolist()
    found = []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        given, cuts = (
            batch["labels"][row].tolist(),
            [cut for cut in batch["input_values_cutoffs"][row].tolist() if cut >= 0],
        )
        frames: list[list[int]] = []
        for begin, end in zip([0, *cuts], cuts, strict=False):
            with torch.no_grad():
                made = model.codec_model.encode(batch["input_values"][row : row + 1, :, begin:end]).audio_codes
            assert made.shape[-1] == (end - begin) // SAMPLES
            frames += made[0].t().tolist()
        labels = []
        for token, label in zip(ids, given, strict=True):
            code = frames.pop(0) if token == AUDIO else [0] * CODEBOOKS if token == AUDIO_END else [label] * CODEBOOKS
            labels.append([code[0], *[IGNORED] * (CODEBOOKS - 1)] if label == -101 else code)
        assert not frames
        found.append(labels)
    return found


def tokens_of(model: Any, batch: Batch) -> Tokens:
    """Everything that is predicted of a microbatch."""
    with torch.no_grad():
        outputs = model(**batch)
    backbone, depth = outputs.logits.double(), iter(outputs.depth_decoder_logits.double())
    found = Tokens()
    for row, labels in enumerate(labels_of(model, batch)):
        for at, frame in enumerate(labels):
            is_end = frame == [0] * CODEBOOKS
            if at > 0 and frame[0] != IGNORED:
                found.add(0, backbone[row, at - 1].tolist(), frame[0], is_end)
            if any(code != IGNORED for code in frame[1:]):
                for k, logits in enumerate(next(depth), start=1):
                    found.add(k, logits.tolist(), frame[k], is_end)
    assert next(depth, None) is None
    return found


def expected(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """What is shown of a step of several microbatches."""
    tokens = Tokens()
    for batch in batches:
        tokens.extend(tokens_of(model, batch))
    counted = sum(int((batch["labels"][..., 1:] != IGNORED).sum()) for batch in batches)  # as the Trainer counts
    return tokens.values(end=0) | {"outputs/loss/total": math.fsum(tokens.losses()) / counted}


@pytest.mark.parametrize("kind", KINDS)
def test_every_stream_is_right_and_training_is_left_alone(
    kind: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    batches, model, untouched = KINDS[kind](), csm(), csm()
    backend, snapshots = MemoryBackend(), Snapshots()
    train(model, batches, tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])])
    total = backend.scalars("outputs/loss/total")
    assert list(total) == [1, 2, 3, 4]
    assert total == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    for step in range(1, STEPS + 1):
        values = expected(snapshots.models[step].eval(), of_step(batches, step, ACCUMULATION))
        assert shown(backend, step, values) == pytest.approx(values, rel=1e-5), step
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []

    train(untouched, batches, tmp_path)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []

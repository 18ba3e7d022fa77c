"""The ledger of hard samples, against losses that are gone through token by token."""

from __future__ import annotations

import copy
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import codec_tokens
from support.speaking import Waveform
from support.speech_models import IGNORED, Batch, csm, csm_codes
from support.steps import Steps
from torch import Tensor

from telemetry import OutputLoggerCallback, SoundPolicy
from telemetry.backends.memory import MemoryBackend
from telemetry.instruments.hardest import KEPT, Ledger, Sample
from telemetry.records import Audio, Table


def surprise(row: Tensor, label: int) -> float:
    return float(-row.double().log_softmax(-1)[label])


def losses_of_text(model: Any, batch: Batch) -> list[float]:
    logits, found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, []
    for row, labels in enumerate(batch["labels"].tolist()):
        own = [surprise(logits[row, at - 1], one) for at, one in enumerate(labels) if at and one != IGNORED]
        found.append(sum(own) / len(own))
    return found


def losses_of_csm(model: Any, batch: Batch) -> list[float]:
    outputs, found, frame = model(**batch), [], 0
    for row, labels in enumerate(batch["labels"].tolist()):
        own = []
        for at, codes in enumerate(labels):
            if codes[0] == IGNORED:
                continue
            if at:
                own.append(surprise(outputs.logits[row, at - 1], codes[0]))
            own += [surprise(outputs.depth_decoder_logits[frame, k], code) for k, code in enumerate(codes[1:])]
            frame += 1
        found.append(sum(own) / len(own))
    return found


KINDS: dict[str, tuple[Any, Any, list[Batch]]] = {
    "codec tokens": (
        codec_tokens.llama,
        losses_of_text,
        [codec_tokens.batch((3, 1, 2, 3), (4, 0, 1, 5)), codec_tokens.batch((2, 2, 1, 4), seed=3)],
    ),
    "csm": (csm, losses_of_csm, [csm_codes((2, 3), (0, 5)), csm_codes((1, 4), seed=9)]),
}
NAMES = [["a", "b"], ["c"]]


def metadata(names: Sequence[str]) -> list[dict[str, Any]]:
    sound = [Waveform(np.full(40, 0.5, np.float32))]
    known = {"speaker": "ann", "target_transcript": "A ship\nsails.", "target": sound}
    return [{"sample_id": name, **known} for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_each_sample(kind: str, tmp_path: Path) -> None:
    make, reference, batches = KINDS[kind]
    model, backend = make().eval(), MemoryBackend()
    with torch.no_grad():
        expected = {name: loss for names, batch in zip(NAMES, batches, strict=True)
                    for name, loss in zip(names, reference(model, batch), strict=True)}  # fmt: skip
    family = codec_tokens.declared() if kind == "codec tokens" else None
    callback = OutputLoggerCallback(1, [backend], family=family)
    given = [{**batch, "metadata": metadata(names)} for names, batch in zip(NAMES, batches, strict=True)]
    with Steps(model, [callback], tmp_path, loss=lambda model, batch: model(**batch).loss) as run:
        run.step(given)
        run.step(given[:1])  # the same weights: nothing steps
    mean = sum(expected.values()) / 3
    of_two = (expected["a"] + expected["b"]) / 2
    above = {name: loss - mean for name, loss in expected.items()}
    above |= {name: (above[name] + expected[name] - of_two) / 2 for name in "ab"}
    rows = list(csv.DictReader((tmp_path / "hardest.csv").open(encoding="utf-8")))
    assert [row["sample"] for row in rows] == sorted(above, key=lambda name: -above[name])
    for row in rows:
        assert float(row["loss"]) == pytest.approx(expected[row["sample"]], rel=1e-5)
        assert float(row["above its step's mean"]) == pytest.approx(above[row["sample"]], abs=1e-5)
        assert (row["times seen"], row["last step"]) == (("1", "1") if row["sample"] == "c" else ("2", "2"))
        assert (row["speaker"], row["transcript"]) == ("ann", "A ship\nsails.")
    table = backend.records["inputs/hardest"][0][1]
    assert isinstance(table, Table)
    assert {row[0] for row in table.rows} == set("abc")
    for row in table.rows:
        assert isinstance(row[-1], Audio)
        assert row[-1].clips[0].samples.tolist() == [0.5] * 40


def test_sound_that_is_off_and_samples_without_names(tmp_path: Path) -> None:
    model, backend = codec_tokens.llama(), MemoryBackend()
    batch = codec_tokens.batch((3, 1, 2, 3), (4, 0, 1, 5))
    callback = OutputLoggerCallback(1, [backend], sound=SoundPolicy(enabled=False))
    own = {"loss": lambda model, batch: model(**batch).loss}
    with Steps(model, [callback], tmp_path / "off", **own) as run:
        run.step([{**batch, "metadata": metadata("ab")}])
    assert [row[-1] for row in backend.last("inputs/hardest", Table).rows] == [None, None]
    assert "inputs/hardest/0" not in backend.tags()
    nameless = MemoryBackend()
    with Steps(model, [OutputLoggerCallback(1, [nameless])], tmp_path / "nameless", **own) as run:
        run.step([batch])
    assert "inputs/hardest" not in nameless.tags()
    assert not (tmp_path / "nameless" / "hardest.csv").exists()
    absent = {str(row[0]): row[1] for row in nameless.last("telemetry/absent", Table).rows}
    assert "sample_id" in str(absent["inputs/hardest"])


def test_the_ledger_is_bounded_and_says_only_what_is_new(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    many = [Sample(f"s{at}", "", "", float(at)) for at in range(KEPT + 500)]
    gone = [Waveform(np.zeros(4, np.float32)) for _ in many]
    sounds: Mapping[str, Any] = {one.name: sound for one, sound in zip(many, gone, strict=True)}
    records = ledger.add(1, many, sounds)
    assert isinstance(records[-1], Table)
    assert [row[0] for row in records[-1].rows] == [f"s{at}" for at in range(KEPT + 499, KEPT + 489, -1)]
    assert len(ledger._sounds) == 10
    assert len((tmp_path / "hardest.csv").read_text().splitlines()) == KEPT + 1
    assert ledger.add(2, [Sample("easy", "", "", 1.0)], {}) == []
    assert [type(one) for one in ledger.add(3, [Sample("new", "", "", 1e6), *many[:9]], {})] == [Audio] * 5 + [Table]
    again = Ledger(tmp_path, resumed=True)
    assert again._lines.keys() == ledger._lines.keys()
    for name, line in ledger._lines.items():
        assert again._lines[name].hardness == pytest.approx(line.hardness)
        assert (again._lines[name].seen, again._lines[name].step) == (line.seen, line.step)


def test_a_callback_that_is_copied_knows_of_no_run(tmp_path: Path) -> None:
    model, batch = codec_tokens.llama(), codec_tokens.batch((3, 1, 2, 3))
    callback = OutputLoggerCallback(1, [MemoryBackend()])
    with Steps(model, [callback], tmp_path, loss=lambda model, batch: model(**batch).loss) as run:
        run.step([{**batch, "metadata": metadata("a")}])
        again = copy.deepcopy(callback)
    assert all(one._samples._run is None for one in again.instruments if hasattr(one, "_samples"))

"""``inputs/`` of real Higgs steps against references in Python loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import Sample, Voices
from support.references import assert_same, scalars_at, tensor_values, token_values
from support.steps import hand_over, measure
from torch import Tensor

from telemetry.callbacks.questions import InputLoggerCallback
from telemetry.instruments.inputs import SHOWN_SAMPLES
from telemetry.records import Audio, Table


def microbatches(voices: Voices) -> list[list[Sample]]:
    """Three of unequal size and length, padded on both sides; one sample without a reference, one without a target."""
    return [
        voices.pad([voices.conversation(seed=1), voices.conversation(reference=9, target=2, seed=2)]),
        voices.pad([voices.conversation(reference=None, seed=3), voices.conversation(target=None, seed=4)], left=True),
        voices.pad([voices.conversation(reference=1, target=1, seed=5)]),
    ]


def test_token_shares_and_supervision_of_an_accumulated_step(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    rows = microbatches(voices)
    backend = measure(InputLoggerCallback, higgs, tmp_path, [voices.batch(samples, 2) for samples in rows])
    measured = {
        tag: value for tag, value in scalars_at(backend, 1, "inputs").items() if not tag.startswith("inputs/tensor/")
    }
    expected = token_values([sample for samples in rows for sample in samples], codebooks=3)
    assert_same(measured, expected | {"inputs/invalid_ids": 0.0}, rel=1e-12)
    shares = [value for tag, value in measured.items() if tag.startswith("inputs/tokens/") and tag.endswith("fraction")]
    assert sum(shares) == pytest.approx(1)


def test_statistics_of_every_tensor_of_an_accumulated_step(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    batches = [voices.batch(samples, 1) for samples in microbatches(voices)]
    backend = measure(InputLoggerCallback, higgs, tmp_path, batches)
    measured = {
        tag: value for tag, value in scalars_at(backend, 1, "inputs").items() if tag.startswith("inputs/tensor/")
    }
    expected: dict[str, float] = {}
    for name in batches[0]:
        expected |= tensor_values(name, [batch[name] for batch in batches])
    assert_same(measured, expected, rel=1e-9)  # and nothing of what the trainer hands to the model beside the batch


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ({}, 0),
        ({"input_ids": [(0, 0, -1), (1, 2, 10**6)]}, 2),
        ({"labels": [(0, 3, -1), (1, 5, 10**6)]}, 2),
        ({"audio_input_ids": [(0, 1, 12), (1, 0, -3), (1, 2, 11)]}, 2 * 3),  # 11, the end of stream, is an id
        ({"audio_labels": [(0, 1, 12), (1, 2, -7)]}, 2 * 3),
        ({"input_ids": [(0, 0, 10**6)], "labels": [(0, 0, -5)], "audio_labels": [(1, 1, 99)]}, 1 + 1 + 3),
    ],
)
def test_invalid_ids_are_counted_wherever_they_are_planted(
    higgs: Any, voices: Voices, tmp_path: Path, planted: dict[str, list[tuple[int, int, int]]], expected: int
) -> None:
    """Handed over rather than run: a model on the CPU stops at such ids."""
    inputs = voices.batch(voices.pad([voices.conversation(), voices.conversation(seed=7)]))
    for name, places in planted.items():
        for row, at, value in places:
            inputs[name][row, at] = value
    backend = handed_over(higgs, tmp_path, inputs)
    assert backend["inputs/invalid_ids"] == expected


def test_frames_that_no_mask_lets_through_hold_no_invalid_id(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    inputs = voices.batch([voices.conversation()], frame_padding=2)
    inputs["audio_input_ids"][0, -1] = 10**6
    assert handed_over(higgs, tmp_path, inputs)["inputs/invalid_ids"] == 0


def test_tensors_without_finite_values_have_no_extremes(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    inputs = voices.batch([voices.conversation()])
    values = handed_over(higgs, tmp_path, inputs | {"extra": torch.tensor([math.nan, math.inf, -math.inf])})
    found = {tag: value for tag, value in values.items() if tag.startswith("inputs/tensor/extra/")}
    assert found == {"inputs/tensor/extra/nonfinite": 3.0, "inputs/tensor/extra/zero_fraction": 0.0}


def handed_over(model: Any, directory: Path, inputs: dict[str, Tensor]) -> dict[str, float]:
    return scalars_at(hand_over(InputLoggerCallback, model, directory, inputs), 1, "inputs")


def test_the_sequence_table_shows_every_span_in_order(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    samples = voices.pad([voices.conversation(reference=4, target=5), voices.conversation(reference=None, target=2)])
    backend = measure(
        InputLoggerCallback, higgs, tmp_path, [voices.batch(samples)], voices.tokenizer, [named(["one", "two"])]
    )
    table = backend.last("inputs/sequence", Table)
    assert table.columns == ("sample", "span", "tokens", "supervised", "text")
    spans: dict[Any, list[tuple[Any, ...]]] = {"one": [], "two": []}
    for sample, *span in table.rows:
        spans[sample].append(tuple(span))

    assert [(name, supervised) for name, _, supervised, _ in spans["one"]] == [
        ("text", "no"),
        ("system", "no"),
        ("user", "no"),
        ("reference audio", "no"),
        ("user", "no"),
        ("assistant", "no"),
        ("assistant", "yes"),
        ("assistant", "no"),
        ("target audio", "yes"),
        ("assistant", "no"),
    ]
    assert [name for name, *_ in spans["two"]][-1] == "padding"
    for name, sample in zip(("one", "two"), samples, strict=True):
        assert sum(count for _, count, _, _ in spans[name]) == len(sample)
        check_spans(spans[name], sample)
    texts = [text for *_, text in spans["one"]]
    assert texts[:3] == [
        "<|begin_of_text|>",
        "<|start_header_id|>system<|end_header_id|>\n\nYou clone voices.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nThe ship sails.<|audio_out_bos|>",
    ]
    assert texts[3] == "<|AUDIO_OUT|>×6 <|reserved_special_token_6|><|reserved_special_token_6|>"
    assert texts[6] == "A green ship."
    assert texts[8] == "<|AUDIO_OUT|>×7 <|reserved_special_token_6|><|reserved_special_token_6|>"


def check_spans(spans: list[tuple[Any, ...]], sample: Sample) -> None:
    """Each span covers positions of its own kind, supervised as it says."""
    at = 0
    for name, count, supervised, _ in spans:
        covered = sample[at : at + count]
        at += count
        kind = {"reference audio": "reference", "target audio": "target", "padding": "padding"}.get(name, "text")
        assert {position.kind for position in covered} == {kind}
        taught = [
            position.label != -100 or any(label != -100 for label in position.code_labels or ()) for position in covered
        ]
        assert supervised == ("yes" if any(taught) else "no")


def test_the_sequence_table_shows_the_first_samples_only(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    samples = voices.pad([voices.conversation(seed=seed) for seed in range(SHOWN_SAMPLES + 2)])
    table = measure(InputLoggerCallback, higgs, tmp_path, [voices.batch(samples)], voices.tokenizer).last(
        "inputs/sequence", Table
    )
    assert list(dict.fromkeys(row[0] for row in table.rows)) == [f"row {row}" for row in range(SHOWN_SAMPLES)]


def test_without_a_tokenizer_the_sequence_table_shows_ids(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    sample = voices.conversation()
    table = measure(InputLoggerCallback, higgs, tmp_path, [voices.batch([sample])]).last("inputs/sequence", Table)
    shown = " ".join(str(row[4]) for row in table.rows)
    assert shown == " ".join(str(position.token) for position in sample)


def test_the_tensor_table_shows_the_last_microbatch(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    batches = [voices.batch(samples) for samples in microbatches(voices)]
    table = measure(InputLoggerCallback, higgs, tmp_path, batches).last("inputs/tensors", Table)
    rows = {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
    for name, tensor in batches[-1].items():
        expected = tensor_values(name, [tensor])
        row = rows[name]
        assert row["shape"] == str(tuple(tensor.shape))
        assert row["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert row["device"] == "cpu"
        for column, tag in (
            ("min", "min"),
            ("max", "max"),
            ("mean", "mean"),
            ("std", "std"),
            ("zero fraction", "zero_fraction"),
        ):
            assert row[column] == pytest.approx(expected[f"inputs/tensor/{name}/{tag}"], rel=1e-9, abs=1e-9), column
        assert row["non-finite"] == 0
        assert str(row["first values"]).split() == [str(value) for value in tensor.flatten().tolist()[:8]]


@dataclass(frozen=True)
class Sound:
    """A waveform as a batch's metadata carries it."""

    samples: np.ndarray
    sampling_rate: int
    seconds: float


def sound(seed: int) -> Sound:
    samples = np.random.default_rng(seed).uniform(-1, 1, 160).astype(np.float32)
    return Sound(samples, 16_000, 0.01)


def named(names: list[str]) -> list[dict[str, Any]]:
    return [
        {"sample_id": name, "speaker": "ann", "language": "en", "reference": [sound(1)], "target": [sound(2)]}
        for name in names
    ]


def test_the_sound_of_the_last_microbatch_is_there_to_listen_to(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    samples = [voices.conversation()]
    batches = [voices.batch(samples), voices.batch(samples)]
    metadata = [named(["first"]), [named(["second"])[0] | {"target": [sound(5)]}]]
    backend = measure(InputLoggerCallback, higgs, tmp_path, batches, voices.tokenizer, metadata)
    for tag, seed in (("inputs/reference", 1), ("inputs/target", 5)):
        assert len(backend.records[tag]) == 1
        (clip,) = backend.last(tag, Audio).clips
        np.testing.assert_array_equal(clip.samples, sound(seed).samples)
        assert clip.sampling_rate == 16_000
        assert clip.caption == "second, ann, en"


def test_without_metadata_sound_is_absent_and_said_once(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = measure(InputLoggerCallback, higgs, tmp_path, [voices.batch([voices.conversation()])] * 2)
    assert not {"inputs/reference", "inputs/target"} & set(backend.tags())
    said = [record.getMessage() for record in telemetry_log.records]
    assert said.count("no inputs/reference: the batch carries no reference waveform") == 1


def test_labels_of_text_at_padding_do_not_count_as_supervised_text(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    samples = voices.pad([voices.conversation(), voices.conversation(reference=None, target=1)])
    marked = [
        [replace(position, label=3) if position.kind == "padding" else position for position in row] for row in samples
    ]
    backend = measure(InputLoggerCallback, higgs, tmp_path, [voices.batch(marked)])
    expected = token_values(samples, codebooks=3)["inputs/supervised/text_fraction"]
    assert backend.scalars("inputs/supervised/text_fraction") == {1: pytest.approx(expected)}

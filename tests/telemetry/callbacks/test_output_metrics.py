"""``outputs/`` of real Higgs steps against references in Python loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import IGNORED, Sample, Voices
from support.references import Outputs, assert_same, scalars_at, supervised_ends
from support.steps import Steps, hand_over, measure
from torch import Tensor

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import OutputLoggerCallback
from telemetry.instruments.outputs import ONLY_ENDS
from telemetry.records import Scalar, Table


def microbatches(voices: Voices) -> list[list[Sample]]:
    """Three with unequal token counts of both modalities, one padded on the left."""
    return [
        voices.pad([voices.conversation(seed=1), voices.conversation(reference=6, target=2, seed=2)]),
        voices.pad(
            [
                voices.conversation(reference=None, target=9, seed=3, words="slow brown ship"),
                voices.conversation(target=None),
            ],
            left=True,
        ),
        voices.pad([voices.conversation(reference=1, target=1, seed=5)]),
    ]


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Text and audio logits from a forward pass of the test's own, ``[batch, sequence, ...]``."""
    names = ("input_ids", "attention_mask", "audio_input_ids", "audio_input_ids_mask")
    hidden = model.model(**{name: inputs[name] for name in names}).last_hidden_state
    audio = model.audio_lm_head(hidden)
    text = model.text_lm_head(hidden)
    return text, audio.reshape(*audio.shape[:2], model.config.num_codebooks, model.config.codebook_size)


def expected_values(model: Any, voices: Voices, rows: list[list[Sample]]) -> dict[str, float]:
    outputs = Outputs()
    config = voices.config
    for samples in rows:
        text, audio = logits_of(model, voices.batch(samples))
        outputs.add_text([[position.label for position in sample] for sample in samples], text)
        outputs.add_audio(samples, audio, config.audio_stream_eos_id)
    special = (config.audio_stream_bos_id, config.audio_stream_eos_id)
    values = outputs.values(special, config.codebook_size)
    ends = supervised_ends([sample for samples in rows for sample in samples], config.audio_stream_eos_id)
    return values | {"outputs/eos/supervised": ends}


def test_every_scalar_of_an_accumulated_step(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    rows = microbatches(voices)
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch(samples) for samples in rows])
    measured = scalars_at(backend, 1, "outputs")
    assert_same(measured, expected_values(higgs, voices, rows))
    assert {"outputs/loss/codebook_2", "outputs/top5/audio", "outputs/eos/probability"} <= set(measured)
    assert measured["outputs/eos/supervised"] == 1


def test_the_same_samples_give_the_same_in_one_microbatch_and_in_many(
    higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    samples = voices.pad([sample for row in microbatches(voices) for sample in row if sample[0].kind != "padding"])
    together = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch(samples)])
    apart = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch([sample]) for sample in samples])
    assert_same(scalars_at(apart, 1, "outputs"), scalars_at(together, 1, "outputs"))


def test_the_parts_make_up_the_trained_loss(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    backend = MemoryBackend()
    with Steps(higgs, [OutputLoggerCallback(1, [backend])], tmp_path) as run:
        trained = run.step([voices.batch(samples) for samples in microbatches(voices)])
    values = scalars_at(backend, 1, "outputs")
    assert values["outputs/loss/total"] == pytest.approx(trained, rel=1e-5)
    parts = values["outputs/loss/text"] + sum(values[f"outputs/loss/codebook_{k}"] for k in range(3))
    assert parts == pytest.approx(trained, rel=1e-5)


def test_labels_at_placeholders_in_the_padding_are_part_of_both_losses(
    higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    """A wrong attention mask does not keep the model from training on what it masks."""
    inputs = voices.batch([voices.conversation()])
    inputs["attention_mask"][0, -6:] = 0  # reaches into the target clip
    backend = MemoryBackend()
    with Steps(higgs, [OutputLoggerCallback(1, [backend])], tmp_path) as run:
        trained = run.step([inputs])
    assert backend.scalars("outputs/loss/total") == {1: pytest.approx(trained, rel=1e-5)}


def test_every_step_is_measured_for_itself(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    backend = MemoryBackend()
    with Steps(higgs, [OutputLoggerCallback(1, [backend])], tmp_path) as run:
        for samples in microbatches(voices):
            run.step([voices.batch(samples)])
    for step, samples in enumerate(microbatches(voices), start=1):
        assert_same(scalars_at(backend, step, "outputs"), expected_values(higgs, voices, [samples]))


def test_masked_ends_are_seen(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    rows = [[voices.conversation(ends=False)]]
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch(samples) for samples in rows])
    measured = scalars_at(backend, 1, "outputs")
    assert measured["outputs/eos/supervised"] == 0
    assert "outputs/eos/probability" not in measured
    assert_same(measured, expected_values(higgs, voices, rows))


def test_some_masked_ends_are_counted(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """One of two clips without ends, and of the other one codebook's end."""
    end = voices.config.audio_stream_eos_id
    partly = [
        replace(position, code_labels=(*position.code_labels[:2], IGNORED))
        if position.code_labels and position.code_labels[2] == end
        else position
        for position in voices.conversation(seed=4)
    ]
    samples = voices.pad([voices.conversation(ends=False), partly])
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch(samples)])
    measured = scalars_at(backend, 1, "outputs")
    assert measured["outputs/eos/supervised"] == pytest.approx(2 / 6)
    assert_same(measured, expected_values(higgs, voices, [samples]))


@pytest.mark.parametrize(("cut", "expected"), [((True, True), 0), ((True, False), 0.5)])
def test_clips_that_lack_their_end_are_counted(
    higgs: Any, voices: Voices, tmp_path: Path, cut: tuple[bool, bool], expected: float
) -> None:
    """As a longest length in tokens cuts them: no codebook has its end of stream."""
    end = voices.config.audio_stream_eos_id
    whole = [voices.conversation(seed=4), voices.conversation(target=9, seed=5)]
    kept = [[p for p in s if p.kind != "target" or end not in (p.codes or ())] for s in whole]
    samples = voices.pad([short if is_cut else long for short, long, is_cut in zip(kept, whole, cut, strict=True)])
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch(samples)])
    assert backend.scalars("outputs/eos/supervised") == {1: expected}
    assert supervised_ends(samples, end) == expected


def test_an_end_counts_once_for_a_clip(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """A stream that begins again after its end is a fault of the data, and no second end."""
    end = voices.config.audio_stream_eos_id
    sample = voices.conversation(target=9)
    frames = [at for at, position in enumerate(sample) if position.kind == "target"]
    sample[frames[2]] = replace(sample[frames[2]], codes=(end, 1, 1), code_labels=(end, 1, 1))
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch([sample])])
    assert backend.scalars("outputs/eos/supervised") == {1: 1.0}


def test_without_supervised_audio_the_audio_values_are_absent(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    rows = [[voices.conversation(target=None)]]
    measured = scalars_at(measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch(rows[0])]), 1, "outputs")
    assert set(measured) == {f"outputs/{name}/text" for name in ("loss", "accuracy", "top5", "entropy")} | {
        "outputs/loss/total",
        "outputs/loss/model",
    }
    assert measured["outputs/loss/total"] == measured["outputs/loss/text"]


def test_without_text_labels_the_text_values_are_absent_and_said_once(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    inputs = voices.batch([voices.conversation()])
    del inputs["labels"]
    backend = MemoryBackend()
    callback = OutputLoggerCallback(1, [backend])
    with Steps(higgs, [callback], tmp_path) as run:
        higgs.loss_function.begin()
        for _ in range(2):  # the run's own loss needs text labels; the model's does not
            with run.taken():
                higgs(**inputs)
    measured = scalars_at(backend, 1, "outputs")
    assert not [tag for tag in measured if tag.endswith("/text")]
    assert measured["outputs/loss/total"] == pytest.approx(
        sum(measured[f"outputs/loss/codebook_{k}"] for k in range(3))
    )
    said = [record.getMessage() for record in telemetry_log.records if "outputs/loss/text" in record.getMessage()]
    assert said == ["no outputs/loss/text: the model computed no logits for it (a fused loss, or no such head)"]


def test_a_model_without_text_head_is_measured_on_audio(make_higgs: Any, voices: Voices, tmp_path: Path) -> None:
    model = make_higgs(use_text_head=False)
    backend = measure(OutputLoggerCallback, model, tmp_path, [voices.batch([voices.conversation()])])
    measured = scalars_at(backend, 1, "outputs")
    assert not [tag for tag in measured if tag.endswith("/text")]
    assert measured["outputs/loss/total"] == pytest.approx(
        sum(measured[f"outputs/loss/codebook_{k}"] for k in range(3))
    )


def test_collapsed_predictions_have_one_entry(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """A head that always says code 7 of codebook 1, and always end of stream in codebook 0."""
    codebook_size, end = voices.config.codebook_size, voices.config.audio_stream_eos_id
    always = torch.zeros(3 * codebook_size)
    always[end] = always[codebook_size + 7] = 1e4
    higgs.audio_lm_head.register_forward_hook(lambda _module, _args, logits: logits + always)
    rows = [[voices.conversation(target=9)]]
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch(rows[0])])
    measured = scalars_at(backend, 1, "outputs")
    assert measured["outputs/codebook_1/used_fraction"] == pytest.approx(1 / 10)
    assert measured["outputs/codebook_1/perplexity"] == pytest.approx(1)
    assert "outputs/codebook_0/used_fraction" not in measured  # no entry of the codebook was predicted
    assert measured["outputs/codebook_2/used_fraction"] > 1 / 10
    said = {row[0]: row[1] for row in backend.last("telemetry/absent", Table).rows}
    assert said["outputs/codebook_0/used_fraction"] == said["outputs/codebook_0/perplexity"] == ONLY_ENDS
    assert "outputs/codebook_1/perplexity" not in said


def test_a_codebook_that_mostly_predicts_the_end_says_so(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """Of codebook 0 the first of ten predictions is code 3, all others are the end of the stream."""
    size, end = voices.config.codebook_size, voices.config.audio_stream_eos_id
    sample = voices.conversation(target=9)
    first = next(at for at, position in enumerate(sample) if position.kind == "target")

    def collapse(_module: Any, _args: Any, logits: Tensor) -> Tensor:
        forced = torch.zeros_like(logits)
        forced[..., end] = 1e4
        forced[:, first, 3] = 2e4
        return logits + forced

    higgs.audio_lm_head.register_forward_hook(collapse)
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [voices.batch([sample])])
    assert 3 < size < first
    for kind, value in (("perplexity", 1.0), ("used_fraction", 1 / 10)):
        ((_, record),) = backend.records[f"outputs/codebook_0/{kind}"]
        assert isinstance(record, Scalar)
        assert record.value == pytest.approx(value)
        assert record.note == "90% of its predictions are no entries of the codebook, and left out."
    ((_, other),) = backend.records["outputs/codebook_1/perplexity"]
    assert isinstance(other, Scalar)
    assert other.note == ""


def test_special_ids_anywhere_in_the_codebook_are_no_entries(make_higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """A begin of stream at id 0: the entries are what lies around the special ids."""
    model = make_higgs()
    model.config.audio_stream_bos_id = 0
    samples = [voices.conversation(target=9)]
    backend = measure(OutputLoggerCallback, model, tmp_path, [voices.batch(samples)])
    outputs = Outputs()
    outputs.add_audio(samples, logits_of(model, voices.batch(samples))[1], end=11)
    expected = outputs.values(special=(0, 11), codebook_size=12)
    for k in range(3):
        for name in ("used_fraction", "perplexity"):
            tag = f"outputs/codebook_{k}/{name}"
            assert backend.scalars(tag) == {1: pytest.approx(expected[tag])}


def test_the_predictions_table(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    samples = voices.pad(
        [voices.conversation(target=30, seed=1), voices.conversation(target=None, words="long green ship")]
    )
    other = voices.batch([voices.conversation(seed=9)])
    inputs = voices.batch(samples)
    metadata = [[{"sample_id": "other"}], [{"sample_id": "a"}, {"sample_id": "b"}]]
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [other, inputs], voices.tokenizer, metadata)
    table = backend.last("outputs/predictions", Table)
    assert table.columns == ("sample", "stream", "supervised", "accuracy", "target", "predicted")
    found = {(row[0], row[1]): row[2:] for row in table.rows}

    text, audio = logits_of(higgs, inputs)
    expected: dict[tuple[str, str], tuple[Any, ...]] = {}
    for row, (name, sample) in enumerate(zip("ab", samples, strict=True)):
        pairs = [(p.label, int(text[row, at - 1].argmax())) for at, p in enumerate(sample) if p.label != IGNORED]
        targets, predicted = [target for target, _ in pairs], [guess for _, guess in pairs]
        accuracy = round(sum(target == guess for target, guess in pairs) / len(pairs), 4)
        expected[name, "text"] = (
            len(pairs),
            accuracy,
            voices.tokenizer.decode(targets),
            voices.tokenizer.decode(predicted),
        )
        expected[name, "text tokens"] = (len(pairs), accuracy, numbers(targets), numbers(predicted))
        for k in range(3):
            pairs = [
                (p.code_labels[k], int(audio[row, at - 1, k].argmax()))
                for at, p in enumerate(sample)
                if p.code_labels and p.code_labels[k] != IGNORED
            ]
            if pairs:
                accuracy = round(sum(target == guess for target, guess in pairs) / len(pairs), 4)
                targets, predicted = [target for target, _ in pairs], [guess for _, guess in pairs]
                expected[name, f"codebook {k}"] = (len(pairs), accuracy, numbers(targets), numbers(predicted))
    assert found == expected
    assert found["a", "codebook 0"][0] == 31  # 30 codes and the end of stream
    assert "…" in str(found["a", "codebook 0"][2])
    assert ("b", "codebook 0") not in found


def numbers(tokens: list[int]) -> str:
    """All tokens, or where there are more than twenty the first and last ten."""
    shown: list[Any] = list(tokens) if len(tokens) <= 20 else [*tokens[:10], "…", *tokens[-10:]]
    return " ".join(str(token) for token in shown)


def test_outputs_handed_over_are_measured(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """The model's output holds its audio logits alone: audio as if watched, text and the total absent."""
    samples = [voices.conversation()]
    inputs = voices.batch(samples)
    with torch.no_grad():
        outputs = higgs(**inputs)
    backend = hand_over(OutputLoggerCallback, higgs, tmp_path, inputs, outputs)
    expected = {
        tag: value
        for tag, value in expected_values(higgs, voices, [samples]).items()
        if not tag.endswith(("/text", "/total"))
    }
    assert_same(scalars_at(backend, 1, "outputs"), expected)


def test_logits_of_some_positions_only_are_said_to_be(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    inputs = voices.batch([voices.conversation()])
    with torch.no_grad():
        outputs = higgs(**{name: value for name, value in inputs.items() if "labels" not in name}, logits_to_keep=2)
    backend = hand_over(OutputLoggerCallback, higgs, tmp_path, inputs, outputs)
    assert [tag for tag in scalars_at(backend, 1, "outputs") if tag != "outputs/eos/supervised"] == []
    assert "no outputs/loss/audio: the logits do not cover every position" in telemetry_log.text

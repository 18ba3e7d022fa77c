"""``zero_shot/``: every kind of violation, planted one at a time, is found under its sample's name; no other is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_references import measured_records
from step_runs import StepRun, hand_over, measure
from torch import Tensor
from voice_batches import Sample, Voices

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.zero_shot import SHOWN_ROWS, ZeroShotVerificationLoggerCallback
from telemetry.records import Table


class Length:
    """A clip of which only the length matters."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def check(
    model: Any,
    directory: Path,
    voices: Voices,
    rows: list[list[Sample]],
    metadata: list[list[dict[str, Any]]] | None = None,
) -> MemoryBackend:
    batches = [voices.batch(voices.pad(samples)) for samples in rows]
    named = metadata or [
        [{"sample_id": f"{m}-{row}", "speaker": "ann"} for row in range(len(r))] for m, r in enumerate(rows)
    ]
    return measure(ZeroShotVerificationLoggerCallback, model, directory, batches, voices.tokenizer, named)


def violations(backend: MemoryBackend) -> dict[Any, list[str]]:
    """Sample → what is wrong with it."""
    table = backend.last("zero_shot/chatml", Table)
    assert table.columns == ("sample", "speaker", "compliant", "violations")
    found = {}
    for sample, _speaker, compliant, listed in table.rows:
        assert sample not in found
        found[sample] = str(listed).split("; ") if listed else []
        assert compliant == ("no" if listed else "yes")
    return found


def test_compliant_samples_have_no_violation(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    rows = [[voices.conversation(), voices.conversation(reference=1, target=1)], [voices.conversation(reference=9)]]
    backend = check(higgs, tmp_path, voices, rows)
    assert violations(backend) == {"0-0": [], "0-1": [], "1-0": []}
    assert backend.scalars("zero_shot/chatml/compliance") == {1: 1.0}
    assert backend.scalars("zero_shot/reference/present_fraction") == {1: 1.0}


def swapped_roles(v: Voices) -> Sample:
    return [
        *v.turn("assistant", v.text("The ship sails."), v.spoken(v.clip(3, 1))),
        *v.turn("user", v.text("A ship."), v.spoken(v.clip(3, 2, target=True))),
    ]


def unknown_role(v: Voices) -> Sample:
    user = v.turn("user", v.text("The ship sails."), v.spoken(v.clip(3, 1)))
    return [*v.turn("narrator", v.text("Once.")), *user, *v.turn("assistant", v.spoken(v.clip(3, 2, target=True)))]


def unclosed_turn(v: Voices) -> Sample:
    return v.conversation()[:-1]


def broken_header(v: Voices) -> Sample:
    """The system turn's header is never closed."""
    end = v.tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    sample = v.conversation()
    at = next(index for index, position in enumerate(sample) if position.token == end)
    return sample[:at] + sample[at + 1 :]


def no_reference(v: Voices) -> Sample:
    return v.conversation(reference=None)


def no_target(v: Voices) -> Sample:
    return v.conversation(target=None)


def no_transcript(v: Voices) -> Sample:
    return [
        *v.turn("user", v.spoken(v.clip(4, 1)), v.text("Please say this.")),
        *v.turn("assistant", v.text("A ship.", supervised=True), v.spoken(v.clip(5, 2, target=True))),
    ]


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (
            swapped_roles,
            [
                "role order: assistant → user, expected user and assistant in turn",
                "role order: ends with user, not assistant",
            ],
        ),
        (unknown_role, ["role order: unknown role 'narrator'"]),
        (unclosed_turn, ["unbalanced header: the assistant turn at token {assistant} has no <|eot_id|>"]),
        (broken_header, ["unbalanced header: no <|end_header_id|> behind token 1"]),
        (no_reference, ["reference: no reference audio"]),
        (no_target, ["target: no supervised audio"]),
        (no_transcript, ["transcript: no transcript before the reference audio at token {reference}"]),
    ],
)
def test_a_planted_violation_is_found_alone(
    higgs: Any, voices: Voices, tmp_path: Path, broken: Callable[[Voices], Sample], expected: list[str]
) -> None:
    sample = broken(voices)
    backend = check(higgs, tmp_path, voices, [[voices.conversation(), sample], [voices.conversation()]])
    header = voices.tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    places = {
        "assistant": max(index for index, position in enumerate(sample) if position.token == header),
        "reference": next((index for index, position in enumerate(sample) if position.kind == "reference"), 0),
    }
    assert violations(backend) == {"0-0": [], "0-1": [fault.format(**places) for fault in expected], "1-0": []}
    assert backend.scalars("zero_shot/chatml/compliance") == {1: pytest.approx(2 / 3)}


@pytest.mark.parametrize("left", [False, True])
def test_positions_are_counted_without_padding(higgs: Any, voices: Voices, tmp_path: Path, left: bool) -> None:
    """A short sample beside a long one: its faults are told at its own positions, and its transcript is its own."""
    samples = voices.pad([no_transcript(voices), voices.conversation(reference=20)], left)
    backend = measure(ZeroShotVerificationLoggerCallback, higgs, tmp_path, [voices.batch(samples)], voices.tokenizer)
    start = next(index for index, position in enumerate(no_transcript(voices)) if position.kind == "reference")
    assert violations(backend) == {
        "row 0": [f"transcript: no transcript before the reference audio at token {start}"],
        "row 1": [],
    }


@pytest.mark.parametrize("extra", [-2, 3])
def test_placeholders_that_do_not_match_the_codes(higgs: Any, voices: Voices, tmp_path: Path, extra: int) -> None:
    """Handed over rather than run: the model would stop at some of these."""
    sample = voices.conversation()
    inputs = voices.batch([sample], frame_padding=max(extra, 0))
    frames = sum(position.codes is not None for position in sample)
    inputs["audio_input_ids_mask"][:] = torch.arange(inputs["audio_input_ids_mask"].shape[1]) < frames + extra
    inputs["audio_labels"][:, frames:] = -100
    found = violations(handed_over(higgs, tmp_path, voices, inputs))
    assert found == {"one": [f"placeholders: {frames} audio placeholders for {frames + extra} code frames"]}


def handed_over(model: Any, directory: Path, voices: Voices, inputs: dict[str, Tensor]) -> MemoryBackend:
    return hand_over(
        ZeroShotVerificationLoggerCallback,
        model,
        directory,
        inputs | {"metadata": [{"sample_id": "one"}]},  # type: ignore[operator]
        processing_class=voices.tokenizer,
    )


def test_a_reference_that_the_assistant_speaks_has_its_transcript_in_the_turn_before(
    higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    target = voices.turn("assistant", voices.spoken(voices.clip(4, 2, target=True)))

    def sample(words: str) -> Sample:
        return [
            *voices.turn("user", voices.text(words)),
            *voices.turn("assistant", voices.spoken(voices.clip(4, 1))),
            *voices.turn("user", voices.text("A ship.")),
            *target,
        ]

    silent = sample("")
    start = next(index for index, position in enumerate(silent) if position.kind == "reference")
    assert violations(check(higgs, tmp_path, voices, [[sample("The ship sails."), silent]])) == {
        "0-0": [],
        "0-1": [f"transcript: no transcript before the reference audio at token {start}"],
    }


def test_every_violation_of_a_hopeless_sample_is_listed(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    found = violations(check(higgs, tmp_path, voices, [[voices.text("hello"), voices.conversation()]]))
    assert found["0-0"] == [
        "role order: no turn at all",
        "reference: no reference audio",
        "target: no supervised audio",
    ]


def test_violations_come_first_in_the_table_and_it_has_an_end(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    rows = [[voices.conversation(reference=1, target=1)] * 20 for _ in range(3)]
    rows[2][-1] = voices.conversation(reference=None, target=1)
    backend = check(higgs, tmp_path, voices, rows)
    table = backend.last("zero_shot/chatml", Table)
    assert len(table.rows) == SHOWN_ROWS
    assert table.rows[0][0] == "2-19"
    assert backend.scalars("zero_shot/chatml/compliance") == {1: pytest.approx(59 / 60)}


def test_presence_and_length_of_references(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """Means over samples of all microbatches, of unequal size; a sample without a reference has no length."""
    rows = [
        [voices.conversation(), voices.conversation(reference=None), voices.conversation()],
        [voices.conversation(reference=None)],
    ]
    metadata: list[list[dict[str, Any]]] = [
        [{"reference": [Length(1.5), Length(0.5)]}, {"reference": []}, {"reference": [Length(0.7)]}],
        [{"sample_id": "x"}],
    ]
    backend = check(higgs, tmp_path, voices, rows, metadata)
    assert backend.scalars("zero_shot/reference/present_fraction") == {1: 0.5}
    assert backend.scalars("zero_shot/reference/seconds") == {1: pytest.approx((2.0 + 0.7) / 2)}


def test_lengths_that_nobody_knows_are_absent(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    batches = [voices.batch([voices.conversation()])] * 2
    backend = measure(ZeroShotVerificationLoggerCallback, higgs, tmp_path, batches, voices.tokenizer)
    assert "zero_shot/reference/seconds" not in backend.tags()
    said = [record.getMessage() for record in telemetry_log.records]
    reason = "the batch does not say how long the reference audio is"
    assert said.count(f"no zero_shot/reference/seconds: {reason}") == 1


def test_without_a_chat_tokenizer_compliance_is_absent_and_presence_is_not(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = measure(ZeroShotVerificationLoggerCallback, higgs, tmp_path, [voices.batch([voices.conversation()])])
    assert list(measured_records(backend)) == ["zero_shot/reference/present_fraction"]
    assert "no zero_shot/chatml/compliance: the tokenizer has no ChatML header tokens" in telemetry_log.text


def test_a_step_shows_its_own_samples_only(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    backend = MemoryBackend()
    run = StepRun(higgs, [ZeroShotVerificationLoggerCallback(1, [backend])], tmp_path, voices.tokenizer)
    for name in ("first", "second"):
        run.step([voices.batch([voices.conversation()])], [[{"sample_id": name}]])
    run.end()
    shown = [[row[0] for row in record.rows] for _, record in backend.records["zero_shot/chatml"]]  # type: ignore[union-attr]
    assert shown == [["first"], ["second"]]

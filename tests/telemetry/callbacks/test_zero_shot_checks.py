"""``zero_shot/``: every kind of violation, planted one at a time, is found under its sample's name; no other is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import Sample, Voices
from support.references import measured_records
from support.steps import Steps, hand_over, measure
from torch import Tensor

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import ZeroShotVerificationLoggerCallback
from telemetry.families.voice_prompt import CHECKS
from telemetry.instruments import reference as reference_log
from telemetry.instruments.chatml import SHOWN_ROWS, Compliance
from telemetry.instruments.reference import SIGNAL
from telemetry.records import Table


class Recording:
    """A clip as a data set offers it; reading it is counted."""

    sampling_rate = 1000

    def __init__(self, seconds: float, wave: Any = None, file_rate: int | None = None) -> None:
        self.seconds = seconds
        self.reads = 0
        self._wave = wave
        if file_rate is not None:
            self.file_sampling_rate = file_rate

    @property
    def samples(self) -> np.ndarray:
        self.reads += 1
        if isinstance(self._wave, Exception):
            raise self._wave
        return np.full(int(self.seconds * self.sampling_rate), 0.5) if self._wave is None else self._wave


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


def no_delay(v: Voices) -> Sample:
    """The target's codebooks all begin at once."""
    sample = v.conversation()
    frames = [index for index, position in enumerate(sample) if position.kind == "target"]
    codes = torch.tensor([sample[index].codes for index in frames])
    for k in range(1, codes.shape[1]):
        codes[:, k] = codes[:, k].roll(-k)
    for index, row in zip(frames, codes.tolist(), strict=True):
        sample[index] = dataclasses.replace(sample[index], codes=tuple(row))
    return sample


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
        (unclosed_turn, ["end of turn: the assistant turn at token {assistant} has no <|eot_id|>"]),
        (broken_header, ["header: no <|end_header_id|> after token 1"]),
        (no_reference, ["reference: no reference audio"]),
        (no_target, ["target: no supervised audio"]),
        (
            no_delay,
            [
                "delay pattern: the audio at token {target} has a code for BOS in codebook 1 at frame 1, "
                "and 7 more like it"
            ],
        ),
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
        "target": next((index for index, position in enumerate(sample) if position.kind == "target"), 0),
    }
    assert violations(backend) == {"0-0": [], "0-1": [fault.format(**places) for fault in expected], "1-0": []}
    kinds = {fault.partition(":")[0].replace(" ", "_") for fault in expected}
    counts = {kind: backend.scalars(f"zero_shot/chatml/violations/{kind}") for kind in CHECKS}
    unchecked = ("target_text", "language")
    assert counts == {kind: {} if kind in unchecked else {1: float(kind in kinds)} for kind in CHECKS}
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
    assert found == {"one": [f"placeholders: {frames} audio placeholders, audio for {frames + extra}"]}


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
        [{"reference": [Recording(1.5), Recording(0.5)]}, {"reference": []}, {"reference": [Recording(0.7)]}],
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


def test_level_clipping_silence_and_rate_of_references(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """Means over the clips of both microbatches; the lowest rate of any file."""
    sine = np.sin(2 * np.pi * np.arange(1000) / 10)  # -3.01 dB, 1 of 5 samples near its peak
    square = np.where(np.arange(500) % 2, 1.0, -1.0)  # 0 dB, all of it at full scale
    quiet = np.concatenate([np.full(250, 0.1), np.zeros(750)])  # -26.02 dB, three quarters silent
    rows = [[voices.conversation()] * 2, [voices.conversation()]]
    metadata: list[list[dict[str, Any]]] = [
        [{"reference": [Recording(1.0, sine * 0.99, 44100), Recording(0.5, square)]}, {}],
        [{"reference": [Recording(1.0, quiet, 16000)]}],
    ]
    backend = check(higgs, tmp_path, voices, rows, metadata)
    levels = [-3.0103 + 20 * np.log10(0.99), 0.0, 10 * np.log10(0.01 / 4)]
    shown = {name: backend.scalars(f"zero_shot/reference/{name}")[1] for name in SIGNAL}
    silent = (0.0 + 0.0 + 37 / 50) / 3  # the frame that begins at 240 still holds sound
    expected = {"level_db": sum(levels) / 3, "clipping_fraction": 1 / 3, "silence_fraction": silent}
    assert shown == pytest.approx(expected, abs=1e-4)
    assert backend.scalars("zero_shot/reference/sampling_rate") == {1: 1000.0}


def test_digital_silence_has_a_finite_level(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    metadata = [[{"reference": [Recording(1.0, np.zeros(1000))]}]]
    backend = check(higgs, tmp_path, voices, [[voices.conversation()]], metadata)
    assert backend.scalars("zero_shot/reference/level_db") == {1: -120.0}
    assert backend.scalars("zero_shot/reference/silence_fraction") == {1: 1.0}


def test_a_file_that_cannot_be_read_hides_no_other(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    clips = [Recording(1.0, OSError("disk on fire")), Recording(1.0, np.zeros(0)), Recording(1.0)]
    rows = [[voices.conversation()] * 3]
    metadata = [[{"sample_id": f"s{index}", "reference": [clip]} for index, clip in enumerate(clips)]]
    backend = check(higgs, tmp_path, voices, rows, metadata)
    assert backend.scalars("zero_shot/reference/level_db") == {1: pytest.approx(20 * np.log10(0.5))}
    assert backend.scalars("zero_shot/reference/seconds") == {1: 1.0}
    said = [record.getMessage() for record in telemetry_log.records if "cannot be measured" in record.getMessage()]
    assert said == ["the reference audio of sample s0 cannot be measured, and is left out: disk on fire"]


def test_reading_files_has_an_end(higgs: Any, voices: Voices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many clips a step, whatever the number of microbatches; and the next step begins anew."""
    monkeypatch.setattr(reference_log, "READ_CLIPS", 3)
    clips = [Recording(1.0) for _ in range(5)]
    backend = MemoryBackend()
    with Steps(higgs, [ZeroShotVerificationLoggerCallback(1, [backend])], tmp_path, voices.tokenizer) as run:
        batch = voices.batch([voices.conversation()])
        read = [{**batch, "metadata": [{"reference": some}]} for some in (clips[:2], clips[2:])]
        for _ in range(2):
            run.step(read)
    assert [clip.reads for clip in clips] == [2, 2, 2, 0, 0]
    assert backend.scalars("zero_shot/reference/seconds") == {1: 2.5, 2: 2.5}
    (note,) = {record.note for _, record in backend.records["zero_shot/reference/level_db"]}  # type: ignore[union-attr]
    assert note == "Over the first 3 clips of a rank."


def test_slow_files_end_the_reading_too(
    higgs: Any, voices: Voices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_log, "READ_SECONDS", 0.0)
    clip = Recording(1.0)
    backend = check(higgs, tmp_path, voices, [[voices.conversation()]], [[{"reference": [clip]}]])
    assert clip.reads == 0
    assert "zero_shot/reference/level_db" not in backend.tags()


def test_a_language_tag_is_missing_where_other_samples_have_one(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    """An optional field: data without any is not at fault, and it is said that nothing was checked."""
    backend = MemoryBackend()
    with Steps(higgs, [ZeroShotVerificationLoggerCallback(1, [backend])], tmp_path, voices.tokenizer) as run:
        batch = voices.batch([voices.conversation()] * 2)
        for languages in ([None, None], ["en", None], [None, None]):
            run.step([{**batch, "metadata": [{"language": language} for language in languages]}])
    assert backend.scalars("zero_shot/chatml/violations/language") == {2: 1.0, 3: 2.0}
    assert backend.scalars("zero_shot/chatml/compliance") == {1: 1.0, 2: 0.5, 3: 0.0}
    assert "no zero_shot/chatml/violations/language: no sample's metadata names its language" in telemetry_log.text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_missing_language_counts_wherever_the_others_are(
    higgs: Any, voices: Voices, tmp_path: Path, order: tuple[int, ...]
) -> None:
    microbatches = [[voices.conversation(seed=1)], [voices.conversation(seed=2)]]
    metadata: list[list[dict[str, Any]]] = [[{"sample_id": "untagged"}], [{"sample_id": "tagged", "language": "en"}]]
    backend = check(higgs, tmp_path, voices, [microbatches[at] for at in order], [metadata[at] for at in order])
    assert backend.scalars("zero_shot/chatml/violations/language") == {1: 1.0}
    assert backend.scalars("zero_shot/chatml/compliance") == {1: 0.5}
    assert {(row[0], row[2], row[3]) for row in backend.last("zero_shot/chatml", Table).rows} == {
        ("untagged", "no", "language: no language tag"),
        ("tagged", "yes", ""),
    }


def test_a_missing_language_counts_whichever_rank_names_the_others() -> None:
    tagged, untagged = Compliance(1, 1, 1, 1), Compliance(0, 1, 1, 0)
    assert untagged.result() == 1.0
    assert tagged.merge(untagged).result() == untagged.merge(tagged).result() == 0.5


def test_a_target_that_does_not_say_its_transcript_is_found(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    metadata = [[{"target_transcript": "A  green ship."}, {"target_transcript": "A green sheep."}, {}]]
    backend = check(higgs, tmp_path, voices, [[voices.conversation()] * 3], metadata)
    assert backend.scalars("zero_shot/chatml/violations/target_text") == {1: 1.0}
    assert violations(backend)["row 1"] == ["target text: says 'A green ship.', the transcript 'A green sheep.'"]


def test_a_part_that_fails_leaves_the_others_alone(
    higgs: Any, voices: Voices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(reference_log.ReferenceInstrument, "inputs", fail)
    backend = check(higgs, tmp_path, voices, [[voices.conversation()]])
    assert backend.scalars("zero_shot/chatml/compliance") == {1: 1.0}
    assert "zero_shot/reference/present_fraction" not in backend.tags()


def test_a_model_without_audio_has_no_compliance(
    llama: Any, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    hand_over(ZeroShotVerificationLoggerCallback, llama, tmp_path, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    assert "no zero_shot/chatml/compliance: the batch has no audio" in telemetry_log.text
    assert "no zero_shot/reference/present_fraction: the batch has no audio" in telemetry_log.text


def test_without_a_chat_tokenizer_compliance_is_absent_and_presence_is_not(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = measure(ZeroShotVerificationLoggerCallback, higgs, tmp_path, [voices.batch([voices.conversation()])])
    shown = [tag for tag in measured_records(backend) if tag.startswith("zero_shot/")]
    assert shown == ["zero_shot/reference/present_fraction"]
    assert "no zero_shot/chatml/compliance: the tokenizer has no ChatML header tokens" in telemetry_log.text


def test_a_step_shows_its_own_samples_only(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    backend = MemoryBackend()
    with Steps(higgs, [ZeroShotVerificationLoggerCallback(1, [backend])], tmp_path, voices.tokenizer) as run:
        for name in ("first", "second"):
            run.step([{**voices.batch([voices.conversation()]), "metadata": [{"sample_id": name}]}])
    shown = [[row[0] for row in record.rows] for _, record in backend.records["zero_shot/chatml"]]  # type: ignore[union-attr]
    assert shown == [["first"], ["second"]]

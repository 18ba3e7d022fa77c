"""Which sounds may leave: nothing that a policy does not allow reaches a backend, whatever way it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import Voices
from support.steps import Steps

from telemetry import InputLoggerCallback, SoundPolicy, StrategicTelemetry, ZeroShotVerificationLoggerCallback
from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.delivery.recorder import Recorder
from telemetry.instruments.clip_records import spectrogram_image
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table

RATE = 10
OFF = SoundPolicy(enabled=False)


def clip(seconds: float, caption: str = "") -> Clip:
    return Clip(np.arange(round(seconds * RATE), dtype=np.float32), RATE, caption)


def lengths(audio: Audio) -> list[int]:
    return [len(clip.samples) for clip in audio.clips]


VOICE = Audio("inputs/reference", (clip(1.0, "ann"),))
MEL = Image("zero_shot/clip_3/spectrogram", np.zeros((2, 2), dtype=np.uint8), voice=True)
HEADS = Image("attention/heads", np.zeros((2, 2), dtype=np.uint8))
PLAIN: list[Record] = [Scalar("a", 1.0), Alert("b", "", "words"), Table("c", ("x",), ((1,), ("y",)))]


def test_what_is_allowed_stays_as_it_is() -> None:
    table = Table("zero_shot/clips", ("sample", "clip", "mel"), (("one", VOICE, MEL),))
    records = [*PLAIN, VOICE, MEL, HEADS, table]
    kept = SoundPolicy().allowed(records)
    assert kept[-1] == table
    assert all(new is old for new, old in zip(kept[:-1], records, strict=False))


def test_off_keeps_numbers_and_text_and_no_sound_nor_a_picture_of_one() -> None:
    table = Table("zero_shot/clips", ("sample", "clip", "mel", "heads"), (("one", VOICE, MEL, HEADS),))
    kept = OFF.allowed([*PLAIN, VOICE, MEL, HEADS, table])
    assert kept[:4] == [*PLAIN, HEADS]
    (left,) = kept[4:]
    assert isinstance(left, Table)
    assert left.rows == (("one", "sound is off", "sound is off", HEADS),)


def test_a_spectrogram_is_a_voice_under_any_tag() -> None:
    picture = spectrogram_image("own/picture", {"generated": clip(1.0)})
    assert OFF.allowed([picture, HEADS]) == [HEADS]
    assert SoundPolicy().allowed([picture]) == [picture]


def test_only_so_many_clips_of_a_tag() -> None:
    policy = SoundPolicy(max_clips=3)
    first, second = Audio("a", (clip(1), clip(2))), Audio("a", (clip(3), clip(4)))
    other, third = Audio("b", (clip(5),) * 4), Audio("a", (clip(6),))
    kept = policy.allowed([first, second, other, third])
    assert [(record.tag, lengths(record)) for record in kept if isinstance(record, Audio)] == [
        ("a", [10, 20]),
        ("a", [30]),
        ("b", [50] * 3),
    ]
    (table,) = policy.allowed([Table("t", ("x", "y"), ((first, second), (third, 1)))])
    assert isinstance(table, Table)
    cells = [cell for row in table.rows for cell in row]
    assert [lengths(cell) if isinstance(cell, Audio) else cell for cell in cells] == [[10, 20], [30], "sound is off", 1]
    # Every step has its own count.
    assert policy.allowed([first]) == policy.allowed([first])


def test_a_long_clip_is_cut_and_says_so() -> None:
    policy = SoundPolicy(max_seconds=2.5)
    (kept,) = policy.allowed([Audio("a", (clip(2.5, "ann"), clip(4, "ann"), clip(3)))])
    assert isinstance(kept, Audio)
    assert lengths(kept) == [25, 25, 25]
    assert [clip.caption for clip in kept.clips] == ["ann", "ann, first 2.5 s of 4.0 s", "first 2.5 s of 3.0 s"]
    assert kept.clips[1].samples.base is None  # the rest of the recording is let go of
    assert kept.clips[1].samples.tolist() == list(range(25))
    assert policy.allowed([kept]) == [kept]
    stereo = Audio("a", (Clip(np.zeros((40, 2)), RATE),))
    assert policy.allowed([stereo])[0].clips[0].samples.shape == (25, 2)  # type: ignore[union-attr]


def test_an_empty_clip_keeps_its_place() -> None:
    empty = Audio("a", (clip(0), clip(1)))
    assert SoundPolicy().allowed([empty, Audio("b", ())]) == [empty, Audio("b", ())]


sounds = st.builds(lambda tag, seconds: Audio(tag, tuple(map(clip, seconds))), st.sampled_from("ab"),
                   st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), max_size=5))  # fmt: skip
cells = st.one_of(sounds, st.just(MEL), st.just(HEADS), st.just("text"))
records = st.lists(
    st.one_of(sounds, st.just(MEL), st.just(HEADS), st.just(Scalar("s", 1.0)),
              st.lists(cells, min_size=2, max_size=2).map(lambda row: Table("t", ("x", "y"), (tuple(row),)))),
    max_size=6,
)  # fmt: skip


@settings(max_examples=100)
@given(records, st.booleans(), st.integers(1, 4), st.sampled_from([0.5, 2.0, 30.0]))
def test_no_mixture_of_records_gets_past_the_policy(
    given_records: list[Record], enabled: bool, max_clips: int, max_seconds: float
) -> None:
    policy = SoundPolicy(enabled, max_clips, max_seconds)
    kept = policy.allowed(given_records)
    shown = [record for record in kept if isinstance(record, Audio)]
    inside = [
        cell for table in kept if isinstance(table, Table) for row in table.rows for cell in row
        if isinstance(cell, Audio | Image)
    ]  # fmt: skip
    heard = [*shown, *(cell for cell in inside if isinstance(cell, Audio))]
    assert all(len(clip.samples) <= max_seconds * RATE for audio in heard for clip in audio.clips)
    for tag in "ab":
        assert sum(len(audio.clips) for audio in shown if audio.tag == tag) <= max_clips
    if not enabled:
        assert not heard
        assert MEL not in [*kept, *inside]
    others = [record for record in given_records if isinstance(record, Scalar) or record is HEADS]
    assert [record for record in kept if isinstance(record, Scalar) or record is HEADS] == others


@pytest.mark.parametrize("wrong", [{"max_clips": 0}, {"max_seconds": 0.0}, {"max_seconds": float("nan")}])
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1 clip"):
        SoundPolicy(**wrong)


# -- on the way to backends -----------------------------------------------------------------------------------------


def test_every_way_through_the_recorder_asks_the_policy(tmp_path: Path) -> None:
    backend = MemoryBackend()
    recorder = Recorder([backend], sound=OFF)
    recorder.open(Run(tmp_path))
    recorder.record(VOICE)
    recorder.show({}, lambda _host, emit: emit.record(VOICE))
    recorder.defer({}, lambda _host, emit: emit.record(MEL))
    recorder.record(Scalar("a", 1.0))
    recorder.flush(1)
    recorder.write(2, [VOICE, MEL, Scalar("a", 2.0)])
    recorder.close()
    assert backend.scalars("a") == {1: 1.0, 2: 2.0}
    assert not {VOICE.tag, MEL.tag} & set(backend.tags())


def test_by_default_clips_are_bounded(tmp_path: Path) -> None:
    backend = MemoryBackend()
    recorder = Recorder([backend])
    recorder.open(Run(tmp_path))
    recorder.write(1, [Audio("a", (clip(31.0),) * 9)])
    recorder.close()
    assert lengths(backend.last("a", Audio)) == [300] * 8


class Recording:
    """A clip of the data set, which notices that it is read."""

    sampling_rate, seconds = RATE, 1.0

    def __init__(self) -> None:
        self.reads = 0

    @property
    def samples(self) -> np.ndarray:
        self.reads += 1
        return np.full(10, 0.5, dtype=np.float32)


def run_with(callbacks: list[Any], higgs: Any, voices: Voices, directory: Path) -> Recording:
    recording = Recording()
    with Steps(higgs, callbacks, directory, voices.tokenizer) as run:
        metadata = [{"reference": [recording], "target": [recording], "speaker": "ann"}]
        run.step([{**voices.batch([voices.conversation()]), "metadata": metadata}])
    return recording


def test_off_means_that_nothing_is_even_read_to_be_heard(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    recording = run_with([InputLoggerCallback(1, [backend], sound=OFF)], higgs, voices, tmp_path)
    assert recording.reads == 0
    assert "inputs/tokens/total" in backend.tags()
    assert not {"inputs/reference", "inputs/target"} & set(backend.tags())
    assert "no inputs/reference: sound is off" in telemetry_log.text


@pytest.mark.parametrize("enabled", [True, False])
def test_numbers_of_a_voice_stay_when_it_is_not_heard(
    enabled: bool, higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    backend = MemoryBackend()
    callback = StrategicTelemetry(["inputs", "zero_shot"], 1, [backend], sound=SoundPolicy(enabled=enabled))
    run_with([callback], higgs, voices, tmp_path)
    heard = {tag for tag, shown in backend.records.items() if any(isinstance(record, Audio) for _, record in shown)}
    assert heard == ({"inputs/reference", "inputs/target"} if enabled else set())
    assert backend.scalars("zero_shot/reference/level_db") == {1: pytest.approx(20 * np.log10(0.5))}


def test_the_first_callback_that_says_it_speaks_for_all(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    backend = MemoryBackend()
    callbacks = [
        InputLoggerCallback(1, [backend]),
        ZeroShotVerificationLoggerCallback(1, [backend], sound=OFF),
        ZeroShotVerificationLoggerCallback(1, [backend], sound=SoundPolicy()),
    ]
    run_with(callbacks, higgs, voices, tmp_path)
    assert "inputs/tokens/total" in backend.tags()
    assert "inputs/reference" not in backend.tags()


def test_a_policy_holds_though_the_recorder_was_opened_before_it_was_said(higgs: Any, tmp_path: Path) -> None:
    backend = MemoryBackend()
    early, late = InputLoggerCallback(1, [backend]), InputLoggerCallback(1, [backend], sound=OFF)
    with Steps(higgs, [early], tmp_path) as run:
        recorder = early.session.recorder
        run.callbacks = [late]
        run.tell("on_train_begin")
        recorder.write(1, [VOICE, Scalar("a", 1.0)])
        run.tell("on_train_end")
        assert not early.session.sound.enabled
        run.callbacks = [early]
    assert VOICE.tag not in backend.tags()
    assert backend.scalars("a") == {1: 1.0}

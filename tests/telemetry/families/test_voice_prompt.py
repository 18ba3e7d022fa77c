"""Every rule of a voice-cloning prompt, broken one at a time on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import Sample, Voices

from telemetry.families.chat import ChatFormat
from telemetry.families.voice_prompt import CHECKS, ClipLayout, PromptClip, VoicePrompt, clips_of, violations

LANGUAGE_NOTE = "You clone voices. Language: {}"


def prompt(
    voices: Voices, sample: Sample, metadata: dict[str, Any] | None = None, frames: int | None = None
) -> VoicePrompt:
    is_audio = np.array([position.codes is not None for position in sample], dtype=bool)
    target = np.array([position.kind == "target" for position in sample], dtype=bool)
    starts = np.array([position.begins for position in sample], dtype=bool)
    codes = np.array([position.codes or (0, 0, 0) for position in sample]).reshape(-1, 3)
    chat = ChatFormat.of(voices.tokenizer)
    assert chat is not None
    placeholders = int(is_audio.sum())
    config = voices.config
    layout = ClipLayout(config.audio_stream_bos_id, config.audio_stream_eos_id, tuple(range(config.num_codebooks)))
    return VoicePrompt(
        [position.token for position in sample],
        clips_of(starts, is_audio, target, codes),
        placeholders if frames is None else frames,
        placeholders,
        {"language": "en", **(metadata or {})},
        chat,
        voices.tokenizer,
        layout,
    )


def broken(voices: Voices, sample: Sample, metadata: dict[str, Any] | None = None) -> list[str]:
    found = violations(prompt(voices, sample, metadata))
    return [f"{kind.replace('_', ' ')}: {what}" for kind, of_kind in found.items() for what in of_kind or ()]


def test_a_compliant_prompt_breaks_no_rule_and_all_are_checked(voices: Voices) -> None:
    found = violations(prompt(voices, voices.conversation(), {"target_transcript": "A green ship."}))
    assert found == {kind: [] for kind in CHECKS}


def test_what_cannot_be_checked_is_neither_kept_nor_broken(voices: Voices) -> None:
    found = violations(prompt(voices, voices.conversation()))
    assert [kind for kind, of_kind in found.items() if of_kind is None] == ["target_text"]
    found = violations(prompt(voices, voices.conversation(), frames=1))
    assert found["delay_pattern"] is None
    assert len(found["placeholders"] or ()) == 1


def test_kinds_are_named_as_their_tags(voices: Voices) -> None:
    sample = voices.conversation(reference=None)[:-1]
    found = violations(prompt(voices, sample, {"target_transcript": "Else."}))
    assert [kind for kind, of_kind in found.items() if of_kind] == ["end_of_turn", "reference", "target_text"]


def test_two_references_in_one_turn(voices: Voices) -> None:
    speech = voices.spoken(voices.clip(3, 1)), voices.spoken(voices.clip(2, 2))
    target = voices.turn("assistant", voices.spoken(voices.clip(3, 3, target=True)))
    crowded = [*voices.turn("user", voices.text("One."), speech[0], voices.text("Two."), speech[1]), *target]
    assert broken(voices, crowded) == ["reference: 2 clips in the user turn at token 0"]
    silent = voices.turn("assistant", voices.spoken(voices.clip(3, 4)))
    two_turns = [
        *voices.turn("user", voices.text("One."), speech[0]),
        *silent,
        *voices.turn("user", voices.text("Two."), speech[1]),
        *target,
    ]
    assert broken(voices, two_turns) == []


# -- the text of the target -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transcript", "expected"),
    [
        ("A green ship.", []),
        ("  A \n green\tship. ", []),
        ("A green sheep.", ["target text: says 'A green ship.', the transcript 'A green sheep.'"]),
        ("", []),
        (None, []),
    ],
)
def test_the_text_of_the_target_is_its_transcript(voices: Voices, transcript: str | None, expected: list[str]) -> None:
    assert broken(voices, voices.conversation(), {"target_transcript": transcript}) == expected


def test_letters_that_are_written_in_two_ways_are_the_same(voices: Voices) -> None:
    sample = [
        *voices.turn("user", voices.text("One."), voices.spoken(voices.clip(3, 1))),
        *voices.turn("assistant", voices.text("Caf\u00e9"), voices.spoken(voices.clip(3, 2, target=True))),
    ]
    assert broken(voices, sample, {"target_transcript": "Cafe\u0301"}) == []


def test_a_target_without_text_of_its_own_says_what_stands_last_in_the_turn_before(voices: Voices) -> None:
    sample = [
        *voices.turn("user", voices.text("The ship sails."), voices.spoken(voices.clip(3, 1)), voices.text("A fish.")),
        *voices.turn("assistant", voices.spoken(voices.clip(4, 2, target=True))),
    ]
    assert broken(voices, sample, {"target_transcript": "A fish."}) == []
    assert broken(voices, sample, {"target_transcript": "The ship sails."}) == [
        "target text: says 'A fish.', the transcript 'The ship sails.'"
    ]


def test_several_targets_say_their_texts_one_after_the_other(voices: Voices) -> None:
    sample = voices.conversation()
    for seed, words in ((5, "One."), (6, "Two.")):
        sample = [
            *sample,
            *voices.turn("user", voices.text("More.")),
            *voices.turn("assistant", voices.text(words), voices.spoken(voices.clip(3, seed, target=True))),
        ]
    assert broken(voices, sample, {"target_transcript": "A green ship. One. Two."}) == []


# -- the language ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "language", "expected"),
    [
        ("You clone voices.", "en", []),
        ("You clone voices.", None, ["language: no language tag"]),
        ("You clone voices.", "", ["language: no language tag"]),
        ("You clone voices. Language: en", "en", []),
        ("You clone voices. language=English", "en", []),
        ("You clone voices. Language: ar-EG", "Arabic", []),
        ('{"language": "ar"}', "en", ["language: tagged en, the prompt says ar"]),
        ("You clone voices. [lang=French] [lang=ar]", "ar", ["language: tagged ar, the prompt says French"]),
        ("Language: calm and slow", "en", []),  # no language of that name
        ("The language is French.", "en", []),  # talk, not a tag
    ],
)
def test_the_language_is_tagged_and_the_prompt_says_no_other(
    voices: Voices, system: str, language: str | None, expected: list[str]
) -> None:
    sample = [*voices.turn("system", voices.text(system)), *voices.conversation()[_system_end(voices) :]]
    assert broken(voices, sample, {"language": language}) == expected


def test_what_the_target_says_is_no_statement_of_its_language(voices: Voices) -> None:
    sample = [
        *voices.turn("user", voices.text("One."), voices.spoken(voices.clip(3, 1))),
        *voices.turn("assistant", voices.text("Language: French"), voices.spoken(voices.clip(3, 2, target=True))),
    ]
    assert broken(voices, sample) == []


def _system_end(voices: Voices) -> int:
    end = voices.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    return next(index for index, position in enumerate(voices.conversation()) if position.token == end) + 1


# -- the delay pattern ----------------------------------------------------------------------------------------------

BOS, EOS = 10, 11
KIND = {BOS: "BOS", EOS: "EOS"}


def delayed(codes: list[list[int]]) -> np.ndarray:
    """``[frames, codebooks]``, built column by column."""
    columns = []
    for k, column in enumerate(codes):
        columns.append([BOS] * (k + 1) + column + [EOS] * (len(codes) - k))
    return np.array(columns).T


def delay_fault(voices: Voices, codes: np.ndarray, is_delayed: bool = True) -> str:
    codebooks = codes.shape[1]
    chat = ChatFormat.of(voices.tokenizer)
    assert chat is not None
    clip = PromptClip(7, 7 + len(codes), True, codes)
    layout = ClipLayout(BOS, EOS, tuple(range(codebooks)) if is_delayed else (0,) * codebooks)
    found = violations(VoicePrompt([0] * 99, [clip], 1, 1, {}, chat, voices.tokenizer, layout))["delay_pattern"]
    assert found is not None
    return found[0].removeprefix("the audio at token 7 has ") if found else ""


streams = st.integers(1, 4).flatmap(
    lambda codebooks: st.integers(1, 6).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 9), min_size=length, max_size=length), min_size=codebooks, max_size=codebooks
        )
    )
)


@settings(max_examples=60)
@given(codes=streams, where=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), token=st.integers(0, 11))
def test_any_stream_is_accepted_and_any_one_id_of_a_wrong_kind_in_it_is_found(
    voices: Voices, codes: list[list[int]], where: tuple[int, int], token: int
) -> None:
    stream = delayed(codes)
    assert delay_fault(voices, stream) == ""
    frame, k = where[0] % stream.shape[0], where[1] % stream.shape[1]
    was = KIND.get(int(stream[frame, k]), "a code")
    stream[frame, k] = token
    now = KIND.get(token, "a code")
    expected = "" if now == was else f"{now} for {was} in codebook {k} at frame {frame}"
    assert delay_fault(voices, stream) == expected


@settings(max_examples=30)
@given(codes=streams.filter(lambda codes: len(codes) > 1), data=st.data())
def test_a_codebook_that_is_not_shifted_by_its_number_is_found(
    voices: Voices, codes: list[list[int]], data: st.DataObject
) -> None:
    stream = delayed(codes)
    k = data.draw(st.integers(0, stream.shape[1] - 1))
    by = data.draw(st.sampled_from([-1, 1]))
    stream[:, k] = np.roll(stream[:, k], by)
    assert f"in codebook {k} at frame " in delay_fault(voices, stream)


def test_streams_without_delay(voices: Voices) -> None:
    straight = np.array([[BOS, BOS], [3, 4], [5, 6], [EOS, EOS]])
    assert delay_fault(voices, straight, is_delayed=False) == ""
    assert delay_fault(voices, straight) == "a code for EOS in codebook 0 at frame 2, and 1 more like it"
    assert delay_fault(voices, delayed([[3], [4]]), is_delayed=False) == (
        "EOS for a code in codebook 0 at frame 2, and 1 more like it"
    )


def test_a_clip_that_is_cut_off_or_holds_nothing(voices: Voices) -> None:
    stream = delayed([[1, 2, 3], [4, 5, 6]])
    assert delay_fault(voices, stream[:-1]).startswith("a code for EOS in codebook 0 at frame 3")
    assert delay_fault(voices, delayed([[], []])) == "3 frames, which leaves none for its codes"


# -- clips ----------------------------------------------------------------------------------------------------------


def test_clips_end_where_the_next_begins_or_the_audio_does() -> None:
    starts = np.array([0, 1, 0, 1, 0, 0, 1], dtype=bool)
    is_audio = np.array([0, 1, 1, 1, 1, 0, 1], dtype=bool)
    target = np.array([0, 0, 0, 1, 1, 0, 0], dtype=bool)
    codes = np.array([0, 1, -1, 3, 4, 0, 6])[:, None]
    clips = clips_of(starts, is_audio, target, codes)
    assert [(clip.start, clip.end, clip.is_target) for clip in clips] == [(1, 3, False), (3, 5, True), (6, 7, False)]
    assert [clip.codes[:, 0].tolist() for clip in clips] == [[1], [3, 4], [6]]  # an embedding has no codes
    none = np.zeros(3, dtype=bool)
    assert clips_of(none, none, none, np.zeros((3, 1), dtype=int)) == []


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), max_size=40), st.data())
def test_wild_ids_are_read_without_a_fault_of_the_reader(voices: Voices, ids: list[int], data: st.DataObject) -> None:
    """Whatever stands where: every rule gives an answer, and a sample without any turn is never compliant."""
    special = [voices.tokenizer.convert_tokens_to_ids(name) for name in ("<|start_header_id|>", "<|eot_id|>")]
    ids = [data.draw(st.sampled_from([token, *special])) for token in ids]
    chat = ChatFormat.of(voices.tokenizer)
    assert chat is not None
    size = len(ids)
    flags = data.draw(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=size, max_size=size))
    starts, is_audio, target = np.array(flags, dtype=bool).reshape(size, 3).T
    clips = clips_of(starts, is_audio, target, np.zeros((size, 2), dtype=int))
    metadata = {"target_transcript": "A ship.", "language": "en"}
    found = violations(VoicePrompt(ids, clips, 3, 3, metadata, chat, voices.tokenizer, ClipLayout(BOS, EOS, (0, 1, 2))))
    assert set(found) == set(CHECKS)
    assert found["role_order"]  # no header is ever closed

"""Data files are read whole, and every fault is reported with its file, sample, field, reason and mend."""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.chatml
from trainer.audio import check_audio
from trainer.chatml import (
    LISTED_PROBLEMS,
    AudioContent,
    DataFileError,
    Message,
    Problem,
    Sample,
    TextContent,
    load_samples,
)

Raw = dict[str, Any]
ARABIC = "مرحبا بالعالم، كيف حالك؟"


def load(file: Path, **options: Any) -> list[Sample]:
    return load_samples(file, show_progress=False, **options)


def problems_of(file: Path, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(DataFileError) as caught:
        load(file, **options)
    return caught.value.problems


def text(words: str) -> Raw:
    return {"type": "text", "text": words}


def audio(url: str, **more: Any) -> Raw:
    return {"type": "audio", "audio_url": url, **more}


def raw_sample(sample_id: str | None = None, **more: Any) -> Raw:
    """A whole valid sample; ``folder`` fixtures hold its clips."""
    user = [text("Words of the reference."), audio("clips/reference.wav"), text(ARABIC)]
    return {
        "messages": [
            {"role": "system", "content": "Speak."},
            {"role": "user", "content": user},
            {"role": "assistant", "content": [text(ARABIC), audio("clips/target.flac")]},
        ],
        "misc": {"sample_id": sample_id} if sample_id else {},
        **more,
    }


def write_json(folder: Path, *samples: Any) -> Path:
    file = folder / "train.json"
    # half a surrogate pair has no UTF-8 form: its backslash escape is JSON's own
    file.write_bytes(json.dumps(samples, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return file


def write_jsonl(folder: Path, *samples: Any) -> Path:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return file


def write_clip(file: Path, seconds: float, sampling_rate: int = 8_000, **options: Any) -> None:
    soundfile.write(file, np.zeros((round(seconds * sampling_rate), 2)), sampling_rate, **options)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clip of every kind, good and bad."""
    clips = tmp_path_factory.mktemp("clips")
    write_clip(clips / "reference.wav", 3.0, 48_000, subtype="PCM_24")
    write_clip(clips / "target.flac", 2.0, 44_100)
    write_clip(clips / "other.ogg", 1.0)
    write_clip(clips / "long.wav", 31.0, 1_000)
    write_clip(clips / "short.wav", 0.04)
    write_clip(clips / "none.wav", 0.0)
    soundfile.write(clips / "nan.wav", np.array([0.0, np.nan, np.inf, 0.0] * 1000), 8_000, subtype="FLOAT")
    (clips / "empty.wav").touch()
    (clips / "text.wav").write_text("not audio at all")
    (clips / "folder.wav").mkdir()
    return clips


@pytest.fixture
def folder(tmp_path: Path, clips: Path) -> Path:
    """A data folder with the clips under ``clips/``."""
    shutil.copytree(clips, tmp_path / "clips")
    return tmp_path


# What is read


def test_a_sample_is_read_whole(folder: Path) -> None:
    misc = {"ref_transcript": "Reference.", "target_transcript": ARABIC, "duration": 2.0, "language": "ar"}
    raw = raw_sample("ar-1", speaker="Layla", start_index=0)
    raw["misc"] |= misc
    file = write_json(folder, raw)

    [sample] = load(file)

    reference, target = folder / "clips/reference.wav", folder / "clips/target.flac"
    assert sample.messages == (
        Message("system", (TextContent("Speak."),)),
        Message(
            "user",
            (TextContent("Words of the reference."), AudioContent(reference, is_target=False), TextContent(ARABIC)),
        ),
        Message("assistant", (TextContent(ARABIC), AudioContent(target, is_target=True))),
    )
    assert (sample.sample_id, sample.speaker, sample.language) == ("ar-1", "Layla", "ar")
    assert (sample.ref_transcript, sample.target_transcript) == ("Reference.", ARABIC)
    assert (sample.start_index, sample.references, sample.targets) == (0, (reference,), (target,))
    assert str(sample.source) == f"{file}: sample 0"


def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "data_format.md"
    example = json.loads(page.read_text(encoding="utf-8").split("```json")[1].split("```")[0])
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips/layla_001.wav", 3.0)
    write_clip(tmp_path / "clips/layla_002.wav", 3.2)

    [sample] = load(write_json(tmp_path, example))

    assert (sample.sample_id, sample.speaker, sample.language) == ("layla-002", "layla", "ar")
    assert (sample.references, sample.targets) == (
        (tmp_path / "clips/layla_001.wav",),
        (tmp_path / "clips/layla_002.wav",),
    )


def test_json_and_jsonl_give_the_same_samples(folder: Path) -> None:
    raws = [raw_sample(f"id-{number}", speaker=ARABIC) for number in range(3)]

    from_json, from_jsonl = load(write_json(folder, *raws)), load(write_jsonl(folder, *raws))

    source = from_json[0].source
    assert [replace(sample, source=source) for sample in from_json] == [
        replace(sample, source=source) for sample in from_jsonl
    ]
    assert [sample.source.position for sample in from_jsonl] == [0, 1, 2]
    assert str(from_jsonl[2].source) == f"{folder / 'train.jsonl'}:3: sample 2"


@pytest.mark.parametrize("writer", [write_json, write_jsonl])
def test_another_extension_is_told_by_its_content(folder: Path, writer: Callable[..., Path]) -> None:
    file = writer(folder, raw_sample("a"), raw_sample("b")).rename(folder / "train.data")

    assert [sample.sample_id for sample in load(file)] == ["a", "b"]


def test_ids_are_made_from_the_position(folder: Path) -> None:
    samples = load(write_jsonl(folder, raw_sample(), raw_sample("named"), raw_sample()))

    assert [sample.sample_id for sample in samples] == ["train-00000", "named", "train-00002"]


def test_optional_fields_may_be_missing_null_or_blank(folder: Path) -> None:
    bare = {"messages": raw_sample()["messages"]}
    null = {**bare, "speaker": None, "start_index": None, "misc": {"sample_id": None, "duration": None}}
    blank = {**bare, "speaker": " ", "misc": {"sample_id": "", "language": "", "ref_transcript": "\n"}}

    for sample in load(write_json(folder, bare, null, blank)):
        assert sample.sample_id == f"train-0000{sample.source.position}"
        assert (sample.speaker, sample.language, sample.ref_transcript, sample.target_transcript) == (None,) * 4
        assert sample.start_index == 0


def test_assistant_audio_before_start_index_is_a_reference(folder: Path) -> None:
    raw = raw_sample(start_index=3)
    raw["messages"] += [
        {"role": "user", "content": "Once more."},
        {"role": "assistant", "content": [audio("clips/other.ogg")]},
    ]

    [sample] = load(write_json(folder, raw))

    assert sample.references == (folder / "clips/reference.wav", folder / "clips/target.flac")
    assert sample.targets == (folder / "clips/other.ogg",)


def test_relative_paths_start_at_the_data_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "lists").mkdir()
    raw = raw_sample()
    raw["messages"][1]["content"][1]["audio_url"] = "../clips/reference.wav"
    raw["messages"][2]["content"][1]["audio_url"] = str(folder / "clips/target.flac")
    file = write_json(folder / "lists", raw)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    [absolute] = load(file)
    monkeypatch.chdir(folder)
    [relative] = load(Path("lists/train.json"))

    assert absolute == relative
    assert absolute.references == (folder / "clips/reference.wav",)
    assert absolute.targets == (folder / "clips/target.flac",)


def test_jsonl_takes_blank_lines_line_separators_and_a_byte_order_mark(folder: Path) -> None:
    raw = raw_sample("a", speaker="one\u2028two")
    line = json.dumps(raw, ensure_ascii=False)
    (folder / "train.jsonl").write_bytes(f"\ufeff{line}\r\n\r\n{json.dumps(raw_sample('b'))}".encode())

    first, second = load(folder / "train.jsonl")

    assert first.speaker == "one\u2028two"
    assert (second.source.position, second.source.line) == (1, 3)


def test_every_audio_file_is_probed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Path] = []

    def count(path: Path) -> Any:
        probed.append(path)
        return check_audio(path)

    monkeypatch.setattr(trainer.chatml, "check_audio", count)
    broken = raw_sample()
    broken["messages"][1]["content"][1] = audio("clips/../clips/missing.wav")
    load(write_json(folder, *([raw_sample()] * 3), broken, broken), skip_bad_samples=True)

    assert sorted(path.name for path in probed) == ["missing.wav", "reference.wav", "target.flac"]


def test_progress_can_be_shown_and_hidden(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_json(folder, raw_sample())
    load_samples(file, show_progress=False)
    assert capsys.readouterr() == ("", "")
    load_samples(file)
    assert "Checking train.json" in capsys.readouterr().err


# What is wrong with a sample


def user(raw: Raw) -> list[Raw]:
    return raw["messages"][1]["content"]


def assistant(raw: Raw) -> list[Raw]:
    return raw["messages"][2]["content"]


GONE = object()
ROLE, CONTENT, ITEM = "messages[1].role", "messages[1].content", "messages[1].content[0]"
REFERENCE, TARGET = "messages[1].content[1].audio_url", "messages[2].content[1].audio_url"
TARGET_TEXT, TARGET_DURATION = "messages[2].content[0].text", "messages[2].content[1].duration"
DURATION = "messages[1].content[1].duration"
BYE = {"role": "assistant", "content": "Bye."}
LATE, THANKS = {"role": "system", "content": "Late."}, {"role": "user", "content": "Thanks."}
SCORES = [1, {"snr": -math.inf}]
NO_TARGET = "there is no assistant audio at or after start_index"
GIVE, SPEECH, QUOTES = "Give a string", "Give the words of the target audio", "Put it in quotes"
LIST, TIME = "Give a list", "correct the duration"
CUT = "Cut the clip, or raise max_reference_seconds"
CHECK, EXPORT, END = "Check the path", "Export the clip", "End the sample with the assistant's audio"


def put(raw: Raw, field: str, value: Any) -> None:
    """Set one field of a sample, named as a problem names it, or take it away."""
    *parents, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", field)]
    holder: Any = raw
    for part in parents:
        holder = holder[part]
    if value is GONE:
        del holder[last]
    else:
        holder[last] = value


# The field named, what it is made (or what is done to a valid sample), the reason, the mend.
BAD_SAMPLES: list[tuple[str, Any, str, str]] = [
    ("messages", GONE, "is missing", LIST),
    ("messages", {}, "is an object, not a list", LIST),
    ("messages", [], "is an empty list", LIST),
    ("messages[0]", "hi", "is a string, not an object", "A message is {"),
    (ROLE, "human", "unknown role 'human'", "Use one of system, user, assist"),
    (ROLE, GONE, "is missing", "Use one of"),
    (ROLE, ["user"], "is a list, not a string", "Use one of"),
    (CONTENT, GONE, "is missing", "Give a string, or a list of"),
    (CONTENT, 3, "is a number, not a string or a list", GIVE),
    (CONTENT, None, "is null, not a string or a list", GIVE),
    (CONTENT, [], "is an empty list", GIVE),
    (ITEM, lambda raw: put(raw, CONTENT, [True]), "is true, not an object", GIVE),
    (
        f"{ITEM}.type",
        lambda raw: put(raw, ITEM, {"type": "video"}),
        "unknown content type 'video'",
        "Use text or audio",
    ),
    (f"{ITEM}.type", lambda raw: put(raw, ITEM, {"text": "a"}), "is missing", "Use text or audio"),
    (f"{ITEM}.text", GONE, "is missing", "Give the text"),
    (f"{ITEM}.text", 7, "is a number, not a string", "Give the text"),
    (f"{ITEM}.text", "\ud83d", "half of a surrogate pair", "Write the text again"),
    (TARGET_TEXT, " \n", "the target text is empty", SPEECH),
    (
        "messages[2].content",
        lambda raw: raw["messages"].insert(2, BYE | {"content": ""}),
        "the target text is empty",
        SPEECH,
    ),
    (REFERENCE, GONE, "is missing", "Give the path"),
    (REFERENCE, None, "is null, not a string", "Give the path"),
    (REFERENCE, " ", "is empty", "Give the path"),
    (REFERENCE, "a\0.wav", "cannot be a path", CHECK),
    (REFERENCE, "a" * 300, "cannot be opened", CHECK),
    (REFERENCE, "clips/gone.wav", "clips/gone.wav: no such file", CHECK),
    (REFERENCE, "clips/folder.wav", "folder.wav: is a directory", CHECK),
    (REFERENCE, "clips/empty.wav", "is an empty file (0 bytes)", EXPORT),
    (TARGET, "clips/text.wav", "is not readable audio (Format not", EXPORT),
    (TARGET, "clips/none.wav", "none.wav: holds no samples", EXPORT),
    (TARGET, "clips/nan.wav", "2000 of 4000 samples are NaN or infinite", EXPORT),
    (REFERENCE, "clips/long.wav", "the reference audio is 31.00 s long, over the 30 s allowed", CUT),
    (
        TARGET,
        "clips/short.wav",
        "the target audio is 0.040 s long, under the least of 0.05 s",
        "See whether the clip was cut short",
    ),
    ("messages", lambda raw: raw["messages"].pop(), "there is no assistant message", END),
    ("messages", lambda raw: assistant(raw).pop(), f"{NO_TARGET} 0", "Add the target audio"),
    (
        "messages",
        lambda raw: (raw.update(start_index=3), raw["messages"].append(BYE)),
        f"{NO_TARGET} 3",
        "lower start_index",
    ),
    ("start_index", "0", "is a string, not a whole", "Use 0"),
    ("start_index", True, "is true, not a whole number", "Use 0"),
    ("start_index", 0.5, "not a whole number", "Use 0"),
    ("start_index", 3, "is 3, outside the 3 messages", "Use 0 to 2"),
    ("start_index", -1, "is -1, outside the 3", "Use 0 to 2"),
    (
        ROLE,
        lambda raw: raw["messages"].insert(1, LATE),
        "a system message that is not the first message",
        "Move it to messages[0]",
    ),
    ("messages[3].role", lambda raw: raw["messages"].append(THANKS), "the last message is the user's", END),
    (TARGET_DURATION, 2.6, "2.6 s declared, but the file is 2.00 s long", TIME),
    (DURATION, 10**400, "s declared, but the file is 3.00 s long", TIME),
    (DURATION, "3", "is a string, not a number", "Give seconds as a number"),
    (DURATION, math.nan, "is nan, not a finite number", "Give a finite number"),
    ("misc.duration", 1.0, "1.0 s declared, but the file is 2.00 s long", TIME),
    (
        "misc.scores[1].snr",
        lambda raw: put(raw, "misc.scores", SCORES),
        "is -inf, not a finite number",
        "Give a finite number",
    ),
    ("misc", [], "is a list, not an object", "Make it an object"),
    ("speaker", 7, "is a number, not a string", QUOTES),
    ("misc.sample_id", 7, "is a number, not a string", QUOTES),
]


@pytest.mark.parametrize(("where", "made", "what", "mend"), BAD_SAMPLES)
@pytest.mark.parametrize("writer", [write_json, write_jsonl])
def test_a_problem_names_file_sample_field_reason_and_mend(
    folder: Path, writer: Callable[..., Path], where: str, made: Any, what: str, mend: str
) -> None:
    bad = raw_sample("bad-one")
    made(bad) if callable(made) else put(bad, where, made)
    file = writer(folder, raw_sample("good"), bad)

    [problem] = problems_of(file)

    assert (problem.sample_position, problem.field, problem.path) == (1, where, file)
    assert what in problem.what
    assert mend in problem.mend
    line = ":2" if writer is write_jsonl else ""
    identity = "" if where in ("misc", "misc.sample_id") else " ('bad-one')"
    assert str(problem) == f"{file}{line}: sample 1{identity}: {where}: {problem.what}. {problem.mend}"
    assert [sample.sample_id for sample in load(file, skip_bad_samples=True)] == ["good"]


@pytest.mark.parametrize(("raw", "kind"), [(None, "null"), ([], "a list"), ("hi", "a string"), (1.5, "a number")])
def test_a_sample_that_is_no_object(folder: Path, raw: Any, kind: str) -> None:
    [problem] = problems_of(write_json(folder, raw_sample(), raw))

    assert (problem.sample_position, problem.sample_id, problem.field) == (1, None, "")
    assert problem.what == f"is {kind}, not an object"
    assert "messages" in problem.mend


def test_the_length_limits_are_the_callers(folder: Path) -> None:
    file = write_json(folder, raw_sample())

    assert len(load(file, max_reference_seconds=3.0, max_target_seconds=2.0)) == 1
    [reference] = problems_of(file, max_reference_seconds=2.9)
    [target] = problems_of(file, max_target_seconds=1.5)
    assert (reference.field, reference.what) == (
        REFERENCE,
        "the reference audio is 3.00 s long, over the 2.9 s allowed",
    )
    assert (target.field, target.what) == (TARGET, "the target audio is 2.00 s long, over the 1.5 s allowed")
    assert "raise max_target_seconds" in target.mend


@pytest.mark.parametrize(("seconds", "declared"), [(2.0, 2.5), (2.0, 1.5), (10.0, 12.0), (10.0, 8)])
def test_a_duration_may_be_rounded(folder: Path, seconds: float, declared: float) -> None:
    write_clip(folder / "clips/timed.wav", seconds)
    raw = raw_sample()
    raw["messages"][1]["content"][1] = audio("clips/timed.wav", duration=declared)

    assert len(load(write_json(folder, raw))) == 1


def test_misc_duration_is_not_held_against_several_targets(folder: Path) -> None:
    raw = raw_sample()
    assistant(raw).append(audio("clips/other.ogg"))
    raw["misc"]["duration"] = 3.0

    assert len(load(write_json(folder, raw))) == 1


def test_duplicate_ids_name_both_positions(folder: Path) -> None:
    [problem] = problems_of(write_jsonl(folder, raw_sample("a"), raw_sample("b"), raw_sample("a")))

    assert (problem.sample_position, problem.sample_id, problem.field) == (2, "a", "misc.sample_id")
    assert problem.what == "the id of sample 2 is already that of sample 0"
    assert "an id of its own" in problem.mend


def test_a_loop_of_links_is_a_problem(folder: Path) -> None:
    (folder / "clips/loop.wav").symlink_to(folder / "clips/loop.wav")
    raw = raw_sample()
    put(raw, REFERENCE, "clips/loop.wav")

    [problem] = problems_of(write_json(folder, raw))

    assert problem.field == REFERENCE
    assert "Check the path" in problem.mend


def test_every_problem_of_every_sample_is_collected(folder: Path) -> None:
    first, second = raw_sample(), raw_sample()
    first["messages"][1]["role"] = "human"
    user(first)[1]["audio_url"] = "clips/gone.wav"
    assistant(first)[0]["text"] = ""
    second["start_index"] = 9

    problems = problems_of(write_json(folder, first, raw_sample(), second))

    assert [(problem.sample_position, problem.field) for problem in problems] == [
        (0, "messages[1].role"),
        (0, REFERENCE),
        (0, "messages[2].content[0].text"),
        (2, "start_index"),
    ]


# What is wrong with a file


def test_a_missing_data_file(tmp_path: Path) -> None:
    [problem] = problems_of(tmp_path / "train.json")

    assert str(problem) == f"{tmp_path / 'train.json'}: no such data file. Check the path."


BAD_FILES: dict[str, tuple[str, bytes, int | None, str, str]] = {
    "not utf-8": ("a.json", b'["\n\xff"]', 2, "is not UTF-8 (byte 3)", "Save the data file as UTF-8"),
    "utf-16": ("a.jsonl", '{"messages": []}'.encode("utf-16"), 1, "is not UTF-8 (byte 0)", "as UTF-8"),
    "broken": ("a.json", b'[\n{"a": 1,}]', 2, "is not valid JSON: ", "Mend the syntax"),
    "cut": ("a.json", b'[{"messages": [', 1, "at line 1, column ", "Mend the syntax"),
    "lines in json": ("a.json", b'{"a": 1}\n{"a": 2}', 2, "Extra data at line 2, column 1", "must end in .jsonl"),
    "too deep": ("a.json", b"[" * 200_000, None, "cannot be parsed as JSON (", "deep nesting"),
    "object": ("a.json", b'{"data": []}', None, "the top level is an object, not a list", "Put the samples into a"),
    "empty list": ("a.json", b"[]", None, "holds no samples", "Add at least one sample"),
    "empty json": ("a.json", b" \n", None, "holds no samples", "Add at least one sample"),
    "empty jsonl": ("a.jsonl", b"\n\n", None, "holds no samples", "Add at least one sample"),
}


@pytest.mark.parametrize("name", sorted(BAD_FILES))
@pytest.mark.parametrize("skip_bad_samples", [False, True])
def test_faults_of_the_file_always_raise(tmp_path: Path, name: str, skip_bad_samples: bool) -> None:
    file_name, data, line, what, mend = BAD_FILES[name]
    (tmp_path / file_name).write_bytes(data)

    [problem] = problems_of(tmp_path / file_name, skip_bad_samples=skip_bad_samples)

    assert (problem.sample_position, problem.path, problem.line) == (None, tmp_path / file_name, line)
    assert what in problem.what
    assert mend in problem.mend


def test_a_directory_instead_of_a_data_file(tmp_path: Path) -> None:
    [problem] = problems_of(tmp_path)

    assert problem.what == "is a directory, not a data file"


def test_a_broken_line_of_jsonl_is_a_problem_of_that_line_alone(folder: Path) -> None:
    good = json.dumps(raw_sample())
    file = folder / "train.jsonl"
    file.write_text(f'{good}\n\n{{"messages": [}}\n{"[" * 200_000}\n{good}\n', encoding="utf-8")

    broken, deep = problems_of(file)

    assert (broken.sample_position, broken.line) == (1, 3)
    assert broken.what == "is not valid JSON: Expecting value at line 3, column 15"
    assert (deep.sample_position, deep.line) == (2, 4)
    assert [sample.source.position for sample in load(file, skip_bad_samples=True)] == [0, 3]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_beyond_json_are_refused(folder: Path, literal: str) -> None:
    file = folder / "train.jsonl"
    file.write_text(json.dumps(raw_sample(extra=[0, "HERE"])).replace('"HERE"', literal), encoding="utf-8")

    [problem] = problems_of(file)

    assert problem.field == "extra[1]"
    assert "not a finite number" in problem.what


# Skipping, and the report


def bad_sample(number: int) -> Raw:
    raw = raw_sample(f"bad-{number}")
    put(raw, REFERENCE, f"clips/gone-{number}.wav")
    return raw


def test_skipping_warns_once_and_says_which_and_why(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_json(folder, bad_sample(0), raw_sample("good"), bad_sample(2))

    with caplog.at_level(logging.WARNING, logger="trainer.chatml"):
        samples = load(file, skip_bad_samples=True)

    assert [sample.sample_id for sample in samples] == ["good"]
    [record] = caplog.records
    message = record.getMessage()
    assert f"{file}: left out 2 of 3 samples" in message
    for number in (0, 2):
        assert f"sample {number} ('bad-{number}'): {REFERENCE}: " in message
        assert f"gone-{number}.wav: no such file" in message


def test_skipping_everything_raises(folder: Path) -> None:
    assert len(problems_of(write_json(folder, bad_sample(0), bad_sample(1)), skip_bad_samples=True)) == 2


def test_the_message_lists_the_first_problems_and_counts_the_rest(folder: Path) -> None:
    file = write_json(folder, *(bad_sample(number) for number in range(LISTED_PROBLEMS + 3)))

    with pytest.raises(DataFileError) as caught:
        load(file)

    heading, *lines, more = str(caught.value).splitlines()
    assert heading == f"{file} cannot be used: {LISTED_PROBLEMS + 3} problems"
    assert len(lines) == LISTED_PROBLEMS
    assert f"gone-{LISTED_PROBLEMS - 1}.wav" in lines[-1]
    assert more.strip() == "and 3 more"
    assert len(caught.value.problems) == LISTED_PROBLEMS + 3


def test_samples_without_a_reference_are_counted_in_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    without = raw_sample()
    without["messages"][1]["content"] = "Say it in any voice."

    with caplog.at_level(logging.WARNING, logger="trainer.chatml"):
        assert len(load(write_json(folder, without, raw_sample(), without))) == 3

    [record] = caplog.records
    assert "2 of 3 samples have no reference audio" in record.getMessage()


def test_nothing_is_logged_for_a_good_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="trainer.chatml"):
        load(write_json(folder, raw_sample()))

    assert not caplog.records


def test_the_error_can_be_pickled_and_written_whatever_the_file_holds(folder: Path) -> None:
    raw = raw_sample("half \ud83d")
    with pytest.raises(DataFileError) as caught:
        load(write_jsonl(folder, raw))

    copied = pickle.loads(pickle.dumps(caught.value))
    assert copied.problems == caught.value.problems
    assert "misc.sample_id: holds half of a surrogate pair" in str(copied).encode("utf-8").decode()


# Anything at all

words = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(["target.flac", "nan.wav", "/", "."])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


def objects(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object with any of the fields, each as expected or anything at all; or anything at all."""
    return st.fixed_dictionaries({}, optional={key: value | values for key, value in fields.items()}) | values


items = objects(type=st.sampled_from(["text", "audio"]), text=words, audio_url=words, duration=st.floats())
turns = objects(role=st.sampled_from(["system", "user", "assistant"]), content=words | st.lists(items, max_size=3))
samples_like = objects(
    messages=st.lists(turns, max_size=3),
    start_index=st.integers(-1, 3),
    speaker=words,
    misc=objects(sample_id=words, duration=st.integers()),
)


def loads_or_says_why(file: Path) -> None:
    for skip_bad_samples in (False, True):
        outcome = outcome_of(file, skip_bad_samples)
        if isinstance(outcome, DataFileError):
            assert outcome.problems
            assert str(outcome).startswith(f"{file} cannot be used: ")
        else:
            assert outcome


def outcome_of(file: Path, skip_bad_samples: bool) -> list[Sample] | DataFileError:
    try:
        return load(file, skip_bad_samples=skip_bad_samples)
    except DataFileError as error:
        return error


@given(raws=st.lists(samples_like, min_size=1, max_size=4), extension=st.sampled_from([".json", ".jsonl"]))
@settings(max_examples=150)
def test_json_of_any_shape_is_read_or_refused(clips: Path, raws: list[Any], extension: str) -> None:
    file = clips / f"any{extension}"
    file.write_text(json.dumps(raws) if extension == ".json" else "\n".join(map(json.dumps, raws)), encoding="utf-8")

    loads_or_says_why(file)


@given(data=st.binary(max_size=60), extension=st.sampled_from([".json", ".jsonl", ""]))
@settings(max_examples=100)
def test_bytes_of_any_kind_are_read_or_refused(clips: Path, data: bytes, extension: str) -> None:
    file = clips / f"bytes{extension}"
    file.write_bytes(data)

    loads_or_says_why(file)


def test_what_a_data_file_holds_does_not_steer_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "t\x1b[2J.json"
    url = "a\x1b[2J\x1b]0;owned\x07\nerror: all is well\u202e.wav"
    answer = {"role": "assistant", "content": [{"type": "audio", "audio_url": url}, {"type": "\x9b", "text": "\x9b2J"}]}
    message = [{"role": "user", "content": "x"}, answer]
    file.write_text(json.dumps([{"messages": message, "start_index": 1, "misc": {"sample_id": "\x1b"}, "\x1b": 1}]))
    with pytest.raises(DataFileError) as raised:
        load(file)
    assert all(line.isprintable() for line in str(raised.value).splitlines())
    assert len(str(raised.value).splitlines()) == 1 + len(raised.value.problems)
    assert r"a\x1b[2J\x1b]0;owned\x07\x0aerror: all is well\u202e.wav" in str(raised.value)

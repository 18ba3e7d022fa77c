"""Reads the training data file and checks all of it before the first step: see ``docs/data_format.md``.

Every fault is collected as a :class:`Problem` that says where it is, what is wrong and what to do, so that a data
file is mended in one go and a run does not stop hours later at a clip that was never there.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from tqdm import tqdm

from trainer.audio import AudioError, AudioInfo, AudioMissingError, check_audio

logger = logging.getLogger(__name__)

Role: TypeAlias = Literal["system", "user", "assistant"]

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
MIN_TARGET_SECONDS = 0.05  # the codec makes 25 frames a second: a shorter clip has one frame, and nothing to learn from
DURATION_TOLERANCE_SECONDS = 0.5
DURATION_TOLERANCE_SHARE = 0.2
LISTED_PROBLEMS = 20

_PATH_MEND = "Check the path (a relative one starts at the folder of the data file; URLs are not fetched)."
_AUDIO_MEND = "Export the clip again as WAV or FLAC, or take the sample out."
_PARSE_MEND = "Look for very deep nesting or a number of thousands of digits."
_ENCODING_MEND = "Save the data file as UTF-8."
_ROLE_MEND = f"Use one of {', '.join(ROLES)}."
_CONTENT_MEND = 'Give a string, or a list of {"type": "text", ...} and {"type": "audio", ...} objects.'


@dataclass(frozen=True)
class TextContent:
    """A piece of text, as the data file has it."""

    text: str


@dataclass(frozen=True)
class AudioContent:
    """An audio file by its absolute path. A target is supervised; any other audio is a reference."""

    path: Path
    is_target: bool


Content: TypeAlias = TextContent | AudioContent


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: tuple[Content, ...]


@dataclass(frozen=True)
class Source:
    """Where a sample stands: the data file, the sample's position in it from 0, and for JSONL its line from 1."""

    path: Path
    position: int
    line: int | None = None

    def __str__(self) -> str:
        line = f":{self.line}" if self.line is not None else ""
        return f"{self.path}{line}: sample {self.position}"


@dataclass(frozen=True)
class Sample:
    """One checked training example.

    Attributes:
        sample_id: unique in the data file; made from the file's name and the position where it has none.
        messages: the turns; the last one is the assistant's.
        speaker, language, ref_transcript, target_transcript: None where the data file has none, or a blank one.
        start_index: assistant messages from this position on are supervised.
        source: where it was read.
    """

    sample_id: str
    messages: tuple[Message, ...]
    speaker: str | None
    language: str | None
    ref_transcript: str | None
    target_transcript: str | None
    start_index: int
    source: Source

    @property
    def references(self) -> tuple[Path, ...]:
        """Paths of the reference audio, in order."""
        return self._audio(is_target=False)

    @property
    def targets(self) -> tuple[Path, ...]:
        """Paths of the target audio, in order."""
        return self._audio(is_target=True)

    def _audio(self, is_target: bool) -> tuple[Path, ...]:
        items = (item for message in self.messages for item in message.content)
        return tuple(item.path for item in items if isinstance(item, AudioContent) and item.is_target == is_target)


@dataclass(frozen=True)
class Problem:
    """One fault of a data file.

    Attributes:
        sample_position: from 0, or None for a fault of the file itself.
        sample_id: None where the sample has none that can be read.
        field: JSON path in the sample, as in ``messages[1].content[1].audio_url``; "" for the sample or file itself.
        what: what is wrong.
        mend: what to do.
        path: the data file.
        line: of the data file, from 1, where it is known.
    """

    sample_position: int | None
    sample_id: str | None
    field: str
    what: str
    mend: str
    path: Path
    line: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.path}{f':{self.line}' if self.line is not None else ''}"]
        if self.sample_position is not None:
            parts.append(f"sample {self.sample_position}{f' ({self.sample_id!r})' if self.sample_id else ''}")
        if self.field:
            parts.append(self.field)
        text = f"{': '.join(parts)}: {self.what}. {self.mend}"
        return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair would break the log


class DataFileError(ValueError):
    """A data file that cannot be used.

    Attributes:
        problems: every fault found, in the order of the file.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        return f"{self.problems[0].path} cannot be used: {count}\n{_listing(self.problems)}"


def load_samples(
    path: str | os.PathLike[str],
    *,
    max_reference_seconds: float = 30.0,
    max_target_seconds: float | None = None,
    skip_bad_samples: bool = False,
    show_progress: bool = True,
) -> list[Sample]:
    """Reads and checks a whole data file, every audio file's header included.

    Warns once, with the number, of samples without reference audio: they are no error, yet teach no voice cloning.

    Args:
        path: JSON (a list) or JSONL (one object a line), by its extension, or by its content for any other extension.
        max_reference_seconds: longest reference audio allowed.
        max_target_seconds: longest target audio allowed; None for any.
        skip_bad_samples: leave samples with problems out, with one warning that names them, instead of raising.
        show_progress: show a progress bar.

    Returns:
        The samples in the order of the file; never empty.

    Raises:
        DataFileError: for any problem; with ``skip_bad_samples`` for a fault of the file itself, or when no sample is
            left.
    """
    file = Path(path).absolute()
    rows = _read_rows(file)
    check = _FileCheck(file, max_reference_seconds, max_target_seconds)
    samples: list[Sample] = []
    problems: list[Problem] = []
    for row in tqdm(rows, desc=f"Checking {file.name}", unit="sample", disable=not show_progress):
        sample, found = _SampleReader(check, row).read()
        problems += found
        if sample is not None:
            samples.append(sample)
    if problems and not (skip_bad_samples and samples):
        raise DataFileError(problems)
    _warn(file, samples, problems, len(rows))
    return samples


def _warn(file: Path, samples: Sequence[Sample], problems: Sequence[Problem], total: int) -> None:
    if problems:
        left_out = total - len(samples)
        logger.warning("%s: left out %d of %d samples:\n%s", file, left_out, total, _listing(problems))
    without = sum(not sample.references for sample in samples)
    if without:
        logger.warning(
            "%s: %d of %d samples have no reference audio: they do not teach the model to clone a voice.",
            file,
            without,
            len(samples),
        )


def _listing(problems: Sequence[Problem]) -> str:
    lines = [f"  {problem}" for problem in problems[:LISTED_PROBLEMS]]
    if len(problems) > LISTED_PROBLEMS:
        lines.append(f"  and {len(problems) - LISTED_PROBLEMS} more")
    return "\n".join(lines)


# The file


@dataclass(frozen=True)
class _Row:
    """A sample as parsed, or why its line could not be."""

    position: int
    line: int | None
    raw: Any
    fault: str = ""


def _read_rows(file: Path) -> list[_Row]:
    text = _read_text(file)
    rows = list(_json_lines(text)) if _is_json_lines(file, text) else _json_list(file, text)
    if not rows:
        raise _file_error(file, "holds no samples", "Add at least one sample.")
    return rows


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise _file_error(file, "no such data file", "Check the path.") from error
    except IsADirectoryError as error:
        raise _file_error(file, "is a directory, not a data file", "Give the .json or .jsonl file in it.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _file_error(file, f"cannot be read ({error})", "Check the path and its permissions.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _file_error(file, f"is not UTF-8 (byte {error.start})", _ENCODING_MEND, line) from error


def _is_json_lines(file: Path, text: str) -> bool:
    extension = file.suffix.lower()
    return extension == ".jsonl" or (extension != ".json" and not text.lstrip().startswith("["))


def _json_list(file: Path, text: str) -> list[_Row]:
    if not text.strip():
        return []
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        mend = "Mend the syntax there; a file with one object a line must end in .jsonl."
        raise _file_error(file, _syntax_fault(error, error.lineno), mend, error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise _file_error(file, f"cannot be parsed as JSON ({error})", _PARSE_MEND) from error
    if not isinstance(parsed, list):
        mend = "Put the samples into a list, or name the file .jsonl if it has one object a line."
        raise _file_error(file, f"the top level is {_kind(parsed)}, not a list", mend)
    return [_Row(position, None, raw) for position, raw in enumerate(parsed)]


def _json_lines(text: str) -> Iterator[_Row]:
    # str.splitlines would also cut at U+2028 and others that JSON allows inside a string
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    for position, (number, line) in enumerate(lines):
        try:
            yield _Row(position, number, json.loads(line))
        except json.JSONDecodeError as error:
            yield _Row(position, number, None, _syntax_fault(error, number))
        except (ValueError, RecursionError) as error:
            yield _Row(position, number, None, f"cannot be parsed as JSON ({error})")


def _syntax_fault(error: json.JSONDecodeError, line: int) -> str:
    return f"is not valid JSON: {error.msg} at line {line}, column {error.colno}"


def _file_error(file: Path, what: str, mend: str, line: int | None = None) -> DataFileError:
    return DataFileError([Problem(None, None, "", what, mend, file, line)])


# A sample


@dataclass(frozen=True)
class _FileCheck:
    """What the samples of one file share: the limits, the audio files probed so far and the ids seen so far."""

    file: Path
    max_reference_seconds: float
    max_target_seconds: float | None
    probe: Callable[[Path], AudioInfo | AudioError] = field(default_factory=lambda: functools.cache(_probe))
    positions: dict[str, int] = field(default_factory=dict)


def _probe(path: Path) -> AudioInfo | AudioError:
    try:
        return check_audio(path)
    except AudioError as error:
        return error


class _SampleReader:
    """Reads one sample and keeps every problem that it finds."""

    def __init__(self, check: _FileCheck, row: _Row) -> None:
        self._check = check
        self._row = row
        self._sample_id: str | None = None
        self._start_index = 0
        self._target_items = 0
        self._target_seconds: list[float] = []
        self._problems: list[Problem] = []

    def read(self) -> tuple[Sample | None, list[Problem]]:
        """The sample, or None and what is wrong with it."""
        sample = self._sample(self._row.raw)
        return (None, self._problems) if self._problems else (sample, [])

    def _sample(self, raw: Any) -> Sample | None:
        if self._row.fault:
            self._add("", self._row.fault, "Mend the line: one whole JSON object a line.")
            return None
        if not isinstance(raw, dict):
            self._add("", f"is {_kind(raw)}, not an object", 'A sample is an object {"messages": [...]}.')
            return None
        misc = self._object(raw, "misc")
        self._sample_id = self._optional_text(misc, "sample_id", "misc.") or self._made_id()
        self._check_id(self._sample_id)
        self._check_values(raw)
        self._start_index = self._read_start_index(raw)
        messages = self._messages(raw)
        self._check_misc_duration(misc)
        return Sample(
            sample_id=self._sample_id,
            messages=messages,
            speaker=self._optional_text(raw, "speaker"),
            language=self._optional_text(misc, "language", "misc."),
            ref_transcript=self._optional_text(misc, "ref_transcript", "misc."),
            target_transcript=self._optional_text(misc, "target_transcript", "misc."),
            start_index=self._start_index,
            source=Source(self._check.file, self._row.position, self._row.line),
        )

    def _add(self, where: str, what: str, mend: str) -> None:
        row = self._row
        self._problems.append(
            Problem(row.position, self._sample_id, where, what, mend, path=self._check.file, line=row.line)
        )

    # Beside the messages

    def _made_id(self) -> str:
        return f"{self._check.file.stem}-{self._row.position:05d}"

    def _check_id(self, sample_id: str) -> None:
        position = self._row.position
        first = self._check.positions.setdefault(sample_id, position)
        if first != position:
            what = f"the id of sample {position} is already that of sample {first}"
            self._add("misc.sample_id", what, "Give every sample an id of its own.")

    def _object(self, raw: dict[str, Any], key: str) -> dict[str, Any]:
        value = raw.get(key)
        if value is None or isinstance(value, dict):
            return value or {}
        self._add(key, f"is {_kind(value)}, not an object", "Make it an object, or leave it out.")
        return {}

    def _optional_text(self, raw: dict[str, Any], key: str, prefix: str = "") -> str | None:
        value = raw.get(key)
        if value is None or isinstance(value, str):
            return value if value and value.strip() else None
        self._add(prefix + key, f"is {_kind(value)}, not a string", "Put it in quotes, or leave it out.")
        return None

    def _read_start_index(self, raw: dict[str, Any]) -> int:
        value = raw.get("start_index")
        messages = raw.get("messages")
        count = len(messages) if isinstance(messages, list) else 0
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int):
            self._add("start_index", f"is {_kind(value)}, not a whole number", "Use 0 to supervise every answer.")
        elif count and not 0 <= value < count:
            what = f"is {value}, outside the {count} messages"
            self._add("start_index", what, f"Use 0 to {count - 1}; 0 supervises every answer.")
        else:
            return value
        return 0

    def _check_values(self, raw: dict[str, Any]) -> None:
        """Python's JSON reader takes NaN, Infinity, 1e999 and half a surrogate pair: here none of them passes."""
        for where, value in _leaves(raw):
            if isinstance(value, float) and not math.isfinite(value):
                self._add(where, f"is {value}, not a finite number", "Give a finite number, or leave the field out.")
            elif isinstance(value, str) and not _is_unicode(value):
                what = "holds half of a surrogate pair, which is not a character"
                self._add(where, what, "Write the text again from its source.")

    # The messages

    def _messages(self, raw: dict[str, Any]) -> tuple[Message, ...]:
        messages = raw.get("messages")
        if not isinstance(messages, list) or not messages:
            what = "is an empty list" if isinstance(messages, list) else _absence(raw, "messages", "a list")
            self._add("messages", what, "Give a list with at least one user and one assistant message.")
            return ()
        read = [self._message(position, message) for position, message in enumerate(messages)]
        self._check_order([message.get("role") if isinstance(message, dict) else None for message in messages])
        return tuple(message for message in read if message is not None)

    def _message(self, position: int, raw: Any) -> Message | None:
        where = f"messages[{position}]"
        if not isinstance(raw, dict):
            self._add(where, f"is {_kind(raw)}, not an object", 'A message is {"role": ..., "content": ...}.')
            return None
        role = raw.get("role")
        if role not in ROLES:
            what = f"unknown role {role!r}" if isinstance(role, str) else _absence(raw, "role", "a string")
            self._add(f"{where}.role", what, _ROLE_MEND)
        is_target = role == "assistant" and position >= self._start_index
        content = self._content(f"{where}.content", raw, is_target)
        return Message(cast(Role, role), content)

    def _check_order(self, roles: list[Any]) -> None:
        for position, role in enumerate(roles):
            if role == "system" and position:
                what = "a system message that is not the first message"
                self._add(f"messages[{position}].role", what, "Move it to messages[0].")
        if "assistant" not in roles:
            self._add("messages", "there is no assistant message", "End the sample with the assistant's audio.")
            return
        if roles[-1] in ROLES and roles[-1] != "assistant":
            what = f"the last message is the {roles[-1]}'s, not the assistant's"
            self._add(f"messages[{len(roles) - 1}].role", what, "End the sample with the assistant's audio.")
        if not self._target_items:
            what = f"there is no assistant audio at or after start_index {self._start_index}"
            self._add("messages", what, "Add the target audio to the assistant's message, or lower start_index.")

    def _content(self, where: str, raw: dict[str, Any], is_target: bool) -> tuple[Content, ...]:
        content = raw.get("content")
        if isinstance(content, str):
            return self._text(where, raw, "content", is_target)
        if not isinstance(content, list) or not content:
            what = "is an empty list" if isinstance(content, list) else _absence(raw, "content", "a string or a list")
            self._add(where, what, _CONTENT_MEND)
            return ()
        items = (self._item(f"{where}[{position}]", item, is_target) for position, item in enumerate(content))
        return tuple(content for item in items for content in item)

    def _item(self, where: str, raw: Any, is_target: bool) -> tuple[Content, ...]:
        if not isinstance(raw, dict):
            self._add(where, f"is {_kind(raw)}, not an object", _CONTENT_MEND)
            return ()
        kind = raw.get("type")
        if kind == "text":
            return self._text(f"{where}.text", raw, "text", is_target)
        if kind == "audio":
            return self._audio(where, raw, is_target)
        what = f"unknown content type {kind!r}" if isinstance(kind, str) else _absence(raw, "type", "a string")
        self._add(f"{where}.type", what, "Use text or audio.")
        return ()

    def _text(self, where: str, raw: dict[str, Any], key: str, is_target: bool) -> tuple[Content, ...]:
        text = raw.get(key)
        if not isinstance(text, str):
            self._add(where, _absence(raw, key, "a string"), "Give the text as a string.")
            return ()
        if is_target and not text.strip():
            self._add(where, "the target text is empty", "Give the words of the target audio, or take the item out.")
        return (TextContent(text),)

    # The audio

    def _audio(self, where: str, raw: dict[str, Any], is_target: bool) -> tuple[Content, ...]:
        self._target_items += is_target
        path = self._audio_path(f"{where}.audio_url", raw)
        if path is None:
            return ()
        info = self._check.probe(path)
        if isinstance(info, AudioError):
            mend = _PATH_MEND if isinstance(info, AudioMissingError) else _AUDIO_MEND
            self._add(f"{where}.audio_url", f"audio file {info}", mend)
            return ()
        self._check_length(f"{where}.audio_url", info.seconds, is_target)
        self._check_duration(f"{where}.duration", raw.get("duration"), info.seconds)
        if is_target:
            self._target_seconds.append(info.seconds)
        return (AudioContent(path, is_target),)

    def _audio_path(self, where: str, raw: dict[str, Any]) -> Path | None:
        url = raw.get("audio_url")
        if not isinstance(url, str) or not url.strip():
            what = "is empty" if isinstance(url, str) else _absence(raw, "audio_url", "a string")
            self._add(where, what, "Give the path of the audio file.")
            return None
        try:
            return (self._check.file.parent / url).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a null byte or half a surrogate pair
            self._add(where, f"{url!r} cannot be a path ({error})", _PATH_MEND)
            return None

    def _check_length(self, where: str, seconds: float, is_target: bool) -> None:
        kind = "target" if is_target else "reference"
        longest = self._check.max_target_seconds if is_target else self._check.max_reference_seconds
        if longest is not None and seconds > longest:
            what = f"the {kind} audio is {seconds:.2f} s long, over the {longest:g} s allowed"
            self._add(where, what, f"Cut the clip, or raise max_{kind}_seconds.")
        if is_target and seconds < MIN_TARGET_SECONDS:
            what = f"the target audio is {seconds:.3f} s long, under the least of {MIN_TARGET_SECONDS:g} s"
            self._add(where, what, "See whether the clip was cut short, or take the sample out.")

    def _check_misc_duration(self, misc: dict[str, Any]) -> None:
        """``misc.duration`` tells of one clip: with several targets it is not known which."""
        actual = self._target_seconds[0] if len(self._target_seconds) == self._target_items == 1 else None
        self._check_duration("misc.duration", misc.get("duration"), actual)

    def _check_duration(self, where: str, declared: Any, actual: float | None) -> None:
        if declared is None or (isinstance(declared, float) and not math.isfinite(declared)):
            return  # absent, or already said by _check_values
        if isinstance(declared, bool) or not isinstance(declared, int | float):
            self._add(where, f"is {_kind(declared)}, not a number", "Give seconds as a number, or leave it out.")
        elif actual is not None and _durations_differ(declared, actual):
            what = f"{declared} s declared, but the file is {actual:.2f} s long"
            self._add(where, what, "See whether it is the right file, then correct the duration or leave it out.")


def _durations_differ(declared: float, actual: float) -> bool:
    tolerance = max(DURATION_TOLERANCE_SECONDS, DURATION_TOLERANCE_SHARE * actual)
    # compared, not subtracted: JSON allows integers that no float can hold
    return declared < actual - tolerance or declared > actual + tolerance


def _absence(raw: dict[str, Any], key: str, wanted: str) -> str:
    return f"is {_kind(raw[key])}, not {wanted}" if key in raw else "is missing"


def _leaves(raw: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is no list and no object, with its JSON path. Keeps a stack: JSON may nest deeper than calls."""
    stack: list[tuple[str, Any]] = [("", raw)]
    while stack:
        where, value = stack.pop()
        if isinstance(value, dict):
            stack += reversed([(f"{where}.{key}".lstrip("."), item) for key, item in value.items()])
        elif isinstance(value, list):
            stack += reversed([(f"{where}[{position}]", item) for position, item in enumerate(value)])
        else:
            yield where, value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    """What JSON calls a value, with its article."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]

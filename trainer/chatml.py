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
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from tqdm import tqdm

from telemetry import printable
from trainer.audio import AudioError, AudioInfo, AudioMissingError, check_audio
from trainer.sample_schema import Fault, MessageFields, MiscFields, Role, TextFields, kind_of, validate

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIN_TARGET_SECONDS = 0.05  # the codec makes 25 frames a second: a shorter clip has one frame, and nothing to learn from
DURATION_TOLERANCE_SECONDS = 0.5
DURATION_TOLERANCE_SHARE = 0.2
LISTED_PROBLEMS = 20

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_PATH_MEND = "Check the path (a relative one starts at the folder of the data file; URLs are not fetched)."
_AUDIO_MEND = "Export the clip again as WAV or FLAC, or take the sample out."


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
        # What a data file holds must not steer a terminal; half a surrogate pair would break the log.
        return printable(f"{': '.join(parts)}: {self.what}. {self.mend}", kept="")


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
        return f"{printable(str(self.problems[0].path), kept='')} cannot be used: {count}\n{_listing(self.problems)}"


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
    reader = _Reader(file, max_reference_seconds, max_target_seconds)
    samples: list[Sample] = []
    problems: list[Problem] = []
    for row in tqdm(rows, desc=f"Checking {file.name}", unit="sample", disable=not show_progress):
        sample, found = reader.read(row)
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
    extension = file.suffix.lower()
    is_lines = extension == ".jsonl" or (extension != ".json" and not text.lstrip().startswith("["))
    rows = list(_json_lines(text)) if is_lines else _json_list(file, text)
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
        raise _file_error(file, f"is not UTF-8 (byte {error.start})", "Save the data file as UTF-8.", line) from error


def _json_list(file: Path, text: str) -> list[_Row]:
    if not text.strip():
        return []
    parsed, fault, line = _parse(text)
    if line:
        raise _file_error(file, fault, "Mend the syntax there; a file with one object a line must end in .jsonl.", line)
    if fault:
        raise _file_error(file, fault, "Look for very deep nesting or a number of thousands of digits.")
    if not isinstance(parsed, list):
        mend = "Put the samples into a list, or name the file .jsonl if it has one object a line."
        raise _file_error(file, f"the top level is {kind_of(parsed)}, not a list", mend)
    return [_Row(position, None, raw) for position, raw in enumerate(parsed)]


def _json_lines(text: str) -> Iterator[_Row]:
    # str.splitlines would also cut at U+2028 and others that JSON allows inside a string
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    for position, (number, line) in enumerate(lines):
        parsed, fault, _ = _parse(line, number - 1)
        yield _Row(position, number, parsed, fault)


def _parse(text: str, lines_before: int = 0) -> tuple[Any, str, int | None]:
    """The value, or None with what is wrong and, where it is the syntax, on which line."""
    try:
        return json.loads(text), "", None
    except json.JSONDecodeError as error:
        line = lines_before + error.lineno
        return None, f"is not valid JSON: {error.msg} at line {line}, column {error.colno}", line
    except (ValueError, RecursionError) as error:
        return None, f"cannot be parsed as JSON ({error})", None


def _file_error(file: Path, what: str, mend: str, line: int | None = None) -> DataFileError:
    return DataFileError([Problem(None, None, "", what, mend, file, line)])


# A sample


class _Reader:
    """Reads the samples of one file. They share the limits, the audio files probed so far and the ids seen so far."""

    def __init__(self, file: Path, max_reference_seconds: float, max_target_seconds: float | None) -> None:
        self._file = file
        self._longest = {"reference": max_reference_seconds, "target": max_target_seconds}
        self._probe = functools.cache(_probe)
        self._positions: dict[str, int] = {}

    def read(self, row: _Row) -> tuple[Sample | None, list[Problem]]:
        """The sample, or None and everything that is wrong with it."""
        parsed, faults = validate(row.raw)
        if row.fault:
            faults = [("", row.fault, "Mend the line: one whole JSON object a line.")]
        sample_id: str | None = None
        if isinstance(row.raw, dict):
            if not {"misc", "misc.sample_id"} & {where for where, *_ in faults}:
                named = _get(_get(row.raw, "misc", dict), "sample_id", str)
                sample_id = named if named.strip() else f"{self._file.stem}-{row.position:05d}"
            if sample_id is not None and (first := self._positions.setdefault(sample_id, row.position)) != row.position:
                what = f"the id of sample {row.position} is already that of sample {first}"
                faults.append(("misc.sample_id", what, "Give every sample an id of its own."))
            faults += [*_bad_values(row.raw), *self._meaning(row.raw)]
        if faults or parsed is None or sample_id is None:
            return None, [Problem(row.position, sample_id, *fault, path=self._file, line=row.line) for fault in faults]
        start, misc = parsed.start_index or 0, parsed.misc or MiscFields()
        return Sample(
            sample_id=sample_id,
            messages=tuple(self._message(message, at >= start) for at, message in enumerate(parsed.messages)),
            speaker=parsed.speaker,
            language=misc.language,
            ref_transcript=misc.ref_transcript,
            target_transcript=misc.target_transcript,
            start_index=start,
            source=Source(self._file, row.position, row.line),
        ), []

    def _message(self, message: MessageFields, is_supervised: bool) -> Message:
        is_target = is_supervised and message.role == "assistant"
        content = (
            TextContent(item.text)
            if isinstance(item, TextFields)
            else AudioContent(self._path(item.audio_url), is_target)
            for item in message.content
        )
        return Message(message.role, tuple(content))

    def _path(self, url: str) -> Path:
        return (self._file.parent / url).resolve()

    def _meaning(self, raw: Mapping[str, Any]) -> Iterator[Fault]:
        """Faults of fields of the right type, whatever is wrong with the others."""
        messages = _get(raw, "messages", list)
        start = _get(raw, "start_index", int)
        if messages and not 0 <= start < len(messages):
            what = f"is {start}, outside the {len(messages)} messages"
            yield "start_index", what, f"Use 0 to {len(messages) - 1}; 0 supervises every answer."
            start = 0
        targets: list[float | None] = []  # their lengths in seconds, where known
        for position, message in enumerate(messages):
            is_target = _get(message, "role", str) == "assistant" and position >= start
            for where, item in _items(message, f"messages[{position}].content"):
                kind, text = item.get("type"), item.get("text")
                if kind == "audio":
                    seconds = yield from self._audio(where, item, is_target)
                    targets += [seconds] * is_target
                elif kind == "text" and is_target and isinstance(text, str) and not text.strip():
                    yield where, "the target text is empty", "Give the words of the target audio, or take the item out."
        yield from _order([_get(message, "role", str) for message in messages], start, bool(targets))
        if len(targets) == 1:  # with several targets it is not known which of them misc.duration tells of
            yield from _duration("misc.duration", _get(raw, "misc", dict).get("duration"), targets[0])

    def _audio(self, where: str, item: Mapping[str, Any], is_target: bool) -> Generator[Fault, None, float | None]:
        """Faults of one audio item. Returns its length in seconds, where it is known."""
        url, where_url = item.get("audio_url"), f"{where}.audio_url"
        if not isinstance(url, str):
            return None
        if not url.strip():
            yield where_url, "is empty", "Give the path of the audio file."
            return None
        try:
            path = self._path(url)
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a null byte or half a surrogate pair
            yield where_url, f"{url!r} cannot be a path ({error})", _PATH_MEND
            return None
        info = self._probe(path)
        if isinstance(info, AudioError):
            mend = _PATH_MEND if isinstance(info, AudioMissingError) else _AUDIO_MEND
            yield where_url, f"audio file {info}", mend
            return None
        seconds, kind = info.seconds, "target" if is_target else "reference"
        longest = self._longest[kind]
        if longest is not None and seconds > longest:
            what = f"the {kind} audio is {seconds:.2f} s long, over the {longest:g} s allowed"
            yield where_url, what, f"Cut the clip, or raise max_{kind}_seconds."
        if is_target and seconds < MIN_TARGET_SECONDS:
            what = f"the target audio is {seconds:.3f} s long, under the least of {MIN_TARGET_SECONDS:g} s"
            yield where_url, what, "See whether the clip was cut short, or take the sample out."
        yield from _duration(f"{where}.duration", item.get("duration"), seconds)
        return seconds


def _probe(path: Path) -> AudioInfo | AudioError:
    try:
        return check_audio(path)
    except AudioError as error:
        return error


def _get(raw: Any, key: str, kind: type[T]) -> T:
    """A field of an object where both have the right type, else an empty value."""
    value = raw.get(key) if isinstance(raw, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else kind()


def _items(message: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The content of a message, item by item, each with its path."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        yield where, {"type": "text", "text": content}
    for position, item in enumerate(content if isinstance(content, list) else ()):
        if isinstance(item, dict):
            yield f"{where}[{position}]" + ".text" * (item.get("type") == "text"), item


def _order(roles: Sequence[str], start: int, has_target: bool) -> Iterator[Fault]:
    for position, role in enumerate(roles):
        if role == "system" and position:
            what = "a system message that is not the first message"
            yield f"messages[{position}].role", what, "Move it to messages[0]."
    if roles and "assistant" not in roles:
        yield "messages", "there is no assistant message", "End the sample with the assistant's audio."
    elif roles:
        if roles[-1] in ("system", "user"):
            what = f"the last message is the {roles[-1]}'s, not the assistant's"
            yield f"messages[{len(roles) - 1}].role", what, "End the sample with the assistant's audio."
        if not has_target:
            what = f"there is no assistant audio at or after start_index {start}"
            yield "messages", what, "Add the target audio to the assistant's message, or lower start_index."


def _duration(where: str, declared: Any, actual: float | None) -> Iterator[Fault]:
    if actual is None or isinstance(declared, bool) or not isinstance(declared, int | float):
        return
    tolerance = max(DURATION_TOLERANCE_SECONDS, DURATION_TOLERANCE_SHARE * actual)
    # Compared, not subtracted: JSON allows integers that no float can hold. Infinity is said elsewhere.
    if -math.inf < declared < actual - tolerance or actual + tolerance < declared < math.inf:
        what = f"{declared} s declared, but the file is {actual:.2f} s long"
        yield where, what, "See whether it is the right file, then correct the duration or leave it out."


def _bad_values(raw: Any) -> Iterator[Fault]:
    """Python's JSON reader takes NaN, Infinity, 1e999 and half a surrogate pair: here none of them passes."""
    stack: list[tuple[str, Any]] = [("", raw)]  # JSON may nest deeper than calls
    while stack:
        where, value = stack.pop()
        if isinstance(value, dict):
            stack += reversed([(f"{where}.{key}".lstrip("."), item) for key, item in value.items()])
        elif isinstance(value, list):
            stack += reversed([(f"{where}[{position}]", item) for position, item in enumerate(value)])
        elif isinstance(value, float) and not math.isfinite(value):
            yield where, f"is {value}, not a finite number", "Give a finite number, or leave the field out."
        elif isinstance(value, str) and _HALF_PAIR.search(value):
            what = "holds half of a surrogate pair, which is not a character"
            yield where, what, "Write the text again from its source."

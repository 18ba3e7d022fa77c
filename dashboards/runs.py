"""Runs as their TensorBoard event files tell them: numbers in memory, everything larger by its place in the file.

What a resumed attempt supersedes is left out as TensorBoard leaves it out: a START of session drops every value at its
step and later, and a value drops what its own tag holds at later steps. Of two numbers at one step the last counts;
texts, sounds and pictures stand beside each other (two alerts of one step are two alerts).
"""

from __future__ import annotations

import bisect
import html
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.audio import metadata as audio
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.image import metadata as image
from tensorboard.plugins.scalar import metadata as scalar
from tensorboard.plugins.text import metadata as text
from tensorboard.util import tensor_util

from dashboards.event_files import read_event, read_events
from telemetry.records import Alert, Table
from telemetry.tfrecord import DamagedError

logger = logging.getLogger(__name__)

SCALARS, TEXT, AUDIO, IMAGES = (kind.PLUGIN_NAME for kind in (scalar, text, audio, image))
MEDIA = (TEXT, AUDIO, IMAGES)


_LAST_TIME = 253402300800.0  # the year 10000, which no calendar here has
_LAST_STEP = 2**31 - 1  # what a page can hold
_NAMED = 3  # faults of one kind


class NothingToShowError(Exception):
    """There is nothing to make a dashboard of. The message says what is missing and what to do."""


@dataclass
class Series:
    """The values of a scalar, at steps that increase.

    Attributes:
        steps: optimizer steps.
        values: as recorded, NaN and infinities included.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """The value at a step; what was there, and later, is superseded."""
        self.drop_from(step)
        self.steps.append(step)
        self.values.append(value)

    def drop_from(self, step: int) -> None:
        """Forget what lies at a step and later."""
        if self.steps and self.steps[-1] >= step:
            del self.values[(first := bisect.bisect_left(self.steps, step)) :], self.steps[first:]


@dataclass(frozen=True)
class Stored:
    """A text, clips or a picture at its place in an event file.

    Attributes:
        tag: under which it was recorded.
        kind: the page of TensorBoard that shows it, one of :data:`MEDIA`.
        step: the optimizer step.
        path: the event file.
        offset: of its event, in bytes.
        index: among the event's values.
    """

    tag: str
    kind: str
    step: int
    path: Path
    offset: int
    index: int

    def load(self) -> np.ndarray:
        """What TensorBoard's plugin of this kind stores: bytes in shape ``[1]`` (text), ``[clips, 2]`` (audio) or
        ``[3]`` (image).

        Raises:
            DamagedError: when it is no longer there, or is no tensor.
            OSError: when the file cannot be read.
        """
        try:
            array = _array(self._value().tensor)
        except Exception as error:
            raise DamagedError(f"{self.tag} at step {self.step}: {_first_line(error)}") from error
        return np.atleast_1d(array)

    def record(self) -> Table | Alert | None:
        """The table, its cells as text, or the alert that a text shows; None where telemetry has not written it.

        Raises:
            DamagedError: when it is no longer there.
            OSError: when the file cannot be read.
        """
        data = self._value().metadata.plugin_data.content
        try:
            said = json.loads(SummaryMetadata.PluginData.FromString(data).content)
            if "title" in said:
                alert = Alert(self.tag, **said)
                return alert if all(isinstance(one, str) for one in said.values()) else None
            table = Table(self.tag, tuple(said["columns"]), tuple(map(tuple, said["rows"])))
        except (DecodeError, KeyError, TypeError, ValueError, RecursionError):
            return None
        lines = [table.columns, *table.rows]
        is_whole = all(len(line) == len(table.columns) and all(isinstance(one, str) for one in line) for line in lines)
        return table if is_whole else None

    def _value(self) -> Summary.Value:
        values = read_event(self.path, self.offset).summary.value
        if self.index >= len(values):
            raise DamagedError(f"{self.tag} at step {self.step} is no longer there")
        return values[self.index]


@dataclass
class Run:
    """One run.

    Attributes:
        name: short, unlike that of every other run.
        directory: where its event files are.
        scalars: tag → values.
        media: tag → what is stored under it, at steps that increase.
        descriptions: tag → what the run said of it.
        config: the configuration of the newest attempt.
        starts: the step at which each attempt began.
        ended: whether the newest attempt closed its file.
        first_time: of the first event, in seconds since the epoch; None without events.
        last_time: of the last event.
        longest_pause: between two events of one attempt, in seconds.
        faults: what could not be read, one sentence each.
    """

    name: str
    directory: Path
    scalars: dict[str, Series] = field(default_factory=dict)
    media: dict[str, list[Stored]] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    config: dict[str, bool | float | str] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    ended: bool = False
    first_time: float | None = None
    last_time: float | None = None
    longest_pause: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def tags(self) -> set[str]:
        """All tags with a value."""
        return self.scalars.keys() | self.media.keys()

    @property
    def last_step(self) -> int:
        """The last step with a value, 0 without one."""
        ends = [series.steps[-1] for series in self.scalars.values()]
        return max([*ends, *(stored[-1].step for stored in self.media.values())], default=0)

    def read(self, path: Path) -> None:
        """Add an event file, newer than those that were added before."""
        damages: list[str] = []
        left_out: list[str] = []
        try:
            for offset, event in read_events(path):
                if isinstance(event, DamagedError):
                    damages.append(str(event))
                else:
                    left_out += self._add(event, path, offset)
        except OSError as error:
            self.faults.append(f"{_plain_name(path.name)} cannot be read: {error.strerror}.")
        name = _plain_name(path.name)
        if damages:
            self.faults.append(f"{name} is damaged: {_first_of(damages)}. It is left out; what follows it is shown.")
        if left_out:
            self.faults.append(f"{name} holds what cannot be shown, and is left out: {_first_of(left_out)}.")
        self.scalars = {tag: series for tag, series in self.scalars.items() if series.steps}
        self.media = {tag: stored for tag, stored in self.media.items() if stored}

    def _add(self, event: Event, path: Path, offset: int) -> Iterator[str]:
        """Add an event; what of it cannot be shown, and why."""
        if 0 <= event.wall_time < _LAST_TIME:
            if self.last_time is not None and event.session_log.status != SessionLog.START:
                self.longest_pause = max(self.longest_pause, event.wall_time - self.last_time)
            self.first_time = event.wall_time if self.first_time is None else self.first_time
            self.last_time = event.wall_time
        else:
            yield f"the time {event.wall_time:g} at step {event.step}"
        if not 0 <= event.step <= _LAST_STEP:
            yield f"step {event.step}"
            return
        if event.session_log.status == SessionLog.START:
            self._start(event.step)
        for index, value in enumerate(event.summary.value):
            try:
                self._add_value(value, event.step, path, offset, index)
            except Exception as error:  # noqa: BLE001  (whatever a decoder does with bytes of any provenance)
                yield f"{value.tag!r} at step {event.step} ({_first_line(error)})"

    def _start(self, step: int) -> None:
        self.starts.append(step)
        self.ended = False
        for series in self.scalars.values():
            series.drop_from(step)
        for stored in self.media.values():
            _drop_from(stored, step)

    def _add_value(self, value: Summary.Value, step: int, path: Path, offset: int, index: int) -> None:
        which = value.WhichOneof("value")
        if not value.tag:
            raise ValueError("a value without a tag")
        if which == "simple_value":
            self._scalar(value.tag, step, value.simple_value)
        if not value.HasField("metadata"):
            return
        kind = value.metadata.plugin_data.plugin_name
        if value.metadata.summary_description:
            self.descriptions.setdefault(value.tag, unescape(value.metadata.summary_description))
        if kind == hparams.PLUGIN_NAME:
            self._session(value)
        elif which == "tensor" and kind == SCALARS:
            self._scalar(value.tag, step, float(_array(value.tensor, most=1).item()))
        elif which == "tensor" and kind in MEDIA:
            stored = self.media.setdefault(value.tag, [])
            _drop_from(stored, step + 1)
            stored.append(Stored(value.tag, kind, step, path, offset, index))

    def _scalar(self, tag: str, step: int, value: float) -> None:
        series = self.scalars.get(tag)
        if series is None:
            series = self.scalars[tag] = Series()
        series.add(step, value)

    def _session(self, value: Summary.Value) -> None:
        data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        if data.HasField("session_start_info"):
            shown = data.session_start_info.hparams
            whole = _whole(value.metadata.summary_description)
            self.config = whole or {name: _plain(hparam) for name, hparam in sorted(shown.items())}
        self.ended = data.HasField("session_end_info")


def unescape(line: str) -> str:
    """A line of Markdown in which every character that could be markup is escaped, as the text that it shows."""
    return html.unescape(line.replace("<br>", "\n"))


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in directories: each that holds event files, however deep, is one, as for ``tensorboard --logdir``.

    Runs in which nothing was recorded are left out with a warning, as long as there are others.

    Raises:
        NothingToShowError: when a directory holds no event file, or no run has a value.
    """
    places = list(dict.fromkeys(place for directory in directories for place in _run_directories(directory)))
    runs = [_read_run(name, place) for name, place in zip(map(_plain_name, _names(places)), places, strict=True)]
    full = [run for run in runs if run.tags]
    if not full:
        faults = " ".join(fault for run in runs for fault in run.faults)
        reason = faults or "wait for the first due step, and see that strategic logging is on"
        raise NothingToShowError(f"nothing is recorded in {', '.join(map(str, places))}: {reason}")
    for run in runs:
        if not run.tags:
            logger.warning("%s is left out: nothing is recorded in it. %s", run.directory, " ".join(run.faults))
    return full


def _run_directories(directory: Path) -> Iterator[Path]:
    if not directory.is_dir():
        raise NothingToShowError(f"{directory} is no directory: give the one that --logging_dir named")
    found = sorted({path.parent for path in directory.rglob("*tfevents*") if path.is_file()})
    if not found:
        raise NothingToShowError(f"no event file in {directory}: give the directory that --logging_dir named")
    yield from (place.resolve() for place in found)


def _read_run(name: str, directory: Path) -> Run:
    run = Run(name, directory)
    for path in sorted(path for path in directory.glob("*tfevents*") if path.is_file()):
        run.read(path)
    return run


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart. ``logs``, where runs log by default, names nothing."""
    telling = [place.parent if place.name == "logs" else place for place in places]
    for depth in range(1, max(len(place.parts) for place in telling)):
        names = ["/".join(place.parts[1:][-depth:]) for place in telling]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _array(tensor: TensorProto, most: int | None = None) -> np.ndarray:
    """The values of a tensor, of which there may be at most so many. A stated shape is not believed before that.

    Raises:
        TypeError, ValueError: when it is no tensor, or has another number of values than its shape.
    """
    size = math.prod(dim.size for dim in tensor.tensor_shape.dim)
    # In one of its fields: as bytes, or one by one.
    held = max([len(tensor.tensor_content), *(len(field) for _, field in tensor.ListFields() if _is_list(field))])
    if min((dim.size for dim in tensor.tensor_shape.dim), default=0) < 0 or size > (held if most is None else most):
        raise ValueError(f"{held} values or bytes, and a shape of {[dim.size for dim in tensor.tensor_shape.dim]}")
    array: np.ndarray = tensor_util.make_ndarray(tensor)
    return array


def _is_list(field: object) -> bool:
    return hasattr(field, "__len__") and not isinstance(field, str | bytes)


def _first_of(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _NAMED:,} more" if len(faults) > _NAMED else ""
    return f"{'; '.join(faults[:_NAMED])}{more}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _plain_name(name: str) -> str:
    """A name of a file or directory, whose bytes need not be UTF-8, as text that can be written."""
    return name.encode("utf-8", "backslashreplace").decode()


def _drop_from(stored: list[Stored], step: int) -> None:
    while stored and stored[-1].step >= step:
        stored.pop()


def _whole(description: str) -> dict[str, bool | float | str]:
    """Every setting of a run that says them all; empty where the page of comparison is all that it has."""
    try:
        said = json.loads(description)
    except (ValueError, RecursionError):
        return {}
    plain = isinstance(said, dict) and all(isinstance(value, bool | float | int | str) for value in said.values())
    return dict(sorted(said.items())) if plain else {}


def _plain(hparam: Any) -> bool | float | str:
    kind = hparam.WhichOneof("kind")
    value: bool | float | str = getattr(hparam, kind) if kind in ("bool_value", "number_value", "string_value") else ""
    return value

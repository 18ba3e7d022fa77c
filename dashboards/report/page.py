"""The page: everything in one file, the template filled, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import hashlib
import itertools
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dashboards.report.drawing import drawn, label, swatch
from dashboards.report.first_screen import parting, progress, timelines
from dashboards.report.media import Content, Document, Item, Media, Picture, Shelf, Sound, collect
from dashboards.report.numbers import Arrays, ChartView, chart_view, natural, section_charts
from dashboards.report.overview import CHECKS, Absent, overview
from dashboards.runs import Run, read_runs
from telemetry.catalogue import SECTIONS, find

_HERE = Path(__file__).parent
SPOKEN = "zero_shot"
CLIPS = 2
"""Rows of clips of a run that stand on the first screen."""

NAMES = {
    "setup": "Set-up", "inputs": "Data", "outputs": "Predictions", "attention": "Attention",
    "activations": "Activations", "gradients": "Gradients", "zero_shot": "Voice", "health": "Health",
    "train": "Training log", "eval": "Evaluation log", "telemetry": "Cost of telemetry",
}  # fmt: skip
"""What the table of contents calls the sections of the catalogue."""

_PACKAGES = ("strategic-telemetry", "plotly", "tensorboard", "jinja2")


@dataclass(frozen=True)
class Written:
    """A report that was written: where, and how many bytes of what it holds."""

    path: Path
    nbytes: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Exhibit:
    """What is heard and seen of one thing: the clips and the picture under one tag."""

    tag: str
    title: str
    meaning: str
    sound: Sound | None
    picture: Picture | None


@dataclass(frozen=True)
class Showing:
    """The exhibits of one run at one step, those with a common beginning of their tags together."""

    step: int
    rows: dict[str, list[Exhibit]]


@dataclass(frozen=True)
class Section:
    """One question with everything that answers it."""

    key: str
    title: str
    charts: tuple[ChartView, ...]
    more: tuple[ChartView, ...]
    documents: tuple[tuple[str, int, tuple[Item[Document], ...]], ...]
    showings: tuple[tuple[int, tuple[Showing, ...]], ...]
    absent: tuple[Absent, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.charts or self.more or self.documents or self.showings)


def write_report(directories: Sequence[Path], output: Path) -> Written:
    """Write the report of the runs in these directories. The file is whole or not there.

    Raises:
        NothingToShowError: when there is no run with a value.
        OSError: when the file cannot be written.
    """
    page, parts = render(read_runs(directories))
    data = page.encode()
    with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(output)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
    return Written(output, len(data), parts)


def render(runs: Sequence[Run]) -> tuple[str, dict[str, int]]:
    """The page, and how many bytes of it go to what."""
    media, arrays = collect(runs), Arrays.for_runs(runs)
    seen = overview(runs, media)
    first_clips = _first_clips(media)
    sections = [_section(key, title, runs, media, arrays, seen.absent.get(key, ())) for key, title in _titles(runs)]
    data = {"runs": [run.name for run in runs], "arrays": arrays.encoded, "charts": dict(_chart_data(sections))}
    scripts = {"plotly": Markup(get_plotlyjs()), "report": Markup(_asset("report.js"))}
    # The sources by which the content security policy lets exactly these scripts run.
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts.values())
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "seconds": seconds,
        "when": when,
        "size": size,
        "human": human,
        "drawn": drawn,
        "swatch": swatch,
        "label": label,
    }
    page = environment.get_template("report.html.jinja").render(
        runs=runs, overview=seen, progress=tuple(progress(runs)), timelines=tuple(timelines(runs)),
        parting=parting(runs), first_clips=first_clips, names=NAMES, sections=sections, media=media, arrays=arrays,
        data=data, scripts=scripts, script_hashes=hashes, style=Markup(_asset("report.css")), checks=CHECKS,
        configuration=configuration(runs), versions=dict(_versions()), made=datetime.now(timezone.utc),
    )  # fmt: skip
    page = page.encode("utf-8", "backslashreplace").decode()  # names of directories are bytes of any kind
    parts = {
        "scalars": sum(map(len, arrays.encoded)),
        "audio": media.sounds.nbytes,
        "images": media.pictures.nbytes,
        "texts": media.documents.nbytes + media.alerts.nbytes,
        "plotly": len(scripts["plotly"]),
    }
    return page, parts


def _titles(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Every section: the catalogue's, then any other."""
    found = {tag.split("/", 1)[0] for run in runs for tag in run.tags}
    return [*SECTIONS.items(), *((key, "Not in the catalogue.") for key in sorted(found - SECTIONS.keys()))]


def _section(
    key: str, title: str, runs: Sequence[Run], media: Media, arrays: Arrays, absent: Sequence[Absent]
) -> Section:
    tags = {tag for run in runs for tag in run.scalars if _in(key, tag)}
    # A declared chart may show a tag of another section beside its own.
    declared, more = section_charts(key, sorted(tags), sorted({tag for run in runs for tag in run.scalars}))
    return Section(
        key=key,
        title=title,
        charts=tuple(chart_view(f"{key}-chart-{n}", chart, runs, arrays) for n, chart in enumerate(declared)),
        more=tuple(chart_view(f"{key}-more-{n}", chart, runs, arrays) for n, chart in enumerate(more)),
        documents=tuple(_documents(key, media)),
        showings=tuple(_without_first_clips(_showings(key, media)) if key == SPOKEN else _showings(key, media)),
        absent=tuple(absent),
    )


def _in(section: str, tag: str) -> bool:
    return tag.split("/", 1)[0] == section


def _documents(section: str, media: Media) -> Iterator[tuple[str, int, tuple[Item[Document], ...]]]:
    """Tag, run and texts, the newest first; the table of checks stands at the top of the page."""
    together: dict[tuple[str, int], list[Item[Document]]] = {}
    for item in media.documents.items:
        if _in(section, item.tag) and item.tag != CHECKS:
            together.setdefault((item.tag, item.run), []).append(item)
    for (tag, run), items in sorted(together.items(), key=lambda pair: (natural(pair[0][0]), pair[0][1])):
        yield tag, run, tuple(items)


def _showings(section: str, media: Media) -> Iterator[tuple[int, tuple[Showing, ...]]]:
    """Run and what is heard and seen of it, the newest first."""
    sounds, pictures = _by_place(section, media.sounds), _by_place(section, media.pictures)
    showings: dict[int, dict[int, Showing]] = {}
    for place in sorted(sounds.keys() | pictures.keys(), key=lambda place: (*place[:2], _listening_order(place[2]))):
        run, step, tag = place[0], -place[1], place[2]
        row, _, title = tag.rpartition("/")
        entry = find(tag)
        showing = showings.setdefault(run, {}).setdefault(step, Showing(step, {}))
        exhibit = Exhibit(tag, title, entry.meaning if entry else "", sounds.get(place), pictures.get(place))
        showing.rows.setdefault(row, []).append(exhibit)
    yield from ((run, tuple(by_step.values())) for run, by_step in showings.items())


def _first_clips(media: Media) -> dict[int, Showing]:
    """The newest clips of every run that spoke: what is heard first."""
    return {
        run: Showing(newest.step, rows)
        for run, (newest, *_earlier) in _showings(SPOKEN, media)
        if (rows := {row: newest.rows[row] for row in _spoken_rows(newest)})
    }


def _spoken_rows(showing: Showing) -> list[str]:
    spoken = (row for row, exhibits in showing.rows.items() if any(one.title == "generated" for one in exhibits))
    return list(itertools.islice(spoken, CLIPS))


def _without_first_clips(
    showings: Iterator[tuple[int, tuple[Showing, ...]]],
) -> Iterator[tuple[int, tuple[Showing, ...]]]:
    """What is left for the section: a clip is in the page once."""
    for run, (newest, *earlier) in showings:
        first = _spoken_rows(newest)
        rest = {row: exhibits for row, exhibits in newest.rows.items() if row not in first}
        if left := [*([Showing(newest.step, rest)] if rest else []), *earlier]:
            yield run, tuple(left)


def _by_place(section: str, shelf: Shelf[Content]) -> dict[tuple[int, int, str], Content]:
    """Run, step (the newest first) and tag of what a section shows."""
    return {(item.run, -item.step, item.tag): item.content for item in shelf.items if _in(section, item.tag)}


def _listening_order(tag: str) -> tuple[Any, ...]:
    """What is compared by ear in the order in which it is compared: given, wanted, made."""
    row, _, title = tag.rpartition("/")
    order = ("reference", "target", "generated", "teacher_forced")
    return natural(row), order.index(title) if title in order else len(order), natural(title)


def _chart_data(sections: Sequence[Section]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the script needs to draw each chart."""
    line_fields = ("name", "run", "color", "place", "dash", "steps", "values")
    for section in sections:
        for chart in (*section.charts, *section.more):
            lines = [{name: getattr(line, name) for name in line_fields} for line in chart.lines]
            yield chart.id, {"unit": chart.unit, "lines": lines}


def configuration(runs: Sequence[Run]) -> tuple[list[tuple[str, list[Any]]], list[tuple[str, list[Any]]]]:
    """Settings as name and each run's value (None where it has none): those that differ, and those that do not."""
    names = sorted({name for run in runs for name in run.config})
    rows = [(name, [run.config.get(name) for run in runs]) for name in names]
    differing = [row for row in rows if any(value != row[1][0] for value in row[1])]
    return differing, [row for row in rows if row not in differing]


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout
            continue


def _asset(name: str) -> str:
    return (_HERE / "assets" / name).read_text(encoding="utf-8")


def human(tag: str) -> str:
    """The last part of a tag as words."""
    words = tag.rsplit("/", 1)[-1].replace("_", " ")
    return words[:1].upper() + words[1:]


def number(value: float | str | None, digits: int = 6) -> str:
    """A number in at most six digits."""
    if isinstance(value, str):
        return value
    return "" if value is None else f"{value:.{digits}g}"


def seconds(value: float) -> str:
    """A length of sound."""
    return f"{value:.1f} s"


def when(value: float | datetime | None) -> str:
    """A time, in UTC: reports are read elsewhere than they are made."""
    if value is None:
        return "unknown"
    moment = value if isinstance(value, datetime) else datetime.fromtimestamp(value, timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def size(nbytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"

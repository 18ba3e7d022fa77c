"""What the report shows: every record by section, verdicts first, text as text, within its size."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from report_runs import ARABIC, HOSTILE, rich_run, tone, write_run

from dashboards.__main__ import main
from dashboards.headlines import worsened
from dashboards.report import media as media_module
from dashboards.report import numbers, write_report
from dashboards.report.first_screen import parting, progress, timelines
from dashboards.report.media import collect
from dashboards.report.numbers import Arrays, chart_view, section_charts, short_names, thin
from dashboards.report.overview import overview
from dashboards.report.page import render
from dashboards.runs import Run, Series, Stored, read_runs
from dashboards.status import look
from telemetry.catalogue import SECTIONS
from telemetry.charts import Chart
from telemetry.records import Alert, Audio, Scalar, Table

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """The elements of a page with their text; scripts and styles apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict] = []
        self._open: list[dict] = []
        self.feed(text)
        assert self._open == [], f"not closed: {[element['tag'] for element in self._open]}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        element = {"tag": tag, "text": "", "parents": [e["id"] for e in self._open], **dict(attrs)}
        element.setdefault("id", None)
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data

    def all(self, tag: str, **attributes: str) -> list[dict]:
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]

    def one(self, tag: str, **attributes: str) -> dict:
        (element,) = self.all(tag, **attributes)
        return element

    @property
    def data(self) -> dict:
        return json.loads(self.one("script", id="data")["text"])


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Page:
    directory = tmp_path_factory.mktemp("report") / HOSTILE.replace("/", "")[:60]
    rich_run(directory)
    return Page(render(read_runs([directory]))[0])


def report(directory: Path) -> Page:
    return Page(render(read_runs([directory]))[0])


def numbers_of(run_scalars: dict[str, list[float]]) -> Run:
    return Run("run", Path("run"), {t: Series([*range(len(v))], v) for t, v in run_scalars.items()})


# -- safety ------------------------------------------------------------------------------------------------------------


def test_hostile_strings_stay_text(rich: Page) -> None:
    assert len(rich.all("script")) == 3
    assert [image["src"][:15] for image in rich.all("img")] == ["data:image/png;"] * len(rich.all("img"))
    assert not [name for element in rich.elements for name in element if name.startswith("on")]
    assert HOSTILE in [cell["text"] for cell in rich.all("td")]
    assert HOSTILE in [pre["text"] for pre in rich.all("pre")]
    alerts = rich.one("ul", **{"class": "alerts"})
    assert alerts["text"].count(f"not learning {HOSTILE}") == 3
    names = {line["name"] for chart in rich.data["charts"].values() for line in chart.get("lines", ())}
    assert HOSTILE.replace("/", "") in names
    assert HOSTILE in " ".join(element["text"] for element in rich.all("p", **{"class": "meaning"}))


def test_the_policy_allows_no_network_and_no_other_script(rich: Page) -> None:
    policy = rich.one("meta", **{"http-equiv": "Content-Security-Policy"})["content"]
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*|script-src[^;]*unsafe", policy)
    for script in rich.all("script")[1:]:
        digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_right_to_left_text_finds_its_own_direction(rich: Page) -> None:
    assert all(cell["dir"] == "auto" for cell in rich.all("td") if cell["text"] in (ARABIC, HOSTILE))
    assert [cell for cell in rich.all("td", dir="auto") if cell["text"] == ARABIC]


# -- completeness ------------------------------------------------------------------------------------------------------


def test_every_section_stands_under_its_question_in_order(rich: Page) -> None:
    ids = [section["id"] for section in rich.all("section")]
    assert ids == ["overview", *SECTIONS, "own", "configuration", "making"]
    for key, title in SECTIONS.items():
        assert title in rich.one("h2", id=f"{key}-title")["text"]


def test_every_scalar_is_on_a_chart_of_its_section(tmp_path: Path) -> None:
    rich_run(tmp_path)
    (run,) = read_runs([tmp_path])
    page = report(tmp_path)
    shown = {row["text"] for row in page.all("code") if any(p and "-" in p for p in row["parents"])}
    assert set(run.scalars) <= shown


def test_values_survive_the_way_into_the_page(rich: Page) -> None:
    chart = rich.data["charts"]["outputs-chart-0"]
    assert [line["name"] for line in chart["lines"]] == ["total", "text"]
    arrays = rich.data["arrays"]
    steps = np.frombuffer(base64.b64decode(arrays[chart["lines"][0]["steps"]]), "<i4")
    values = np.frombuffer(base64.b64decode(arrays[chart["lines"][1]["values"]]), "<f4")
    assert steps.tolist() == [10, 20, 30]
    assert values == pytest.approx([0.3, 0.15, 0.1])


def test_verdicts_come_first(rich: Page) -> None:
    text = " ".join(rich.one("section", id="overview")["text"].split())
    assert "Health checks at step 30: 1 failing 1 ok" in text
    assert "NaN or infinity in 2 scalars" in text
    assert "4 records lost" in text
    assert "not measured" in text
    failing = [row for row in rich.all("tr") if "loss does not fall" in row["text"]]
    assert len(failing) == 1
    (found,) = [row["text"] for row in rich.all("tr") if "overview" in row["parents"] and "/nonfinite" in row["text"]]
    assert found == "inputs/tensor/labels/nonfiniteup to 1 values30"


def test_the_first_screen_has_the_numbers_that_status_has(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 4.0, 3: 4.5, 4: 4.25}
    steps = {step: [Scalar("outputs/loss/total", value)] for step, value in losses.items()}
    steps[2].append(Scalar("eval/loss", 4.0))
    for step, value in ((1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25)):
        steps[step] += [Scalar("outputs/accuracy/codebook_0", value), Scalar("outputs/top5/text", 0.5 + value / 1000)]
    write_run(tmp_path, steps)
    (run,) = read_runs([tmp_path])
    (status,) = look([tmp_path])
    (one,) = progress([run])
    assert [card.number for card in one.cards] == status.numbers
    assert [(card.number.tag, card.number.direction) for card in one.cards] == [
        ("outputs/loss/total", "worse"),
        ("eval/loss", ""),
    ]
    # Of the others: what moved further than it usually does, relative to that (neither moved before).
    assert [(card.number.tag, card.number.before, card.number.value) for card in one.worse] == [
        ("outputs/accuracy/codebook_0", 0.5, 0.25),
        ("outputs/top5/text", pytest.approx(0.5005), pytest.approx(0.50025)),
    ]
    cards = " ".join(" ".join(card["text"].split()) for card in report(tmp_path).all("li"))
    assert "outputs/loss/total 4.25 ▼ worse was 4, step 4" in cards


def test_the_verdict_is_that_of_health_and_set_up(tmp_path: Path) -> None:
    columns = ("finding", "verdict", "evidence", "what to do")
    rows = (("labels are the inputs", "failing", "next 0, same 1", "shift them"), ("chance", "ok", "1.0", ""))
    write_run(tmp_path, {1: [Scalar("health/leak", 1.0), Table("setup/checks", columns, rows)]})
    assert look([tmp_path])[0].verdict == "failing"
    text = " ".join(report(tmp_path).one("div", **{"class": "box verdict"})["text"].split())
    assert text.startswith("failing Health checks at step 1: 1 warning")
    assert "labels are the inputs: next 0, same 1 → shift them" in text


def test_what_moves_all_the_time_is_not_said_to_get_worse() -> None:
    steady = {"outputs/accuracy/text": [0.5, 0.6, 0.5, 0.6, 0.5]}
    assert worsened(numbers_of(steady).scalars) == []
    assert [one.tag for one in worsened(numbers_of({"outputs/accuracy/text": [0.5, 0.6, 0.5, 0.6, 0.3]}).scalars)]


def test_health_is_a_timeline_of_the_rules_that_were_not_always_well() -> None:
    verdicts = {
        "health/a": [0, 0, 1, 2, 2],
        "health/b": [0] * 5,
        "health/c": [2, 2, 2, 2, 0],
        "health/d": [0, 0, 0, 0, 1],
    }
    (timeline,) = timelines([numbers_of({tag: [*map(float, values)] for tag, values in verdicts.items()})])
    spans = {row.rule: [(span.verdict, span.first, span.last) for span in row.spans] for row in timeline.rows}
    assert list(spans.items()) == [
        ("a", [("ok", 0, 1), ("warning", 2, 2), ("failing", 3, 4)]),
        ("d", [("ok", 0, 3), ("warning", 4, 4)]),
        ("c", [("failing", 0, 3), ("ok", 4, 4)]),
    ]
    assert timeline.always_ok == 1
    assert [(span.start, span.width) for span in timeline.rows[0].spans] == [(0, 0.5), (0.5, 0.25), (0.75, 0.25)]
    assert all(span.width >= 0.01 and span.start + span.width <= 1.001 for row in timeline.rows for span in row.spans)


def test_two_runs_part_at_the_first_step_with_another_number() -> None:
    one = numbers_of({"train/loss": [3.0, 2.0, 1.0], "eval/runtime": [1.0], "a/x": [1.0, 1.0, math.nan]})
    other = numbers_of({"train/loss": [3.0, 2.5, 0.5], "eval/runtime": [2.0], "a/x": [1.0, 2.0, math.nan]})
    parted = parting([one, other])
    assert parted is not None
    assert (parted.step, parted.compared) == (1, 6)
    assert parted.numbers == (("a/x", 1.0, 2.0), ("train/loss", 2.0, 2.5))
    same = parting([one, one])
    assert same is not None
    assert (same.step, same.compared, same.numbers) == (None, 6, ())
    assert parting([one]) is None


def test_clips_and_their_picture_stand_together_in_the_order_of_comparison(rich: Page) -> None:
    newest = [figure for figure in rich.all("figure") if (figure["id"] or "").endswith("@30-0")]
    assert [figure["id"] for figure in newest if "listen" in figure["parents"]] == [
        f"zero_shot/clip_0/{kind}@30-0" for kind in ("reference", "target", "generated")
    ]
    players = [audio for audio in rich.all("audio") if "zero_shot/clip_0/generated@30-0" in audio["parents"]]
    assert [player["src"][:23] for player in players] == ["data:audio/flac;base64,"]
    assert [image for image in rich.all("img") if "zero_shot/clip_0/generated@30-0" in image["parents"]]
    assert f"speaker {HOSTILE}" in " ".join(span["text"] for span in rich.all("span"))
    assert "0.5 s, 16000 Hz" in rich.one("figure", id="zero_shot/clip_0/target@30-0")["text"]


def test_a_cell_with_sound_leads_to_its_player(rich: Page) -> None:
    links = {link["href"] for link in rich.all("a") if link["text"] == "zero_shot/clip_0/generated"}
    assert links == {f"#zero_shot/clip_0/generated@{step}-0" for step in (10, 20, 30)}
    assert {link[1:] for link in links} <= {figure["id"] for figure in rich.all("figure")}


def test_ids_are_unique_and_every_inner_link_leads_somewhere(rich: Page) -> None:
    ids = [element["id"] for element in rich.elements if element["id"]]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in rich.all("a")} <= set(ids)
    labels = {name for element in rich.elements for name in element.get("aria-labelledby", "").split()}
    assert labels <= set(ids)


def test_what_was_not_measured_is_said_with_its_reason(rich: Page) -> None:
    text = rich.one("details", id="outputs-absent")["text"]
    assert "outputs/loss/audio" in text
    assert "no supervised audio token in the step" in text
    assert "outputs/loss/total" not in text
    assert "outputs/accuracy/text" in text


def test_notes_units_and_directions_are_the_runs_and_the_catalogues(tmp_path: Path) -> None:
    write_run(
        tmp_path, {1: [Scalar("gradients/total_norm", 1.0, note="after clipping"), Scalar("outputs/loss/text", 1.0)]}
    )
    page = report(tmp_path)
    meanings = [p["text"] for p in page.all("p", **{"class": "meaning"})]
    assert any("Norm of all gradients" in meaning and "after clipping" in meaning for meaning in meanings)
    assert any("In nats per token. ↓ lower is better" in " ".join(meaning.split()) for meaning in meanings)
    assert page.data["charts"]["outputs-chart-0"]["unit"] == "nats per token"


def test_configuration_says_first_what_differs(tmp_path: Path) -> None:
    for name, rate in (("a", 0.1), ("b", 0.2)):
        records = {1: [Scalar("train/loss", 1.0)]}
        write_run(
            tmp_path / name,
            records,
            config={"rate": rate, "bf16": True, "only": name} if rate < 0.2 else {"rate": rate, "bf16": True},
        )
    section = report(tmp_path).one("section", id="configuration")["text"]
    assert section.index("0.2") < section.index("Settings that are the same (1)") < section.index("bf16")
    assert section.index("only") < section.index("Settings that are the same")


# -- charts ------------------------------------------------------------------------------------------------------------


def test_what_nobody_set_is_in_the_report_though_not_on_the_hparams_page(tmp_path: Path) -> None:
    config = {"rate": 0.5, "seed": 42, "on": False, "nested": {"a": "b"}, "huge": math.inf}
    write_run(tmp_path, {1: [Scalar("train/loss", 1.0)]}, config=config, defaults=frozenset({"seed", "nested.a"}))
    (run,) = read_runs([tmp_path])
    assert run.config == {"rate": 0.5, "seed": 42.0, "on": False, "nested.a": "b", "huge": "inf"}


def test_tags_that_no_chart_declares_get_charts_of_their_kind() -> None:
    tags = ["own/x_1/loss", "own/x_10/loss", "own/x_2/loss", "own/y", "inputs/tensor/ids/max", "inputs/tensor/ids/min"]
    tags += ["train/loss", "train/flos", "train/runtime"]
    _, charts = section_charts("none", tags, tags)
    assert charts == [
        Chart("inputs/tensor/ids", ("inputs/tensor/ids/max", "inputs/tensor/ids/min")),
        Chart("own/x_<n>/loss", ("own/x_1/loss", "own/x_2/loss", "own/x_10/loss")),
        Chart("own/y", ("own/y",)),
        Chart("train/flos", ("train/flos",)),
        Chart("train/loss", ("train/loss",)),
        Chart("train/runtime", ("train/runtime",)),
    ]


def test_a_declared_chart_may_show_another_sections_tag_beside_its_own() -> None:
    declared, more = section_charts("train", ["train/loss"], ["train/loss", "eval/loss"])
    assert declared == [Chart("Loss as the Trainer logs it", ("train/loss", "eval/loss"))]
    assert more == []
    assert section_charts("train", [], ["eval/loss"]) == ([], [])


@pytest.mark.parametrize(
    ("tags", "names"),
    [
        (["train/loss"], ["loss"]),
        (["train/loss", "eval/loss"], ["train", "eval"]),
        (["a/l_0/x/norm", "a/l_1/x/norm"], ["l_0", "l_1"]),
        (["a/total", "a/total/deep"], ["total", "total/deep"]),
        (["a/b", "a/b/b"], ["b", "b/b"]),
    ],
)
def test_lines_are_named_by_what_differs(tags: list[str], names: list[str]) -> None:
    assert short_names(tags) == names


def test_lines_of_one_chart_look_different() -> None:
    run = numbers_of({f"gradients/part_{n}/norm": [1.0] for n in range(8)} | {"x/a": [1.0], "x/b": [2.0]})
    many = numbers_of({f"attention/layer_{n}/sink": [1.0] for n in range(28)})
    for runs in ([run], [run, run, run]):
        tags = [f"gradients/part_{n}/norm" for n in range(8)]
        lines = chart_view("c", Chart("t", tuple(tags)), runs, Arrays.for_runs(runs)).lines
        assert len({(line.color, line.dash) for line in lines}) == len(lines) == 8 * len(runs)
    lines = chart_view("c", Chart("t", tuple(many.scalars)), [many], Arrays.for_runs([many])).lines
    assert [line.color for line in lines] == [None] * 28
    assert [line.place for line in lines] == sorted({line.place for line in lines})
    alone = chart_view("c", Chart("t", ("x/a",)), [run] * 10, Arrays.for_runs([run] * 10)).lines
    assert len({line.color for line in alone}) == 7
    assert len({line.dash for line in alone}) == 6


def test_a_thinned_line_keeps_its_spike_its_gap_and_its_ends() -> None:
    values = np.sin(np.arange(10_000) / 500).astype(np.float32)
    values[4321], values[7777], values[1234] = 99, -99, np.nan
    kept = thin(values, 300)
    assert len(kept) <= 310
    assert {0, 9_999, 4321, 7777, 1234} <= set(kept.tolist())
    assert np.all(np.diff(kept) > 0)
    assert thin(values[:300], 300).tolist() == list(range(300))
    assert len(thin(np.full(1000, np.nan, np.float32), 30)) <= 40


def test_the_numbers_of_a_line_are_those_of_all_its_values() -> None:
    run = numbers_of({"x/a": [math.nan, 3.0, -1.0, math.inf, 2.0]})
    (line,) = chart_view("c", Chart("t", ("x/a",)), [run], Arrays.for_runs([run])).lines
    assert (line.points, line.nonfinite, line.last, line.low, line.high) == (5, 2, (4, 2.0), -1.0, 3.0)


# -- size --------------------------------------------------------------------------------------------------------------


def test_arrays_are_held_once(tmp_path: Path) -> None:
    run = numbers_of({f"a/{n}": [1.0, 2.0] for n in range(50)})
    arrays = Arrays.for_runs([run])
    assert {arrays.add(series) for series in run.scalars.values()} == {(0, 1)}
    assert len(arrays.encoded) == 2


def test_long_runs_are_thinned_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "POINTS", 300)
    write_run(tmp_path, {step: [Scalar("train/loss", 1.0 / step)] for step in range(1, 1001)})
    page = report(tmp_path)
    (line,) = page.data["charts"]["train-chart-0"]["lines"]
    assert len(base64.b64decode(page.data["arrays"][line["steps"]])) < 4 * 320
    assert "1 long lines are thinned out to 300 points" in page.one("section", id="making")["text"]


def test_sound_has_its_bound_and_the_newest_step_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).standard_normal(8000).astype(np.float32) * 0.2
    clip = tone()
    loud = type(clip)(noise, 16000)
    write_run(tmp_path, {step: [Audio("inputs/target", (loud,)), Scalar("train/loss", 1.0)] for step in (1, 2, 3, 4)})
    one = collect(read_runs([tmp_path])).sounds.nbytes // 4
    monkeypatch.setattr(media_module, "AUDIO_BYTES", int(2.5 * one))
    loaded = []
    load = Stored.load
    monkeypatch.setattr(Stored, "load", lambda stored: loaded.append(stored.step) or load(stored))
    shelf = collect(read_runs([tmp_path])).sounds
    assert ([item.step for item in shelf.items], shelf.total) == ([4, 3], 4)
    assert loaded == [4, 3, 2]  # what cannot fit is not decoded to find that out
    assert "Sound: 2 of 4 are here, the newest" in report(tmp_path).one("section", id="making")["text"]


def test_every_runs_newest_sound_comes_before_any_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, {step: [Audio("inputs/target", (tone(),))] for step in (1, 2, 3)})
    one = collect(read_runs([tmp_path])).sounds.nbytes // 6
    monkeypatch.setattr(media_module, "AUDIO_BYTES", int(3.2 * one))
    shelf = collect(read_runs([tmp_path])).sounds
    assert [(item.run, item.step) for item in shelf.items] == [(0, 3), (0, 2), (1, 3)]


def test_sound_is_smaller_and_the_same(tmp_path: Path) -> None:
    write_run(tmp_path, {1: [Audio("inputs/target", (tone(2.0),))]})
    (run,) = read_runs([tmp_path])
    wav = run.media["inputs/target"][0].load()[0][0]
    (item,) = collect([run]).sounds.items
    clip = item.content[0]
    assert clip is not None
    flac = base64.b64decode(clip.source.partition(",")[2])
    assert len(flac) < len(wav)
    assert np.array_equal(
        soundfile.read(io.BytesIO(flac), dtype="int16")[0], soundfile.read(io.BytesIO(wav), dtype="int16")[0]
    )


def test_an_empty_place_among_clips_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, {1: [Audio("inputs/target", (tone(), tone()))], 2: [Audio("inputs/target", (tone(),))]})
    page = report(tmp_path)
    assert [len([a for a in page.all("audio") if f"inputs/target@{step}-0" in a["parents"]]) for step in (1, 2)] == [
        2,
        1,
    ]


def test_damaged_media_are_counted_and_do_not_stop_the_report(tmp_path: Path) -> None:
    rich_run(tmp_path)
    runs = read_runs([tmp_path])
    for stored in runs[0].media.values():
        stored[-1] = type(stored[-1])(**{**vars(stored[-1]), "offset": 3})
    page = Page(render(runs)[0])
    making = page.one("section", id="making")["text"]
    assert "Sound: 6 of 9 are here, the newest" in making
    assert "3 could not be read" in making


# -- runs --------------------------------------------------------------------------------------------------------------


def test_ten_runs_share_charts(tmp_path: Path) -> None:
    for n in range(10):
        write_run(
            tmp_path / f"run{n}",
            {s: [Scalar("train/loss", n / s), Alert("health/alerts", f"a{n}", "")] for s in (1, 2)},
        )
    page = report(tmp_path)
    assert page.data["runs"] == [f"run{n}" for n in range(10)]
    assert [line["run"] for line in page.data["charts"]["train-chart-0"]["lines"]] == list(range(10))
    assert len(page.all("input", type="checkbox")) == 10
    assert "8 earlier alerts" not in page.one("section", id="overview")["text"]
    assert "10 earlier alerts" in page.one("section", id="overview")["text"]


def test_a_run_with_only_the_trainers_own_numbers_has_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, {1: [Scalar("train/loss", 1.0)]})
    page = report(tmp_path)
    assert "No health checks in this run." in page.one("section", id="overview")["text"]
    assert "Nothing was recorded." in page.one("section", id="outputs")["text"]


def test_absence_in_one_of_two_runs_names_it(tmp_path: Path) -> None:
    write_run(tmp_path / "with", {1: [Scalar("gradients/total_norm", 1.0)]})
    write_run(tmp_path / "without", {1: [Scalar("train/loss", 1.0)]})
    runs = read_runs([tmp_path])
    absent = {entry.tag: lacking for entry, lacking in overview(runs, collect(runs)).absent["gradients"]}
    assert absent["gradients/total_norm"] == (1,)
    assert absent["gradients/text_audio_cosine"] == (0, 1)


def test_a_damaged_file_is_named_in_the_verdict(tmp_path: Path) -> None:
    path = write_run(tmp_path, {step: [Scalar("train/loss", 1.0)] for step in range(1, 9)})
    path.write_bytes(path.read_bytes()[:-30] + b"x" * 30)
    assert "damaged file" in report(tmp_path).one("section", id="overview")["text"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_one_whole_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rich_run(tmp_path / "run")
    output = tmp_path / "report.html"
    main(["report", str(tmp_path / "run"), "-o", str(output)])
    said = capsys.readouterr().out
    assert said.startswith(f"{output}: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]
    assert not re.search(
        r"""(?:src|href)=["'](?!data:|#)""", re.sub(r"<script\b.*?</script>", "", output.read_text(), flags=re.S)
    )
    assert output.stat().st_size < 6e6


@pytest.mark.parametrize("fault", ["missing", "empty", "unwritable"])
def test_a_fault_is_one_line_and_exit_code_2(tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", {1: [Scalar("train/loss", 1.0)]})
    (tmp_path / "empty").mkdir()
    directory = tmp_path / {"missing": "nothing", "empty": "empty", "unwritable": "run"}[fault]
    output = tmp_path / ("no/such/place.html" if fault == "unwritable" else "out.html")
    with pytest.raises(SystemExit) as left:
        main(["report", str(directory), "-o", str(output)])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert {"missing": "--logging_dir", "empty": "--logging_dir", "unwritable": "cannot make"}[fault] in error
    assert not output.exists()


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", {1: [Scalar("train/loss", 1.0)]})
    output = tmp_path / "report.html"
    output.write_text("old")

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report([tmp_path / "run"], output)
    assert output.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_without_plotly_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['plotly.offline'] = None; from dashboards.__main__ import main; main(['report', '.'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: plotly.offline is not installed: pip install 'strategic-telemetry[report]'\n"

"""The report in a real browser: drawn, heard, reachable by keyboard, readable, and asking nothing of the network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python import sync_playwright as axe
from playwright import sync_api as playwright_api
from report_runs import HOSTILE, rich_run, write_run

from dashboards.report import write_report
from telemetry.records import Scalar


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium: the one on PATH, or playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright_api.Error as error:
            pytest.skip(f"no Chromium on PATH and none of playwright's: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("browser")
    runs = [directory / "first", directory / HOSTILE.replace("/", "")[:60]]
    rich_run(runs[0])
    write_run(runs[1], {step: [Scalar("outputs/loss/total", 5.0 / step)] for step in (10, 20)})
    write_report(runs[1:], directory / "small.html")
    return write_report(runs, directory / "report.html").path


class Opened:
    """A page with everything that it complained about and asked for."""

    def __init__(self, browser, path: Path, **context: object) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_context(**context).new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def drawn(self, id_: str):
        """A chart, scrolled to, focused and so drawn by the library."""
        self.page.evaluate(
            """id => {
                const figure = document.getElementById(id);
                figure.scrollIntoView({block: "center"});
                if (!("drawn" in figure.dataset)) figure.querySelector(".plot").focus();
            }""",
            id_,
        )
        self.page.wait_for_selector(f"[id='{id_}'][data-drawn]")
        return self.page.locator(f"[id='{id_}']")


@pytest.fixture(scope="module")
def opened(browser, written: Path) -> Iterator[Opened]:
    opened = Opened(browser, written, viewport={"width": 1300, "height": 900})
    yield opened
    opened.page.context.close()


def test_players_play(opened: Opened) -> None:
    lengths = opened.page.evaluate(
        """() => Promise.all([...document.querySelectorAll("audio")].map(player => new Promise((done, fail) => {
            if (player.readyState >= 1) return done(player.duration);
            player.onloadedmetadata = () => done(player.duration);
            player.onerror = () => fail(player.error.message);
            player.load();
        })))"""
    )
    assert lengths == pytest.approx([0.5] * 9, abs=0.01)


def test_a_chart_answers_to_the_pointer(opened: Opened) -> None:
    chart = opened.drawn("outputs-chart-0")
    box = chart.locator(".plot").bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.page.wait_for_selector("[id='outputs-chart-0'] .hoverlayer text")
    text = chart.locator(".hoverlayer").text_content()
    assert "0.45" in text
    assert "first" in text


def test_charts_are_there_before_the_library_which_waits_for_a_touch(browser, written: Path) -> None:
    opened = Opened(browser, written, viewport={"width": 1300, "height": 900})
    drawn = """id => [...document.querySelectorAll(`[id='${id}'] .still g[data-line] path`)]
        .map(path => [path.getBBox().width > 100, getComputedStyle(path).stroke])"""
    assert opened.page.evaluate(drawn, "outputs-chart-0") == [
        [True, "rgb(0, 114, 178)"],
        [True, "rgb(0, 114, 178)"],
        [True, "rgb(213, 94, 0)"],
    ]
    assert opened.page.evaluate("typeof Plotly") == "undefined"
    opened.page.locator("[id='outputs-chart-0'] .plot").scroll_into_view_if_needed()
    opened.page.locator("[id='outputs-chart-0'] .plot").click()
    opened.page.wait_for_function("() => typeof Plotly == 'object'")
    assert opened.page.locator("[data-drawn]").count() == 1
    assert opened.complaints == []
    opened.page.context.close()


def test_the_contents_follow_the_reader(opened: Opened) -> None:
    at = "document.querySelector('nav a[aria-current]')?.textContent"
    opened.page.evaluate("document.getElementById('gradients').scrollIntoView()")
    opened.page.wait_for_function(f"() => {at} == 'Gradients'")
    opened.page.evaluate("scrollTo(0, 0)")
    opened.page.wait_for_function(f"() => {at} == 'First look'")


def test_a_line_is_hidden_and_shown_from_the_keyboard(opened: Opened) -> None:
    chart = opened.drawn("outputs-chart-0")
    button = chart.locator(".legend button").first
    shown = chart.locator(".scatterlayer .trace").count()
    button.focus()
    opened.page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert chart.locator(".scatterlayer .trace").count() == shown - 1
    assert opened.page.evaluate("document.activeElement.dataset.line") == "0"
    opened.page.keyboard.press("Enter")
    assert chart.locator(".scatterlayer .trace").count() == shown


def test_a_run_is_hidden_from_every_chart(opened: Opened) -> None:
    chart = opened.drawn("outputs-chart-0")
    shown = chart.locator(".scatterlayer .trace").count()
    opened.page.uncheck("[data-run='1']")
    assert chart.locator(".scatterlayer .trace").count() == shown - 1
    opened.page.check("[data-run='1']")
    assert chart.locator(".scatterlayer .trace").count() == shown


def test_a_value_that_is_not_finite_has_a_mark(opened: Opened) -> None:
    opened.drawn("gradients-chart-0")
    traces = opened.page.evaluate(
        """() => document.querySelector("[id='gradients-chart-0'] .live").data.map(t => [[...t.x], [...t.y], t.text])"""
    )
    assert traces[1] == [[20], [1.5], ["NaN"]]


@pytest.mark.parametrize(
    ("scheme", "colors"),
    [("dark", ("rgb(20, 23, 28)", "#14171c")), ("light", ("rgb(255, 255, 255)", "#ffffff"))],
)
def test_no_serious_barrier_in_light_or_dark(opened: Opened, scheme: str, colors: tuple[str, str]) -> None:
    opened.drawn("attention-chart-0")
    opened.page.emulate_media(color_scheme=scheme)
    plot = "document.querySelector('[data-drawn] .live').layout.paper_bgcolor"
    opened.page.wait_for_function(f"color => {plot} == color", arg=colors[1])
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == colors[0]
    found = axe.Axe().run(opened.page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")] == []


def test_a_phone_scrolls_one_way_and_print_holds_everything_that_is_open(browser, written: Path) -> None:
    opened = Opened(browser, written, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    opened.drawn("inputs-chart-0")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.page.evaluate("document.querySelector('[data-drawn] .live').layout.dragmode") is False
    unseen = """[...document.querySelectorAll("figure.chart")].filter(figure => figure.getClientRects().length
        && !figure.querySelector(".still path:not(.grid)").getClientRects().length).length"""
    assert opened.page.evaluate(unseen) == 1  # the one that is drawn by the library
    opened.page.emulate_media(media="print")
    opened.page.set_viewport_size({"width": 690, "height": 1000})
    assert opened.page.evaluate(unseen) == 0
    wide = "[...document.querySelectorAll('.scroller, .plot')].filter(s => s.scrollWidth > s.clientWidth + 1).length"
    assert opened.page.evaluate(wide) == 0
    opened.page.context.close()


def test_the_keyboard_reaches_the_report_first_and_links_open_what_is_closed(browser, written: Path) -> None:
    opened = Opened(browser, written.with_name("small.html"), viewport={"width": 1300, "height": 900})
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.className") == "skip"
    assert opened.page.evaluate("getComputedStyle(document.activeElement).left") == "0px"
    opened.page.keyboard.press("Enter")
    assert opened.page.evaluate("document.activeElement.id") == "main"
    opened.page.click("a[href='#attention-absent']")
    opened.page.locator("[id='attention-absent'] table").wait_for(state="visible")
    opened.page.context.close()


def test_hostile_strings_ran_nowhere_and_nothing_was_asked_of_the_network(opened: Opened) -> None:
    opened.page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    for id_ in opened.page.evaluate("[...document.querySelectorAll('figure.chart')].map(figure => figure.id)"):
        opened.drawn(id_)
    assert opened.page.evaluate("typeof window.hacked") == "undefined"
    assert {url.partition(":")[0] for url in opened.requests} <= {"file", "data", "blob"}
    assert [url for url in opened.requests if url.startswith("file:")] == [opened.page.url.partition("#")[0]]
    assert opened.complaints == []
    legend = opened.page.locator("[id='outputs-chart-0'] .legend").text_content()
    assert HOSTILE.replace("/", "")[:60] in legend

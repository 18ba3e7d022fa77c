"""Pictures of what people look at, made from the demonstration's run: ``make pictures``.

Each is a photograph of the real thing in a headless browser: TensorBoard, the HTML report, ``dashboards status`` as a
terminal shows it, and a table of clips as a stand-in W&B server has received it from the real client.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import soundfile
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from support import wandb_server
from support.tensorboard_server import serve as serve_tensorboard

from dashboards import status
from dashboards.report import write_report
from dashboards.runs import Run, Stored, read_runs
from telemetry.backends.base import Run as Opened
from telemetry.backends.wandb import WandbBackend
from telemetry.records import Audio, Cell, Clip, Image, Record, Table

MOST_BYTES = 1_500_000
COLORS = 128
TABLE = "zero_shot/clips"
SHOWN_ROWS = 3
SHOWN = (
    "sample", "speaker", "target text", "reference", "target", "generated", "spectrogram", "ended by", "mel_distance",
    "since before training",
)  # fmt: skip
STYLE = """body { margin: 0; padding: 16px; font: 14px/1.4 system-ui, sans-serif; background: #fff; color: #1b1f24; }
h1 { font-size: 17px; margin: 0 0 10px; } table { border-collapse: collapse; }
th, td { border: 1px solid #d5d9e0; padding: 6px 8px; text-align: left; vertical-align: middle; max-width: 190px; }
th { background: #f5f6f8; } audio { width: 110px; height: 32px; } img { height: 110px; }
pre { margin: 0; font: 14px/1.35 "DejaVu Sans Mono", monospace; }"""


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the demonstration's directory, in which logs/ lies")
    parser.add_argument("output", type=Path)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    logs = asked.run / "logs"
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        directory = Path(place)
        for name, picture in (
            ("tensorboard", tensorboard(browser, logs, directory)),
            ("report", report(browser, logs, directory)),
            ("status", terminal(browser, logs)),
            ("wandb", wandb_table(browser, logs, directory)),
        ):
            path = asked.output / f"{name}.png"
            path.write_bytes(_smaller(picture))
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()
    total = sum(path.stat().st_size for path in asked.output.glob("*.png"))
    if total > MOST_BYTES:
        raise SystemExit(f"the pictures take {total:,} bytes, which is more than {MOST_BYTES:,}")


def _page(browser: Browser, width: int, height: int) -> Page:
    return browser.new_page(viewport={"width": width, "height": height})


def _smaller(picture: bytes) -> bytes:
    """The picture in few colors."""
    stream = io.BytesIO()
    PIL.Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLORS).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def tensorboard(browser: Browser, logs: Path, directory: Path) -> bytes:
    """Photograph TensorBoard's Custom Scalars."""
    shutil.copytree(logs, directory / "tensorboard" / "demo")
    with serve_tensorboard(directory / "tensorboard", "rust") as server:
        server.wait_for(lambda: server.runs() == ["demo"])
        server.wait_for(lambda: len(server.scalars("outputs/loss/total", "demo")) > 1)
        page = _page(browser, 1200, 800)
        page.goto(f"{server.url}/#custom_scalars")
        page.get_by_text("Matches (").first.wait_for()
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(2000)  # its lines are drawn in frames of an animation, which tells nobody when it ends
        return page.screenshot()


def report(browser: Browser, logs: Path, directory: Path) -> bytes:
    """Photograph the first screen of the report."""
    path = write_report([logs], directory / "report.html").path
    page = _page(browser, 1200, 800)
    page.goto(path.resolve().as_uri())
    page.wait_for_load_state("load")
    return page.screenshot()


def terminal(browser: Browser, logs: Path) -> bytes:
    """Photograph what ``dashboards status`` prints."""
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    status.show([logs], console)
    said = console.export_html(inline_styles=True, theme=SVG_EXPORT_THEME, code_format="<pre>{code}</pre>")
    return _element(browser, f'<div id="whole" style="background:#1b1f24;color:#e7eaee;padding:14px">{said}</div>')


def _element(browser: Browser, body: str) -> bytes:
    page = _page(browser, 1200, 800)
    shell = f'<!doctype html><meta charset="utf-8"><style>{STYLE} #whole {{ display: inline-block }}</style>'
    page.set_content(shell + body, wait_until="load")
    return page.locator("#whole").screenshot()


# The table of clips


def wandb_table(browser: Browser, logs: Path, directory: Path) -> bytes:
    """Photograph the newest table of clips as the server has received it."""
    (run,) = read_runs([logs])
    stored = run.media[TABLE][-1]
    table = stored.record()
    assert isinstance(table, Table)
    media = dict(_media(run, stored.step))
    rows = tuple(tuple(_cell(cell, media) for cell in row) for row in table.rows)
    received = _received([*media.values(), Table(TABLE, table.columns, rows)], stored.step, directory / "wandb")
    shown = [received.columns.index(name) for name in SHOWN if name in received.columns]
    head = "".join(f"<th>{html.escape(received.columns[at])}</th>" for at in shown)
    body = "".join(
        f"<tr>{''.join(f'<td>{_drawn(row[at])}</td>' for at in shown)}</tr>"
        for row in received.rows[-len(rows) :][:SHOWN_ROWS]
    )
    title = f"<h1>{TABLE}, step {stored.step}</h1>"
    return _element(browser, f'<div id="whole">{title}<table><tr>{head}</tr>{body}</table></div>')


def _media(run: Run, step: int) -> Iterator[tuple[str, Audio | Image]]:
    """Sounds and pictures of a step, by their tags."""
    for tag, stored in run.media.items():
        for one in stored:
            if one.step == step and one.kind in ("audio", "images"):
                yield tag, _sound(one) if one.kind == "audio" else _picture(one)


def _sound(stored: Stored) -> Audio:
    samples, rate = soundfile.read(io.BytesIO(stored.load()[0, 0]), dtype="float32")
    return Audio(stored.tag, (Clip(samples, rate),))


def _picture(stored: Stored) -> Image:
    return Image(stored.tag, np.asarray(PIL.Image.open(io.BytesIO(stored.load()[2])).convert("RGB")))


def _cell(cell: Cell, media: dict[str, Audio | Image]) -> Cell:
    """A cell with what it refers to: event files hold sounds and pictures beside their tables."""
    return media.get(cell[4:], cell) if isinstance(cell, str) and cell.startswith("see ") else cell


def _received(records: Sequence[Record], step: int, directory: Path) -> wandb_server.Table:
    """What a server holds of these records after the client has sent them."""
    with wandb_server.serve(directory / "server") as server:
        with mock.patch.dict(os.environ, server.environment(directory / "client")):
            backend = WandbBackend()
            backend.open(Opened(directory / "logs", name="demo"))
            backend.write(step, records)
            while backend.catch_up(last=True):
                pass
            backend.close()
        state = server.wait_for(lambda state: state.run().tables(TABLE))
    table: wandb_server.Table = state.run().tables(TABLE)[-1]
    return table


def _drawn(cell: Any) -> str:
    """A cell as HTML: sound and pictures by what their first bytes say."""
    if not isinstance(cell, bytes):
        return html.escape(f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell))
    data = base64.b64encode(cell).decode()
    if cell.startswith(b"RIFF"):
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'
    return f'<img alt="" src="data:image/png;base64,{data}">'


if __name__ == "__main__":
    main()

"""The HTML report of a long run: how large it is, how long it takes to make and to open."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from dashboards.report import write_report
from telemetry.backends.base import Run
from telemetry.backends.tensorboard import TensorBoardBackend
from telemetry.records import Scalar

STEPS, SCALARS, OPENINGS = 1000, 300, 5
LAYERS = 28


def rows() -> list[tuple[str, ...]]:
    """What was measured, and the figure. Opening is left out where there is no Chromium."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        _write_run(directory / "run")
        start = time.perf_counter()
        written = write_report([directory / "run"], directory / "report.html")
        made = time.perf_counter() - start
        return [("made, s", f"{made:.2f}"), ("size, MB", f"{written.nbytes / 1e6:.1f}"), *_opening(written.path)]


def _write_run(directory: Path) -> None:
    tags = [f"outputs/{kind}/codebook_{k}" for kind in ("loss", "accuracy", "top5") for k in range(8)]
    tags += [
        f"attention/layer_{n}/{kind}" for n in range(LAYERS) for kind in ("target_to_reference", "entropy", "sink")
    ]
    tags += [f"gradients/layer_{n}/{part}/norm" for n in range(LAYERS) for part in ("shared_attention", "audio_ffn")]
    tags += [f"inputs/tensor/tensor_{n}/mean" for n in range(SCALARS - len(tags))]
    values = np.random.default_rng(0).standard_normal((STEPS, SCALARS)).cumsum(0)
    backend = TensorBoardBackend()
    backend.open(Run(directory))
    for step in range(STEPS):
        backend.write(step + 1, [Scalar(tag, float(value)) for tag, value in zip(tags, values[step], strict=True)])
    backend.close()


def _opening(path: Path) -> list[tuple[str, ...]]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ModuleNotFoundError:
        return [("opening", "playwright is not installed")]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except Error:
            return [("opening", "no Chromium")]
        times = [_open(browser, path) for _ in range(OPENINGS)]
        browser.close()
    painted, drawn = np.median(times, axis=0)
    return [("first text seen, s", f"{painted:.2f}"), ("first chart seen, s", f"{drawn:.2f}")]


def _open(browser: object, path: Path) -> tuple[float, float]:
    """Seconds from navigation to the first paint and to the first drawn chart."""
    page = browser.new_page(viewport={"width": 1400, "height": 1600})  # type: ignore[attr-defined]
    page.goto(path.as_uri(), wait_until="commit")
    page.wait_for_selector("figure.chart .still path", state="attached")
    painted, drawn = page.evaluate(
        """() => new Promise(done => {
            const look = () => {
                const [paint] = performance.getEntriesByType("paint");
                if (paint) return done([paint.startTime, performance.now()]);
                requestAnimationFrame(() => setTimeout(look));
            };
            requestAnimationFrame(() => setTimeout(look)); // after the frame that holds the chart
        })"""
    )
    page.close()
    return painted / 1000, drawn / 1000

"""A real TensorBoard server in a process of its own, and the questions that tests ask it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np

from .programs import wait_until

LOADERS: dict[str, list[str]] = {
    "rust": ["--load_fast=true", "--reload_interval=1"],
    "python": ["--load_fast=false", "--reload_task=blocking", "--reload_interval=0"],
}
PATIENCE = 100.0  # seconds, on a machine with much else to do
SAMPLES = "scalars=100000,text=1000,audio=200,images=200"


class Server:
    """Answers of one server, parsed."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str | int) -> bytes:
        url = f"{self.url}/data/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return answer.read()

    def json(self, path: str, **query: str | int) -> Any:
        return json.loads(self.get(path, **query))

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/data/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read())

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Ask again until ``ready`` holds: the data server reads files when it gets to it."""
        wait_until(ready, PATIENCE, (urllib.error.HTTPError, KeyError))

    def runs(self) -> list[str]:
        return sorted(self.json("runs"))

    def tags(self, plugin: str, run: str = ".") -> set[str]:
        """Tags of one page (scalars, text, audio, images or histograms)."""
        answer = self.json(f"plugin/{plugin}/tags").get(run, {})
        return set(answer)

    def scalars(self, tag: str, run: str = ".") -> list[tuple[int, Any]]:
        """``(step, value)`` in the order shown."""
        points = self.json("plugin/scalars/scalars", tag=tag, run=run)
        return [(step, value) for _, step, value in points]

    def wall_times(self, tag: str, run: str = ".") -> list[float]:
        return [wall_time for wall_time, _, _ in self.json("plugin/scalars/scalars", tag=tag, run=run)]

    def texts(self, tag: str, run: str = ".") -> dict[int, str]:
        """Step to the HTML that the text page inserts."""
        return {event["step"]: event["text"] for event in self.json("plugin/text/text", tag=tag, run=run)}

    def clips(self, tag: str, sample: int, run: str = ".") -> dict[int, Sound]:
        """Step to what one numbered clip holds."""
        events = self.json("plugin/audio/audio", tag=tag, run=run, sample=sample)
        return {e["step"]: Sound(self.get(f"plugin/audio/individualAudio?{e['query']}")) for e in events}

    def images(self, tag: str, run: str = ".") -> dict[int, bytes]:
        """Step to the picture's file."""
        events = self.json("plugin/images/images", tag=tag, run=run, sample=0)
        return {e["step"]: self.get(f"plugin/images/individualImage?{e['query']}") for e in events}


class Sound:
    """A WAV file's parts.

    Attributes:
        rate: in hertz.
        samples: int16, ``[frames, channels]``.
    """

    def __init__(self, file: bytes) -> None:
        with wave.open(io.BytesIO(file)) as stream:
            self.rate = stream.getframerate()
            frames = stream.readframes(stream.getnframes())
            self.samples = np.frombuffer(frames, "<i2").reshape(-1, stream.getnchannels())

    @property
    def rms(self) -> float:
        """Root mean square, 1 for full scale."""
        return float(np.sqrt(np.mean(np.square(self.samples / 32768.0))))


@contextlib.contextmanager
def serve(logdir: Path, loader: str) -> Iterator[Server]:
    """A server on a free port of this machine alone. ``loader`` is a key of :data:`LOADERS`."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    command += ["--samples_per_plugin", SAMPLES, *LOADERS[loader]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield Server(_address(process))
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def _address(process: subprocess.Popen[str]) -> str:
    """Where the server says that it listens. Goes on reading its messages, so that it never waits for a reader."""
    lines: Queue[str] = Queue()
    assert process.stderr is not None
    threading.Thread(
        target=lambda stream: [lines.put(line) for line in stream], args=(process.stderr,), daemon=True
    ).start()
    said = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(Empty):
            said.append(lines.get(timeout=1))
            if match := re.search(r"http://127\.0\.0\.1:\d+", said[-1]):
                return match[0]
        if process.poll() is not None:
            break
    raise RuntimeError("TensorBoard did not start: " + "".join(said))

"""A stand-in for the W&B server: the real client runs against it, and tests read what reached it.

It is a process of its own, so that it can be killed and come back with what its journal holds, and so that it takes
nothing from the program that is measured: ``python -m support.wandb_server --port 0 --journal DIRECTORY``.
See ``wandb_stand_in/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .programs import wait_until
from .wandb_stand_in.serving import Fault, listen
from .wandb_stand_in.state import Alert, Artifact, Journal, Run, State, Table, View

__all__ = ["API_KEY", "Alert", "Artifact", "Fault", "Run", "Server", "State", "Table", "View", "serve"]

API_KEY = "stand-in-" + "0" * 40
PATIENCE = 100.0  # seconds, on a machine with much else to do


class Server:
    """One stand-in: starting, breaking and reading it.

    Args:
        directory: where its journal lies and goes on, in ``journal``.
    """

    def __init__(self, directory: Path) -> None:
        self.journal = Journal(directory.absolute() / "journal")
        self.journal.directory.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Its address, which it keeps when it starts again."""
        return f"http://127.0.0.1:{self._port}"

    def environment(self, directory: Path) -> dict[str, str]:
        """Environment variables with which the real client works with this server alone.

        Args:
            directory: where the client keeps everything that it writes: runs, staged artifacts, caches, settings.
        """
        return client_environment(self.url, directory)

    def start(self) -> None:
        """Start it, on the port that it had before if it had one. Returns when it answers."""
        command = [sys.executable, "-m", "support.wandb_server", "--port", str(self._port), "--until-stdin-closes"]
        self._process = subprocess.Popen(
            [*command, "--journal", str(self.journal.directory)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said.strip().isdigit():
            raise RuntimeError("the stand-in did not start")
        self._port = int(said)

    def kill(self) -> None:
        """As ``kill -9``: connections are refused from now on."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def restart(self) -> None:
        """Back on the same port, with what the journal holds and without faults."""
        self.kill()
        self.start()

    def fail(self, *faults: Fault) -> None:
        """Have these faults from now on, in place of those before; the first that is for a request takes it."""
        body = json.dumps([dataclasses.asdict(fault) for fault in faults]).encode()
        request = urllib.request.Request(f"{self.url}/faults", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            answer.read()

    def heal(self) -> None:
        """No more faults."""
        self.fail()

    def state(self) -> State:
        """Everything that reached it, read from its journal: also after its end, and from another process."""
        return self.journal.state()

    def runs(self) -> list[Run]:
        """All runs, in the order of their making."""
        return self.state().runs()

    def run(self, run_id: str | None = None) -> Run:
        """The run of an id; without one, the only run.

        Raises:
            KeyError: when it is not there, or there is not one alone.
        """
        return self.state().run(run_id)

    def views(self) -> list[View]:
        """Saved workspaces."""
        return list(self.state().views.values())

    def find(self, *secrets: str) -> dict[str, list[str]]:
        """Which of these texts reached the server, and where they are found."""
        return self.journal.find(*secrets)

    def wait_for(self, ready: Callable[[State], Any], seconds: float = PATIENCE) -> State:
        """Read again until ``ready`` holds, taking a run that is not there yet as not ready."""
        wait_until(lambda: ready(self.state()), seconds, KeyError)
        return self.state()


def client_environment(url: str, directory: Path, **settings: str) -> dict[str, str]:
    """Environment variables with which the real client knows the server at ``url`` alone and writes here alone."""
    directory.mkdir(parents=True, exist_ok=True)  # where it is missing the client falls back to the system's
    return {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": API_KEY,
        "WANDB_MODE": "online",
        "WANDB_DIR": str(directory),
        "WANDB_DATA_DIR": str(directory / "data"),
        "WANDB_CACHE_DIR": str(directory / "cache"),
        "WANDB_CONFIG_DIR": str(directory / "config"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONSOLE": "off",
        "WANDB_SILENT": "true",
        "WANDB_X_DISABLE_STATS": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **settings,
    }


@contextlib.contextmanager
def serve(directory: Path, *earlier: Server) -> Iterator[Server]:
    """A stand-in on a free port of this machine alone; gone when the context ends, its journal stays.

    Args:
        directory: of its journal.
        earlier: servers whose journals it begins with.
    """
    server = Server(directory)
    for other in earlier:
        server.journal.take_in(other.journal)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve until killed; says its port when it is ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--journal", type=Path, required=True, help="directory that keeps what was sent")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started it")
    arguments = parser.parse_args()
    listener = listen(arguments.port, arguments.journal)
    print(listener.server_address[1], flush=True)
    if arguments.until_stdin_closes:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    listener.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()

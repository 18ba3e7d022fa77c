"""The stand-in's HTTP side: routes, injected faults, and the journal's writer."""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from .graphql import Answers, operation
from .state import Entry, Journal

ASYNC_CLIENT = "X-WANDB-ASYNC-CLIENT-ID"
DROPPED = 0


@dataclass
class Fault:
    """What happens to requests instead of, or before, a right answer.

    Attributes:
        of: ``graphql``, ``file_stream``, ``upload``, or ``all``.
        status: answered with this, nothing accepted; 0 hangs up without an answer; None only delays.
        matching: only requests whose GraphQL operation or path holds this text.
        calls: how many requests it is for; None for all.
        seconds: for how long from now; None for ever.
        delay: seconds before the answer.
        accepted: the request is taken in all the same, and only its answer is lost.
    """

    of: str = "all"
    status: int | None = None
    matching: str = ""
    calls: int | None = None
    seconds: float | None = None
    delay: float = 0.0
    accepted: bool = False

    def __post_init__(self) -> None:
        self._until = None if self.seconds is None else time.monotonic() + self.seconds

    def takes(self, of: str, what: str) -> bool:
        """Whether it is for this request; then it is one call nearer to its end."""
        if self.of not in ("all", of) or self.matching not in what or self.is_over:
            return False
        if self.calls is not None:
            self.calls -= 1
        return True

    @property
    def is_over(self) -> bool:
        return self.calls == 0 or (self._until is not None and time.monotonic() > self._until)


class Core:
    """What all connections share: the state, the journal's writer and the faults."""

    def __init__(self, journal: Journal, address: str) -> None:
        journal.blobs.mkdir(parents=True, exist_ok=True)
        self._journal = journal
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._state = journal.state()
        _cut_torn_line(journal.path)
        self._lines = journal.path.open("ab", buffering=0)
        self._answers = Answers(self._state, self._apply, address)

    def set_faults(self, faults: list[Fault]) -> None:
        with self._lock:
            self._faults = faults

    def fault(self, of: str, what: str) -> Fault | None:
        """The fault that this request meets."""
        with self._lock:
            return next((fault for fault in self._faults if fault.takes(of, what)), None)

    def note_refused(self, of: str, status: int) -> None:
        with self._lock:
            self._apply({"kind": "refused", "of": of, "status": status})

    def graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            data = self._answers.answer(name, variables)
        return {"errors": [{"message": f"the stand-in has no answer to {name}"}]} if data is None else {"data": data}

    def stream(self, where: list[str], client: str, body: dict[str, Any]) -> dict[str, Any]:
        entity, project, run = where
        entry: Entry = {"kind": "stream", "entity": entity, "project": project, "run": run, "client": client}
        with self._lock:
            self._apply({**entry, "body": body, "at": time.time()})
        return {"exitcode": None, "limits": {}}

    def upload(self, where: list[str], content: bytes) -> dict[str, Any]:
        name = hashlib.sha256(content).hexdigest()
        path = self._journal.blobs / name
        with self._lock:
            if not path.exists():
                # Whole or not there at all, though the server is killed in the middle.
                part = path.with_suffix(".part")
                part.write_bytes(content)
                part.rename(path)
            self._apply({"kind": "upload", "where": where, "blob": name})
        return {}

    def _apply(self, entry: Entry) -> Any:
        made = self._state.apply(entry)
        self._lines.write(json.dumps(entry).encode() + b"\n")
        return made


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write a response: headers and body apart cost the client tens of milliseconds a call
    disable_nagle_algorithm = True
    core: ClassVar[Core]

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/faults":
            self.core.set_faults([Fault(**given) for given in json.loads(body)])
            self._send(200, {})
        elif self.path == "/graphql":
            asked = json.loads(body)
            name = operation(asked["query"])
            self._answer("graphql", name, lambda: self.core.graphql(name, asked.get("variables") or {}))
        elif self.path.startswith("/files/") and self.path.endswith("/file_stream"):
            where = [unquote(part) for part in self.path.split("/")[2:5]]
            client = self.headers.get(ASYNC_CLIENT, "")
            self._answer("file_stream", self.path, lambda: self.core.stream(where, client, json.loads(body)))
        else:
            self._send(404, {"error": f"the stand-in has nothing at {self.path}"})

    def do_PUT(self) -> None:
        content = self._body()
        where = [unquote(part) for part in self.path.split("/")[2:]]
        self._answer("upload", "/".join(where), lambda: self.core.upload(where, content))

    def do_GET(self) -> None:
        found = self.path in ("/", "/healthz")
        self._send(200 if found else 404, {"ok": found})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, of: str, what: str, act: Callable[[], dict[str, Any]]) -> None:
        """Take a request in and say so, or let it meet its fault."""
        fault = self.core.fault(of, what) or Fault()
        time.sleep(fault.delay)
        if fault.status is None:
            self._send(200, act())
            return
        if fault.accepted:
            act()
        self.core.note_refused(of, fault.status)
        if fault.status == DROPPED:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._send(fault.status, {"errors": [{"message": f"injected {fault.status}"}]})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the journal does."""


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def listen(port: int, journal: Path) -> Listener:
    """A server on this machine alone; ``port`` 0 takes a free one."""
    listener = Listener(("127.0.0.1", port), Handler)
    Handler.core = Core(Journal(journal), f"http://127.0.0.1:{listener.server_address[1]}")
    return listener

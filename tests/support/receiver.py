"""A web server on this machine that alerts are sent to, and what it was sent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """Attributes: ``port``; ``got``: when each message came (``time.time()``), its path and its JSON."""

    port: int
    got: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)

    def address(self, path: str = "hook", secret: str = "") -> str:
        """Apprise's name of it."""
        return f"json://{f'someone:{secret}@' if secret else ''}127.0.0.1:{self.port}/{path}"


@contextmanager
def receiver(answer: Callable[[BaseHTTPRequestHandler], None] | int = 200) -> Iterator[Receiver]:
    """A server that answers every message with a status, or as a function does."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.got.append((time.time(), self.path, json.loads(body)))
            if callable(answer):
                answer(self)
            else:
                self.send_response(answer)
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made = Receiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

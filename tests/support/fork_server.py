"""Starts Python programs as forks of one process that has imported torch and transformers: milliseconds, not seconds.

A fork becomes the program: it has the program's arguments, environment and directory, ends as an interpreter ends
(threads, exit hooks, status of an uncaught exception), and can be sent signals. What is about the start of an
interpreter itself (the order of imports, ``-X`` options) needs one of its own.

``python fork_server.py SOCKET`` serves until its standard input closes, and imports nothing heavy before it is asked
for a first program. ``python fork_server.py --whole PROGRAM ARGUMENT...`` (or ``--brief``) has a program forked by the
server that :data:`ADDRESS` names and ends as it does: for launchers that start commands, such as torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADDRESS = "TESTS_FORK_SERVER"
PRELOADED = (
    "trainer",  # first: repairs what transformers imports
    "torch.distributed.argparse_util",
    "torch.distributed.launcher.api",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.fsdp",
    "torch._dynamo.utils",
    "accelerate",
    "peft",
    "psutil",
    "rich.console",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.higgs_audio_v2.modeling_higgs_audio_v2",
    "tensorboard.backend.event_processing.event_file_loader",
    "trainer.demo.prepare",
    "trainer.higgs_trainer",
)
SAFE_OVER_FORKS = ("jemalloc_bg_thd",)  # pyarrow's allocator, which starts its thread anew in a fork
START_SECONDS = 120  # of the imports, on a machine with much else to do


@dataclass(frozen=True)
class Request:
    """A program to become.

    Attributes:
        arguments: of Python: a file, ``-m`` and a module, or ``-c`` and code, and what is handed to it.
        environment: all of it.
        directory: where it runs.
        brief: end after threads and exit hooks, without taking down all that was imported, which takes half a second.
    """

    arguments: list[str]
    environment: dict[str, str]
    directory: str
    brief: bool


# -------------------------------------------------------------------------------------------------------------- asking


class Forked:
    """A program that a server has forked; as much of ``subprocess.Popen`` as tests use.

    Args:
        arguments: see :class:`Request`.
        stdin, stdout, stderr: descriptors, taken as they are.
        env: all of its environment; this process's where it is None.
        brief: see :class:`Request`.

    Attributes:
        pid: of the program itself.
        returncode: exit status, negative for a signal; None while it runs.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        stdin: int = 0,
        stdout: int = 1,
        stderr: int = 2,
        env: Mapping[str, str] | None = None,
        brief: bool = False,
    ) -> None:
        self.arguments = list(arguments)
        self.returncode: int | None = None
        environment = dict(os.environ if env is None else env)
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(START_SECONDS)
        self._connection.connect(os.environ[ADDRESS])
        request = json.dumps(asdict(Request(self.arguments, environment, str(Path.cwd()), brief))).encode()
        socket.send_fds(self._connection, [len(request).to_bytes(4, "big")], [stdin, stdout, stderr])
        self._connection.sendall(request)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())
        self._connection.settimeout(None)

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Exit status.

        Raises:
            subprocess.TimeoutExpired: when it has not ended in time.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def stand_in_for(arguments: Sequence[str], brief: bool) -> None:
    """Run a program as a fork, hand signals on to it, and end as it does."""
    handed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, handed_on)  # none is lost before there is a program
    program = Forked(arguments, brief=brief)
    for number in handed_on:
        signal.signal(number, lambda number, _frame: program.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handed_on)
    status = program.wait()
    if status >= 0:
        sys.exit(status)
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """A server for the programs of this process and of those that it starts; its address."""
    with tempfile.TemporaryDirectory() as directory:
        address = str(Path(directory) / "socket")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}
        process = subprocess.Popen(
            [sys.executable, __file__, address],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the tests, which end what they have started
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield address
        finally:
            process.communicate()


# ------------------------------------------------------------------------------------------------------------- serving


class Server:
    """Forks programs and says how they end, until standard input closes."""

    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._children, said = socket.socketpair()  # a byte for every child that ends
        said.setblocking(False)
        self._said = said
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(said.fileno())
        self._selector = selectors.DefaultSelector()
        for readable in (self._listener, self._children, sys.stdin):
            self._selector.register(readable, selectors.EVENT_READ)
        self._running: dict[int, socket.socket] = {}

    def serve(self) -> Request | None:
        """None in this process, in the end; in a fork the program that it is to become."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    self._end()
                    return None
                if key.fileobj is self._children:
                    self._children.recv(4096)
                    self._reap(os.WNOHANG)
                elif key.fileobj is self._listener:
                    request = self._fork()
                    if request is not None:
                        return request
                else:
                    self._forsaken(key.fileobj)

    def _fork(self) -> Request | None:
        preload()
        connection, _ = self._listener.accept()
        size, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
        with connection.makefile("rb") as stream:
            request = Request(**json.loads(stream.read(int.from_bytes(size, "big"))))
        pid = os.fork()
        if pid == 0:
            self._leave(connection)
            for standard, descriptor in enumerate(descriptors):
                os.dup2(descriptor, standard)
        for descriptor in descriptors:
            os.close(descriptor)
        if pid == 0:
            return request
        self._running[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ)
        connection.sendall(f"{pid}\n".encode())
        return None

    def _leave(self, connection: socket.socket) -> None:
        """In a fork: nothing of the server is left."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for held in (self._listener, self._children, self._said, connection, *self._running.values()):
            held.close()

    def _reap(self, options: int) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, options))[0]:
                pid, status = ended
                connection = self._running.pop(pid)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(connection)
                with contextlib.suppress(OSError):  # nobody wants to know
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()

    def _forsaken(self, connection: Any) -> None:
        """Who has asked for a program is gone: so is the program."""
        self._selector.unregister(connection)
        os.kill(next(pid for pid, held in self._running.items() if held is connection), signal.SIGKILL)

    def _end(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        self._reap(0)


def preload() -> None:
    """Import what programs import, once; no thread may come of it, or forks could wait for one forever."""
    if PRELOADED[0] not in sys.modules:
        for name in PRELOADED:
            importlib.import_module(name)
        telemetry = importlib.import_module("telemetry")
        for name in telemetry.__all__:
            getattr(telemetry, name)
        threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        assert len([name for name in threads if name not in SAFE_OVER_FORKS]) == 1, threads
        gc.collect()
        gc.freeze()  # the end of a fork then need not go through all that was imported


def become(request: Request) -> None:
    """Run a program in this process as its interpreter would."""
    if not request.brief:
        _run(request)
        return
    status = 0
    try:
        _run(request)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:  # noqa: BLE001
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(request: Request) -> None:
    os.chdir(request.directory)
    os.environ.clear()
    os.environ.update(request.environment)
    if "HF_HOME" in os.environ:  # the one variable that what was imported has read already
        importlib.import_module("huggingface_hub.constants").HF_HOME = os.environ["HF_HOME"]
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first, *rest = request.arguments
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        sys.path[:1] = ["", *path]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = rest
        sys.path[:1] = [request.directory, *path]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = request.arguments
        sys.path[:1] = [str(Path(first).resolve().parent), *path]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] in ("--whole", "--brief"):
        stand_in_for(sys.argv[2:], brief=sys.argv[1] == "--brief")
    else:
        server = Server(sys.argv[1])
        print("ready", flush=True)
        asked = server.serve()
        if asked is not None:
            become(asked)

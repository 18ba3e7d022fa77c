"""Logging for a run of many processes: every rank may log, one speaks."""

from __future__ import annotations

import logging
import os
import sys
import unicodedata

from tqdm import tqdm

from telemetry.redaction import redact

LOGGERS = ("telemetry", "trainer", "transformers")
"""The loggers that :func:`setup_logging` sets up."""

_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # scripts and emoji are written with them
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of what steers a terminal, or the order of characters
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def printable(text: str, kept: str = "\n\t") -> str:
    """Spell out every character that could steer a terminal or turn the order of others around.

    Args:
        text: of any provenance.
        kept: control characters that are meant.
    """
    if text.isprintable():
        return text
    meant = kept + _JOINERS
    return "".join(one if one in meant or unicodedata.category(one) not in _UNSEEN else _spelled(one) for one in text)


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class RankFilter(logging.Filter):
    """Lets everything pass on rank 0; on other ranks warnings and worse, with ``[rank N]`` before the message.

    The rank goes into the log record itself, once, so that it shows with any formatter.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        if self.rank == 0:
            return True
        if record.levelno < logging.WARNING:
            return False
        if not hasattr(record, "rank"):
            record.rank = self.rank
            record.msg = f"[rank {self.rank}] {record.msg}"
        return True


class _StderrHandler(logging.Handler):
    """Writes above the progress bars, to what ``sys.stderr`` is at the time: no secrets, nothing that steers it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(printable(redact(self.format(record))), file=sys.stderr)
            sys.stderr.flush()
        except RecursionError:
            raise
        except Exception:  # noqa: BLE001  # a log line never stops the program: the logging module's own rule
            self.handleError(record)


def setup_logging(rank: int | None = None, level: int = logging.INFO) -> None:
    """One handler on stderr for the loggers ``telemetry``, ``trainer`` and ``transformers``; call it once per process.

    ``level`` is for the project's own; transformers keeps its own verbosity (``TRANSFORMERS_VERBOSITY``).

    Their lines come once: they no longer propagate to the root logger, and transformers' default handler is taken off.
    Other loggers, and other handlers of these three, are left as they are. A second call adds nothing; it applies its
    rank and level to the handler that is there.

    Since nothing propagates, pytest's ``caplog`` misses these loggers in the test that makes the call, unless its
    handler is added to them (``logging.getLogger("telemetry").addHandler(caplog.handler)``).

    Args:
        rank: this process's rank; the environment variable ``RANK`` (set by torchrun) or else 0 when None.
        level: the least severe level to show on rank 0.

    Raises:
        ValueError: when ``RANK`` is not a number.
    """
    # Not at the top, because importing transformers takes seconds that a program without this call need not wait for.
    from transformers.utils import logging as transformers_logging

    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    transformers_logging.disable_default_handler()
    handler = _the_handler()
    handler.filters = [RankFilter(rank)]
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if handler not in logger.handlers:
            logger.addHandler(handler)
        if name != "transformers":
            logger.setLevel(level)
        logger.propagate = False


def _the_handler() -> logging.Handler:
    """The handler that an earlier call added, or a new one."""
    for handler in logging.getLogger(LOGGERS[0]).handlers:
        if isinstance(handler, _StderrHandler):
            return handler
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler

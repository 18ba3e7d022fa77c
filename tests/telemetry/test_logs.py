from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.logging import LogCaptureHandler
from tqdm import tqdm

from telemetry.logs import LOGGERS, RankFilter, printable, setup_logging

ROOT = Path(__file__).parents[2]
PROGRAM = """
import logging, sys
from telemetry.logs import setup_logging
setup_logging()
setup_logging()
for name in ("telemetry.delivery.recorder", "trainer", "transformers.trainer", "another"):
    logger = logging.getLogger(name)
    logger.info("info of %s", name)
    logger.warning("warning of %s", name)
"""


def own_handlers(logger: logging.Logger) -> list[logging.Handler]:
    """The logger's handlers but those with which pytest listens in."""
    return [handler for handler in logger.handlers if not isinstance(handler, LogCaptureHandler)]


@pytest.fixture(autouse=True)
def _untouched_loggers() -> Iterator[None]:
    """Each test begins without a handler and leaves the loggers as they were."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, own_handlers(logger), logger.level, logger.propagate) for logger in loggers]
    for logger, handlers, _, _ in before:
        for handler in handlers:
            logger.removeHandler(handler)
    yield
    for logger, handlers, level, propagate in before:
        for handler in own_handlers(logger):
            logger.removeHandler(handler)
        for handler in handlers:
            logger.addHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


def record(level: int, message: object = "x %d", *args: object) -> logging.LogRecord:
    return logging.LogRecord("telemetry", level, __file__, 1, message, args, None)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR])
def test_rank_0_lets_everything_pass_as_it_is(level: int) -> None:
    line = record(level, "x %d", 7)
    assert RankFilter(0).filter(line)
    assert line.getMessage() == "x 7"


def test_other_ranks_let_warnings_pass_and_say_who_they_are() -> None:
    rank_filter = RankFilter(3)
    assert not rank_filter.filter(record(logging.DEBUG))
    assert not rank_filter.filter(record(logging.INFO))
    for level in (logging.WARNING, logging.ERROR, logging.CRITICAL):
        line = record(level, "x %d", 7)
        assert rank_filter.filter(line)
        assert line.getMessage() == "[rank 3] x 7"


def test_the_rank_is_said_once_however_many_filters_there_are() -> None:
    line = record(logging.WARNING, ValueError("50% done"))
    assert RankFilter(1).filter(line)
    assert RankFilter(1).filter(line)
    assert line.getMessage() == "[rank 1] 50% done"


@pytest.mark.parametrize("name", ["telemetry", "telemetry.delivery.recorder", "trainer.data", "transformers.trainer"])
def test_a_line_comes_once_on_stderr(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        setup_logging(rank=0)
    logging.getLogger(name).warning("hello %s", "there")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.endswith(f" WARNING {name}: hello there")
    assert line[:2] == "20"


def test_all_share_one_handler() -> None:
    setup_logging(rank=0)
    setup_logging(rank=0)
    added = [own_handlers(logging.getLogger(name)) for name in LOGGERS]
    assert [len(handlers) for handlers in added] == [1, 1, 1]
    assert added[0] == added[1] == added[2]


def test_a_second_call_applies_its_rank_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0)
    setup_logging(rank=2, level=logging.ERROR)
    logging.getLogger("trainer").warning("below the level")
    logging.getLogger("trainer").error("shown")
    assert [line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines()] == ["ERROR trainer: [rank 2] shown"]


def test_handlers_of_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    own = logging.StreamHandler(io.StringIO())
    logging.getLogger("trainer").addHandler(own)
    root = list(logging.getLogger().handlers)
    other = logging.getLogger("another.library")
    before = (other.level, other.propagate, list(other.handlers), logging.getLogger().level)
    setup_logging(rank=0)
    assert own in logging.getLogger("trainer").handlers
    assert logging.getLogger().handlers == root
    assert (other.level, other.propagate, list(other.handlers), logging.getLogger().level) == before


def test_a_line_never_stops_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    setup_logging(rank=0)
    logging.getLogger("telemetry").info("%d", "not a number")
    logging.getLogger("telemetry").info("still here")
    assert capsys.readouterr().err.endswith("INFO telemetry: still here\n")


def test_a_progress_bar_is_cleared_before_a_line_and_drawn_again_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging(rank=0)
    with tqdm(total=10, file=stream, desc="training", mininterval=0) as bar:
        bar.update(1)
        logging.getLogger("telemetry").info("a line")
    drawn = [part for part in stream.getvalue().replace("\n", "\r").split("\r") if part.strip()]
    (place,) = [place for place, part in enumerate(drawn) if "a line" in part]
    assert "training" not in drawn[place]
    assert "training" in drawn[place - 1]
    assert "training" in drawn[place + 1]


def test_a_rank_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="first"):
        setup_logging()


def run(rank: str | None) -> list[str]:
    """The lines on stderr of a program of its own, without their times."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "TRANSFORMERS_VERBOSITY")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | ({} if rank is None else {"RANK": rank})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == ""
    return [line.split(" ", 2)[2] if line[:2] == "20" else line for line in done.stderr.splitlines() if " of " in line]


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_process_of_rank_0_shows_what_the_levels_let_pass(rank: str | None) -> None:
    names = ("telemetry.delivery.recorder", "trainer", "transformers.trainer")
    shown = [f"{level.upper()} {name}: {level} of {name}" for name in names for level in ("info", "warning")]
    shown.remove("INFO transformers.trainer: info of transformers.trainer")  # its own verbosity: warnings
    assert run(rank) == [*shown, "warning of another"]


def test_a_process_of_another_rank_shows_warnings() -> None:
    names = ("telemetry.delivery.recorder", "trainer", "transformers.trainer")
    assert run("1") == [*(f"WARNING {name}: [rank 1] warning of {name}" for name in names), "warning of another"]


def test_lines_show_no_secrets_and_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0)
    key = "hf_" + "a1B2" * 6
    try:
        raise ValueError(f"no answer from https://me:{key}@host\x1b]0;owned\x07\u202e")
    except ValueError:
        logging.getLogger("telemetry").exception("could not open %s", "a\x9b2J.wav")
    said = capsys.readouterr().err
    assert key not in said
    assert "https://<redacted>@host\\x1b]0;owned\\x07\\u202e" in said
    assert "could not open a\\x9b2J.wav\nTraceback" in said


def test_printable_text_stays_and_the_rest_is_spelled_out() -> None:
    for text in ("", "plain", "نحن نحب", "می\u200cروم", "👩\u200d🔬", "全角\u3000空白", "a\nb\tc", "1\u00a0000"):
        assert printable(text) == text
    assert printable("\n\r\x1b\x85\u202e\u2028\ud800\U000e0001", kept="") == (
        r"\x0a\x0d\x1b\x85\u202e\u2028\ud800\U000e0001"
    )

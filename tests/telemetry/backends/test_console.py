from __future__ import annotations

import logging
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from telemetry.backends.base import Run
from telemetry.backends.console import ConsoleBackend, _related
from telemetry.catalogue import SECTIONS
from telemetry.records import Alert, Audio, Clip, Image, Record, Scalar, Table


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the logger says, to ``caplog`` alone, whatever an earlier test set up."""
    logger = logging.getLogger("telemetry.console")
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, logger=logger.name)
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


def shown(caplog: pytest.LogCaptureFixture, records: Sequence[Record], step: int = 1) -> str:
    """The one message of a write."""
    caplog.clear()
    ConsoleBackend().write(step, records)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("telemetry.console", logging.INFO)
    return record.getMessage()


def line(text: str, start: str) -> list[str]:
    """The words of the only line whose content starts with ``start``."""
    found = [words for words in (row.lstrip("│├└─ ").split() for row in text.splitlines()) if words[:1] == [start]]
    assert len(found) == 1, text
    return found[0]


def test_sections_come_in_order_with_their_questions(caplog: pytest.LogCaptureFixture) -> None:
    tags = ["own/thing", "health/x", "outputs/loss/text", "inputs/invalid_ids"]
    text = shown(caplog, [Scalar(tag, 1.5) for tag in tags], step=12_300)
    assert text.splitlines()[0] == "step 12,300 · 4 records"
    heads = [row for row in text.splitlines() if row.startswith(("├── ", "└── "))]
    assert [head[4:] for head in heads] == [
        *(f"{name} — {SECTIONS[name]}" for name in ("inputs", "outputs", "health")),
        "own",
    ]


def test_codebooks_stand_side_by_side_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    names = ["total", "text", "audio", *(f"codebook_{k}" for k in range(8))]
    losses = [Scalar(f"outputs/loss/{name}", 1000.5 + place) for place, name in enumerate(names)]
    hits = [Scalar(f"outputs/accuracy/{name}", place / 16) for place, name in enumerate(names) if name != "total"]
    text = shown(caplog, [*losses, *hits])
    assert line(text, "total") == ["total", "text", "audio", "codebook_0", *(f"_{k}" for k in range(1, 8))]
    assert line(text, "loss") == ["loss", *(f"{1000.5 + place:.4g}" for place in range(11))]
    assert line(text, "accuracy") == ["accuracy", *(f"{place / 16:.4g}" for place in range(1, 11))]
    rows = {row.lstrip("│├└─ ").split()[0]: row for row in text.splitlines()}
    # Numbers end under the end of their heading.
    assert rows["total"].index("audio") + len("audio") == rows["accuracy"].index("0.125") + len("0.125")


def test_statistics_of_a_tensor_stand_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    values = {"min": 0.0, "max": 128_255.0, "mean": 1.25e-7, "std": 2.5}
    text = shown(caplog, [Scalar(f"inputs/tensor/{t}/{k}", v) for t in ("ids", "mask") for k, v in values.items()])
    assert line(text, "min") == ["min", "max", "mean", "std"]
    for name in ("ids", "mask"):
        assert line(text, f"tensor/{name}") == [f"tensor/{name}", "0", "128,255", "1.25e-07", "2.5"]


def test_columns_that_do_not_fit_continue_below(caplog: pytest.LogCaptureFixture) -> None:
    kinds = ("text", "reference", "target")
    tags = [f"attention/layer_{layer}/{a}_to_{b}" for layer in range(2) for a in kinds for b in kinds]
    text = shown(caplog, [Scalar(tag, 0.125 + place) for place, tag in enumerate(tags)])
    assert all(len(row) <= 120 for row in text.splitlines())
    assert all(text.count(f"{0.125 + place:.4g} ") + text.count(f"{0.125 + place:.4g}\n") >= 1 for place in range(17))
    assert text.count("layer_1") == 2
    assert "…" not in text


def test_values_that_are_not_finite_are_marked_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.0}
    text = shown(caplog, [Scalar(f"outputs/loss/{name}", value) for name, value in values.items()])
    head = text.splitlines()[0]
    assert head == "step 1 · 4 records · 3 non-finite values: outputs/loss/nan, outputs/loss/up, outputs/loss/down"
    assert line(text, "loss") == ["loss", "!nan", "!inf", "!-inf", "1"]


def test_a_headline_names_a_dozen(caplog: pytest.LogCaptureFixture) -> None:
    text = shown(caplog, [Scalar(f"gradients/layer_{layer}/text_ffn/norm", math.nan) for layer in range(30)])
    head = text[: text.index("gradients —")]
    assert "30 non-finite values" in head
    assert "layer_11/" in head
    assert "layer_12/" not in head
    assert "18 more" in head
    assert text.count("!nan") == 30


def test_tables_show_their_first_rows(caplog: pytest.LogCaptureFixture) -> None:
    table = Table("inputs/sequence", ("row", "value"), tuple((f"row{i}", i + 0.5) for i in range(20)))
    text = shown(caplog, [table])
    assert line(text, "row") == ["row", "value"]
    assert line(text, "row11") == ["row11", "11.5"]
    assert "row12" not in text
    assert "… 8 more rows" in text
    assert "more row" not in shown(caplog, [Table("inputs/sequence", ("row",), (("a",),) * 12)])
    assert line(shown(caplog, [Table("a/b", ("x", "y", "z"), ((None, True, 7),))]), "True") == ["True", "7"]
    assert line(shown(caplog, [Table("a/b", ("lonely",), ())]), "lonely") == ["lonely"]


def test_audio_images_and_alerts_have_their_lines(caplog: pytest.LogCaptureFixture) -> None:
    clip = Clip(np.zeros(22_400, dtype=np.float32), 16_000, "hello there")
    text = shown(
        caplog,
        [
            Audio("inputs/target", (clip, Clip(np.zeros((0, 2)), 24_000), Clip(np.zeros(1), 0))),
            Image("attention/mass", np.zeros((30, 40, 3), dtype=np.uint8), "by layer"),
            Alert("health/nan_loss", "Loss is not a number", "Lower the learning rate.\nThen go on.", "error"),
        ],
    )
    rows = [row.lstrip("│├└─ ") for row in text.splitlines()]
    for expected in (
        "target: 1.4 s at 16,000 Hz, hello there",
        "target: 0.0 s at 24,000 Hz",
        "target: ? s at 0 Hz",
        "mass: image of 40 × 30, by layer",
        "ERROR health/nan_loss: Loss is not a number",
        "Lower the learning rate.",
        "Then go on.",
    ):
        assert expected in rows


def test_hostile_texts_survive_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    hostile = "[bold]x[/] [/nothing] :smile: %s {0} مرحبا"
    records: list[Record] = [
        Scalar(f"inputs/tensor/{hostile}/min", 1.0, hostile),
        Table("inputs/t", (hostile,), ((hostile,),)),
        Audio("inputs/reference", (Clip(np.zeros(1), 1, hostile),)),
        Alert("health/a", hostile, hostile),
    ]
    for record in records:
        assert hostile in shown(caplog, [record])
    assert shown(caplog, records).count("[bold]x[/]") == 7


def test_nothing_moves_the_cursor(caplog: pytest.LogCaptureFixture) -> None:
    text = shown(
        caplog,
        [Alert("a/b", "", "\x1b[31mred\x1b[0m\r\b\x07\x9b tab\tend \ud800"), Table("a/c", ("\x1b",), (("\x00",),))],
    )
    assert "\\x1b[31mred\\x1b[0m\\x0d\\x08\\x07\\x9b" in text
    assert "\\ud800" in text
    assert not {char for char in text if ord(char) < 32 and char != "\n"}


def test_long_texts_say_how_much_is_left(caplog: pytest.LogCaptureFixture) -> None:
    text = shown(caplog, [Alert("a/b", "", "x" * 5000), Table("a/c", ("y",), (("y" * 1234,),))])
    assert text.count("x") == 2000
    assert "3,000 more" in text
    assert "1,034 more" in text


def test_a_note_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = ConsoleBackend()
    for step in (1, 2):
        backend.write(step, [Scalar(f"outputs/loss/{part}", 1.0, "after clipping") for part in ("text", "audio")])
    assert [record.getMessage().count("note: after clipping") for record in caplog.records] == [1, 0]


def test_what_the_trainer_prints_is_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    backend = ConsoleBackend()
    backend.write(1, [])
    backend.write(1, [Scalar("train/loss", 1.0), Scalar("eval/loss", 2.0), Scalar("test/loss", 3.0)])
    assert caplog.records == []
    backend.write(1, [Alert("eval/loss", "Look", "")])
    backend.write(1, [Scalar("train/loss", 1.0), Scalar("health/x", 2.0)])
    assert len(caplog.records) == 2


def test_nothing_is_made_for_a_logger_that_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="telemetry.console")
    ConsoleBackend().write(1, [Scalar("health/x", 2.0)])
    assert caplog.records == []


def test_opens_and_closes(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    backend = ConsoleBackend()
    backend.open(Run(tmp_path))
    backend.write(1, [Scalar("health/x", 2.0)])
    backend.close()
    assert backend.name == "console"
    assert len(caplog.records) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_is_as_wide_as_the_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((columns, 24)))
    monkeypatch.setenv("COLUMNS", "33")
    text = shown(caplog, [Alert("a/b", "", "x" * 500)])
    assert max(len(row) for row in text.splitlines()) == columns


def test_is_120_wide_without_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    text = shown(caplog, [Alert("a/b", "", "x" * 500)])
    assert max(len(row) for row in text.splitlines()) == 120


NAMES = st.text(st.sampled_from("abc_/0123[]é字 \n"), max_size=12)
CELLS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
TABLES = st.integers(0, 4).flatmap(
    lambda n: st.builds(
        lambda tag, columns, rows: Table(tag, tuple(columns), tuple(map(tuple, rows))),
        NAMES,
        st.lists(NAMES, min_size=n, max_size=n),
        st.lists(st.lists(CELLS, min_size=n, max_size=n), max_size=14),
    )
)
RECORDS = st.one_of(
    st.builds(Scalar, NAMES, st.floats(), NAMES),
    st.builds(Alert, NAMES, st.text(), st.text()),
    TABLES,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORDS, min_size=1, max_size=12), st.integers(1, 200))
def test_any_record_shows_at_any_width(caplog: pytest.LogCaptureFixture, records: list[Record], columns: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
        patch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((columns, 24)))
        text = shown(caplog, records)
    assert text.startswith("s")
    assert columns < 20 or all(cell_len(row) <= columns for row in text.splitlines())


@pytest.mark.parametrize("number", [1000, 5000])
def test_a_big_section_is_cut_and_says_so_in_time_that_grows_with_its_numbers(
    caplog: pytest.LogCaptureFixture, number: int
) -> None:
    scalars = [Scalar(f"custom/group_{i % 50}/name_{i}/v{i}", 1.0) for i in range(number)]
    began = time.thread_time()
    text = shown(caplog, scalars)
    assert time.thread_time() - began < 1.0
    assert f"step 1 · {number:,} records" in text
    assert text.count("name_") == 400
    assert f"… {number - 400:,} more numbers" in text


def test_rows_that_share_columns_through_others_share_a_grid_whatever_their_number() -> None:
    def slow(rows: dict[str, dict[str, str]]) -> set[frozenset[str]]:
        grids = [({name}, set(cells)) for name, cells in rows.items()]
        while pair := next(((a, b) for a in grids for b in grids if a is not b and a[1] & b[1]), None):
            grids = [grid for grid in grids if grid not in pair] + [(pair[0][0] | pair[1][0], pair[0][1] | pair[1][1])]
        return {frozenset(names) for names, _ in grids}

    for seed in range(20):
        chance = random.Random(seed)
        rows = {f"r{i}": {f"c{chance.randrange(30)}": "1" for _ in range(chance.randint(1, 3))} for i in range(25)}
        grids = _related(rows)
        assert {frozenset(grid) for grid in grids} == slow(rows)
        firsts = [list(rows).index(next(iter(grid))) for grid in grids]
        assert firsts == sorted(firsts)
        assert {name: cells for grid in grids for name, cells in grid.items()} == rows


@pytest.mark.parametrize("steering", ["\x1b[2J", "\x9b2J", "\x07", "\u202e", "\u2066", "\u2028", "\ud800", "\r"])
def test_nothing_of_any_provenance_steers_the_terminal(caplog: pytest.LogCaptureFixture, steering: str) -> None:
    text = f"a{steering}b"
    records = [
        Alert(f"x/{text}", text, text),
        Table(f"y/{text}", (text,), ((text,),)),
        Scalar(f"z/{text}/{text}", 1.0, note=text),
        Audio(f"w/{text}", (Clip(np.zeros(2, np.float32), 8000, text),)),
        Image(f"v/{text}", np.zeros((2, 2, 3), np.uint8), text),
    ]
    message = shown(caplog, records)
    assert steering not in message
    assert message.isprintable() or all(one.isprintable() or one in "\n" for one in message)

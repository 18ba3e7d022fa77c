"""The lines at the end of a run that compare generated clips of training voices and of others."""

from __future__ import annotations

from typing import Any

from telemetry.records import Scalar, Table
from trainer.clip_summary import TABLE, ClipSummary

COLUMNS = ("speaker", "clips", "mel_distance", "mel_distance_shuffled")


def lines(*tables: list[tuple[Any, ...]]) -> list[str]:
    summary = ClipSummary({"Ada", "Ben"})
    summary.open(None)
    for step, rows in enumerate(tables):
        summary.write(step, [Scalar("a/b", 1.0), Table(TABLE, COLUMNS, tuple(rows)), Scalar("a/c", 1.0)])
    summary.close()
    return list(summary.lines())


def test_means_are_over_clips_and_the_last_table_counts() -> None:
    first = [("Ada", 9, 99.0, 99.0)]
    last = [("Ada", 1, 4.0, 10.0), ("Ben", 3, 2.0, 14.0), ("Eve", 2, 9.0, 9.5)]
    assert lines(first, last) == [
        "generated clips of training voices: mel distance to their targets 2.5 dB, to another sample's target 13.0 dB "
        "(4 clips)",
        "generated clips of other voices: mel distance to their targets 9.0 dB, to another sample's target 9.5 dB "
        "(2 clips)",
    ]


def test_what_was_not_compared_is_not_said() -> None:
    assert lines() == []
    assert lines([("Ada", 1, None, None), ("Eve", 1, 3.0, None)]) == []

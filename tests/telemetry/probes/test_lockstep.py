"""Ranks agree, all alike, whatever one of them does; one that does not come is waited for only once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from torch import nn

from telemetry.probes import lockstep
from telemetry.probes.lockstep import Lockstep
from telemetry.probes.sharding import forwards_are_collective

RANKS = 3


@pytest.fixture
def ranks() -> list[Lockstep]:
    """As many, each for a thread of its own, over one store."""
    store = dist.HashStore()
    return [Lockstep(store, RANKS, "test") for _ in range(RANKS)]


def on_threads(work: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(timeout=30) for future in [pool.submit(one) for one in work]]


@pytest.mark.parametrize("able", [(True, True, True), (True, False, True), (False, False, False)])
def test_all_are_told_whether_every_one_is_able(ranks: list[Lockstep], able: tuple[bool, ...]) -> None:
    for _ in range(3):
        told = on_threads([lambda one=one, own=own: one.agree(own) for one, own in zip(ranks, able, strict=True)])
        assert told == [all(able)] * RANKS
    assert all(one.together and one.needed for one in ranks)


def test_nobody_goes_on_before_the_last_has_come(ranks: list[Lockstep]) -> None:
    came = []

    def late() -> bool:
        time.sleep(0.3)
        came.append(time.monotonic())
        return ranks[0].agree(True)

    def early(one: Lockstep) -> float:
        one.agree(False)
        return time.monotonic()

    _, *ended = on_threads([late, *(lambda one=one: early(one) for one in ranks[1:])])
    assert min(ended) >= came[0]


def test_rounds_do_not_mix(ranks: list[Lockstep]) -> None:
    """Each rank goes at its own pace through the same rounds."""
    rounds = [True, False, True, True, False] * 4

    def go(rank: int) -> list[bool]:
        answers = []
        for number, able in enumerate(rounds):
            time.sleep(0.001 * ((number * 7 + rank * 3) % 4))
            answers.append(ranks[rank].agree(able or rank != 1))
        return answers

    assert on_threads([lambda rank=rank: go(rank) for rank in range(RANKS)]) == [rounds] * RANKS


def test_the_store_does_not_grow(ranks: list[Lockstep]) -> None:
    counts = []
    for _ in range(4):
        on_threads([lambda one=one: one.agree(True) for one in ranks])
        counts.append(ranks[0]._store.num_keys())
    assert len(set(counts[1:])) == 1


def test_a_rank_that_does_not_come_ends_it_for_all(
    ranks: list[Lockstep], monkeypatch: pytest.MonkeyPatch, telemetry_log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lockstep, "AGREE_SECONDS", 0.2)
    assert on_threads([lambda one=one: one.agree(True) for one in ranks[1:]]) == [False, False]
    assert ranks[0].agree(True) is False  # comes when the others have gone, and is told the same
    monkeypatch.setattr(lockstep, "AGREE_SECONDS", 3.0)
    began = time.monotonic()
    assert [one.agree(True) for one in ranks for _ in range(2)] == [False] * 6  # nobody waits again
    assert time.monotonic() - began < 1
    assert not any(one.together for one in ranks)
    assert telemetry_log.text.count("cannot run the model together") == RANKS  # each once


def test_ranks_that_ask_about_different_things_do_not_meet(
    ranks: list[Lockstep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "AGREE_SECONDS", 0.2)
    asked = ("gain", "gain", "clips")
    told = on_threads(
        [lambda one=one, what=what: one.agree(True, what) for one, what in zip(ranks, asked, strict=True)]
    )
    assert told == [False] * RANKS


def test_a_store_that_is_gone_is_no_agreement(telemetry_log: pytest.LogCaptureFixture) -> None:
    store = Mock()
    store.add.side_effect = RuntimeError("connection reset")
    one = Lockstep(store, 2, "test")
    assert [one.agree(True), one.agree(True)] == [False, False]
    assert store.add.call_count == 1
    assert telemetry_log.text.count("connection reset") == 1


def test_where_not_all_run_telemetry_nothing_is_agreed_on() -> None:
    one = Lockstep(dist.HashStore(), 2, "test", together=False)
    assert not one.agree(True)


def test_alone_ones_own_word_is_enough() -> None:
    one = Lockstep.join(nn.Linear(2, 2))
    assert (one.agree(True), one.agree(False), one.needed) == (True, False, False)
    assert not forwards_are_collective(nn.Linear(2, 2))

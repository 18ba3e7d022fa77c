"""The background thread: in order, within its bytes, and idle work only when nothing waits."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetry.delivery.worker import Worker
from telemetry.once import Once

SOON = 20.0  # generous: other programs share the machine


@dataclass
class Parcel:
    """A job of ``media`` and ``scalars`` records, one byte each."""

    name: str
    media: int = 0
    scalars: int = 0
    before: Callable[[], object] = field(default=lambda: None, repr=False)

    @property
    def nbytes(self) -> int:
        return self.media + self.scalars

    def drop_media(self) -> int:
        dropped, self.media = self.media, 0
        return dropped

    def drop_all(self) -> int:
        dropped, self.media, self.scalars = self.media + self.scalars, 0, 0
        return dropped


class Bench:
    """A worker, what it has done and what it has dropped."""

    def __init__(self, max_bytes: int = 10**6) -> None:
        self.done: list[tuple[str, int, int]] = []
        self.threads: list[threading.Thread] = []
        self.dropped: list[int] = []
        self.gate = threading.Event()
        self.began = threading.Event()
        self.worker = Worker(self._work, max_bytes, self.dropped.append)

    def _work(self, job: Parcel) -> None:
        self.threads.append(threading.current_thread())
        job.before()
        self.done.append((job.name, job.media, job.scalars))

    def wait_at_the_gate(self) -> None:
        self.began.set()
        assert self.gate.wait(SOON)

    def stick(self) -> None:
        """Has the thread work on a job that ends when the gate opens."""
        self.worker.put(Parcel("stuck", before=self.wait_at_the_gate))
        assert self.began.wait(SOON)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.gate.set()
    bench.worker.close()


def small_bench(max_bytes: int) -> Bench:
    bench = Bench(max_bytes)
    bench.stick()
    return bench


def ended(thread: threading.Thread) -> bool:
    thread.join(SOON)
    return not thread.is_alive()


def test_there_is_no_thread_before_the_first_job_and_one_daemon_after() -> None:
    before = threading.active_count()
    bench = Bench()
    assert threading.active_count() == before
    bench.worker.put(Parcel("a"))
    bench.worker.put(Parcel("b"))
    assert bench.worker.drain(SOON)
    assert len(set(bench.threads)) == 1
    assert bench.threads[0].daemon
    assert bench.threads[0] is not threading.current_thread()
    bench.worker.close()
    assert ended(bench.threads[0])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_jobs_are_done_once_and_in_order(sizes: list[int]) -> None:
    bench = Bench()
    for index, size in enumerate(sizes):
        bench.worker.put(Parcel(str(index), size, size))
    assert bench.worker.drain(SOON)
    assert bench.done == [(str(index), size, size) for index, size in enumerate(sizes)]
    assert bench.dropped == []
    assert bench.worker.close() == 0


def slow_bound(sizes: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """What is left of waiting jobs, put one by one, by the rule: oldest media first, numbers last."""
    waiting: list[tuple[int, int]] = []
    for size in sizes:
        waiting.append(size)
        for index, (_, scalars) in enumerate(waiting):
            if sum(media + numbers for media, numbers in waiting) > limit:
                waiting[index] = (0, scalars)
        for index in range(len(waiting)):
            if sum(media + numbers for media, numbers in waiting) > limit:
                waiting[index] = (0, 0)
    return waiting


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=12), st.integers(0, 40))
def test_too_many_bytes_cost_the_oldest_media_first_and_numbers_last(sizes: list[tuple[int, int]], limit: int) -> None:
    bench = small_bench(limit)
    for index, (media, scalars) in enumerate(sizes):
        bench.worker.put(Parcel(str(index), media, scalars))
    assert bench.worker.waiting == len(sizes)  # every step is still worked on
    bench.gate.set()
    assert bench.worker.drain(SOON)
    bench.worker.close()
    left = slow_bound(sizes, limit)
    assert bench.done[1:] == [(str(index), *size) for index, size in enumerate(left)]
    assert sum(bench.dropped) == sum(map(sum, sizes)) - sum(map(sum, left))
    assert 0 not in bench.dropped


def test_bytes_are_given_back_when_a_job_is_begun() -> None:
    """A hundred times the bound, one after the other: nothing is dropped."""
    bench = Bench(max_bytes=10)
    for index in range(100):
        bench.worker.put(Parcel(str(index), 5, 5))
        assert bench.worker.drain(SOON)
    assert bench.dropped == []
    assert len(bench.done) == 100


def test_draining_returns_within_its_bound(bench: Bench) -> None:
    bench.stick()
    began = time.monotonic()
    assert not bench.worker.drain(0.3)
    assert 0.3 <= time.monotonic() - began < SOON
    bench.gate.set()
    assert bench.worker.drain(SOON)


def test_draining_waits_for_the_job_in_hand(bench: Bench) -> None:
    bench.stick()
    assert bench.worker.waiting == 0
    assert not bench.worker.drain(0.1)


def test_idle_work_is_done_when_no_job_waits_and_for_as_long_as_there_is_some() -> None:
    done: list[str] = []
    left = 3
    begun, gate = threading.Event(), threading.Event()

    def idle() -> bool:
        nonlocal left
        done.append("idle")
        if left == 3:
            begun.set()
            assert gate.wait(SOON)
        left -= 1
        return left > 0

    worker = Worker(lambda job: done.append(job.name), 10**6, lambda _: None, idle)
    worker.put(Parcel("a"))
    assert begun.wait(SOON)
    worker.put(Parcel("b"))
    worker.put(Parcel("c"))
    assert not worker.drain(0)
    gate.set()
    assert worker.drain(SOON)
    assert done == ["a", "idle", "b", "c", "idle", "idle"]
    worker.close()


def test_a_closed_worker_does_no_more_idle_work() -> None:
    begun, gate = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def idle() -> bool:
        threads.append(threading.current_thread())
        begun.set()
        assert gate.wait(SOON)
        return True

    worker = Worker(lambda _: None, 10**6, lambda _: None, idle)
    worker.put(Parcel("a"))
    assert begun.wait(SOON)
    worker.close()
    gate.set()
    assert ended(threads[0])
    assert len(threads) == 1


def test_what_still_waits_at_the_end_is_counted_and_so_is_what_comes_late(bench: Bench) -> None:
    bench.stick()
    bench.worker.put(Parcel("waiting", 2, 3))
    bench.worker.put(Parcel("waiting too", 0, 4))
    assert bench.worker.close() == 9
    bench.worker.put(Parcel("late", 1, 1))
    assert bench.dropped == [2]
    bench.gate.set()
    assert ended(bench.threads[0])
    assert [name for name, *_ in bench.done] == ["stuck"]


def test_putting_returns_at_once_while_the_thread_is_stuck(bench: Bench) -> None:
    bench.stick()
    began = time.perf_counter()
    for index in range(1000):
        bench.worker.put(Parcel(str(index), 1, 1))
    assert (time.perf_counter() - began) / 1000 < 0.001


def test_a_thread_that_cannot_be_started_costs_what_it_would_have_done(
    monkeypatch: pytest.MonkeyPatch, telemetry_log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("telemetry.delivery.worker._once", Once(logging.getLogger("telemetry.delivery.worker")))

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    bench = Bench()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        bench.worker.put(Parcel("lost", 1, 2))
        bench.worker.put(Parcel("lost", 3, 4))
        assert bench.worker.drain(SOON)
    assert bench.dropped == [3, 7]
    bench.worker.put(Parcel("done", 1, 1))
    assert bench.worker.drain(SOON)
    assert bench.done == [("done", 1, 1)]
    said = "telemetry loses what it measures (can't start new thread); training goes on"
    assert telemetry_log.text.count(said) == 1
    assert bench.worker.close() == 0


def test_nothing_of_a_job_is_held_after_it_and_the_thread_has_ended_after_closing() -> None:
    """Tensors that a thread lets go of while the interpreter ends take the process down with it."""
    for _ in range(50):
        bench = Bench()
        parcel = Parcel("a", media=1)
        held = weakref.ref(parcel)
        bench.worker.put(parcel)
        del parcel
        assert bench.worker.drain(SOON)
        assert held() is None
        bench.worker.close()
        assert not any(thread.is_alive() for thread in bench.threads)


def test_a_thread_that_is_in_a_job_is_not_waited_for() -> None:
    bench = Bench()
    bench.worker.put(Parcel("slow", before=lambda: (bench.wait_at_the_gate(), bench.gate.wait(SOON))))
    assert bench.began.wait(SOON)
    began = time.monotonic()
    bench.worker.close()
    assert time.monotonic() - began < SOON / 2
    bench.gate.set()

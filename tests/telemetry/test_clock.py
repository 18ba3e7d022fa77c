"""What telemetry costs, by clocks that are set by hand."""

from __future__ import annotations

import contextlib
import threading

import pytest

import telemetry.clock
from telemetry.clock import Overhead, StepClock


class Clocks:
    """Stands in for ``time``: what passes, and how much of it the thread computes, is said."""

    def __init__(self) -> None:
        self.wall = 100.0
        self.computed = 5.0
        self.background = 0.0

    def perf_counter(self) -> float:
        return self.wall

    def thread_time(self) -> float:
        return self.computed

    def passes(self, seconds: float, computed: float | None = None, background: float = 0.0) -> None:
        self.wall += seconds
        self.computed += seconds if computed is None else computed
        self.background += background


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(telemetry.clock, "time", clocks)
    return clocks


AROUND = 1 + 1 / 5  # what telemetry takes, and by how much it slows down what is around it where no step shows that


def due_step(clocks: Clocks, own: float, training: float, waited: float = 0.0, background: float = 0.0) -> StepClock:
    """A due step: telemetry's own seconds, training's, those it waited, and what the background computed meanwhile."""
    clock = StepClock()
    with clock.running():
        clocks.passes(own)
    clocks.passes(training)
    clocks.passes(waited, computed=0.0, background=background)
    return clock


def test_of_a_first_step_it_is_what_telemetry_took_of_it(clocks: Clocks) -> None:
    clocks.passes(50.0, background=9.0)  # before
    overhead = Overhead(lambda: clocks.background)
    assert overhead.share(due_step(clocks, own=3.0, training=1.0)) == 3 / 4


def test_what_training_waits_for_the_background_is_a_cost(clocks: Clocks) -> None:
    """Steps of 5 s that take 20: 8 s of telemetry, 7 s of waiting for its threads."""
    overhead = Overhead(lambda: clocks.background)
    for _ in range(20):
        share = overhead.share(due_step(clocks, own=8.0, training=5.0, waited=7.0, background=7.0))
    assert share == pytest.approx((8 * AROUND + 7) / 20)


def test_a_background_that_computes_on_another_core_costs_nothing(clocks: Clocks) -> None:
    overhead = Overhead(lambda: clocks.background)
    for _ in range(20):
        clocks.passes(0.0, background=3.0)
        share = overhead.share(due_step(clocks, own=1.0, training=9.0))
    assert share == pytest.approx(0.1 * AROUND)


def test_waiting_for_a_device_or_data_is_no_cost_beyond_what_the_background_computes(clocks: Clocks) -> None:
    overhead = Overhead(lambda: clocks.background)
    for _ in range(20):
        share = overhead.share(due_step(clocks, own=1.0, training=3.0, waited=6.0, background=0.5))
    assert share == pytest.approx(0.1 * AROUND + 0.05)


def test_other_work_on_the_machine_stretches_what_the_background_computes(clocks: Clocks) -> None:
    """A quiet machine: 2 s of telemetry, 4 s of training, 2 s of waiting. A loaded one takes twice as long for each."""
    overhead = Overhead(lambda: clocks.background)
    for _ in range(20):
        clock = StepClock()
        with clock.running():
            clocks.passes(4.0, computed=2.0)
        clocks.passes(8.0, computed=4.0)
        clocks.passes(4.0, computed=0.0, background=2.0)
        share = overhead.share(clock)
    assert share == pytest.approx((2 * AROUND + 2) / 8)


def test_the_steps_between_due_steps_dilute_it(clocks: Clocks) -> None:
    overhead = Overhead(lambda: clocks.background)
    for _ in range(20):
        clocks.passes(90.0)
        share = overhead.share(due_step(clocks, own=5.0, training=5.0))
    assert share == pytest.approx(0.05 * AROUND)


def every_tenth(clocks: Clocks, own: float, due: float, following: float, background: float = 0.0) -> float:
    """The share of steps of 5 s of which every tenth is due, which takes longer than telemetry, as does the next."""
    overhead = Overhead(lambda: clocks.background)
    seconds = [due, following, *[5.0] * 8]
    for _ in range(20):
        clocks.passes(sum(seconds[1:]), background=background)
        share = overhead.share(due_step(clocks, own=own, training=due - own), seconds)
    return share


def test_by_what_a_due_step_and_the_next_take_longer_than_others_is_a_cost(clocks: Clocks) -> None:
    """7 s more, and 4 s more, of which paired runs would say 11 / 61."""
    assert every_tenth(clocks, own=6.0, due=12.0, following=9.0, background=3.0) == pytest.approx(11 / 61)


def test_it_is_no_more_than_telemetry_can_have_caused(clocks: Clocks) -> None:
    assert every_tenth(clocks, own=6.0, due=12.0, following=99.0, background=3.0) == pytest.approx((6 + 3 + 3) / 151)


def test_steps_that_have_less_to_do_take_nothing_from_what_telemetry_took(clocks: Clocks) -> None:
    assert every_tenth(clocks, own=1.0, due=5.0, following=1.0) == pytest.approx(1 / 46)


def test_batches_that_are_longer_than_others_are_averaged(clocks: Clocks) -> None:
    overhead = Overhead(lambda: clocks.background)
    for number in range(20):
        due = 9.0 if number % 2 else 1.0
        clocks.passes(9 * 5.0)
        step = due_step(clocks, own=0.01, training=due - 0.01)
        share = overhead.share(step, [10.0 - due, *[5.0] * 9])  # the due step before
    assert share < 0.02 / 50


def test_a_job_that_is_counted_steps_after_it_was_waited_for_is_a_cost_all_the_same(clocks: Clocks) -> None:
    overhead = Overhead(lambda: clocks.background)
    shares = []
    for number in range(32):
        clock = due_step(clocks, own=1.0, training=8.0, waited=1.0, background=4.0 if number % 4 == 3 else 0.0)
        shares.append(overhead.share(clock))
    assert sum(shares[16:]) / 16 == pytest.approx(0.1 * AROUND + 0.1)


def test_what_stands_between_due_steps_is_counted_with_the_next(clocks: Clocks) -> None:
    overhead = Overhead(lambda: clocks.background)
    overhead.share(due_step(clocks, own=1.0, training=9.0))
    beside = StepClock()
    with beside.running():
        clocks.passes(20.0, computed=4.0)
    overhead.owe(beside)
    assert overhead.share(due_step(clocks, own=1.0, training=9.0)) == pytest.approx(21 / 30 + (AROUND - 1) / 30)
    assert overhead.share(due_step(clocks, own=1.0, training=9.0)) == pytest.approx(AROUND / 10)


def test_what_runs_inside_of_what_is_counted_is_counted_once(clocks: Clocks) -> None:
    clock = StepClock()
    with clock.running():
        clocks.passes(1.0)
        with clock.running():
            clocks.passes(2.0)
        clocks.passes(3.0, computed=1.0)
    assert (clock.spent, clock.computed) == (6.0, 4.0)
    with contextlib.suppress(ValueError), clock.running():
        clocks.passes(1.0)
        raise ValueError
    with clock.running():
        clocks.passes(1.0)
    assert clock.spent == 8.0


def test_another_thread_begins_anew(clocks: Clocks) -> None:
    overhead = Overhead(lambda: clocks.background)
    overhead.share(due_step(clocks, own=1.0, training=9.0))
    clocks.passes(1000.0, computed=-3.0)
    shares: list[float] = []
    other = threading.Thread(target=lambda: shares.append(overhead.share(due_step(clocks, own=1.0, training=1.0))))
    other.start()
    other.join()
    assert shares == [0.5]


def test_no_time_at_all_is_no_division_by_zero(clocks: Clocks) -> None:
    overhead = Overhead(lambda: 0.0)
    assert overhead.share(StepClock()) == 1.0

"""The circuit on dead letters: what opens it, what does not, and the way back."""

from __future__ import annotations

import random

import pytest
from structlog.testing import capture_logs

from tests.worker.fake_clock import FakeClock
from worker.errors import Code
from worker.settings import CircuitSettings
from worker.stages.circuit import JUDGED_BY, UNLIMITED, UPLOADERS_OWN, DeadLetterCircuit

PROBES = 64
OURS = sorted(set(Code) - UPLOADERS_OWN)


class Bench:
    def __init__(self, **settings: float) -> None:
        self.clock = FakeClock()
        self.settings = CircuitSettings.model_validate(settings)
        self.circuit = DeadLetterCircuit(self.settings, PROBES, self.clock)

    def fail(self, count: int, code: Code = Code.FETCH_UNAVAILABLE, apart_s: float = 0.0) -> None:
        for _ in range(count):
            self.circuit.failed(code)
            self.clock.advance(apart_s)

    def succeed(self, count: int) -> None:
        for _ in range(count):
            self.circuit.succeeded()

    def half_open(self) -> None:
        self.clock.advance(self.settings.reset_s)
        assert self.circuit.room() == PROBES


@pytest.mark.parametrize("code", OURS)
def test_failures_in_a_row_open_it(code: Code) -> None:
    bench = Bench()
    bench.fail(999, code)
    assert bench.circuit.closed
    assert bench.circuit.room() == UNLIMITED
    with capture_logs() as logs:
        bench.fail(1, code)
    assert not bench.circuit.closed
    assert bench.circuit.room() == 0
    (line,) = logs
    assert (line["event"], line["code"], line["in_a_row"]) == ("circuit.opened", code.value, 1000)


def test_one_score_between_breaks_the_row() -> None:
    bench = Bench(failure_share=0)
    for _ in range(20):
        bench.fail(999)
        bench.succeed(1)
    assert bench.circuit.closed


def test_a_share_too_high_opens_it() -> None:
    bench = Bench()
    for _ in range(499):
        bench.succeed(1)
        bench.fail(1)
    assert bench.circuit.closed  # too few to tell
    bench.succeed(1)
    bench.fail(1)
    assert not bench.circuit.closed


def test_the_share_looks_at_the_window_only() -> None:
    bench = Bench(failures_in_a_row=0, window_s=300)
    bench.fail(900)
    bench.clock.advance(300)
    bench.fail(999)
    assert bench.circuit.closed
    bench.fail(1)
    assert not bench.circuit.closed


@pytest.mark.parametrize("code", sorted(UPLOADERS_OWN))
def test_what_an_uploader_alone_can_cause_never_opens_it(code: Code) -> None:
    bench = Bench()
    bench.fail(50_000, code)
    assert bench.circuit.closed


@pytest.mark.parametrize("code", [Code.DECODE_CRASHED, Code.DECODE_TIMEOUT])
def test_a_burst_of_several_hundred_hostile_files_does_not_open_it(code: Code) -> None:
    bench = Bench()
    bench.fail(800, code)
    assert bench.circuit.closed


def test_one_broken_event_in_twenty_never_opens_it() -> None:
    bench, rng = Bench(), random.Random(4)
    for _ in range(50_000):
        if rng.random() < 0.05:
            bench.circuit.failed(rng.choice(OURS))
        else:
            bench.circuit.succeeded()
        bench.clock.advance(0.01)
    assert bench.circuit.closed


def test_zero_switches_it_off() -> None:
    bench = Bench(failures_in_a_row=0, failure_share=0)
    bench.fail(50_000)
    assert bench.circuit.closed


def test_after_its_time_it_lets_a_few_in_and_closes_when_most_succeed() -> None:
    bench = Bench()
    bench.fail(1000)
    bench.clock.advance(59)
    assert bench.circuit.room() == 0
    bench.clock.advance(1)
    for left in range(PROBES, 0, -1):
        assert bench.circuit.room() == left
        bench.circuit.admitted()
    assert bench.circuit.room() == 0
    bench.fail(JUDGED_BY // 2 - 1)
    bench.succeed(JUDGED_BY // 2)
    assert not bench.circuit.closed
    with capture_logs() as logs:
        bench.succeed(1)
    assert bench.circuit.closed
    assert [line["event"] for line in logs] == ["circuit.closed"]
    bench.fail(999)  # counted anew
    assert bench.circuit.closed


def test_probes_that_fail_open_it_for_another_while() -> None:
    bench = Bench()
    bench.fail(1000)
    bench.half_open()
    bench.fail(JUDGED_BY)
    assert bench.circuit.room() == 0
    bench.clock.advance(59)
    assert bench.circuit.room() == 0
    bench.clock.advance(1)
    assert bench.circuit.room() == PROBES


def test_probes_of_which_nothing_comes_are_followed_by_others() -> None:
    bench = Bench()
    bench.fail(1000)
    bench.half_open()
    for _ in range(PROBES):
        bench.circuit.admitted()
    assert bench.circuit.room() == 0
    bench.clock.advance(60)
    assert bench.circuit.room() == PROBES


def test_late_failures_of_what_was_in_flight_do_not_prolong_it() -> None:
    bench = Bench()
    bench.fail(1000)
    bench.fail(200, apart_s=0.1)
    bench.clock.advance(41)
    assert bench.circuit.room() == PROBES

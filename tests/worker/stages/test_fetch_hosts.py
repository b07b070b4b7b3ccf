"""The gate before a host: limit, breaker, and a memory that stays bounded."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from worker.clock import Deadline
from worker.errors import Code, ItemError, TransientItemError
from worker.stages.fetch_hosts import HostGate


class ManualClock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def soon() -> Deadline:
    """A minute from now: made at each use, for this module may be imported long before it runs."""
    return Deadline(60)


def make_gate(clock: ManualClock | None = None, **changes: object) -> HostGate:
    values: dict[str, object] = {"limit": 2, "wait_s": 0.05, "failures": 3, "reset_s": 10.0, "clock": clock or ManualClock()}
    return HostGate(**(values | changes))  # type: ignore[arg-type]


def visit(gate: HostGate, host: str = "a", error: Exception | None = None) -> None:
    with gate.visit(host, host, soon()):
        if error is not None:
            raise error


def fail(gate: HostGate, host: str = "a") -> TransientItemError:
    with pytest.raises(TransientItemError) as error:
        visit(gate, host, TransientItemError(Code.FETCH_UNAVAILABLE, "down"))
    return error.value


def test_failures_in_a_row_open_the_breaker_for_this_host_only() -> None:
    gate = make_gate()
    assert [fail(gate).attempted for _ in range(5)] == [True, True, True, False, False]
    turned_away = fail(gate)
    assert turned_away.code is Code.FETCH_UNAVAILABLE
    assert turned_away.retry_after_s == pytest.approx(10.0)
    visit(gate, "b")


def test_a_success_or_an_answer_about_the_event_itself_starts_the_count_anew() -> None:
    gate = make_gate()
    for good in (None, ItemError(Code.FETCH_NOT_FOUND, "404")):
        fail(gate)
        fail(gate)
        with contextlib.suppress(ItemError):
            visit(gate, error=good)
    assert [fail(gate).attempted for _ in range(3)] == [True] * 3


def test_a_bug_teaches_the_breaker_nothing_and_frees_its_place() -> None:
    gate = make_gate(limit=1)
    for _ in range(5):
        with pytest.raises(KeyError):
            visit(gate, error=KeyError("bug"))
    visit(gate)


def test_one_probe_decides_whether_the_breaker_closes() -> None:
    clock = ManualClock()
    gate = make_gate(clock)
    for _ in range(3):
        fail(gate)
    clock.now += 10.1
    with gate.visit("a", "a", soon()):
        assert not fail(gate).attempted  # one at a time while it is on trial
    assert fail(gate).attempted  # closed again
    for _ in range(2):
        fail(gate)
    clock.now += 10.1
    assert fail(gate).attempted  # the probe fails
    assert not fail(gate).attempted  # and it is open for another ten seconds
    clock.now += 10.1
    visit(gate)
    visit(gate)


def test_a_probe_that_ends_in_a_bug_leaves_room_for_the_next() -> None:
    clock = ManualClock()
    gate = make_gate(clock)
    for _ in range(3):
        fail(gate)
    clock.now += 10.1
    with pytest.raises(KeyError):
        visit(gate, error=KeyError("bug"))
    visit(gate)
    assert fail(gate).attempted


@pytest.mark.timing
def test_a_place_is_waited_for_but_not_for_long() -> None:
    gate = make_gate(limit=1, wait_s=0.2)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with gate.visit("a", "a", soon()):
            entered.set()
            leave.wait(5)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(5)
    started = time.monotonic()
    turned_away = fail(gate)
    assert 0.15 < time.monotonic() - started < 2.0
    assert not turned_away.attempted and turned_away.retry_after_s is not None
    threading.Timer(0.05, leave.set).start()
    visit(gate)  # free in time
    holder.join()


def test_being_turned_away_never_opens_the_breaker() -> None:
    gate = make_gate(limit=1, wait_s=0.0)
    with gate.visit("a", "a", soon()):
        for _ in range(10):
            fail(gate)
    visit(gate)


def test_whoever_waits_at_a_host_that_dies_is_told_at_once() -> None:
    gate = make_gate(limit=1, wait_s=5.0, failures=1)
    entered = threading.Event()
    ended: list[tuple[float, bool]] = []

    def dies() -> None:
        with contextlib.suppress(TransientItemError), gate.visit("a", "a", soon()):
            entered.set()
            time.sleep(0.2)
            raise TransientItemError(Code.FETCH_TIMEOUT, "dead")

    def waits() -> None:
        error = fail(gate)
        ended.append((time.monotonic(), error.attempted))

    first = threading.Thread(target=dies)
    first.start()
    entered.wait(5)
    started = time.monotonic()
    second = threading.Thread(target=waits)
    second.start()
    first.join()
    second.join()
    assert ended[0][0] - started < 2.0 and ended[0][1] is False


def test_memory_is_bounded_and_busy_hosts_are_kept() -> None:
    gate = make_gate(max_hosts=10, limit=1, wait_s=0.0)
    with gate.visit("busy", "busy", soon()):
        for number in range(1_000):
            visit(gate, f"host{number}")
        assert len(gate._hosts) <= 10
        assert not fail(gate, "busy").attempted  # still known to be at its limit


def test_nobody_is_overtaken() -> None:
    """More threads than places, each coming back at once: all are served long before they would give up."""
    gate = make_gate(limit=1, wait_s=1.0)
    turned_away = []

    def work() -> None:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            try:
                with gate.visit("a", "a", soon()):
                    time.sleep(0.002)
            except TransientItemError as error:
                turned_away.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turned_away == []


def test_the_limit_holds_under_many_threads() -> None:
    gate = make_gate(limit=3, wait_s=5.0)
    lock = threading.Lock()
    active, most = 0, 0

    def work() -> None:
        nonlocal active, most
        for _ in range(30):
            with gate.visit("a", "a", soon()):
                with lock:
                    active += 1
                    most = max(most, active)
                time.sleep(0.0005)
                with lock:
                    active -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3

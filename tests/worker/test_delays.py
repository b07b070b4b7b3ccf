"""Waiting retries: due in order, bounded, dropped with their partition, and no clock can make them wait for ever."""

from __future__ import annotations

from worker.delays import DelayQueue


class FakeClock:
    """Wall and monotonic time that move by hand, apart from each other."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.wall = 1_700_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


def queue(clock: FakeClock, max_items: int = 10, max_bytes: int = 1_000, max_delay_s: float = 300.0) -> DelayQueue[str]:
    return DelayQueue(max_items, max_bytes, max_delay_s, clock)


def test_items_are_due_in_the_order_of_their_times() -> None:
    clock = FakeClock()
    waiting = queue(clock)
    waiting.push("late", clock.wall + 20, ("r", 0))
    waiting.push("soon", clock.wall + 5, ("r", 0))
    waiting.push("now", None, ("r", 0))
    waiting.push("past", clock.wall - 50, ("r", 0))
    assert waiting.pop_due() == ["now", "past"]
    assert waiting.wait_s() == 5
    clock.sleep(5)
    assert waiting.pop_due() == ["soon"]
    assert waiting.pop_due() == []
    clock.sleep(15)
    assert waiting.pop_due() == ["late"]
    assert waiting.wait_s() is None


def test_a_limit_leaves_the_rest_for_the_next_call() -> None:
    clock = FakeClock()
    waiting = queue(clock)
    for name in "abc":
        waiting.push(name, None, ("r", 0))
    assert waiting.pop_due(2) == ["a", "b"]
    assert waiting.pop_due(2) == ["c"]


def test_bounds_by_number_and_by_bytes() -> None:
    clock = FakeClock()
    waiting = queue(clock, max_items=2, max_bytes=100)
    waiting.push("a", clock.wall + 1, ("r", 0), 10)
    assert not waiting.full
    waiting.push("b", clock.wall + 1, ("r", 0), 10)
    assert waiting.full
    clock.sleep(1)
    waiting.pop_due()
    assert not waiting.full
    waiting.push("c", clock.wall + 1, ("r", 0), 100)
    assert waiting.full


def test_neither_a_wrong_header_nor_a_stepping_clock_makes_an_item_wait_for_ever() -> None:
    clock = FakeClock()
    waiting = queue(clock, max_delay_s=300)
    waiting.push("forged", clock.wall + 10**9, ("r", 0))
    waiting.push("honest", clock.wall + 10, ("r", 0))
    clock.wall -= 3_600  # the machine's clock is set back
    clock.now += 10
    assert waiting.pop_due() == ["honest"]
    clock.now += 290
    assert waiting.pop_due() == ["forged"]


def test_what_was_read_from_a_revoked_partition_is_dropped() -> None:
    clock = FakeClock()
    waiting = queue(clock, max_bytes=100)
    waiting.push("mine", clock.wall + 1, ("r", 0), 60)
    waiting.push("theirs", clock.wall + 1, ("r", 1), 60)
    assert waiting.full
    assert waiting.drop([("r", 1)]) == ["theirs"]
    assert not waiting.full
    clock.sleep(1)
    assert waiting.pop_due() == ["mine"]

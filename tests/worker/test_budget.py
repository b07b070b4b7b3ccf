"""The in-flight budget: room, reservations that wait, one image always admitted."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from worker.budget import Budget


def test_room_counts_events_and_closes_on_bytes() -> None:
    budget = Budget(max_events=3, max_bytes=1000, max_image_bytes=100)
    assert budget.room() == 3
    budget.charge(100)
    assert budget.room() == 2
    budget.charge(400)
    assert budget.room() == 0
    budget.refund(400)
    assert budget.room() == 2
    budget.refund(100)
    assert (budget.events, budget.bytes) == (0, 0)


def test_a_reservation_waits_for_room_and_close_lets_it_go() -> None:
    budget = Budget(max_events=9, max_bytes=200, max_image_bytes=100)
    budget.reserve(100)
    entered: list[int] = []

    def take(number: int) -> None:
        budget.reserve(60)
        entered.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert not entered
    budget.release(100)
    deadline = time.monotonic() + 5
    while len(entered) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(entered) == 1
    budget.close()
    for thread in threads:
        thread.join(5)
    assert len(entered) == 2


def test_one_image_is_admitted_however_large() -> None:
    budget = Budget(max_events=1, max_bytes=10, max_image_bytes=5)
    budget.reserve(10_000)
    assert budget.bytes == 10_000


@given(st.lists(st.integers(0, 500), max_size=30))
def test_books_balance(sizes: list[int]) -> None:
    budget = Budget(max_events=100, max_bytes=10**6, max_image_bytes=500)
    for size in sizes:
        budget.charge(size)
        budget.reserve(size)
    assert budget.events == len(sizes)
    assert budget.bytes == 2 * sum(sizes)
    for size in sizes:
        budget.refund(size)
        budget.release(size)
    assert (budget.events, budget.bytes) == (0, 0)


def test_trying_never_waits_and_never_overtakes_who_does() -> None:
    budget = Budget(max_events=9, max_bytes=200, max_image_bytes=100)
    assert budget.try_reserve(60)
    assert not budget.try_reserve(60)
    assert budget.bytes == 60
    waiting = threading.Thread(target=budget.reserve, args=(100,))
    waiting.start()
    deadline = time.monotonic() + 30
    while budget.try_reserve(1):  # until the other one waits
        budget.release(1)
        assert time.monotonic() < deadline
        time.sleep(0.001)
    budget.release(60)
    waiting.join(30)
    assert not waiting.is_alive()
    assert budget.bytes == 100
    budget.release(100)
    assert budget.try_reserve(100)
    budget.close()
    assert not budget.try_reserve(1)


def test_who_waits_is_admitted_in_order_however_much_it_wants() -> None:
    budget = Budget(max_events=9, max_bytes=200, max_image_bytes=100)
    budget.reserve(60)
    entered: list[str] = []

    def take(name: str, size: int) -> None:
        budget.reserve(size)
        entered.append(name)

    threads = []
    for name, size in (("large", 100), ("small", 40)):
        threads.append(threading.Thread(target=take, args=(name, size)))
        threads[-1].start()
        deadline = time.monotonic() + 30
        while len(budget._waiting) < len(threads) and time.monotonic() < deadline:
            time.sleep(0.001)
    budget.release(20)  # room for the small one, which came second
    time.sleep(0.05)
    assert not entered
    budget.release(40)
    threads[0].join(30)
    assert entered == ["large"]
    budget.release(100)
    threads[1].join(30)
    assert entered == ["large", "small"] and budget.bytes == 40


def test_what_is_under_way_may_grow_past_those_who_wait_but_not_past_the_limit() -> None:
    budget = Budget(max_events=9, max_bytes=200, max_image_bytes=100)
    budget.reserve(60)
    waiting = threading.Thread(target=budget.reserve, args=(100,))
    waiting.start()
    deadline = time.monotonic() + 30
    while not budget._waiting and time.monotonic() < deadline:
        time.sleep(0.001)
    assert budget.try_grow(40) and budget.bytes == 100
    assert not budget.try_grow(1) and budget.bytes == 100
    budget.close()
    waiting.join(30)
    assert not waiting.is_alive()

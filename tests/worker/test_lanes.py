"""Priority lanes: urgent first, order within a lane, nothing starves, nothing lost."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.lanes import Closed, Lanes


@given(st.lists(st.integers(0, 5), max_size=200), st.integers(1, 4), st.integers(2, 9))
def test_nothing_is_lost_and_lanes_keep_their_order(priorities: list[int], levels: int, fair_every: int) -> None:
    lanes: Lanes[tuple[int, int]] = Lanes(levels, fair_every)
    for number, priority in enumerate(priorities):
        lanes.put((min(priority, levels - 1), number), priority)
    lanes.close()
    taken = [lanes.get() for _ in priorities]
    with pytest.raises(Closed):
        lanes.get()
    assert sorted(number for _, number in taken) == list(range(len(priorities)))
    for level in range(levels):
        mine = [number for lane, number in taken if lane == level]
        assert mine == sorted(mine)


def test_urgent_goes_first_and_bulk_keeps_its_share() -> None:
    lanes: Lanes[str] = Lanes(2, fair_every=4)
    for _ in range(40):
        lanes.put("bulk", 1)
    for _ in range(40):
        lanes.put("urgent", 0)
    first = [lanes.get() for _ in range(40)]
    assert first.count("urgent") == 30
    assert first.count("bulk") == 10
    assert first[0] == "urgent"


def test_get_waits_for_put_and_ends_at_close() -> None:
    lanes: Lanes[int] = Lanes(1)
    got: list[int] = []

    def take() -> None:
        while True:
            try:
                got.append(lanes.get())
            except Closed:
                return

    thread = threading.Thread(target=take)
    thread.start()
    for number in range(5):
        lanes.put(number, 0)
    lanes.close()
    thread.join(5)
    assert not thread.is_alive()
    assert got == [0, 1, 2, 3, 4]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=120),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 30),
)
def test_several_are_of_one_lane_share_what_stands_and_weigh_no_more_than_they_may(
    items: list[tuple[int, int]], at_most: int, takers: int, weight: int
) -> None:
    lanes: Lanes[tuple[int, int, int]] = Lanes(4)
    for number, (priority, weighs) in enumerate(items):
        lanes.put((priority, weighs, number), priority)
    lanes.close()
    order: dict[int, list[int]] = {}
    left = len(items)
    while left:
        taken = lanes.get_several(at_most, takers, lambda item: item[1], weight)
        assert 1 <= len(taken) <= min(at_most, -(-left // takers))
        assert len({priority for priority, _, _ in taken}) == 1
        assert len(taken) == 1 or sum(weighs for _, weighs, _ in taken) <= weight
        order.setdefault(taken[0][0], []).extend(number for _, _, number in taken)
        left -= len(taken)
    with pytest.raises(Closed):
        lanes.get_several(at_most, takers, lambda item: item[1], weight)
    assert sorted(itertools.chain(*order.values())) == list(range(len(items)))
    assert all(numbers == sorted(numbers) for numbers in order.values())


def test_one_taker_gets_what_there_is_and_leaves_the_rest() -> None:
    lanes: Lanes[int] = Lanes(2)
    for number in range(10):
        lanes.put(number, 1)
    lanes.put(100, 0)
    takes = [lanes.get_several(4, 1, lambda _: 1, 8) for _ in range(4)]
    assert takes == [[100], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_what_was_put_back_comes_first_in_its_order_also_after_the_end() -> None:
    lanes: Lanes[int] = Lanes(2)
    for number in range(6):
        lanes.put(number, 1)
    assert lanes.get_several(4, 1, lambda _: 1, 8) == [0, 1, 2, 3]
    lanes.put(100, 0)
    lanes.close()
    lanes.put_back([2, 3], 7)
    assert [lanes.get() for _ in range(5)] == [100, 2, 3, 4, 5]


def test_one_who_waits_is_woken_for_what_is_put_back() -> None:
    lanes: Lanes[int] = Lanes(1)
    lanes.put(1, 0)
    taken = lanes.get_several(8, 1, lambda _: 1, 8)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(lanes.get()))
    thread.start()
    lanes.put_back(taken, 0)
    thread.join(5)
    assert got == [1]

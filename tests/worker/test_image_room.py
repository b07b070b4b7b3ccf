"""Room for an image whose size its host tells: what is held, what is given back, and what the next one will take."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.budget import Budget
from worker.image_room import FIRST_BYTES, REMEMBERED, ExpectedSize, ImageRoom, RoomWanted


def test_room_grows_to_the_size_told_and_the_rest_goes_back() -> None:
    budget = Budget(max_events=9, max_bytes=2000, max_image_bytes=1000)
    budget.reserve(100)
    room = ImageRoom(budget, 100)
    room.hold(700)
    assert budget.bytes == 700
    room.hold(300)  # less than there is
    assert budget.bytes == 700
    room.keep(650)
    assert budget.bytes == 650
    room.keep(0)
    assert budget.bytes == 0


def test_without_room_nothing_is_taken_and_the_size_is_told() -> None:
    budget = Budget(max_events=9, max_bytes=2000, max_image_bytes=1000)
    budget.reserve(600)
    budget.reserve(100)
    with pytest.raises(RoomWanted) as wanted:
        ImageRoom(budget, 100).hold(500)
    assert wanted.value.image_bytes == 500 and budget.bytes == 700


def test_what_is_expected_is_what_nine_in_ten_took() -> None:
    expected = ExpectedSize(max_image_bytes=10_000_000)
    assert expected.bytes == FIRST_BYTES
    for number in range(200):
        expected.learn(9_000_000 if number % 20 == 0 else 100_000 + number)
    assert 100_000 < expected.bytes < 100_200
    for _ in range(REMEMBERED):
        expected.learn(3_000_000)
    assert expected.bytes == 3_000_000


def test_no_more_is_expected_than_an_image_may_have() -> None:
    assert ExpectedSize(max_image_bytes=1000).bytes == 1000


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 1000))
def test_fetches_side_by_side_end_within_the_limit_whatever_their_sizes(sizes: list[int], expected: int) -> None:
    """Each reserves what is expected, learns its size, and starts anew with all of it where there was no room."""
    limit = 1000
    budget = Budget(max_events=99, max_bytes=2 * limit, max_image_bytes=limit)
    most, lock = [0], threading.Lock()

    def fetch(size: int) -> int:
        wanted, tries = expected, 0
        while True:
            tries += 1
            budget.reserve(wanted)
            room = ImageRoom(budget, wanted)
            try:
                room.hold(size)
            except RoomWanted as larger:
                room.keep(0)
                wanted = larger.image_bytes
                continue
            room.keep(size)
            with lock:
                most[0] = max(most[0], budget.bytes)
            budget.release(size)
            return tries

    with ThreadPoolExecutor(8) as threads:
        tries = list(threads.map(fetch, sizes, timeout=30))
    assert max(tries) <= 2 and most[0] <= limit and budget.bytes == 0

"""Entries of a queue in lists."""

from __future__ import annotations

import queue
from typing import Any

from worker.rounds import rounds


def _filled(*entries: Any) -> queue.SimpleQueue[Any]:
    source: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for entry in entries:
        source.put(entry)
    return source


def test_what_stands_in_the_queue_comes_together_and_lists_are_not_divided() -> None:
    assert list(rounds(_filled(1, [2, 3], 4, 5, None), 3)) == [[1, 2, 3], [4, 5]]


def test_it_ends_at_none_without_an_empty_round() -> None:
    assert list(rounds(_filled(None, 1), 3)) == []


def test_a_wait_that_is_over_gives_an_empty_round_and_the_next_goes_on() -> None:
    source = _filled()
    found = rounds(source, 3, lambda: 0.01)
    assert next(found) == []
    source.put(1)
    assert next(found) == [1]

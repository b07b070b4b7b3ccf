"""Clients that are opened beside the engine: who waits for them, what refuses them, and who closes them."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from worker.errors import DependencyError
from worker.kafka_start import KafkaStart

WAIT_S = 30.0


class Opening:
    """Opens when it is told to, and says what was closed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go_on = threading.Event()
        self.closed: list[str] = []
        self.all_closed = threading.Event()
        self._error = error

    def __call__(self, stack: ExitStack) -> str:
        stack.callback(self.all_closed.set)
        stack.callback(self.closed.append, "first")
        assert self.go_on.wait(WAIT_S)
        if self._error is not None:
            raise self._error
        stack.callback(self.closed.append, "second")
        return "clients"


def test_they_are_there_once_they_are_open_and_closed_last_first() -> None:
    opening = Opening()
    start = KafkaStart(opening)
    assert start.opened(0.01) is None
    opening.go_on.set()
    assert start.opened(WAIT_S) == "clients"
    assert start.opened(0.0) == "clients"
    assert not opening.closed
    start.close()
    assert opening.closed == ["second", "first"]
    start.close()
    assert opening.closed == ["second", "first"]


def test_what_refuses_them_is_raised_where_they_are_awaited_and_what_was_open_is_closed() -> None:
    opening = Opening(DependencyError("no broker"))
    start = KafkaStart(opening)
    opening.go_on.set()
    with pytest.raises(DependencyError, match="no broker"):
        start.opened(WAIT_S)
    start.close()
    assert opening.closed == ["first"]


def test_nobody_waits_for_clients_that_are_not_wanted_any_more_and_they_are_closed_all_the_same() -> None:
    opening = Opening()
    start = KafkaStart(opening)
    start.close()
    assert not opening.closed
    opening.go_on.set()
    assert opening.all_closed.wait(WAIT_S)
    assert opening.closed == ["second", "first"]

"""Identical images in flight are inferred once: the first leads, the others wait for its scores."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Waiter = TypeVar("Waiter")


class SingleFlight(Generic[Key, Waiter]):
    """Who waits for which image. Thread-safe.

    Whoever was told to lead must end the flight exactly once, whatever becomes of it: `done` when there is a result or an
    error for everyone, `hand_over` when the leader gives up without one. Until then nobody who waits is lost: a leader whose
    partition was taken away either goes on for the others or hands over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Key, list[Waiter]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: Key, waiter: Waiter) -> bool:
        """Wait for a flight that is under way; False where there is none, and `waiter` is not kept."""
        with self._lock:
            waiters = self._flights.get(key)
            if waiters is None:
                return False
            waiters.append(waiter)
            return True

    def lead(self, key: Key, waiter: Waiter) -> bool:
        """True: no flight was under way, `waiter` leads a new one. False: one was, `waiter` waits for it."""
        with self._lock:
            waiters = self._flights.get(key)
            if waiters is None:
                self._flights[key] = []
                return True
            waiters.append(waiter)
            return False

    def done(self, key: Key) -> list[Waiter]:
        """End a flight; who waited, in the order they came. Empty where the flight is unknown."""
        with self._lock:
            return self._flights.pop(key, [])

    def hand_over(self, key: Key) -> Waiter | None:
        """The leader gives up: the first who waits leads from now on. None where nobody waits: the flight is over."""
        with self._lock:
            waiters = self._flights.get(key)
            if waiters:
                return waiters.pop(0)
            self._flights.pop(key, None)
            return None

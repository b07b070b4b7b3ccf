"""Records of the retry topic that wait for their time: a bounded heap in memory."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

from worker.clock import Clock, SystemClock
from worker.ledger import Partition

T = TypeVar("T")


class DelayQueue(Generic[T]):
    """Gives items back once they are due. Thread-safe.

    The wall-clock time of the header is turned into a wait when the item arrives, at most `max_delay_s`: neither a
    stepping clock nor a wrong header can make an item wait for ever.
    """

    def __init__(self, max_items: int, max_bytes: int, max_delay_s: float, clock: Clock | None = None) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._max_delay_s = max_delay_s
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._heap: list[tuple[float, int, T, Partition, int]] = []
        self._tickets = itertools.count()  # ties in order of arrival, and items need not be comparable
        self._bytes = 0

    def push(self, item: T, not_before: float | None, partition: Partition, size_bytes: int = 0) -> None:
        """Keep `item`, read from `partition`, until `not_before` (POSIX seconds; None: due at once)."""
        wait = 0.0 if not_before is None else min(max(0.0, not_before - self._clock.time()), self._max_delay_s)
        due = self._clock.monotonic() + wait
        with self._lock:
            heapq.heappush(self._heap, (due, next(self._tickets), item, partition, size_bytes))
            self._bytes += size_bytes

    def pop_due(self, limit: int | None = None) -> list[T]:
        """Items whose time has come, earliest first, at most `limit`."""
        now = self._clock.monotonic()
        found: list[T] = []
        with self._lock:
            while self._heap and self._heap[0][0] <= now and (limit is None or len(found) < limit):
                _, _, item, _, size = heapq.heappop(self._heap)
                self._bytes -= size
                found.append(item)
        return found

    def wait_s(self) -> float | None:
        """Seconds until the next item is due; None where none waits."""
        with self._lock:
            return max(0.0, self._heap[0][0] - self._clock.monotonic()) if self._heap else None

    def drop(self, partitions: Iterable[Partition]) -> list[T]:
        """Take out what was read from these partitions: they are being revoked."""
        gone = set(partitions)
        with self._lock:
            dropped = [entry for entry in self._heap if entry[3] in gone]
            if dropped:
                self._heap = [entry for entry in self._heap if entry[3] not in gone]
                heapq.heapify(self._heap)
                self._bytes -= sum(entry[4] for entry in dropped)
        return [entry[2] for entry in dropped]

    @property
    def full(self) -> bool:
        """Whether the retry topic should be held until some are due."""
        with self._lock:
            return len(self._heap) >= self._max_items or self._bytes >= self._max_bytes

    def __len__(self) -> int:
        with self._lock:
            return len(self._heap)

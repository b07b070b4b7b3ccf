"""A queue with priority lanes: urgent first, and nothing starves."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):  # noqa: N818 - a state, not a fault
    """The queue was closed and is empty."""


class Lanes(Generic[T]):
    """Unbounded thread-safe queue; the in-flight budget bounds what can stand in it.

    `get` serves the most urgent lane, but at every `fair_every`-th call the lane whose head has waited longest, so
    that a steady urgent stream leaves the bulk a share of 1/fair_every.
    """

    def __init__(self, levels: int, fair_every: int = 8) -> None:
        self._lanes: tuple[deque[tuple[int, T]], ...] = tuple(deque() for _ in range(levels))
        self._ready = threading.Condition()
        self._fair_every = fair_every
        self._tickets = 0
        self._taken = 0
        self._closed = False

    def put(self, item: T, priority: int) -> None:
        """Append to the lane of `priority` (0 most urgent; beyond the last level counts as the last)."""
        with self._ready:
            lane = self._lanes[min(priority, len(self._lanes) - 1)]
            lane.append((self._tickets, item))
            self._tickets += 1
            self._ready.notify()

    def get(self) -> T:
        """Wait for an item.

        Raises:
            Closed: the queue is closed and empty.
        """
        with self._ready:
            return self._next().popleft()[1]

    def get_several(self, at_most: int, takers: int, weigh: Callable[[T], int], weight: int) -> list[T]:
        """Wait for an item, and take those of its lane that stand behind it along.

        Args:
            at_most: so many items.
            takers: how many threads take from this queue: none takes more than its share of what stands there.
            weigh: what an item weighs.
            weight: what they may weigh together; the first comes whatever it weighs.

        Raises:
            Closed: the queue is closed and empty.
        """
        with self._ready:
            lane = self._next()
            share = -(-sum(map(len, self._lanes)) // takers)
            taken = [lane.popleft()[1]]
            weight -= weigh(taken[0])
            while lane and len(taken) < min(at_most, share) and (weight := weight - weigh(lane[0][1])) >= 0:
                taken.append(lane.popleft()[1])
            return taken

    def put_back(self, items: Sequence[T], priority: int) -> None:
        """What `get_several` took of the lane of `priority` and nobody served: it stands before all others again."""
        with self._ready:
            lane = self._lanes[min(priority, len(self._lanes) - 1)]
            lane.extendleft((-1, item) for item in reversed(items))
            self._ready.notify(len(items))

    def _next(self) -> deque[tuple[int, T]]:
        """Wait for the lane that is to be served; the lock is held. Raises as `get`."""
        self._ready.wait_for(lambda: self._closed or any(self._lanes))
        waiting = [lane for lane in self._lanes if lane]
        if not waiting:
            raise Closed
        self._taken += 1
        fair = self._taken % self._fair_every == 0
        return min(waiting, key=lambda lane: lane[0][0]) if fair else waiting[0]

    def close(self) -> None:
        """No more items will come; waiting `get` calls end once the queue is empty."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    def __len__(self) -> int:
        with self._ready:
            return sum(len(lane) for lane in self._lanes)

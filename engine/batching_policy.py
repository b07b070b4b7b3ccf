"""Which waiting crops form the next batch, and when: pure logic, time is a number that the caller passes in.

Rules, in Triton's words:

* The window opens at the first crop and closes `max_queue_delay_microseconds` later (reason `timeout`), or as soon as the
  smallest of `preferred_batch_size` is reached (reason `full`). What leaves is everything that waits, up to
  `max_batch_size`: rounding down to a preferred size would only leave crops behind that pay a whole further call.
* While the device is busy nothing but a whole `max_batch_size` leaves, so waiting costs nothing and batches fill.
* `max_queue_size` crops may wait at each priority level (Triton's queue policy is per level, too), so that bulk which
  fills its level never locks urgent items out.
* Within a level first come, first served. Urgent levels go first; when not all that waits fits into the batch, a share
  of it (`bulk_share`) goes to the oldest items of the less urgent levels, so that none starves.
* While urgent items come (one in the last `URGENT_MEMORY_S`), batches with bulk in them stay so small that an urgent item that
  meets one is through within twice the time it takes alone; but no smaller than the smallest preferred size.
* Sizes count crops. An item is split where a batch ends: what is left of it could not finish earlier anyway.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Reason = Literal["full", "timeout", "drain"]

T = TypeVar("T")

URGENT_MEMORY_S = 10.0
"""For how long after an urgent item more of them must be expected."""


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """Dynamic batching, in Triton's words; sizes in crops.

    Raises:
        ValueError: a number that makes no sense, named.
    """

    max_batch_size: int = 32
    preferred_batch_size: tuple[int, ...] = ()
    """Sizes that leave at once; empty: a quarter, a half and the whole of `max_batch_size`."""
    max_queue_delay_microseconds: int = 5_000
    max_queue_size: int = 1_024
    """Crops that may wait at each priority level."""
    priority_levels: int = 2
    """0 is the most urgent; larger priorities count as the last level."""
    bulk_share: float = 0.125
    """Share of an overfull batch that is kept for the oldest items of less urgent levels; at most a half."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue_size", "priority_levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_queue_delay_microseconds < 0:
            raise ValueError(f"max_queue_delay_microseconds must not be negative: {self.max_queue_delay_microseconds}")
        if any(not 1 <= size <= self.max_batch_size for size in self.preferred_batch_size):
            raise ValueError(f"preferred_batch_size {self.preferred_batch_size} must lie within 1 and {self.max_batch_size}")
        if not 0 < self.bulk_share <= 0.5:
            raise ValueError(f"bulk_share must lie above 0 and be at most 0.5, not {self.bulk_share}")

    @property
    def leaves_at(self) -> int:
        """Crops at which a batch leaves an idle device's queue at once: the smallest preferred size."""
        return min(self.preferred_batch_size) if self.preferred_batch_size else max(1, self.max_batch_size // 4)

    @property
    def max_queue_delay_s(self) -> float:
        """The longest wait of the first crop for company, in seconds."""
        return self.max_queue_delay_microseconds / 1e6


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """An item in the queue: `crops` of them, of which `taken` have left."""

    item: T
    crops: int
    priority: int
    arrived: float
    """Seconds of the caller's monotonic clock."""
    deadline: float | None = None
    """The same clock: an item that has not begun by then leaves with an error; one half done, too."""
    taken: int = 0
    sequence: int = field(default=0, compare=False)
    gone: bool = False
    """Finished, failed or expired: whatever still refers to it may forget it."""


@dataclass(frozen=True, slots=True)
class Slice(Generic[T]):
    """Crops `start` to `stop` of one item, in one batch."""

    entry: Entry[T]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Departure(Generic[T]):
    """What leaves together, the most urgent first, and why."""

    slices: tuple[Slice[T], ...]
    reason: Reason

    @property
    def size(self) -> int:
        """Crops in the batch."""
        return sum(part.stop - part.start for part in self.slices)


class BatchQueue(Generic[T]):
    """Items that wait for the device. Not thread-safe; `Batcher` puts a lock around it.

    Every `now` is a reading of one monotonic clock in seconds, never smaller than the one before.
    """

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        self._levels: list[deque[Entry[T]]] = [deque() for _ in range(config.priority_levels)]
        self._waiting = [0] * config.priority_levels
        self._deadlines: _Timers[T] = _Timers()
        self._early: _Timers[T] = _Timers()
        self._sequence = 0
        self._credit = 0.0
        self._urgent_at = -math.inf

    @property
    def crops(self) -> int:
        """Crops that wait."""
        return sum(self._waiting)

    def entries(self) -> Iterator[Entry[T]]:
        """What waits, the most urgent first; an item of which a part is under way counts as waiting."""
        for level in self._levels:
            yield from level

    def level(self, priority: int) -> int:
        """The level of a priority: 0 is the most urgent, what is beyond the last level belongs to the last."""
        return min(max(priority, 0), len(self._levels) - 1)

    def fits(self, priority: int, crops: int) -> bool:
        """Whether `push` is allowed: the level has room, or is empty (an item larger than the whole queue)."""
        waiting = self._waiting[self.level(priority)]
        return waiting == 0 or waiting + crops <= self._config.max_queue_size

    def push(self, entry: Entry[T]) -> None:
        """Append an item to its level; `entry.arrived` opens its window."""
        self._sequence += 1
        entry.sequence = self._sequence
        level = self.level(entry.priority)
        self._levels[level].append(entry)
        self._waiting[level] += entry.crops
        if level == 0:
            self._urgent_at = entry.arrived
        self._time(entry)

    def restart(self) -> list[Entry[T]]:
        """Let the items of which a part has left begin again with their first crop (they keep their places); return them."""
        begun = [level[0] for level in self._levels if level and level[0].taken]
        for entry in begun:
            self._waiting[self.level(entry.priority)] += entry.taken
            entry.taken = 0
        return begun

    def drop(self, entry: Entry[T]) -> None:
        """Forget the crops of an item that still wait (it failed, or its time is over); a second time is nothing."""
        waits = not entry.gone and entry.taken < entry.crops
        entry.gone = True
        if waits:
            level = self.level(entry.priority)
            self._levels[level].remove(entry)
            self._waiting[level] -= entry.crops - entry.taken

    def expire(self, now: float) -> list[Entry[T]]:
        """Remove and return the items whose deadline has passed before all their crops had left."""
        expired = []
        while self._deadlines.next() <= now:
            expired.append(self._deadlines.pop())
            self.drop(expired[-1])
        return expired

    def wake_at(self, cap: int | None = None) -> float:
        """When the queue must be looked at again if nothing arrives and the device is idle; inf: never."""
        if not self.crops:
            return math.inf
        if self.crops >= self._threshold(cap):
            return -math.inf
        oldest = min(level[0].arrived for level in self._levels if level)
        return min(oldest + self._config.max_queue_delay_s, self._early.next(), self._deadlines.next())

    def cap(self, now: float, device: int | None, prompt: int | None) -> int | None:
        """The cap for the next batch: the device's, and while urgent items come, bulk makes batches no larger than `prompt`.

        Not smaller than the smallest preferred size, and not smaller than the urgent crops that wait.

        Args:
            device: what the device has memory for; None: `max_batch_size`.
            prompt: the largest batch beside which urgent crops stay prompt; None: any.
        """
        if prompt is None or now - self._urgent_at > URGENT_MEMORY_S or not any(self._waiting[1:]):
            return device
        return min(max(prompt, self._config.leaves_at, self._waiting[0]), self._limit(device))

    def overtakes(self, cap: int | None = None) -> bool:
        """Whether crops that come later could be more urgent than those of the next whole batch."""
        return len(self._levels) > 1 and self._waiting[0] < self._limit(cap)

    def take(self, now: float, *, busy: bool = False, closing: bool = False, cap: int | None = None) -> Departure[T] | None:
        """The batch that leaves now, or None: wait until `wake_at`, or until something arrives.

        Args:
            now: monotonic seconds.
            busy: the device has a batch already; only a whole batch may be made ready behind it.
            closing: nothing more will come: whatever waits leaves.
            cap: what the device can take, where that is less than `max_batch_size`.
        """
        limit = self._limit(cap)
        reason: Reason
        if not self.crops:
            return None
        if closing:
            reason = "drain"
        elif self.crops >= (limit if busy else self._threshold(cap)):
            reason = "full"
        elif not busy and self.wake_at(cap) <= now:
            reason = "timeout"
        else:
            return None
        return Departure(tuple(self._fill(limit)), reason)

    def _limit(self, cap: int | None) -> int:
        return min(self._config.max_batch_size, cap or self._config.max_batch_size)

    def _threshold(self, cap: int | None) -> int:
        return min(self._config.leaves_at, self._limit(cap))

    def _time(self, entry: Entry[T]) -> None:
        """An item waits for company at most half of the time it has: a deadline must not pass on an idle device."""
        if entry.deadline is None:
            return
        self._deadlines.add(entry.deadline, entry)
        half = entry.arrived + max(0.0, (entry.deadline - entry.arrived) / 2)
        if half < entry.arrived + self._config.max_queue_delay_s:
            self._early.add(half, entry)

    def _fill(self, limit: int) -> Iterator[Slice[T]]:
        """Slices of the next batch: the reserved share first chosen, then the levels in order; one slice an item."""
        taken: dict[Entry[T], int] = {}
        reserved = self._reserve(limit, taken)
        room = limit - reserved
        for level in range(len(self._levels)):
            while room and self._levels[level]:
                room -= self._advance(level, room, taken)
        order = sorted(taken, key=self._place) if reserved else taken
        for entry in order:
            yield Slice(entry, entry.taken - taken[entry], entry.taken)

    def _place(self, entry: Entry[T]) -> tuple[int, int]:
        return self.level(entry.priority), entry.sequence

    def _reserve(self, limit: int, taken: dict[Entry[T], int]) -> int:
        """Take the share of the less urgent levels, the oldest item first; returns how many crops."""
        top = next(level for level, waiting in enumerate(self._waiting) if waiting)
        lower = range(top + 1, len(self._levels))
        if self.crops <= limit or not any(self._waiting[level] for level in lower):
            self._credit = 0.0
            return 0
        self._credit += limit * self._config.bulk_share
        used = 0
        while used < int(self._credit) and (heads := [level for level in lower if self._levels[level]]):
            oldest = min(heads, key=lambda level: self._levels[level][0].sequence)
            used += self._advance(oldest, int(self._credit) - used, taken)
        starving = any(self._waiting[level] for level in lower)
        self._credit = self._credit - used if starving else 0.0
        return used

    def _advance(self, level: int, room: int, taken: dict[Entry[T], int]) -> int:
        """Take up to `room` crops of the first item of a level; returns how many."""
        entry = self._levels[level][0]
        crops = min(room, entry.crops - entry.taken)
        entry.taken += crops
        taken[entry] = taken.get(entry, 0) + crops
        self._waiting[level] -= crops
        if entry.taken == entry.crops:
            self._levels[level].popleft()
        return crops


class _Timers(Generic[T]):
    """Moments of items that wait, the next one first; those of items that have left are forgotten in passing."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Entry[T]]] = []
        self._ties = itertools.count()
        self._sweep_at = 64

    def add(self, moment: float, entry: Entry[T]) -> None:
        """Remember a moment of an entry."""
        if len(self._heap) >= self._sweep_at:
            self._heap = [timer for timer in self._heap if self._waits(timer[2])]
            heapq.heapify(self._heap)
            self._sweep_at = max(64, 2 * len(self._heap))
        heapq.heappush(self._heap, (moment, next(self._ties), entry))

    def next(self) -> float:
        """The next moment; inf where there is none."""
        while self._heap and not self._waits(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def pop(self) -> Entry[T]:
        """Remove the moment that `next` has shown, and return its item."""
        return heapq.heappop(self._heap)[2]

    @staticmethod
    def _waits(entry: Entry[T]) -> bool:
        return not entry.gone and entry.taken < entry.crops

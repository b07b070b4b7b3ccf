"""Dynamic batching between threads: many submit items, one owns the device and runs it.

The policy is `batching_policy`, the device side is `flights`, what a failing batch comes to is `isolation`; here are the
lock, the waiting, and who is told. Nothing polls: an idle batcher sleeps until something arrives, a filling one until its
window closes.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.batching_policy import BatchConfig, BatchQueue, Departure, Entry, Reason
from engine.flights import Engine, Flights, Landed, Overlapping
from engine.isolation import InferenceFailed

__all__ = [
    "BatchConfig",
    "BatchReport",
    "BatchTiming",
    "Batcher",
    "BatcherClosed",
    "DeadlineExpired",
    "Engine",
    "InferenceFailed",
    "Overlapping",
    "QueueFull",
    "Submission",
]

T = TypeVar("T")
E = TypeVar("E", bound=Engine)

_NO_PIXELS = np.empty((0, 0, 0, 0), np.uint8)


class QueueFull(Exception):  # noqa: N818 - the name says what is the case
    """No room in the queue within the time the caller was ready to wait."""


class BatcherClosed(Exception):  # noqa: N818 - the name says what is the case
    """The batcher takes no more items: it was closed, or the device failed (`__cause__`)."""


class DeadlineExpired(TimeoutError):  # noqa: N818 - the name says what is the case
    """The item's deadline passed before all its crops had reached the device."""


@dataclass(frozen=True, slots=True)
class BatchTiming(Generic[E]):
    """Where an item's time went; the two add up to its time in the batcher."""

    queue_s: float
    infer_s: float
    """Device time of the batches it was in (more than one where it was split)."""
    engine: E
    """The engine that made its scores, all of them."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch, for metrics."""

    size: int
    """Crops."""
    reason: Reason
    waits_s: tuple[float, ...]
    """For each item that began in this batch, the time from `submit` to the call."""
    infer_s: float
    """Device time, further calls for failures included."""
    cap: int | None
    """The largest batch the device has memory for, where that is below `max_batch_size`."""


@dataclass(frozen=True, slots=True)
class Submission(Generic[T]):
    """An item to be queued; see `Batcher.submit`."""

    crops: NDArray[np.uint8]
    priority: int
    context: T


@dataclass(slots=True, eq=False)
class _Job(Generic[T]):
    context: T
    crops: NDArray[np.uint8]
    scores: NDArray[np.float32] | None = None
    done: int = 0
    infer_s: float = 0.0


class Batcher(Generic[T]):
    """A queue in front of a device. `submit` from any thread; `run` in the thread that owns the device."""

    def __init__(
        self,
        config: BatchConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        observer: Callable[[BatchReport], None] | None = None,
        crop_shape: tuple[int, int, int] = (224, 224, 3),
    ) -> None:
        """Make an empty batcher.

        Args:
            config: sizes and delays.
            clock: monotonic seconds; deadlines are readings of it.
            observer: told about each batch, in the device's thread; must be quick.
            crop_shape: height, width, channels of a crop.
        """
        self._config = config
        self._clock = clock
        self._observer = observer
        self._crop_shape = crop_shape
        self._queue: BatchQueue[_Job[T]] = BatchQueue(config)
        self._open: dict[_Job[T], None] = {}
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._sleeps_until: float | None = None
        self._room = [threading.Condition(self._lock) for _ in range(config.priority_levels)]
        self._lines: list[deque[object]] = [deque() for _ in range(config.priority_levels)]
        self._device_cap: int | None = None
        self._prompt: int | None = None
        self._running = False
        self._closed = False
        self._drain = True
        self._failure: BaseException | None = None

    @property
    def queued(self) -> int:
        """Crops that wait for the device."""
        with self._lock:
            return self._queue.crops

    def unfinished(self) -> list[T]:
        """Contexts of accepted items that were given neither to `on_done` nor to `on_error`, in order of arrival."""
        # A copy in one step: `_settle` takes items out without the lock.
        return [job.context for job in list(self._open)]

    def submit(
        self,
        crops: NDArray[np.uint8],
        priority: int,
        context: T,
        deadline: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """Queue an item; its scores go to `run`'s `on_done` together with `context`.

        Args:
            crops: uint8 [k, 224, 224, 3], k at least 1; must not change until the item is settled. k may exceed
                `max_batch_size` (the item is split) and `max_queue_size` (it waits for an empty level).
            priority: 0 is the most urgent; beyond the last level counts as the last.
            context: given back as it is.
            deadline: reading of the clock by which the item must have reached the device, else `DeadlineExpired`.
            timeout: seconds to wait for room; None: as long as it takes; 0: do not wait.

        Raises:
            QueueFull: no room in time. Those who wait for room at one level are served in order.
            BatcherClosed: closed before the item was accepted, or the device failed.
            ValueError: crops of another shape or dtype.
        """
        self._submit([Submission(crops, priority, context)], deadline, timeout)

    def submit_several(self, items: Sequence[Submission[T]]) -> None:
        """Queue items one behind the other, as `submit` does, with one turn for the device's thread.

        Raises:
            BatcherClosed: closed before the last item was accepted; those before it were, as `unfinished` shows.
            ValueError: crops of another shape or dtype; no item was accepted.
        """
        self._submit(items, None, None)

    def _submit(self, items: Sequence[Submission[T]], deadline: float | None, timeout: float | None) -> None:
        for item in items:
            crops = item.crops
            if crops.dtype != np.uint8 or crops.ndim != 4 or len(crops) < 1 or crops.shape[1:] != self._crop_shape:
                raise ValueError(f"crops must be uint8 [k, {self._crop_shape}], not {crops.dtype} {crops.shape}")
        with self._lock:
            try:
                for item in items:
                    self._wait_for_room(self._queue.level(item.priority), len(item.crops), timeout)
                    job = _Job(item.context, item.crops)
                    self._open[job] = None
                    self._queue.push(Entry(job, len(item.crops), item.priority, self._clock(), deadline))
            finally:
                self._nudge()

    def _nudge(self) -> None:
        """Wake the device's thread where it would sleep too long; the lock is held."""
        if self._sleeps_until is not None and self._queue.wake_at(self._cap(self._clock())) < self._sleeps_until:
            self._work.notify()

    def close(self, drain: bool = True) -> None:
        """Take no more items; `run` returns when what waits has left (`drain`), or after the batches under way.

        Returns at once and may be called again: drain=False cuts a drain short. Without drain, items that have not
        begun stay in `unfinished`.
        """
        with self._lock:
            self._closed = True
            self._drain = self._drain and drain
            self._wake_everyone()

    def run(
        self,
        engine: Callable[[], E],
        on_done: Callable[[T, NDArray[np.float32], BatchTiming[E]], None],
        on_error: Callable[[T, Exception], None],
        on_told: Callable[[], None] = lambda: None,
    ) -> None:
        """Own the device: run batches in this thread until the batcher is closed.

        Args:
            engine: asked before each batch which engine to use; the same object until it is to be swapped. At a swap the
                batches under way are landed first, and an item that was half scored begins again, so that one engine makes
                all its scores. The next time it is asked, the old engine is out of use and may be closed.
            on_done: context, float32 [k, heads], timing. Called in this thread, as `on_error` is: quick, and never blocking
                on `submit`. In order of arrival within a priority, except that failures may be told earlier.
            on_error: context and InferenceFailed (the item's fault) or DeadlineExpired.
            on_told: a batch has landed, and everyone in it was told: for who hands results on together.

        Raises:
            BackendError: the device or engine failed, not an image. Nothing is called for the items it leaves in `unfinished`,
                and everyone who waits in `submit` gets BatcherClosed. So does any exception of the three callables.
        """
        with self._lock:
            if self._running:
                raise RuntimeError("this batcher is being run already; one thread owns the device")
            self._running = True
        flights: Flights[_Job[T], E] = Flights(self._config.max_batch_size, self._crop_shape, self._clock)
        current: E | None = None
        try:
            while self._ready(flights, on_error):
                chosen = engine()
                if current is not None and chosen is not current:
                    self._swap(flights, on_done, on_error)
                    on_told()
                current = chosen
                departure = self._take(busy=len(flights) > 0)
                more = departure is not None and flights.launch(departure, self._parts(departure), current)
                if flights and not more:
                    self._deliver(flights, on_done, on_error)
                    on_told()
            while flights:
                self._deliver(flights, on_done, on_error)
                on_told()
        finally:
            with self._lock:
                self._running = False
                self._closed = True
                self._failure = sys.exception()
                self._wake_everyone()
            flights.close()

    # The rest runs under the lock where it says so, and otherwise in the device's thread.

    def _wait_for_room(self, level: int, crops: int, timeout: float | None) -> None:
        """Wait in line for room at a level; the lock is held, and let go while waiting."""
        line, ticket = self._lines[level], object()
        if not line and self._queue.fits(level, crops) and not self._closed:
            return
        self._nudge()  # of what was queued in this turn
        line.append(ticket)
        try:
            admitted = self._room[level].wait_for(
                lambda: self._closed or (line[0] is ticket and self._queue.fits(level, crops)), timeout
            )
        finally:
            line.remove(ticket)
            if line:
                self._room[level].notify_all()
        if self._closed:
            why = "it was closed" if self._failure is None else f"it ended with {type(self._failure).__name__}"
            raise BatcherClosed(f"the batcher takes nothing more: {why}") from self._failure
        if not admitted:
            raise QueueFull(f"no room for {crops} crops within {timeout} s: {self._queue.crops} wait")

    def _wake_everyone(self) -> None:
        self._work.notify_all()
        for room in self._room:
            room.notify_all()

    def _make_room(self) -> None:
        for level, line in enumerate(self._lines):
            if line:
                self._room[level].notify_all()

    def _ready(self, flights: Flights[_Job[T], Any], on_error: Callable[[T, Exception], None]) -> bool:
        """Sleep until a batch may leave, also behind one under way. False: closed, nothing is to begin any more."""
        while True:
            with self._lock:
                now = self._clock()
                expired = self._queue.expire(now)
                if not expired:
                    if self._closed and not (self._drain and self._queue.crops):
                        return False
                    cap = self._cap(now)
                    wake_at = flights.next_at(self._queue.overtakes(cap)) if flights else self._queue.wake_at(cap)
                    if self._closed or wake_at <= now:
                        return True
                    self._sleeps_until = None if flights else wake_at
                    self._work.wait(None if math.isinf(wake_at) else wake_at - now)
                    self._sleeps_until = None
                    continue
                self._make_room()
            for entry in expired:
                self._settle(entry)
                on_error(entry.item.context, DeadlineExpired(f"not scored within {now - entry.arrived:.3f} s"))

    def _take(self, busy: bool) -> Departure[_Job[T]] | None:
        with self._lock:
            now = self._clock()
            departure = self._queue.take(now, busy=busy, closing=self._closed, cap=self._cap(now))
            self._make_room()
            return departure

    def _cap(self, now: float) -> int | None:
        return self._queue.cap(now, self._device_cap, self._prompt)

    @staticmethod
    def _parts(departure: Departure[_Job[T]]) -> list[NDArray[np.uint8]]:
        return [part.entry.item.crops[part.start : part.stop] for part in departure.slices]

    def _deliver(
        self,
        flights: Flights[_Job[T], E],
        on_done: Callable[[T, NDArray[np.float32], BatchTiming[E]], None],
        on_error: Callable[[T, Exception], None],
    ) -> None:
        """Land the oldest batch and tell about it."""
        landed = flights.land()
        with self._lock:
            self._device_cap = flights.cap
            self._prompt = flights.speed.prompt(self._config.max_queue_delay_s)
        if self._observer is not None:
            self._observer(self._report(landed))
        stop = 0
        errors, scores = landed.outcome.errors, landed.outcome.scores
        for index, part in enumerate(landed.departure.slices):
            start, stop = stop, stop + part.stop - part.start
            entry, job = part.entry, part.entry.item
            if entry.gone:
                continue
            job.infer_s += landed.infer_s
            if index in errors:
                self._settle(entry)
                on_error(job.context, errors[index])
            elif (gathered := self._gather(job, entry.crops, scores[start:stop])) is not None:
                self._settle(entry)
                queue_s = max(0.0, landed.ended - entry.arrived - job.infer_s)
                on_done(job.context, gathered, BatchTiming(queue_s, job.infer_s, landed.engine))

    @staticmethod
    def _gather(job: _Job[T], crops: int, scores: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Put the next scores of an item to those it has; all of them when these were the last."""
        if len(scores) == crops:
            return scores
        if job.scores is None:
            job.scores = np.empty((crops, scores.shape[1]), np.float32)
        job.scores[job.done : job.done + len(scores)] = scores
        job.done += len(scores)
        return job.scores if job.done == crops else None

    def _report(self, landed: Landed[_Job[T], E]) -> BatchReport:
        waits_s = tuple(landed.started - part.entry.arrived for part in landed.departure.slices if part.start == 0)
        return BatchReport(landed.departure.size, landed.departure.reason, waits_s, landed.infer_s, self._device_cap)

    def _settle(self, entry: Entry[_Job[T]]) -> None:
        """An item is done with: nothing of it waits, and its pixels are let go."""
        if entry.taken < entry.crops:
            with self._lock:
                self._queue.drop(entry)
                self._make_room()
        # The rest without the lock, for which producers stand in line: each of these is one step to them.
        entry.gone = True
        entry.item.crops = _NO_PIXELS
        self._open.pop(entry.item, None)

    def _swap(
        self,
        flights: Flights[_Job[T], E],
        on_done: Callable[[T, NDArray[np.float32], BatchTiming[E]], None],
        on_error: Callable[[T, Exception], None],
    ) -> None:
        """Land what the old engine has, and let half-scored items begin again with the new one."""
        while flights:
            self._deliver(flights, on_done, on_error)
        with self._lock:
            for entry in self._queue.restart():
                entry.item.scores, entry.item.done, entry.item.infer_s = None, 0, 0.0

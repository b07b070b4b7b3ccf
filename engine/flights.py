"""Batches on the device: copy the crops in, call, collect, settle failures. One thread, the device's owner, uses this."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from engine.backends.base import BackendError, OutOfDeviceMemory
from engine.batching_policy import Departure
from engine.device_speed import DeviceSpeed
from engine.device_thread import Call, DeviceThread
from engine.isolation import Infer, Outcome, finite, isolate

log = structlog.get_logger()

AHEAD = 0.5
"""How early the next batch goes behind one under way at most, as a share of what that one takes."""
AHEAD_S = 0.002
"""And in seconds, where more urgent crops may still come: a batch that is put together later can take them along."""
DEPTH = 2
"""Batches that may be under way where the engine itself takes one at a time: the second waits in the device's thread."""
CAP_DOUBLES_AFTER = 256
"""Whole batches at a lowered cap that must succeed before a larger one is tried again."""


class Engine(Protocol):
    """What scores crops: a detector, or a simulated device."""

    def infer(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [n, 224, 224, 3] -> float32 [n, heads]. Keeps neither the array it got nor the one it gave."""
        ...


class Overlapping(Protocol):
    """An engine that takes the next batch while it computes one: copies overlap with computing. Known by its `depth`."""

    depth: int
    """Batches that may be under way."""

    def infer(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """As of `Engine`; only called while nothing else is under way."""
        ...

    def submit(self, crops: NDArray[np.uint8]) -> object:
        """Start a batch and return its ticket; the array stays as it is until the ticket is collected."""
        ...

    def collect(self, ticket: Any) -> NDArray[np.float32]:
        """Wait for a batch; called once a ticket, in the order of `submit`."""
        ...


T = TypeVar("T")
E = TypeVar("E", bound=Engine)


@dataclass(slots=True)
class _Flight(Generic[T, E]):
    departure: Departure[T]
    engine: E
    buffer: NDArray[np.uint8]
    bounds: list[int]
    started: float
    ticket: Any = None
    result: NDArray[np.float32] | Exception | None = None
    ended: float | None = None

    @property
    def crops(self) -> NDArray[np.uint8]:
        return self.buffer[: self.bounds[-1]]


@dataclass(frozen=True, slots=True)
class Landed(Generic[T, E]):
    """A batch that is settled; `outcome`'s parts are the departure's slices."""

    departure: Departure[T]
    engine: E
    outcome: Outcome
    started: float
    """Seconds of the injected clock when its call began…"""
    ended: float
    """…and when it was settled."""
    infer_s: float
    """Seconds it kept the device, further calls for failures included."""


class Flights(Generic[T, E]):
    """The batches under way, the oldest first."""

    def __init__(self, max_batch_size: int, crop_shape: tuple[int, int, int], clock: Callable[[], float]) -> None:
        self._max_batch_size = max_batch_size
        self._shape = (max_batch_size, *crop_shape)
        self._clock = clock
        self._free: list[NDArray[np.uint8]] = []
        self._flights: deque[_Flight[T, E]] = deque()
        self._landed_at = -math.inf
        self._assembly_s = 0.0
        self._whole_at_cap = 0
        self._device: DeviceThread | None = None
        self.speed = DeviceSpeed()
        """What batches take; learnt as they land."""
        self.cap: int | None = None
        """The largest batch that the device has memory for; None: `max_batch_size`."""

    def __len__(self) -> int:
        return len(self._flights)

    def next_at(self, overtakes: bool) -> float:
        """When to put the next batch behind those under way, so that the device does not stand still; -inf: now.

        Args:
            overtakes: whether crops that come later could be more urgent than those of the next batch.
        """
        expected = [self.speed.seconds(len(flight.crops)) or 0.0 for flight in self._flights]
        if not all(expected):
            return -math.inf
        begun = max(self._flights[0].started, self._landed_at)
        ahead_s = AHEAD * expected[-1]
        return begun + sum(expected) - (min(ahead_s, AHEAD_S) if overtakes else ahead_s) - self._assembly_s

    def launch(self, departure: Departure[T], parts: list[NDArray[np.uint8]], engine: E) -> bool:
        """Copy the crops of each slice into a batch and begin its call. True: the device takes another one behind it."""
        begun = self._clock()
        buffer = self._free.pop() if self._free else np.empty(self._shape, np.uint8)
        bounds = [0]
        for crops in parts:
            bounds.append(bounds[-1] + len(crops))
            buffer[bounds[-2] : bounds[-1]] = crops
        flight = _Flight(departure, engine, buffer, bounds, self._clock())
        self._flights.append(flight)
        if (depth := _depth(engine)) == 1:
            self._thread().submit(engine.infer, flight.crops)
            # How long an unknown size takes must be seen first: until then nobody knows when the next batch is due.
            depth = 1 if self.speed.seconds(len(flight.crops)) is None else DEPTH
        else:
            try:
                flight.ticket = cast(Overlapping, engine).submit(flight.crops)
            except Exception as error:  # noqa: BLE001  settled in `land`, which tells the device's failures from the images'
                flight.result = error
        self._assembly_s = max(0.9 * self._assembly_s, self._clock() - begun)
        return len(self._flights) < depth

    def land(self) -> Landed[T, E]:
        """Wait for the oldest batch and settle it.

        Raises:
            BackendError: fatal; what is under way is lost.
        """
        flight = self._flights.popleft()
        result = self._collect(flight)
        if isinstance(result, Exception) or not finite(result, len(flight.crops)):
            for other in self._flights:
                other.result = self._collect(other)
            outcome = isolate(self._blocking(flight.engine), flight.crops, flight.bounds, result)
            flight.ended = None
        else:
            outcome = Outcome(result)
        self._free.append(flight.buffer)
        self._note_cap(outcome.cap, len(flight.crops))
        now = self._clock()
        begun = max(flight.started, self._landed_at)
        ended = now if flight.ended is None else flight.ended
        self._landed_at = ended
        self.speed.learn(len(flight.crops), ended - begun)
        return Landed(flight.departure, flight.engine, outcome, flight.started, now, ended - begun)

    def close(self) -> None:
        """Let go of the device's thread; what is under way is lost."""
        if self._device is not None:
            self._device.close()
            self._device = None

    def _thread(self) -> DeviceThread:
        if self._device is None:
            self._device = DeviceThread(self._clock)
        return self._device

    def _blocking(self, engine: E) -> Infer:
        """The engine's `infer`, from the thread that its other calls come from; only while nothing is under way."""
        if _depth(engine) > 1:
            return engine.infer

        def infer(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
            self._thread().submit(engine.infer, crops)
            result = self._thread().collect().result
            if isinstance(result, Exception):
                raise result
            return result

        return infer

    def _collect(self, flight: _Flight[T, E]) -> NDArray[np.float32] | Exception:
        if flight.result is None and _depth(flight.engine) == 1:
            call: Call = self._thread().collect()
            flight.result, flight.ended = call.result, call.ended
        elif flight.result is None:
            try:
                flight.result = cast(Overlapping, flight.engine).collect(flight.ticket)
            except Exception as error:  # noqa: BLE001  as in `launch`
                flight.result = error
        if isinstance(flight.result, BackendError) and not isinstance(flight.result, OutOfDeviceMemory):
            raise flight.result
        return flight.result

    def _note_cap(self, cap: int | None, size: int) -> None:
        """Lower the cap where memory ran out; try twice as much again after it has held for long."""
        if cap is not None:
            self.cap = min(cap, self.cap or cap)
            self._whole_at_cap = 0
            log.warning("engine.batch_capped", crops=self.cap, max_batch_size=self._max_batch_size)
        elif self.cap is not None and size >= self.cap:
            self._whole_at_cap += 1
            if self._whole_at_cap >= CAP_DOUBLES_AFTER:
                self.cap = self.cap * 2 if self.cap * 2 < self._max_batch_size else None
                self._whole_at_cap = 0
                log.info("engine.batch_cap_raised", crops=self.cap or self._max_batch_size)


def _depth(engine: Engine) -> int:
    return int(getattr(engine, "depth", 1))

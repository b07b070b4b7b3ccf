"""A device on which n crops take a + b*n seconds: it sleeps, so that what is measured is the batcher."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.batching_policy import BatchConfig, BatchQueue, Entry
from engine.device_speed import DeviceSpeed


@dataclass
class SimulatedDevice:
    """One call at a time, as an engine without streams."""

    a_s: float
    b_s: float

    def seconds(self, crops: int) -> float:
        """What a batch takes."""
        return self.a_s + self.b_s * crops

    def infer(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Sleep, and give zeros."""
        time.sleep(self.seconds(len(crops)))
        return np.zeros((len(crops), 3), np.float32)


@dataclass
class OverlappedDevice(SimulatedDevice):
    """Takes the next batch while it computes one, as an engine with streams."""

    depth: int = 2
    free_at: float = 0.0

    def submit(self, crops: NDArray[np.uint8]) -> Any:
        """Queue a batch behind the one under way."""
        self.free_at = max(self.free_at, time.monotonic()) + self.seconds(len(crops))
        return self.free_at, len(crops)

    def collect(self, ticket: Any) -> NDArray[np.float32]:
        """Sleep until it is done."""
        done_at, crops = ticket
        time.sleep(max(0.0, done_at - time.monotonic()))
        return np.zeros((crops, 3), np.float32)


def poisson(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process, ascending."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate_per_s, int(rate_per_s * seconds * 1.5) + 10)
    moments = np.cumsum(gaps)
    return [float(moment) for moment in moments[moments < seconds]]


def in_virtual_time(
    config: BatchConfig, device: SimulatedDevice, schedule: list[tuple[float, str, int]]
) -> Iterator[tuple[str, float, float, int]]:
    """The same policy under a clock that jumps: exact, and without this machine's noise.

    Args:
        config, device: as in a real run; one batch at a time.
        schedule: moment, name and priority of each item, ascending.

    Yields:
        For each item its name, its moment, the moment its scores are there, and the size of its batch.
    """
    queue: BatchQueue[str] = BatchQueue(config)
    speed = DeviceSpeed()
    for crops in (1, config.max_batch_size):
        speed.learn(crops, device.seconds(crops))
    prompt = speed.prompt(config.max_queue_delay_s)
    now, free_at, at = 0.0, 0.0, 0
    while at < len(schedule) or queue.crops:
        while at < len(schedule) and schedule[at][0] <= now:
            moment, name, priority = schedule[at]
            queue.push(Entry(name, 1, priority, moment))
            at += 1
        departure = queue.take(now, cap=queue.cap(now, None, prompt)) if now >= free_at else None
        if departure is not None:
            free_at = now + device.seconds(departure.size)
            for part in departure.slices:
                yield part.entry.item, part.entry.arrived, free_at, departure.size
            continue
        moments = [schedule[at][0]] if at < len(schedule) else []
        if queue.crops:
            moments.append(max(free_at, queue.wake_at(queue.cap(now, None, prompt))))
        now = min(moments)

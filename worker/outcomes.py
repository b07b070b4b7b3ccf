"""What travels between the pipeline's stages and is known to it alone: engines in service, flights, outcomes, receipts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from worker.errors import ItemError, TransientItemError
from worker.items import Delivery, Event, ImageInfo, Item, ModelRef, Position, Record, Scored, Timings

if TYPE_CHECKING:
    from engine.backends.base import Outputs
    from engine.detector import Detector
    from worker.drift import DriftMonitor


@dataclass(frozen=True, slots=True)
class Delayed:
    """A record of the retry topic whose time has not come."""

    record: Record
    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Waiting:
    """A decoded image without its crops, which the batcher holds."""

    item: Item
    info: ImageInfo
    crops_per_frame: int
    flight: Flight


@dataclass(frozen=True, slots=True)
class Inferred:
    """An image back from the engine; `probabilities` is float32 [crops, heads], calibrated."""

    waiting: Waiting
    probabilities: NDArray[np.float32]
    engine: Engine


@dataclass(frozen=True, slots=True)
class Failed:
    """An event that ends in a dead letter, and in a verdict where its id is known."""

    record: Record
    delivery: Delivery
    error: ItemError
    event: Event | None
    timings: Timings | None
    sha256: str | None = None

    @classmethod
    def of(cls, item: Item, error: ItemError, sha256: str | None = None) -> Failed:
        """An event that was readable; `sha256` of its image, where that is known."""
        return cls(item.record, item.delivery, error, item.event, item.timings, sha256)


@dataclass(frozen=True, slots=True)
class Postponed:
    """An event that waits in the retry topic for its next try."""

    item: Item
    error: TransientItemError
    delay_s: float


@dataclass(frozen=True, slots=True)
class Engine:
    """A detector in service and its name in verdicts. `scope` is the part of the cache's key that it decides."""

    detector: Detector
    model: ModelRef
    scope: str
    drift: DriftMonitor | None = None
    """Sees every batch; None where the bundle has no reference."""

    def infer(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [n, 224, 224, 3] -> float32 [n, heads], calibrated probabilities."""
        if self.drift is None:
            return self.detector.infer(crops)
        return self._seen(self.detector.outputs(crops))

    @property
    def depth(self) -> int:
        """Batches the device takes at once."""
        return self.detector.depth

    def submit(self, crops: NDArray[np.uint8]) -> object:
        """Start a batch; its ticket."""
        return self.detector.submit(crops)

    def collect(self, ticket: object) -> NDArray[np.float32]:
        """Probabilities of a submitted batch, in the order of `submit`."""
        if self.drift is None:
            return self.detector.collect(ticket)
        return self._seen(self.detector.collect_outputs(ticket))

    def _seen(self, outputs: Outputs) -> NDArray[np.float32]:
        probabilities = self.detector.calibrate(outputs.raw)
        if self.drift is not None:
            self.drift.see(outputs.embedding, probabilities)
        return probabilities


@dataclass(frozen=True, slots=True)
class Flight:
    """An image being inferred, by model and digest: identical images join it."""

    scope: str
    sha256: str


Outcome = Inferred | Scored | Failed | Postponed


class Receipts:
    """Counts the broker's acknowledgements an event still needs, and calls `done` on the last.

    It also ties the outputs of one record together, for whoever publishes them in a transaction: `position` is the record
    read, `outputs` how many records are published for it, and `dropped` is called instead of `done`, once, where its
    partition was taken away before they could be.
    """

    __slots__ = ("_done", "_lock", "_missing", "dropped", "outputs", "position")

    def __init__(
        self,
        outputs: int,
        done: Callable[[], None],
        position: Position | None = None,
        dropped: Callable[[], None] = lambda: None,
    ) -> None:
        self.outputs = outputs
        self.position = position
        self.dropped = dropped
        self._missing = outputs
        self._done = done
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._missing -= 1
            last = self._missing == 0
        if last:
            self._done()

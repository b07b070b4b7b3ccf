"""What a backend is: load, warm up, infer, close, the same verbs everywhere; and the errors it may raise.

BackendError
├── BackendUnavailable     cannot run here: names the missing package, device or driver
├── BackendStateError      called out of order, or by two threads at once: a mistake in the calling code
├── OutOfDeviceMemory      this batch did not fit: the same images in smaller batches may
└── DeviceError            the device failed: nothing more can be expected of this process
"""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.heads import EMBEDDING_DIM, HEADS
from engine.preprocess import CROP_PX

CROP_SHAPE = (CROP_PX, CROP_PX, 3)


class BackendError(Exception):
    """Base of what a backend raises on purpose."""


class BackendUnavailable(BackendError):  # noqa: N818 - the name says what is the case
    """The backend cannot run here; the message names what is missing and what to do."""


class BackendStateError(BackendError):
    """A method was called before `load`, after `close`, or while another thread was inside the backend."""


class DeviceError(BackendError):
    """The device failed; every later call must be expected to fail too."""


class OutOfDeviceMemory(BackendError):  # noqa: N818 - the name says what is the case
    """This batch did not fit into the device's memory; a smaller one may. Not a `DeviceError`."""


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What a backend makes of n crops.

    `raw`: f32 [n, 3], uncalibrated scores in the order of `HEADS`, larger = more likely AI-generated; `embedding`: f32 [n, 192].
    A crop whose embedding came out not finite has NaN in its whole row of `raw`; the other rows are sound.
    """

    raw: NDArray[np.float32]
    embedding: NDArray[np.float32]


class Backend(Protocol):
    """One way to run a bundle on one device. Owned by one thread at a time."""

    @property
    def name(self) -> str:
        """torch, openvino, tensorrt, …"""
        ...

    @property
    def device(self) -> str:
        """cpu, cuda:0, …"""
        ...

    @property
    def loads_in_seconds(self) -> bool:
        """Whether `load` takes seconds whatever is cached; else it may compile for many minutes."""
        ...

    def load(self, bundle: Bundle) -> None:
        """Put the model on the device. Once."""
        ...

    def warm_up(self, batch_sizes: Iterable[int]) -> None:
        """Run each size once, so that no real image pays for compilation or allocation."""
        ...

    def infer(self, crops: NDArray[np.uint8]) -> Outputs:
        """Score uint8 [n, 224, 224, 3] RGB crops."""
        ...

    def close(self) -> None:
        """Give back the device's memory. May be called again, and before `load`."""
        ...


class CheckedBackend(ABC):
    """Base of the backends: public methods check state and arguments, the private ones of a subclass do the work.

    A subclass sets `name` and `device` (in a constructor that raises `BackendUnavailable` where it cannot run), and defines
    `_load`, `_infer` and `_close`. `max_batch_size` limits what `_infer` is given at once; larger batches are split here.
    """

    name: str = ""
    device: str = ""
    max_batch_size: int | None = None
    loads_in_seconds: bool = False

    def __init__(self) -> None:
        self._state = "new"
        self._busy = threading.Lock()

    def load(self, bundle: Bundle) -> None:
        """Put the model on the device. Once.

        Raises:
            BackendUnavailable: this bundle cannot run on this device.
            BackendStateError: loaded or closed before.
            OutOfDeviceMemory, DeviceError: as their names say.
        """
        self._require("new", "load")
        with self._alone("load"):
            self._load(bundle)
            self._state = "loaded"

    def warm_up(self, batch_sizes: Iterable[int]) -> None:
        """Infer gray crops once in each size, smallest first.

        Raises:
            BackendStateError: not loaded, or closed.
            ValueError: a size below 1.
            OutOfDeviceMemory, DeviceError: as in `infer`.
        """
        for size in self._checked_sizes(batch_sizes):
            self.infer(np.full((size, *CROP_SHAPE), 128, np.uint8))

    def infer(self, crops: NDArray[np.uint8]) -> Outputs:
        """Score crops.

        Args:
            crops: uint8 [n, 224, 224, 3], RGB; n may be 0 and may exceed `max_batch_size`.

        Raises:
            ValueError: a wrong dtype or shape.
            BackendStateError: not loaded, closed, or another thread is inferring.
            OutOfDeviceMemory, DeviceError: as their names say.
        """
        self._require("loaded", "infer")
        crops = self._checked(crops)
        step = self.max_batch_size or max(len(crops), 1)
        with self._alone("infer"):
            parts = [self._infer(crops[start : start + step]) for start in range(0, len(crops), step)]
        if not parts:
            return Outputs(np.empty((0, len(HEADS)), np.float32), np.empty((0, EMBEDDING_DIM), np.float32))
        raw = np.concatenate([part.raw for part in parts]).astype(np.float32, copy=False)
        embedding = np.concatenate([part.embedding for part in parts]).astype(np.float32, copy=False)
        return self._marked(Outputs(raw, embedding))

    @staticmethod
    def _checked_sizes(batch_sizes: Iterable[int]) -> list[int]:
        """The sizes, each once, ascending; ValueError where one makes no batch."""
        sizes = sorted(set(batch_sizes))
        if sizes and sizes[0] < 1:
            raise ValueError(f"warm-up batch sizes start at 1, got {sizes[0]}")
        return sizes

    @staticmethod
    def _checked(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The crops, contiguous; ValueError where they are none."""
        if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != CROP_SHAPE:
            raise ValueError(f"expected crops as uint8 [n, {CROP_PX}, {CROP_PX}, 3], got {crops.dtype} {list(crops.shape)}")
        return np.ascontiguousarray(crops)

    @staticmethod
    def _marked(outputs: Outputs) -> Outputs:
        """The same, with NaN where the embedding is not finite: a maximum or a comparison in the graph can lose it."""
        outputs.raw[~np.isfinite(outputs.embedding).all(axis=1)] = np.nan
        return outputs

    def close(self) -> None:
        """Give back the device's memory. May be called again, and before `load`; nothing else may follow."""
        if self._state == "closed":
            return
        with self._alone("close"):
            loaded, self._state = self._state == "loaded", "closed"
            if loaded:
                self._close()

    def _require(self, state: str, verb: str) -> None:
        if self._state != state:
            raise BackendStateError(f"backend {self.name}: {verb} needs a {state} backend, this one is {self._state}")

    def _alone(self, verb: str) -> _Alone:
        return _Alone(self._busy, f"backend {self.name}: {verb} was called while another thread was using it")

    @abstractmethod
    def _load(self, bundle: Bundle) -> None: ...

    @abstractmethod
    def _infer(self, crops: NDArray[np.uint8]) -> Outputs:
        """Score 1 to `max_batch_size` contiguous crops; arrays of its own, writable."""

    @abstractmethod
    def _close(self) -> None: ...


class _Alone:
    """Holds a lock that nobody waits for: one thread owns the device, a second one is a mistake, not a queue."""

    def __init__(self, lock: threading.Lock, message: str) -> None:
        self._lock, self._message = lock, message

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise BackendStateError(self._message)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPU cores this process may use: its affinity, and the quota of its container, rounded up.

    A pod limited to two cores on a machine of 64 must not start 64 threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text("ascii").split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no cgroup v2: the affinity stands
    return max(cores, 1)

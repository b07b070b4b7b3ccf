"""Score a batch although something in it fails: find the guilty items, and never blame an item for the device.

A call that fails is split in halves until the guilty item stands alone: between log2(n) and 2 log2(n) further calls for
one guilty item among n, and all guilty ones are found. An item is blamed only after it failed alone and a plain grey
image went through right after it: if that fails, too, it is the engine. Scores that are not finite count as failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import BackendError, DeviceError, OutOfDeviceMemory

Infer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 [n, 224, 224, 3] -> float32 [n, heads]; must not keep the array, it is written again."""


class InferenceFailed(Exception):  # noqa: N818 - the name says what is the case
    """This item cannot be scored, and it is the item's fault; `__cause__` is what the backend raised, if it did."""


@dataclass(slots=True)
class Outcome:
    """Scores of a batch's parts, and which parts have none."""

    scores: NDArray[np.float32]
    """float32 [n, heads]; rows of failed parts mean nothing."""
    errors: dict[int, InferenceFailed] = field(default_factory=dict)
    """By index of the part."""
    cap: int | None = None
    """The largest batch that the device had memory for, where it ran out of it."""


def finite(scores: NDArray[np.float32], n: int) -> bool:
    """Whether a call gave what it must: n rows of finite numbers.

    Raises:
        DeviceError: not n rows; that is never an image's fault.
    """
    if scores.ndim != 2 or len(scores) != n:
        raise DeviceError(f"the engine returned scores of shape {scores.shape} for {n} crops")
    return bool(np.isfinite(scores).all())


def isolate(infer: Infer, crops: NDArray[np.uint8], bounds: Sequence[int], first: NDArray[np.float32] | Exception) -> Outcome:
    """Settle a batch whose call failed, or whose scores are not all finite.

    Args:
        infer: the call that failed; blocking.
        crops: uint8 [n, 224, 224, 3], the batch.
        bounds: part i is crops[bounds[i]:bounds[i + 1]]; the first is 0, the last n.
        first: what the call of the whole batch returned or raised.

    Raises:
        BackendError: the device or the engine failed, not an image (DeviceError also where memory does not hold one crop).
    """
    return _Isolation(infer, crops, bounds).settle(first)


class _Isolation:
    def __init__(self, infer: Infer, crops: NDArray[np.uint8], bounds: Sequence[int]) -> None:
        self._infer = infer
        self._crops = crops
        self._bounds = bounds
        self._outcome = Outcome(np.empty((len(crops), 0), np.float32))
        self._engine_works = False

    def settle(self, first: NDArray[np.float32] | Exception) -> Outcome:
        last = len(self._bounds) - 1
        if isinstance(first, OutOfDeviceMemory):
            self._lower_cap(len(self._crops), first)
            self._try(0, last)
        elif isinstance(first, BackendError):
            raise first
        elif isinstance(first, Exception):
            self._split(0, last)
        else:
            self._keep(0, last, first)
        return self._outcome

    def _try(self, start: int, stop: int) -> bool:
        """Call parts start to stop together; on failure find the guilty among them. False: there was one."""
        try:
            scores = self._call(self._bounds[start], self._bounds[stop])
        except BackendError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a backend raises for an image it cannot take
            if stop - start > 1:
                self._split(start, stop)
            else:
                self._blame(start, "the engine failed on this image alone", error)
            return False
        return self._keep(start, stop, scores)

    def _split(self, start: int, stop: int) -> None:
        """Parts start to stop failed together. If the first half works, the second must fail: it is split unasked."""
        if stop - start == 1:
            self._try(start, stop)
            return
        middle = (start + stop) // 2
        if self._try(start, middle):
            self._split(middle, stop)
        else:
            self._try(middle, stop)

    def _keep(self, start: int, stop: int, scores: NDArray[np.float32]) -> bool:
        """Store the scores of parts start to stop; a part with scores that are not finite is tried again alone."""
        low, high = self._bounds[start], self._bounds[stop]
        whole = finite(scores, high - low)
        if self._outcome.scores.shape[1] != scores.shape[1]:
            self._outcome.scores = np.full((len(self._crops), scores.shape[1]), np.nan, np.float32)
        self._outcome.scores[low:high] = scores
        if whole:
            return True
        for part in range(start, stop):
            if np.isfinite(self._outcome.scores[self._bounds[part] : self._bounds[part + 1]]).all():
                continue
            if stop - start > 1:
                self._try(part, part + 1)
            else:
                self._blame(part, "the scores of this image are not finite numbers", None)
        return False

    def _blame(self, part: int, message: str, cause: Exception | None) -> None:
        if not self._engine_works:
            self._prove_engine(cause)
        error = InferenceFailed(f"{message}: {type(cause).__name__}" if cause else message)
        error.__cause__ = cause
        self._outcome.errors[part] = error

    def _prove_engine(self, cause: Exception | None) -> None:
        grey = np.full((1, *self._crops.shape[1:]), 128, np.uint8)
        try:
            works = finite(self._infer(grey), 1)
        except Exception as error:
            if isinstance(error, BackendError) and not isinstance(error, OutOfDeviceMemory):
                raise
            raise DeviceError(f"the engine fails on a plain grey image, too: {error}") from error
        if not works:
            raise DeviceError("the engine's scores of a plain grey image are not finite numbers") from cause
        self._engine_works = True

    def _call(self, low: int, high: int) -> NDArray[np.float32]:
        """Crops low to high in one call, or in several of at most the cap."""
        rows: list[NDArray[np.float32]] = []
        while low < high:
            size = min(high - low, self._outcome.cap or high - low)
            try:
                rows.append(self._infer(self._crops[low : low + size]))
            except OutOfDeviceMemory as error:
                self._lower_cap(size, error)
                continue
            finite(rows[-1], size)
            low += size
        return np.concatenate(rows)

    def _lower_cap(self, size: int, error: OutOfDeviceMemory) -> None:
        if size == 1:
            raise DeviceError("the device has no memory for a single crop") from error
        self._outcome.cap = size // 2

"""Many images to scores, in order and in bounded memory: threads decode ahead, the calling thread infers in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine import images as decoder
from engine.backends.base import OutOfDeviceMemory, usable_cores
from engine.detector import Detector, ImageScore, ScoreError
from engine.images import CorruptImage, Crops, ImageError, Limits, OutOfMemory, TooManyPixels, UnsupportedImage
from engine.preprocess import Layout

ImageBytes = bytes | Callable[[], bytes]
"""The file's bytes, or a function that reads them (in a decoding thread) and may raise OSError."""

DEFAULT_LIMITS = Limits(max_pixels=64_000_000, max_frames=4)

_CODES: tuple[tuple[type[ImageError], str], ...] = (
    (UnsupportedImage, "decode.unsupported"),
    (TooManyPixels, "decode.too_many_pixels"),
    (CorruptImage, "decode.corrupt"),
    (OutOfMemory, "decode.crashed"),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image has no score: a code (the contract's section 5, or `read.failed`) and one line."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Classified:
    """One image: its score, or why it has none. `frames` counts those looked at; sizes are 0 where it could not be decoded."""

    name: str
    score: ImageScore | None = None
    failure: Failure | None = None
    width: int = 0
    height: int = 0
    format: str = ""
    frames: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    row: Classified
    crops: Crops | None = None

    @property
    def count(self) -> int:
        """Crops to score."""
        return 0 if self.crops is None else len(self.crops.crops)


def classify(
    detector: Detector,
    images: Iterable[tuple[str, ImageBytes]],
    limits: Limits | None = None,
    batch_size: int = 16,
    threads: int = 0,
) -> Iterator[Classified]:
    """Score images one after the other; an image that fails is a row of its own, the others go on.

    Args:
        images: names and bytes, drawn only a few ahead of the rows that are given out.
        limits: on pixels and frames; None: 64 million pixels, 4 frames.
        batch_size: crops the backend is given at once.
        threads: that decode; 0: one per usable core.

    Raises:
        OutOfDeviceMemory: even one crop does not fit.
        DeviceError: the device failed.
    """
    workers = threads or usable_cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    batch: list[_Prepared] = []
    try:
        for prepared in _decoded_ahead(pool, 2 * workers, images, limits or DEFAULT_LIMITS, detector.crops):
            batch.append(prepared)
            if _full(batch, batch_size):
                yield from _score(detector, batch, batch_size)
                batch = []
        yield from _score(detector, batch, batch_size)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _decoded_ahead(
    pool: ThreadPoolExecutor, ahead: int, images: Iterable[tuple[str, ImageBytes]], limits: Limits, layout: Layout
) -> Iterator[_Prepared]:
    """In the order of `images`, with at most `ahead` of them drawn and not yet given out."""
    waiting: deque[Future[_Prepared]] = deque()
    for name, data in images:
        waiting.append(pool.submit(_prepare, name, data, limits, layout))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _prepare(name: str, data: ImageBytes, limits: Limits, layout: Layout) -> _Prepared:
    try:
        crops = decoder.read_crops(data if isinstance(data, bytes) else data(), limits, layout)
    except OSError as error:
        return _failed(name, "read.failed", error.strerror or str(error))
    except ImageError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "decode.corrupt")
        return _failed(name, code, str(error))
    frames = len(crops.crops) // crops.crops_per_frame
    return _Prepared(Classified(name, width=crops.width, height=crops.height, format=crops.format, frames=frames), crops)


def _failed(name: str, code: str, message: str) -> _Prepared:
    return _Prepared(Classified(name, failure=Failure(code, " ".join(message.split()))))


def _full(batch: list[_Prepared], batch_size: int) -> bool:
    # A failed image counts as one crop: a folder without a single image must not pile up either.
    return sum(max(prepared.count, 1) for prepared in batch) >= batch_size


def _score(detector: Detector, batch: list[_Prepared], batch_size: int) -> Iterator[Classified]:
    wanted = [prepared.crops.crops for prepared in batch if prepared.crops is not None]
    probabilities = _infer(detector, np.concatenate(wanted), batch_size) if wanted else np.empty((0, 0), np.float32)
    start = 0
    for prepared in batch:
        if prepared.crops is None:
            yield prepared.row
            continue
        rows, start = probabilities[start : start + prepared.count], start + prepared.count
        try:
            yield replace(prepared.row, score=detector.combine(rows, prepared.crops.crops_per_frame))
        except ScoreError as error:
            yield replace(prepared.row, failure=Failure("engine.failed", str(error)))


def _infer(detector: Detector, batch: NDArray[np.uint8], step: int) -> NDArray[np.float32]:
    """In pieces of at most `step` crops, halved while the device's memory does not hold them."""
    step = min(step, len(batch))
    while True:
        try:
            return np.concatenate([detector.infer(batch[start : start + step]) for start in range(0, len(batch), step)])
        except OutOfDeviceMemory:
            if step == 1:
                raise
        # Outside of the handler: within it the exception would keep the failed batch's memory alive.
        step //= 2

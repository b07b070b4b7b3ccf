"""A backend that computes nothing: scores from the brightness of a crop, for tests and benchmarks of what stands around it.

Reached only by its name (`create("null")`) or `Detector.from_parts`; neither `auto` nor the worker's settings know it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import CheckedBackend, Outputs
from engine.bundle import Bundle
from engine.heads import EMBEDDING_DIM, HEADS


class NullBackend(CheckedBackend):
    """raw = (mean of the crop's bytes - 127.5) / 25.5 for every head: -5 for black, +5 for white.

    The embedding's first value is the same number, the others are zero.
    """

    name = "null"

    def __init__(self, device: str = "auto", threads: int = 0) -> None:
        super().__init__()
        self.device = "cpu" if device == "auto" else device

    def _load(self, bundle: Bundle) -> None:
        pass

    def _infer(self, crops: NDArray[np.uint8]) -> Outputs:
        mean = crops.reshape(len(crops), -1).sum(axis=1, dtype=np.uint32) / (crops[0].size * 25.5) - 5.0
        embedding = np.zeros((len(crops), EMBEDDING_DIM), np.float32)
        embedding[:, 0] = mean
        return Outputs(np.repeat(mean[:, None], len(HEADS), axis=1).astype(np.float32), embedding)

    def _close(self) -> None:
        pass

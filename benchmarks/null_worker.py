"""`worker run` with a detector that returns at once: what the path itself costs. Settings from the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine import bundle
from engine.backends.base import Outputs
from engine.backends.null import NullBackend
from engine.detector import Detector
from engine.heads import EMBEDDING_DIM, HEADS
from worker import log, settings
from worker.app import App
from worker.engines import EngineLoader, Opening, engine_of
from worker.outcomes import Engine


class Instant(NullBackend):
    """Does not even look at the crops: brightness costs a tenth of a millisecond, which is no cost of the path."""

    def _infer(self, crops: NDArray[np.uint8]) -> Outputs:
        return Outputs(np.zeros((len(crops), len(HEADS)), np.float32), np.zeros((len(crops), EMBEDDING_DIM), np.float32))


class NullLoader(EngineLoader):
    """Opens the bundle on the null backend."""

    def load(self, opening: Opening | None = None) -> Engine:
        """The engine whose scores are made without a device."""
        opened = bundle.load(self._path())
        detector = Detector.from_parts(opened, Instant("cpu"), head=self._settings.engine.head, crops=self._settings.engine.crops)
        self._metrics.set_engine(detector.version, detector.backend_name, detector.device)
        return engine_of(detector, self._settings.decode.max_frames)

    def follow(self, take_over: Callable[[Engine], None]) -> None:
        """Never."""


def _take_a_core(number: int) -> None:
    """Stay on one core, with the decoders."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


if __name__ == "__main__":
    if "--core" in sys.argv:
        _take_a_core(int(os.environ["BENCHMARK_WORKER"]))
    loaded = settings.load()
    log.configure(loaded.log)
    sys.exit(App(loaded, loader=NullLoader).run())

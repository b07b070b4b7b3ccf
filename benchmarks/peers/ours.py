"""This project's worker for the course: as `worker run`, or with the simulated device of PEER_MODEL=a,b."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.null_worker import NullLoader
from engine import bundle
from engine.backends.base import Outputs
from engine.backends.null import NullBackend
from engine.detector import Detector
from worker import log, settings
from worker.app import App
from worker.engines import EngineLoader, Opening, engine_of
from worker.outcomes import Engine


class SimulatedBackend(NullBackend):
    """Takes a + b*n seconds for n crops."""

    def _infer(self, crops: NDArray[np.uint8]) -> Outputs:
        a, b = map(float, os.environ["PEER_MODEL"].split(","))
        with Path(os.environ["PEER_DEVICE_LOCK"]).open("wb") as device:  # one device among all processes, as for the peers
            fcntl.flock(device, fcntl.LOCK_EX)
            time.sleep(a + b * len(crops))
        return super()._infer(crops[:, :1, :1])


class SimulatedLoader(NullLoader):
    """Opens the bundle on the simulated device."""

    def load(self, opening: Opening | None = None) -> Engine:
        """The engine that takes time and nothing else."""
        detector = Detector.from_parts(bundle.load(self._path()), SimulatedBackend())
        self._metrics.set_engine(detector.version, detector.backend_name, detector.device)
        return engine_of(detector, self._settings.decode.max_frames)


if __name__ == "__main__":
    loaded = settings.load()
    log.configure(loaded.log)
    simulated = "," in os.environ["PEER_MODEL"]
    sys.exit(App(loaded, loader=SimulatedLoader if simulated else EngineLoader).run())

"""`worker run` with an engine that costs nothing and a wall clock that can be stepped. Settings from the environment.

    CHAOS_CLOCK          a file of one double: seconds that every reading of the wall clock is off
    CHAOS_ENGINE_MS      what a batch takes at least

The clock: `time.time` is replaced before anything else is imported, so that the worker's clock, the Kafka client, the cache's
client and the log all see the step, as they would see one of the machine's clock. Monotonic time does not step on a real machine
either. libfaketime would do the same for C code as well, of which none here reads the wall clock, and would be one more thing to
install.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any


def _step_clock(file: str) -> None:
    with Path(file).open("r+b") as opened:
        shared = mmap.mmap(opened.fileno(), 8)
    true_time = time.time

    def stepped() -> float:
        return true_time() + float(struct.unpack_from("d", shared)[0])

    time.time = stepped


def _die_with_parent() -> None:
    """A run that is killed leaves no workers behind (PR_SET_PDEATHSIG; the keeper's thread lives as long as the run)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


_die_with_parent()
if "CHAOS_CLOCK" in os.environ:
    _step_clock(os.environ["CHAOS_CLOCK"])

# Imports after the step, so that `from time import time` gets the stepped one.
from engine import bundle  # noqa: E402
from engine.backends.null import NullBackend  # noqa: E402
from engine.detector import Detector  # noqa: E402
from worker import log, settings  # noqa: E402
from worker.app import App  # noqa: E402
from worker.engines import EngineLoader, engine_of  # noqa: E402
from worker.errors import FatalError  # noqa: E402
from worker.outcomes import Engine  # noqa: E402

ENGINE_S = float(os.environ.get("CHAOS_ENGINE_MS", "0")) / 1000


class CheapBackend(NullBackend):
    """Scores by brightness, as slowly as it was told."""

    def _infer(self, crops: Any) -> Any:
        time.sleep(ENGINE_S)
        return super()._infer(crops)


class CheapLoader(EngineLoader):
    """Opens bundles on the cheap backend; everything else (watching, swapping, refusing) is the worker's own."""

    def _open(self, path: Path) -> Engine:
        detector = Detector.from_parts(
            bundle.load(path), CheapBackend("cpu"), head=self._settings.engine.head, crops=self._settings.engine.crops
        )
        return engine_of(detector, self._settings.decode.max_frames)


if __name__ == "__main__":
    try:
        loaded = settings.load()
        log.configure(loaded.log)
        sys.exit(App(loaded, loader=CheapLoader).run())
    except FatalError as error:
        print(f"fatal: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

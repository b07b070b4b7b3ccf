"""Opens the detector that the settings name, warms it, and opens its successor when the bundle's pointer moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from worker.drift import DriftMonitor
from worker.errors import ConfigurationError, DependencyError
from worker.items import ModelRef
from worker.metrics import Metrics
from worker.outcomes import Engine
from worker.settings import Settings

if TYPE_CHECKING:
    from engine.backends.base import Backend
    from engine.bundle import Bundle
    from engine.detector import Detector

Opening = Callable[["Bundle", "Backend"], None]

log = structlog.get_logger(__name__)


class EngineLoader:
    """Loads engines for one worker; used by the main thread at start and by the watch thread afterwards."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._loaded: Path | None = None
        self._complaint: str | None = None
        self._opening: Opening | None = None

    def load(self, opening: Opening | None = None) -> Engine:
        """Open and warm the detector. `opening`: called in between, as `Detector.open` says.

        Raises:
            ConfigurationError: the bundle is missing or wrong, or the backend is not installed.
            DependencyError: the device failed.
        """
        from engine import bundle
        from engine.backends.base import BackendUnavailable, DeviceError

        self._opening = opening
        try:
            path = self._path()
            engine = self._open(path)
        except bundle.BundleError as error:
            raise ConfigurationError(f"WORKER_ENGINE__BUNDLE: {error}") from error
        except BackendUnavailable as error:
            raise ConfigurationError(f"WORKER_ENGINE__BACKEND: {error}") from error
        except DeviceError as error:
            raise DependencyError(f"the device failed: {error}") from error
        finally:
            self._opening = None
        self._loaded = path
        self._metrics.set_engine(engine.model.version, engine.model.backend, engine.model.device)
        return engine

    def follow(self, take_over: Callable[[Engine], None]) -> None:
        """When CURRENT names another version, open and warm it and hand it over; the old one stays if anything fails."""
        from engine import bundle
        from engine.backends.base import BackendError

        try:
            path = self._path()
            if path == self._loaded:
                return
            engine = self._open(path)
            take_over(engine)
        except (bundle.BundleError, BackendError, ConfigurationError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("bundle.refused", error=str(error), kept=self._loaded.name if self._loaded else None)
                self._metrics.bundle_swaps.labels("failed").inc()
            return
        self._loaded, self._complaint = path, None
        self._metrics.set_engine(engine.model.version, engine.model.backend, engine.model.device)
        self._metrics.bundle_swaps.labels("ok").inc()
        log.info("bundle.swapped", model=engine.model.name, version=engine.model.version)

    def _path(self) -> Path:
        from engine import bundle

        return bundle.resolve(self._settings.engine.bundle or bundle.packaged())

    def _open(self, path: Path) -> Engine:
        from engine.detector import Detector

        settings = self._settings
        started = time.monotonic()
        batch_sizes = (1, *settings.batch.preferred_sizes, settings.batch.max_batch_size)
        detector = Detector.open(
            path,
            backend=settings.engine.backend,
            device=settings.engine.device,
            head=settings.engine.head,
            crops=settings.engine.crops,
            threads=settings.engine.threads,
            opening=self._opening,
            plan_cache=settings.engine.plan_cache,
            batch_sizes=batch_sizes,
        )
        detector.warm_up(batch_sizes)
        log.info(
            "engine.loaded",
            backend=detector.backend_name,
            device=detector.device,
            duration_ms=round((time.monotonic() - started) * 1000),
        )
        foreign = {name for name, threshold in detector.thresholds.items() if threshold.crops != detector.crops}
        if foreign:
            log.warning("engine.thresholds_of_other_crops", crops=detector.crops, thresholds=sorted(foreign))
        reference = detector.bundle.manifest.reference
        drift = None if reference is None else DriftMonitor(reference, self._metrics)
        return engine_of(detector, settings.decode.max_frames, drift, gpu_decode=settings.decode.gpu)


def engine_of(detector: Detector, max_frames: int, drift: DriftMonitor | None = None, *, gpu_decode: bool = False) -> Engine:
    """The engine record of a detector: its name in verdicts, its part of the cache's key, and who watches its outputs.

    `gpu_decode`: pixels may come from a GPU's decoder, so their scores are kept apart from those of workers without one.
    """
    model = ModelRef(detector.name, detector.version, detector.head, detector.backend_name, detector.device)
    scope = f"{detector.cache_scope}:{max_frames}" + (":nvimgcodec" if gpu_decode else "")
    return Engine(detector, model, scope, drift)

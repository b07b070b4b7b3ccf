"""The first engine loads beside the main thread: when the group may be joined, and what refuses the worker before."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from engine import bundle as bundles
from engine.backends.null import NullBackend
from engine.bundle import Bundle
from engine.detector import Detector
from tests.engine.bundles import random_bundle
from worker.engine_start import EngineStart
from worker.engines import EngineLoader, Opening, engine_of
from worker.errors import ConfigurationError
from worker.metrics import Metrics
from worker.outcomes import Engine
from worker.settings import PolicySettings, Settings
from worker.stages.policy import PolicyKeeper

WAIT_S = 30.0


class Loads(NullBackend):
    """A backend that is loaded when it is told."""

    def __init__(self, in_seconds: bool) -> None:
        super().__init__("cpu")
        self.loads_in_seconds = in_seconds
        self.go_on = threading.Event()
        self.loading = threading.Event()

    def _load(self, bundle: Bundle) -> None:
        self.loading.set()
        assert self.go_on.wait(WAIT_S)
        super()._load(bundle)


class Loader(EngineLoader):
    """Opens one bundle on one backend, as `load_first` would."""

    def __init__(self, path: Path, backend: Loads) -> None:
        super().__init__(Settings(), Metrics())
        self.path, self.backend = path, backend

    def load(self, opening: Opening | None = None) -> Engine:
        bundle = bundles.load(self.path)
        assert opening is not None
        opening(bundle, self.backend)
        return engine_of(Detector.from_parts(bundle, self.backend), 1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "b", seed=1).path


def started(bundle: Path, backend: Loads, policy: Path | None = None) -> EngineStart:
    settings = PolicySettings(file=policy) if policy else PolicySettings()
    return EngineStart(Loader(bundle, backend), PolicyKeeper(settings, Metrics()), "linear")


def test_what_loads_in_seconds_may_join_before_it_is_loaded(bundle: Path) -> None:
    backend = Loads(in_seconds=True)
    start = started(bundle, backend)
    start.may_join(WAIT_S)
    assert backend.loading.wait(WAIT_S)
    assert start.loaded() is None
    backend.go_on.set()
    start.end()
    engine = start.loaded()
    assert engine is not None
    assert engine.detector.version == bundles.load(bundle).manifest.version


def test_what_may_compile_holds_the_join_back(bundle: Path) -> None:
    backend = Loads(in_seconds=False)
    start = started(bundle, backend)
    joins = threading.Thread(target=lambda: start.may_join(WAIT_S))
    joins.start()
    assert backend.loading.wait(WAIT_S)
    joins.join(0.2)
    assert joins.is_alive()
    backend.go_on.set()
    joins.join(WAIT_S)
    assert not joins.is_alive()
    start.end()
    assert start.loaded() is not None


def test_a_policy_that_the_model_cannot_serve_refuses_before_the_join(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('name = "p"\nversion = "1"\n[tenants.default]\nblock = "fpr_0.5"\n')
    backend = Loads(in_seconds=True)
    start = started(bundle, backend, file)
    with pytest.raises(ConfigurationError, match=r"fpr_0\.5"):
        start.may_join(WAIT_S)
    assert not backend.loading.is_set()
    start.end()


@pytest.mark.parametrize("error", [ConfigurationError("no such bundle"), ZeroDivisionError()])
def test_what_ends_the_load_is_raised_where_it_is_awaited(error: Exception) -> None:
    class Broken(EngineLoader):
        def load(self, opening: Any = None) -> Engine:
            raise error

    start = EngineStart(Broken(Settings(), Metrics()), PolicyKeeper(PolicySettings(), Metrics()), "linear")
    start.end()
    with pytest.raises(type(error)):
        start.may_join(WAIT_S)
    with pytest.raises(type(error)):
        start.loaded()


def test_a_failure_after_the_join_is_raised_too(bundle: Path) -> None:
    class Fails(Loads):
        def _load(self, bundle: Bundle) -> None:
            assert self.go_on.wait(WAIT_S)
            raise ConfigurationError("not on this device")

    backend = Fails(in_seconds=True)
    start = started(bundle, backend)
    start.may_join(WAIT_S)
    backend.go_on.set()
    start.end()
    with pytest.raises(ConfigurationError, match="device"):
        start.loaded()

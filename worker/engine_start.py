"""The first engine is loaded in a thread of its own, so that the worker joins its group meanwhile.

A broker makes the first member of a group wait (Kafka 3 s), as long as a CPU's engine takes to load. The group is joined
early only when nothing is left that refuses this worker: the bundle is whole, the policy's names are known to it, the
backend's packages and device are there, and it loads within seconds. A plan that may have to be compiled first holds the join
back until it is warm: the partitions of a member that cannot work yet would stand still.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from worker import thread_names
from worker.engines import EngineLoader
from worker.outcomes import Engine
from worker.stages.policy import PolicyKeeper

if TYPE_CHECKING:
    from engine.backends.base import Backend
    from engine.bundle import Bundle
    from engine.heads import Head
    from engine.manifest import Band, Threshold


@dataclass(frozen=True, slots=True)
class _Scale:
    """What the policy needs of a model that is not loaded yet (`worker.stages.policy.Scale`)."""

    name: str
    version: str
    head: str
    thresholds: Mapping[str, Threshold]
    abstain: Band | None


class EngineStart:
    """One engine on its way. Made, waited for and ended by the main thread."""

    def __init__(self, loader: EngineLoader, policy: PolicyKeeper, head: str) -> None:
        self._loader = loader
        self._policy = policy
        self._head = cast("Head", head)
        self._may_join = threading.Event()
        self._done = threading.Event()
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._load, name="engine-load", daemon=True)
        self._thread.start()

    def may_join(self, timeout_s: float) -> bool:
        """Whether the group may be joined, by the end of so many seconds.

        Raises:
            ConfigurationError, DependencyError: what ended the load.
        """
        if not self._may_join.wait(timeout_s):
            return False
        self._raise()
        return True

    def loaded(self) -> Engine | None:
        """The engine, once it is warm and the policy knows it. Raises as `may_join`."""
        if not self._done.is_set():
            return None
        self._raise()
        return self._engine

    def end(self) -> None:
        """Wait for the thread: a process must not end under a library that is compiling."""
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _load(self) -> None:
        thread_names.set_current("engine-load")
        try:
            engine = self._loader.load(self._opening)
            self._policy.bind(engine.detector)
            self._engine = engine
        except Exception as error:  # noqa: BLE001 - raised again in the main thread, which knows what each means
            self._error = error
        finally:
            self._done.set()
            self._may_join.set()

    def _opening(self, bundle: Bundle, backend: Backend) -> None:
        manifest, head = bundle.manifest, self._head
        thresholds, abstain = manifest.thresholds.get(head, {}), manifest.abstain.get(head)
        self._policy.bind(_Scale(manifest.name, manifest.version, head, thresholds, abstain))
        if backend.loads_in_seconds:
            self._may_join.set()

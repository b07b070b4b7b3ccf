"""The latest verdicts by event, for explanations; and which verdict ids were seen, so that a redelivery is counted once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

KEPT_VERDICTS = 20_000
"""About 3 kB each."""


class Recent:
    """Bounded memory of verdicts. Thread-safe."""

    def __init__(self, kept: int = KEPT_VERDICTS) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._events: dict[str, str] = {}

    def add(self, verdict: dict[str, Any]) -> bool:
        """Remember it; False where it was there already."""
        with self._lock:
            verdict_id = verdict["verdict_id"]
            if verdict_id in self._verdicts:
                return False
            self._verdicts[verdict_id] = verdict
            self._events[verdict["event_id"]] = verdict_id
            while len(self._verdicts) > self._kept:
                old_id, old = self._verdicts.popitem(last=False)
                if self._events.get(old["event_id"]) == old_id:
                    del self._events[old["event_id"]]
            return True

    def of_event(self, event_id: str) -> dict[str, Any] | None:
        """The latest verdict of an event."""
        with self._lock:
            verdict_id = self._events.get(event_id)
            return self._verdicts.get(verdict_id) if verdict_id else None

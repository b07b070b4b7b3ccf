"""Scores that wait for company on their way to the cache: a round trip costs as much as dozens of scores in it.

They wait `WAIT_S` at most. What is asked for meanwhile is written first, so that nobody sees the wait. A worker that dies in
it costs the cache these scores, and somebody a later inference.
"""

from __future__ import annotations

from collections.abc import Iterable

from worker.clock import Clock
from worker.stages.cache import ScoreCache
from worker.stages.cache_entry import CachedScore

WAIT_S = 0.02
MOST = 64
"""So many are written at once."""


class CacheWrites:
    """For one thread."""

    def __init__(self, cache: ScoreCache, clock: Clock) -> None:
        self._cache = cache
        self._clock = clock
        self._waiting: dict[tuple[str, str], CachedScore] = {}
        self._since = 0.0

    def add(self, entries: Iterable[CachedScore]) -> None:
        """Take scores; write when there are many, or when the first has waited long enough."""
        for entry in entries:
            if not self._waiting:
                self._since = self._clock.monotonic()
            self._waiting[entry.scope, entry.sha256] = entry
        if len(self._waiting) >= MOST or (self._waiting and self._clock.monotonic() - self._since >= WAIT_S):
            self.write()

    def before(self, scope: str, digests: Iterable[str]) -> None:
        """These are about to be asked for."""
        if self._waiting and any((scope, digest) in self._waiting for digest in digests):
            self.write()

    def write(self) -> None:
        """Write what waits, in the background."""
        if self._waiting:
            self._cache.put_many(self._waiting.values())
            self._waiting = {}

    def patience(self) -> float | None:
        """Seconds in which something should be written; None where nothing waits."""
        return WAIT_S if self._waiting else None

"""When to read and when to commit: both cost broker and worker as much as the handling of several records. Pure logic.

Every `now` is a reading of one monotonic clock in seconds.
"""

from __future__ import annotations

READ_INTERVAL_S = 0.02
"""After a read that found a few records the next one comes no sooner. Every answer of a broker, however small, costs it and this
process as much as the handling of several records: without the rest, records that trickle in cost up to twice as much as a
backlog, and two processes fill two cores at half of what they carry."""
FEW_RECORDS = 64
FEW_BYTES = 1 << 20
"""A read of as many records or bytes is no trickle."""
COMMIT_RECORDS = 64
"""So many finished records are committed before `COMMIT_INTERVAL_MS` has passed, …"""
MIN_COMMIT_INTERVAL_S = 0.05
"""… but not within so little after the commit before: one costs as much as a few records."""


class Pacing:
    """For one consumer."""

    def __init__(self, commit_interval_s: float) -> None:
        self._commit_interval_s = commit_interval_s
        self._rests_until = 0.0
        self._committed_at = 0.0
        self._finished_then = 0

    def rest_s(self, now: float) -> float:
        """How long the next read should wait, so that records gather."""
        return max(0.0, self._rests_until - now)

    def has_read(self, now: float, records: int, size_bytes: int, *, more: bool) -> None:
        """A read found these; `more`: the broker had others when it answered, which are wanted at once."""
        if 0 < records < FEW_RECORDS and size_bytes < FEW_BYTES and not more:
            self._rests_until = now + READ_INTERVAL_S

    def commits(self, now: float, finished: int) -> bool:
        """Whether to commit now: the interval is over, or many records would be read again if this process died.

        `finished`: records, since the start.
        """
        many = finished - self._finished_then >= COMMIT_RECORDS and now >= self._committed_at + MIN_COMMIT_INTERVAL_S
        due = many or now >= self._committed_at + self._commit_interval_s
        if due:
            self._committed_at, self._finished_then = now, finished
        return due

"""Circuit breaker: leaves a failing dependency alone for a while, then lets one call find out whether it is back."""

from __future__ import annotations

import threading

from worker.clock import Clock

CLOSED = "closed"
OPEN = "open"
HALF_OPEN = "half_open"


class Breaker:
    """Counts failures in a row. Thread-safe.

    A call asks `allow` first, and reports `succeeded` or `failed` if it was allowed. After `failures` failures in a row the
    breaker is open for `reset_s`; then exactly one call is let through, and its outcome closes or re-opens it.
    """

    def __init__(self, failures: int, reset_s: float, clock: Clock) -> None:
        self._limit = failures
        self._reset_s = reset_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_until: float | None = None
        self._probing = False

    @property
    def state(self) -> str:
        """closed, open or half_open (the next call, or one under way, is the probe)."""
        with self._lock:
            if self._open_until is None:
                return CLOSED
            return HALF_OPEN if self._probing or self._clock.monotonic() >= self._open_until else OPEN

    def allow(self) -> bool:
        """Whether a call may be made now."""
        with self._lock:
            if self._open_until is None:
                return True
            if self._probing or self._clock.monotonic() < self._open_until:
                return False
            self._probing = True
            return True

    def succeeded(self) -> bool:
        """The call went well; True where this closes the breaker."""
        with self._lock:
            closes = self._open_until is not None
            self._failures = 0
            self._open_until = None
            self._probing = False
            return closes

    def failed(self) -> bool:
        """The call failed; True where this opens a breaker that was closed."""
        with self._lock:
            self._failures += 1
            was_closed = self._open_until is None
            if not was_closed or self._failures >= self._limit:
                self._open_until = self._clock.monotonic() + self._reset_s
                self._probing = False
                return was_closed
            return False

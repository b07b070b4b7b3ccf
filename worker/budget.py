"""What may be in flight: the one bound behind which every queue of the pipeline is bounded.

Two accounts, so that neither can starve the other into a deadlock: *records* are charged by the main thread when they
are accepted (and only close the intake, never block), *images* are reserved by fetch threads before the bytes are read
(and block until earlier images are done; those never wait for a fetch, so the wait ends).
"""

from __future__ import annotations

import threading


class Budget:
    """Thread-safe account of events and bytes between read and verdict."""

    def __init__(self, max_events: int, max_bytes: int, max_image_bytes: int) -> None:
        """`max_bytes` is shared half and half by records and images; one image is always admitted."""
        self._max_events = max_events
        self._max_record_bytes = max_bytes // 2
        self._max_reserved_bytes = max(max_bytes - max_bytes // 2, max_image_bytes)
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._events = 0
        self._record_bytes = 0
        self._reserved_bytes = 0
        self._waiting = 0
        self._closed = False

    @property
    def events(self) -> int:
        """Events in flight."""
        return self._events

    @property
    def bytes(self) -> int:
        """Bytes of records and images in flight."""
        return self._record_bytes + self._reserved_bytes

    def room(self) -> int:
        """How many further events may be accepted now: 0 when either account is spent."""
        with self._lock:
            if self._record_bytes >= self._max_record_bytes:
                return 0
            return max(0, self._max_events - self._events)

    def charge(self, record_bytes: int) -> None:
        """Accept one record. Never blocks: the caller asked `room` first."""
        with self._lock:
            self._events += 1
            self._record_bytes += record_bytes

    def refund(self, record_bytes: int) -> None:
        """One event is finished or dropped."""
        with self._lock:
            self._events -= 1
            self._record_bytes -= record_bytes

    def reserve(self, image_bytes: int) -> None:
        """Wait until an image of at most `image_bytes` may be held. Returns at once after `close`."""
        with self._freed:
            self._waiting += 1
            self._freed.wait_for(lambda: self._closed or self._fits(image_bytes))
            self._waiting -= 1
            self._reserved_bytes += image_bytes

    def try_reserve(self, image_bytes: int) -> bool:
        """As `reserve`, where that need not wait; False, and nothing reserved, where it would, or where others wait already."""
        with self._lock:
            if self._closed or self._waiting or not self._fits(image_bytes):
                return False
            self._reserved_bytes += image_bytes
            return True

    def release(self, image_bytes: int) -> None:
        """Give back what `reserve` took, or a part of it once the true size is known."""
        with self._freed:
            self._reserved_bytes -= image_bytes
            self._freed.notify_all()

    def close(self) -> None:
        """Let every waiting `reserve` go, so that threads can end."""
        with self._freed:
            self._closed = True
            self._freed.notify_all()

    def _fits(self, image_bytes: int) -> bool:
        return self._reserved_bytes == 0 or self._reserved_bytes + image_bytes <= self._max_reserved_bytes

"""What may be in flight: the one bound behind which every queue of the pipeline is bounded.

Two accounts, so that neither can starve the other into a deadlock: *records* are charged by the main thread when they
are accepted (and only close the intake, never block), *images* are reserved by fetch threads before the bytes are read
(and block, in the order in which they came, until earlier images are done; those never wait for a fetch, so the wait ends).
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field


class Budget:
    """Thread-safe account of events and bytes between read and verdict."""

    def __init__(self, max_events: int, max_bytes: int, max_image_bytes: int) -> None:
        """`max_bytes` is shared half and half by records and images; one image is always admitted."""
        self._max_events = max_events
        self._max_record_bytes = max_bytes // 2
        self._max_reserved_bytes = max(max_bytes - max_bytes // 2, max_image_bytes)
        self._lock = threading.Lock()
        self._events = 0
        self._record_bytes = 0
        self._reserved_bytes = 0
        self._waiting: deque[_Waiting] = deque()
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
        with self._lock:
            if self._closed or (not self._waiting and self._fits(image_bytes)):
                self._reserved_bytes += image_bytes
                return
            waiting = _Waiting(image_bytes)
            self._waiting.append(waiting)
        waiting.admitted.wait()

    def try_reserve(self, image_bytes: int) -> bool:
        """As `reserve`, where that need not wait; False, and nothing reserved, where it would, or where others wait already."""
        with self._lock:
            if self._closed or self._waiting or not self._fits(image_bytes):
                return False
            self._reserved_bytes += image_bytes
            return True

    def try_grow(self, more_bytes: int) -> bool:
        """Add to what `reserve` took if there is room, whoever waits: so what is under way ends. False: nothing was added."""
        with self._lock:
            if not self._closed and self._reserved_bytes + more_bytes > self._max_reserved_bytes:
                return False
            self._reserved_bytes += more_bytes
            return True

    def release(self, image_bytes: int) -> None:
        """Give back what `reserve` took, or a part of it once the true size is known."""
        with self._lock:
            self._reserved_bytes -= image_bytes
            self._admit()

    def close(self) -> None:
        """Let every waiting `reserve` go, so that threads can end."""
        with self._lock:
            self._closed = True
            self._admit()

    def _admit(self) -> None:
        """Wake those for whom there is room now, first come, first served: each is woken once and need not look."""
        while self._waiting and (self._closed or self._fits(self._waiting[0].image_bytes)):
            first = self._waiting.popleft()
            self._reserved_bytes += first.image_bytes
            first.admitted.set()

    def _fits(self, image_bytes: int) -> bool:
        return self._reserved_bytes == 0 or self._reserved_bytes + image_bytes <= self._max_reserved_bytes


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A reservation that waits for its turn."""

    image_bytes: int
    admitted: threading.Event = field(default_factory=threading.Event)

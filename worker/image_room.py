"""Room in the budget for an image whose size is not known before its host has answered.

What the last images took is reserved before a fetch begins; once the host has said how large this one is, what is missing is
taken if it is free. If not, the fetch is given up and made again with the whole of it reserved: a fetch that waited while it
held room could wait for another that does the same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from worker.budget import Budget

Hold = Callable[[int], None]
"""Told how large an image is before its bytes are read; raises where there is no room for it."""

FIRST_BYTES = 2 * 2**20
"""Reserved for an image as long as none was fetched."""
REMEMBERED = 64


def unbounded(image_bytes: int) -> None:
    """Room for everything."""


class RoomWanted(Exception):  # noqa: N818  nothing failed: the fetch is made again
    """There is no room for the image now; `image_bytes` is what it takes."""

    def __init__(self, image_bytes: int) -> None:
        super().__init__(image_bytes)
        self.image_bytes = image_bytes


class ImageRoom:
    """What one fetch holds of the budget. Of one thread at a time."""

    def __init__(self, budget: Budget, reserved_bytes: int) -> None:
        """`reserved_bytes` were reserved already."""
        self._budget = budget
        self._held_bytes = reserved_bytes

    def hold(self, image_bytes: int) -> None:
        """See to it that an image of this size fits; called before its bytes are read.

        Raises:
            RoomWanted: it does not fit now.
        """
        missing = image_bytes - self._held_bytes
        if missing > 0:
            if not self._budget.try_grow(missing):
                raise RoomWanted(image_bytes)
            self._held_bytes = image_bytes

    def keep(self, image_bytes: int) -> None:
        """The image is there and has this size: give the rest back."""
        if self._held_bytes != image_bytes:
            self._budget.release(self._held_bytes - image_bytes)
            self._held_bytes = image_bytes


class ExpectedSize:
    """What an image will probably take: nine in ten of the last ones took no more. Thread-safe."""

    def __init__(self, max_image_bytes: int) -> None:
        self._max_image_bytes = max_image_bytes
        self._lock = threading.Lock()
        self._last: deque[int] = deque(maxlen=REMEMBERED)

    @property
    def bytes(self) -> int:
        """Of the next image."""
        with self._lock:
            last = sorted(self._last)
        return min(last[len(last) * 9 // 10] if last else FIRST_BYTES, self._max_image_bytes)

    def learn(self, image_bytes: int) -> None:
        """An image had this size."""
        with self._lock:
            self._last.append(image_bytes)

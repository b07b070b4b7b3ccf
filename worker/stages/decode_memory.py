"""Memory that the worker shares with one decoder process: the image goes in, its crops come out, neither through a socket.

The memory is a sealed memfd: its size is fixed, so that a taken-over decoder cannot take pages away from under the worker. Each
decoder has its own and sees none but its own images. What it writes are pixels, copied before anything looks at them.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IMAGE_BYTES = 1 << 20
"""Larger images go through the socket: what it costs is little beside their decoding. Of smaller ones several find room."""
MAX_CROP_BYTES = 1 << 23
"""Larger replies too: many frames in five crops each."""


class SharedMemory:
    """Both ends of it: `create` in the worker, `adopt` in the decoder."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, size)
        self._crops = np.frombuffer(self._memory, np.uint8, offset=IMAGE_BYTES)

    @classmethod
    def create(cls, crop_bytes: int) -> SharedMemory | None:
        """Memory for images and this much of crops, at most `MAX_CROP_BYTES`; None where the system has no sealed memory."""
        if sys.platform != "linux":
            return None
        import fcntl

        size = IMAGE_BYTES + min(crop_bytes, MAX_CROP_BYTES)
        try:
            fd = os.memfd_create("decoder-images", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            return None
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size)
        except OSError:
            os.close(fd)
            return None

    @classmethod
    def adopt(cls, fd: int) -> SharedMemory:
        """The same memory in the decoder, by the descriptor it was started with, which is closed: the mapping stays."""
        try:
            return cls(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def put_images(self, images: Sequence[bytes]) -> bool:
        """Lay images in, one behind the other; False where they are too large together."""
        if sum(map(len, images)) > IMAGE_BYTES:
            return False
        at = 0
        for data in images:
            self._memory[at : at + len(data)] = data
            at += len(data)
        return True

    def image(self, at: int, size: int) -> bytes:
        """A copy of the image of this size that begins `at` so many bytes."""
        return self._memory[at : at + size]

    def put_crops(self, at: int, pixels: memoryview) -> bool:
        """Lay crops in (bytes), `at` so many bytes from the first ones; False where there is no room for them."""
        if at + len(pixels) > len(self._crops):
            return False
        self._memory[IMAGE_BYTES + at : IMAGE_BYTES + at + len(pixels)] = pixels
        return True

    def crops(self, at: int, size: int) -> NDArray[np.uint8] | None:
        """A copy of so many bytes of crops, uint8 [size]; None where it does not hold as many."""
        return self._crops[at : at + size].copy() if at + size <= len(self._crops) else None

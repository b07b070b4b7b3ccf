"""Memory habits of this process: many threads that each hold large, short-lived buffers must not make it grow.

glibc gives each thread an arena of its own and keeps freed memory in it; with dozens of threads and megabyte buffers the
resident size creeps up although nothing leaks. Two arenas and a fixed threshold for mmap keep it flat.

The threshold lies above what is allocated for every event (fetch answers, images, batches): mapped memory comes zeroed, page by
page, and goes back at once, which was a third of the cost of consuming.
"""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def settle() -> None:
    """Set the allocator's options; does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, 2)
    mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 32 * 2**20)

"""Memory habits of this process: many threads that each hold large, short-lived buffers must not make it grow.

glibc gives each thread an arena of its own and keeps freed memory in it; with dozens of threads and megabyte buffers the
resident size creeps up although nothing leaks. Two arenas and a fixed threshold for mmap keep it flat.

The threshold lies above what is allocated for every event (fetch answers, images, batches): mapped memory comes zeroed, page by
page, and goes back at once, which was a third of the cost of consuming.

What lives a little longer than its neighbours (verdicts that wait for receipts, buffers of connections) leaves holes between them
that only `malloc_trim` gives back: without it the resident size goes on creeping up, ever more slowly, for hours.

Python's collector of cycles looks through everything young whenever a few hundred objects more were made than freed, and through
everything else ever so often. With hundreds of events in flight that is always. Hardly anything of an event lies in a cycle, and
nothing of what was loaded at start is garbage: the one may wait longer, the other be left out.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

GIVE_BACK_INTERVAL_S = 30.0
"""How often `give_back` is worth its milliseconds."""

YOUNG_OBJECTS = 20_000
"""So many objects more than were freed make the collector look for cycles among them (Python's default is 700)."""


def settle() -> None:
    """Set the allocator's options; does nothing where the C library is not glibc."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 2)
    mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 32 * 2**20)


def keep_what_stands() -> None:
    """What lives now is kept out of the collector's sight, and the collector looks less often; once everything is loaded."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)


def let_go() -> None:
    """What was kept may be garbage by now: an engine that was replaced."""
    gc.unfreeze()


def give_back() -> None:
    """Give whole free pages inside the heap back to the system; does nothing where the C library is not glibc."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


def _glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
    return function

"""Holes in the heap go back to the system."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from worker import process_memory

SCRIPT = """
import psutil
from worker import process_memory

process_memory.settle()
process = psutil.Process()
# Above 512 bytes Python asks malloc. Every 64th stays, so that no heap can shrink from its end.
blocks = [bytes(2048) for _ in range(50_000)]
kept = blocks[::64]
del blocks
before = process.memory_info().rss
process_memory.give_back()
print(before - process.memory_info().rss, len(kept))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's allocator needs it")
def test_holes_in_the_heap_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 50 * 2**20, done.stdout


class _Node:
    def __init__(self) -> None:
        self.itself = self


def test_what_stood_at_start_is_kept_and_let_go_again_when_it_may_be_garbage() -> None:
    before = gc.get_threshold()
    node = _Node()
    seen = weakref.ref(node)
    try:
        process_memory.keep_what_stands()
        del node
        gc.collect()
        assert seen() is not None
        process_memory.let_go()
        gc.collect()
        assert seen() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)

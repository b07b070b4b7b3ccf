"""What stands in a queue, taken in lists: waking a thread costs more than what most stages do for an event."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any


def rounds(
    source: queue.SimpleQueue[Any], at_most: int, patience: Callable[[], float | None] = lambda: None
) -> Iterator[list[Any]]:
    """Wait for the first entry, take the rest at once until there are `at_most`. Ends at None.

    An entry that is a list counts as what is in it, and is not divided. `patience`: asked before each wait for how many seconds
    it may last (None: for as long as it takes); one that ended without an entry gives an empty list.
    """
    while True:
        try:
            entry = source.get(timeout=patience())
        except queue.Empty:
            yield []
            continue
        entries: list[Any] = []
        while entry is not None:
            if isinstance(entry, list):
                entries += entry
            else:
                entries.append(entry)
            if len(entries) >= at_most or source.empty():
                break
            entry = source.get()
        if entries:
            yield entries
        if entry is None:
            return

"""In which order records are read: shards dealt to ranks and lanes, shuffled anew each epoch, every position computable.

Step s belongs to lane s modulo the number of lanes, so that of n loader processes, dealt steps in turn, each reads the shards of
whole lanes (n dividing the lanes). A position in a lane is a number; which record stands there depends on seed, epoch, rank and
lane alone, so a run goes on in mid-epoch with the very records it would have had, with any number of loader processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from train.recipe import Recipe

WINDOW = 8
"""Shards that are open at once and shuffled together; records further apart than this meet only by the shards' own order."""

Records = NDArray[np.int64]


def lanes_for(records: int, world_size: int, lanes: int) -> int:
    """Lanes a rank really has: no more than there are records for, and at least one."""
    return max(1, min(lanes, records // world_size))


def dealt(shard: NDArray[np.int32], chosen: Records, reader: int, readers: int, seed: int) -> list[Records]:
    """The blocks of one reader (a lane of a rank), each of one shard: every record goes to one of them, all get as many (+-1).

    shard: int32[n] the shard of each record; chosen: the records to deal, ascending. Shards are shuffled, laid end to end and cut
    into as many stretches as there are readers: a reader has whole shards, and shares at most the first and the last.
    """
    blocks = np.split(chosen, np.flatnonzero(np.diff(shard[chosen])) + 1)
    order = np.random.default_rng(seed).permutation(len(blocks))
    stretch = np.array_split(np.concatenate([blocks[b] for b in order]), readers)[reader]
    return np.split(stretch, np.flatnonzero(np.diff(shard[stretch])) + 1)


class Stream:
    """An endless, shuffled order of a lane's records: every one once an epoch."""

    def __init__(self, blocks: Sequence[Records], seed: tuple[int, ...]) -> None:
        self._blocks, self._seed = [block for block in blocks if len(block)], seed
        self.length = sum(map(len, self._blocks))
        self._window = lru_cache(maxsize=2)(self._shuffled)

    def at(self, position: int) -> int:
        """The record at a position; positions beyond an epoch's end go on in the next one's order."""
        epoch, place = divmod(position, self.length)
        order = np.random.default_rng((*self._seed, epoch)).permutation(len(self._blocks))
        for window in range(0, len(order), WINDOW):
            chosen = tuple(int(b) for b in order[window : window + WINDOW])
            count = sum(len(self._blocks[b]) for b in chosen)
            if place < count:
                return int(self._window(epoch, window, chosen)[place])
            place -= count
        raise AssertionError("the windows hold every record of the lane")

    def _shuffled(self, epoch: int, window: int, chosen: tuple[int, ...]) -> Records:
        records = np.concatenate([self._blocks[b] for b in chosen])
        return np.random.default_rng((*self._seed, epoch, window)).permutation(records)


def position(recipe: Recipe, step: int, lanes: int) -> tuple[int, int]:
    """(lane, records that this lane has given before `step`)."""
    lane, first, before = step % lanes, 0, 0
    for phase in recipe.phases:
        last = min(step, first + phase.steps)
        before += max(0, _steps_of(lane, last, lanes) - _steps_of(lane, first, lanes)) * phase.records
        first += phase.steps
        if first >= step:
            break
    return lane, before


def _steps_of(lane: int, step: int, lanes: int) -> int:
    """How many steps below `step` belong to the lane."""
    return (step - lane + lanes - 1) // lanes

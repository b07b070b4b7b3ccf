"""The order of records: every one to one lane, once an epoch, the same from any step and with any number of workers."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.tiny import recipe
from train.lanes import Stream, dealt, lanes_for, position
from train.recipe import Phase


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), world=st.integers(1, 4), wanted=st.integers(1, 8))
def test_every_record_goes_to_exactly_one_lane(sizes: list[int], world: int, wanted: int) -> None:
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    chosen = np.arange(len(shard), dtype=np.int64)[:: 1 + wanted % 2]
    if len(chosen) < world:
        return
    lanes = lanes_for(len(chosen), world, wanted)
    blocks = [dealt(shard, chosen, reader, world * lanes, 7) for reader in range(world * lanes)]
    assert all(len(set(shard[block].tolist())) == 1 for mine in blocks for block in mine)
    parts = [np.concatenate(mine) for mine in blocks]
    assert min(map(len, parts)) >= 1 and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sorted(np.concatenate(parts).tolist()) == chosen.tolist()


def test_lanes_read_whole_shards_where_there_are_enough() -> None:
    shard = np.repeat(np.arange(8, dtype=np.int32), 5)
    owners = [{int(s) for block in dealt(shard, np.arange(40), reader, 4, 7) for s in shard[block]} for reader in range(4)]
    assert [len(mine) for mine in owners] == [2, 2, 2, 2] and set.union(*owners) == set(range(8))


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_a_stream_gives_every_record_once_an_epoch_and_shuffles_anew(sizes: list[int], seed: int) -> None:
    edges = np.cumsum([0, *sizes])
    stream = Stream([np.arange(a, b) for a, b in pairwise(edges)], (seed, 0, 0))
    n = int(edges[-1])
    epochs = [[stream.at(e * n + i) for i in range(n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(n))
    if n > 12:
        assert epochs[0] != epochs[1] != list(range(n))
    # Any position can be asked for at any time.
    again = Stream([np.arange(a, b) for a, b in pairwise(edges)], (seed, 0, 0))
    assert again.at(n + n // 2) == epochs[1][n // 2]


@given(
    phases=st.lists(st.tuples(st.integers(1, 9), st.integers(2, 5)), min_size=1, max_size=4),
    lanes=st.integers(1, 5),
)
def test_positions_of_a_lane_follow_each_other_without_gaps(phases: list[tuple[int, int]], lanes: int) -> None:
    made = recipe(phases=tuple(Phase(steps=s, records=r) for s, r in phases))
    reached: Counter[int] = Counter()
    for step in range(made.steps):
        lane, first = position(made, step, lanes)
        assert lane == step % lanes and first == reached[lane]
        reached[lane] += made.phase_at(step)[0].records

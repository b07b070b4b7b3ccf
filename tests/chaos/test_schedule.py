"""The schedule is a function of the seed, and its faults do not step on each other."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.schedule import BROKER_REST_S, BY_NAME, EMBEDDED, KINDS, draw

ALL = [kind.name for kind in KINDS if kind.weight]


@given(seed=st.integers(0, 10**6), hurts=st.integers(0, 80), workers=st.integers(1, 5), nodes=st.integers(1, 3))
def test_a_schedule_has_as_many_kills_and_stops_as_were_asked_for(seed: int, hurts: int, workers: int, nodes: int) -> None:
    faults = draw(seed, 600, hurts, workers=workers, nodes=nodes, allowed=ALL)
    assert faults == draw(seed, 600, hurts, workers=workers, nodes=nodes, allowed=reversed(ALL))
    assert sum(BY_NAME[fault.kind].hurts for fault in faults) == hurts
    assert all(fault.target < {"worker": workers, "brokers": nodes}.get(BY_NAME[fault.kind].group, 1) for fault in faults)
    by_lane = defaultdict(list)
    for fault in faults:
        by_lane[fault.lane].append(fault)
    for lane, own in by_lane.items():
        rest = BROKER_REST_S if lane == "brokers" else 0.0
        for one, following in itertools.pairwise(own):
            assert following.at_s >= one.at_s + one.duration_s + rest


def test_another_seed_is_another_schedule() -> None:
    assert draw(1, 600, 20, workers=3, nodes=3, allowed=ALL) != draw(2, 600, 20, workers=3, nodes=3, allowed=ALL)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_small_cluster_keeps_a_broker(nodes: int) -> None:
    kinds = {fault.kind for fault in draw(3, 600, 200, workers=2, nodes=nodes, allowed=ALL)}
    assert not kinds & {"brokers_stop_two", "leaders_move"}


def test_only_what_is_possible_is_drawn_and_all_of_it() -> None:
    assert {fault.kind for fault in draw(3, 600, 300, workers=2, nodes=3, allowed=EMBEDDED)} == EMBEDDED
    assert {fault.kind for fault in draw(3, 600, 300, workers=2, nodes=3, allowed=ALL)} == set(ALL)


def test_durations_are_bounded() -> None:
    assert max(fault.duration_s for fault in draw(3, 600, 100, workers=2, nodes=3, allowed=ALL, longest_s=4)) == 4

"""What batches take, and how large they may be beside urgent crops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.device_speed import SLACK, DeviceSpeed


def test_the_shortest_time_counts_and_is_forgotten_slowly() -> None:
    speed = DeviceSpeed()
    assert speed.seconds(8) is None and speed.prompt(0.005) is None
    speed.learn(8, 0.010)
    speed.learn(8, 0.050)
    assert speed.seconds(8) == pytest.approx(0.0105)
    for _ in range(100):
        speed.learn(8, 0.050)
    assert speed.seconds(8) == pytest.approx(0.050)


@given(a_s=st.floats(0, 0.1), b_s=st.floats(1e-5, 0.1), delay_s=st.floats(0, 0.1), sizes=st.sets(st.integers(1, 256), min_size=2))
def test_prompt_is_the_largest_batch_that_keeps_the_slack(a_s: float, b_s: float, delay_s: float, sizes: set[int]) -> None:
    speed = DeviceSpeed()
    for size in sizes:
        speed.learn(size, a_s + b_s * size)
    found, alone = speed.prompt(delay_s), delay_s + a_s + b_s
    assert found is not None and found >= 1
    if found > 1:
        assert 2 * (a_s + b_s * found) <= SLACK * alone * (1 + 1e-6)
    assert 2 * (a_s + b_s * (found + 1)) >= SLACK * alone * (1 - 1e-6)


def test_larger_batches_that_take_no_longer_are_not_limited() -> None:
    speed = DeviceSpeed()
    for size in (1, 32):
        speed.learn(size, 0.004)
    assert speed.prompt(0.005) is None


def test_one_size_alone_counts_as_all_crops() -> None:
    speed = DeviceSpeed()
    speed.learn(32, 0.032)
    assert speed.prompt(0.005) == int(SLACK / 2 * 6)

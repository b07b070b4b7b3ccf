"""Failing batches: exactly the guilty are found, cheaply, and the device's faults are nobody's else."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.backends.base import BackendStateError, DeviceError, OutOfDeviceMemory
from engine.isolation import Infer, InferenceFailed, isolate

GREY = 128


class Device:
    """Fails on batches with a poisonous crop, gives NaN for a spoilt one, has memory for `memory` crops."""

    def __init__(self, poisonous: set[int], spoilt: set[int], memory: int = 10**6) -> None:
        self.poisonous, self.spoilt, self.memory = poisonous, spoilt, memory
        self.calls = 0

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.calls += 1
        if len(crops) > self.memory:
            raise OutOfDeviceMemory(f"{len(crops)} crops")
        values = crops[:, 0, 0, 0].astype(np.int64)
        if any(int(value) in self.poisonous for value in values):
            raise RuntimeError("illegal image")
        scores = np.stack([values, values * 2], axis=1).astype(np.float32)
        scores[np.isin(values, list(self.spoilt))] = np.nan
        return scores


def batch_of(sizes: list[int]) -> tuple[NDArray[np.uint8], list[int]]:
    """Part i's crops carry the value i."""
    bounds = [0, *np.cumsum(sizes).tolist()]
    crops = np.zeros((bounds[-1], 2, 2, 3), np.uint8)
    for part, (start, stop) in enumerate(pairwise(bounds)):
        crops[start:stop] = part
    return crops, bounds


def first_call(infer: Infer, crops: NDArray[np.uint8]) -> NDArray[np.float32] | Exception:
    try:
        return infer(crops)
    except Exception as error:  # noqa: BLE001
        return error


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=40),
    st.sets(st.integers(0, 39), max_size=5),
    st.sets(st.integers(0, 39), max_size=5),
    st.sampled_from([1, 2, 5, 10**6]),
)
def test_exactly_the_guilty_are_found(sizes: list[int], poisonous: set[int], spoilt: set[int], memory: int) -> None:
    device = Device(poisonous, spoilt, memory)
    crops, bounds = batch_of(sizes)
    outcome = isolate(device, crops, bounds, first_call(device, crops))
    guilty = {part for part in range(len(sizes)) if part in poisonous | spoilt}
    assert set(outcome.errors) == guilty
    assert all(isinstance(error, InferenceFailed) for error in outcome.errors.values())
    for part, (start, stop) in enumerate(pairwise(bounds)):
        if part not in guilty:
            np.testing.assert_array_equal(outcome.scores[start:stop], [[part, 2 * part]] * (stop - start))
    assert (outcome.cap is None) == (len(crops) <= memory)
    assert outcome.cap is None or outcome.cap <= memory


@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 32, 64])
def test_one_guilty_among_n_costs_two_calls_a_halving_at_most(n: int) -> None:
    for guilty in range(n):
        device = Device({guilty}, set())
        crops, bounds = batch_of([1] * n)
        first = first_call(device, crops)
        device.calls = 0
        isolate(device, crops, bounds, first)
        assert device.calls <= 2 * math.ceil(math.log2(n)) + 2


def test_a_failure_that_does_not_repeat_blames_nobody() -> None:
    device = Device(set(), set())
    crops, bounds = batch_of([1, 2, 3])
    outcome = isolate(device, crops, bounds, RuntimeError("once"))
    assert not outcome.errors
    np.testing.assert_array_equal(outcome.scores[:, 0], [0, 1, 1, 2, 2, 2])
    lone, lone_bounds = batch_of([2])
    assert not isolate(device, lone, lone_bounds, RuntimeError("once")).errors


def test_an_image_is_not_blamed_by_an_engine_that_fails_on_grey() -> None:
    crops, bounds = batch_of([1, 1])
    with pytest.raises(DeviceError, match="illegal image"):
        isolate(Device({0, GREY}, set()), crops, bounds, RuntimeError("illegal image"))
    with pytest.raises(DeviceError, match="not finite"):
        isolate(Device({0}, {GREY}), crops, bounds, RuntimeError("illegal image"))


@pytest.mark.parametrize("error", [DeviceError("Xid 79"), BackendStateError("closed")])
def test_the_backends_own_errors_are_fatal_at_every_step(error: Exception) -> None:
    crops, bounds = batch_of([1, 1, 1])

    def dies(_: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise error

    with pytest.raises(type(error)):
        isolate(dies, crops, bounds, error)
    with pytest.raises(type(error)):
        isolate(dies, crops, bounds, RuntimeError("first"))

    def dies_on_grey(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise error if batch[0, 0, 0, 0] == GREY else RuntimeError("illegal image")

    with pytest.raises(type(error)):
        isolate(dies_on_grey, crops, bounds, RuntimeError("first"))


def test_scores_of_another_shape_are_the_engines_fault() -> None:
    crops, bounds = batch_of([1, 1])
    with pytest.raises(DeviceError, match="shape"):
        isolate(lambda batch: np.zeros((5, 2), np.float32), crops, bounds, RuntimeError("first"))


def test_the_half_that_must_be_guilty_is_split_without_asking() -> None:
    device = Device({31}, set())
    crops, bounds = batch_of([1] * 32)
    first = first_call(device, crops)
    device.calls = 0
    isolate(device, crops, bounds, first)
    assert device.calls == 5 + 1 + 1, "five first halves, the guilty one, grey"

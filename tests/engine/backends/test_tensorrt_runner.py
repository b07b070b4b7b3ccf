"""The runner on a driver that runs everything as late and in as bad an order as it may: overlap, reuse of buffers, errors."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backends.base import BackendStateError, DeviceError, OutOfDeviceMemory
from engine.backends.plan_engine import PlanEngine, PlanRejected
from engine.backends.tensorrt_runner import DEPTH, Runner
from tests.engine.backends.fake_cuda import FakeDriver
from tests.engine.backends.fake_tensorrt import FakeTensorRT, embedding_of, plan_bytes
from tests.engine.bundles import random_heads

SIZES = (1, 2, 4)
HEADS = random_heads()
GRAPH = b"graph"


def make(driver: FakeDriver, **options: bool) -> tuple[FakeTensorRT, Runner]:
    trt = FakeTensorRT(driver, **options)
    trt.know(GRAPH, HEADS)
    return trt, Runner(driver, PlanEngine(trt, plan_bytes(GRAPH, SIZES), SIZES), SIZES)


def plain(*brightness: int) -> np.ndarray:
    return np.stack([np.full((224, 224, 3), value, np.uint8) for value in brightness])


def check(outputs: object, crops: np.ndarray) -> None:
    expected = embedding_of(crops)
    np.testing.assert_array_equal(outputs.embedding, expected)  # type: ignore[attr-defined]
    # A padded batch is another shape to the matrix product, which some processors then sum in another order.
    np.testing.assert_allclose(outputs.raw, HEADS.raw_scores(expected), rtol=0, atol=1e-6)  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(1, 4), min_size=1, max_size=8), capturable=st.booleans())
def test_two_under_way_give_each_its_own_scores_in_any_order_of_execution(seed: int, counts: list[int], capturable: bool) -> None:
    driver = FakeDriver(seed)
    _, runner = make(driver, capturable=capturable)
    waiting: list[tuple[object, np.ndarray]] = []
    value = 0
    for count in counts:
        crops = plain(*range(value, value + count))
        value += count
        if len(waiting) == DEPTH:
            ticket, sent = waiting.pop(0)
            check(runner.collect(ticket), sent)  # type: ignore[arg-type]
        given_away = crops.copy()
        waiting.append((runner.submit(given_away), crops))
        given_away[:] = 255  # the caller may reuse its array at once
    for ticket, sent in waiting:
        check(runner.collect(ticket), sent)  # type: ignore[arg-type]
    runner.close()
    assert driver.live == 0


def test_the_next_copy_in_does_not_wait_for_the_computation_under_way() -> None:
    driver = FakeDriver()
    driver.random.random = lambda: 1.0  # type: ignore[method-assign]  # nothing runs before the host waits
    _, runner = make(driver)
    first, second = runner.submit(plain(1)), runner.submit(plain(2))
    copies, compute, out = (list(driver.streams.values())[i].ops for i in range(3))
    assert [op.what for op in copies] == ["copy_in", "event"] * 2
    assert [op.what for op in compute] == ["wait", "compute", "event"] * 2
    assert [op.what for op in out] == ["wait", "copy_out", "copy_out", "event"] * 2
    runner.collect(first)
    runner.collect(second)


def test_the_host_waits_only_for_the_copy_out() -> None:
    driver = FakeDriver()
    _, runner = make(driver)
    driver.log.clear()
    runner.collect(runner.submit(plain(1, 2, 3)))
    assert driver.log == [
        *("copy_in", "record", "wait_on", "launch", "record", "wait_on", "copy_out", "copy_out", "record"),
        "finish",
    ]


def test_each_size_and_slot_has_a_graph_and_no_batch_allocates() -> None:
    driver = FakeDriver()
    trt, runner = make(driver)
    assert runner.graphs == len(SIZES) * DEPTH
    trt.ran_sizes.clear()
    before = driver.calls.copy()
    for count in (1, 2, 3, 4):
        runner.collect(runner.submit(plain(*range(count))))
    assert trt.ran_sizes == [1, 2, 4, 4], "a batch runs at the next size that has a graph"
    after = driver.calls - before
    assert not {"allocate", "host_array", "begin_capture", "event", "stream"} & set(after)
    assert after["launch"] == 4


def test_only_the_rows_of_the_batch_are_copied() -> None:
    driver = FakeDriver()
    _, runner = make(driver)
    runner.collect(runner.submit(plain(9, 9, 9, 9)))
    outputs = runner.collect(runner.submit(plain(1, 2, 3)))
    assert outputs.raw.shape == (3, 3) and outputs.embedding.shape == (3, 192)
    check(outputs, plain(1, 2, 3))


def test_runs_call_by_call_where_nothing_can_be_captured() -> None:
    for options, fail_capture in (({"capturable": False}, False), ({}, True)):
        driver = FakeDriver()
        trt = FakeTensorRT(driver, **options)
        trt.know(GRAPH, HEADS)
        trt.fail_capture = fail_capture
        runner = Runner(driver, PlanEngine(trt, plan_bytes(GRAPH, SIZES), SIZES), SIZES)
        assert runner.graphs == 0 and driver.capturing is None
        check(runner.collect(runner.submit(plain(5, 6))), plain(5, 6))
        runner.close()
        assert driver.live == 0


def test_a_third_batch_and_tickets_out_of_order_are_refused() -> None:
    driver = FakeDriver()
    _, runner = make(driver)
    first, second = runner.submit(plain(1)), runner.submit(plain(2))
    with pytest.raises(BackendStateError, match="2 batches are under way"):
        runner.submit(plain(3))
    with pytest.raises(BackendStateError, match="in the order"):
        runner.collect(second)
    check(runner.collect(first), plain(1))
    with pytest.raises(BackendStateError, match="once"):
        runner.collect(first)
    check(runner.collect(second), plain(2))


def test_running_out_of_memory_in_a_batch_leaves_the_runner_usable() -> None:
    driver = FakeDriver()
    trt, runner = make(driver, capturable=False)
    kept = runner.submit(plain(7))
    trt.fail_enqueue = 1
    with pytest.raises(OutOfDeviceMemory, match="out of memory"):
        runner.submit(plain(1, 2))
    check(runner.collect(kept), plain(7))
    for value in range(4):
        check(runner.collect(runner.submit(plain(value))), plain(value))


def test_a_hung_device_ends_in_an_error_and_not_in_a_hung_queue() -> None:
    driver = FakeDriver()
    _, runner = make(driver)
    ticket = runner.submit(plain(1))
    driver.hung = True
    with pytest.raises(DeviceError, match="did not end within 30 s"):
        runner.collect(ticket)
    driver.log.clear()
    runner.close()
    assert not driver.log, "freeing would wait for what hangs"


@pytest.mark.parametrize("call", ["copy_in", "launch", "copy_out", "record", "finish"])
def test_an_error_of_the_device_reaches_the_caller(call: str) -> None:
    driver = FakeDriver()
    _, runner = make(driver)
    driver.fail[call] = DeviceError("CUDA: cuX: CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        runner.collect(runner.submit(plain(1)))
    driver.log.clear()
    runner.close()
    assert not driver.log, "a failed device is left alone: freeing may hang"


@pytest.mark.parametrize("call", ["stream", "host_array", "allocate", "event", "begin_capture", "end_capture", "launch"])
def test_what_was_made_before_an_error_is_given_back(call: str) -> None:
    driver = FakeDriver()
    driver.fail[call] = OutOfDeviceMemory("CUDA: out of device memory")
    trt = FakeTensorRT(driver)
    trt.know(GRAPH, HEADS)
    engine = PlanEngine(trt, plan_bytes(GRAPH, SIZES), SIZES)
    with pytest.raises(OutOfDeviceMemory):
        Runner(driver, engine, SIZES)
    assert driver.live == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (b"junk", r"does not load: Serialization assertion magicTag failed\.$"),
        (plan_bytes(GRAPH, (1, 2)), "profiles are"),
        (plan_bytes(GRAPH, (1, 2, 8)), "profiles are"),
        (plan_bytes(GRAPH, SIZES, tensors={"crops": ["INPUT", "FLOAT", [-1, 224, 224, 3]]}), "tensors are"),
    ],
)
def test_a_plan_that_is_not_the_one_it_should_be_is_rejected(plan: bytes, message: str) -> None:
    with pytest.raises(PlanRejected, match=message):
        PlanEngine(FakeTensorRT(FakeDriver()), plan, SIZES)


def test_a_runner_that_nobody_holds_gives_everything_back() -> None:
    driver = FakeDriver()
    _, runner = make(driver)
    runner.collect(runner.submit(plain(1)))
    assert driver.live > 0
    driver.calls.clear()
    del runner
    gc.collect()
    assert driver.live == 0 and driver.calls["make_current"] == 1

"""The batcher between real threads: nothing lost, nothing doubled, nobody left waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.backends.base import DeviceError, OutOfDeviceMemory
from engine.batcher import (
    BatchConfig,
    Batcher,
    BatcherClosed,
    BatchReport,
    BatchTiming,
    DeadlineExpired,
    InferenceFailed,
    QueueFull,
    Submission,
)

SHAPE = (2, 2, 3)


def crops(value: int, k: int = 1) -> NDArray[np.uint8]:
    """k crops that carry a value and their place in the item."""
    made = np.full((k, *SHAPE), value % 251, np.uint8)
    made[:, 0, 0, 1] = np.arange(k) % 256
    made[:, 0, 0, 2] = value // 251
    return made


def expected(value: int, k: int = 1) -> NDArray[np.float32]:
    return np.stack([np.full(k, value % 251), np.arange(k) % 256, np.full(k, value // 251)], axis=1).astype(np.float32)


class Echo:
    """An engine that gives the first pixel of each crop back, after a + b*n seconds; `fails` may raise or spoil."""

    def __init__(self, a_s: float = 0.0, b_s: float = 0.0, fails: Callable[[NDArray[np.float32]], Any] | None = None) -> None:
        self.a_s, self.b_s, self.fails = a_s, b_s, fails
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.entered.set()
        assert self.gate.wait(60)
        self.sizes.append(len(batch))
        if self.a_s or self.b_s:
            time.sleep(self.a_s + self.b_s * len(batch))
        scores = batch[:, 0, 0, :].astype(np.float32)
        return scores if self.fails is None else self.fails(scores)


class OverlappedEcho(Echo):
    """The same, with two batches under way; copies at `collect` what it was given at `submit`: the buffer must still hold it."""

    depth = 2

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.under_way: list[NDArray[np.uint8]] = []
        self.most_under_way = 0

    def submit(self, batch: NDArray[np.uint8]) -> object:
        self.under_way.append(batch)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        assert len(self.under_way) <= self.depth
        return batch

    def collect(self, ticket: Any) -> NDArray[np.float32]:
        assert self.under_way.pop(0) is ticket
        return super().infer(ticket)

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert not self.under_way, "a blocking call while batches are under way"
        return super().infer(batch)


@dataclass
class Told:
    done: dict[Any, NDArray[np.float32]] = field(default_factory=dict)
    timings: dict[Any, BatchTiming[Any]] = field(default_factory=dict)
    errors: dict[Any, Exception] = field(default_factory=dict)
    order: list[Any] = field(default_factory=list)
    fatal: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def on_done(self, context: Any, scores: NDArray[np.float32], timing: BatchTiming[Any]) -> None:
        with self.changed:
            assert context not in self.done and context not in self.errors, "told twice"
            self.done[context] = scores.copy()
            self.timings[context] = timing
            self.order.append(context)
            self.changed.notify_all()

    def on_error(self, context: Any, error: Exception) -> None:
        with self.changed:
            assert context not in self.done and context not in self.errors, "told twice"
            self.errors[context] = error
            self.order.append(context)
            self.changed.notify_all()

    def wait_for(self, n: int, timeout: float = 60) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.order) >= n, timeout), f"{len(self.order)} of {n} settled"


@contextmanager
def running(batcher: Batcher[Any], engine: Callable[[], Any]) -> Iterator[Told]:
    told = Told()

    def own() -> None:
        try:
            batcher.run(engine, told.on_done, told.on_error)
        except Exception as error:  # noqa: BLE001
            told.fatal = error

    thread = threading.Thread(target=own, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        batcher.close()
        thread.join(60)
        assert not thread.is_alive(), "run did not return after close"


def always(engine: Any) -> Callable[[], Any]:
    return lambda: engine


def make(reports: list[BatchReport] | None = None, **config: Any) -> Batcher[Any]:
    return Batcher(BatchConfig(**config), crop_shape=SHAPE, observer=None if reports is None else reports.append)


@pytest.mark.parametrize("engine", [Echo(), OverlappedEcho()], ids=["blocking", "overlapping"])
def test_each_item_gets_its_own_scores_however_it_was_split(engine: Echo) -> None:
    batcher = make(max_batch_size=8, max_queue_size=64, max_queue_delay_microseconds=500)
    sizes = [1, 3, 8, 9, 40, 1, 100, 5, 2]
    with running(batcher, always(engine)) as told:
        for value, k in enumerate(sizes):
            batcher.submit(crops(value, k), priority=value % 3, context=value)
        told.wait_for(len(sizes))
    assert told.fatal is None and not told.errors
    for value, k in enumerate(sizes):
        np.testing.assert_array_equal(told.done[value], expected(value, k))
    assert max(engine.sizes) <= 8
    assert batcher.unfinished() == [] and batcher.queued == 0


@pytest.mark.parametrize("engine", [Echo(0.0002, 0.00002), OverlappedEcho(0.0002, 0.00002)], ids=["blocking", "overlapping"])
def test_many_threads_lose_and_double_nothing(engine: Echo) -> None:
    reports: list[BatchReport] = []
    batcher = make(reports, max_batch_size=16, max_queue_size=48, max_queue_delay_microseconds=300, priority_levels=3)
    poison = {value for value in range(6 * 300) if value % 97 == 5}
    tags = {(value % 251, value // 251) for value in poison}

    def fails(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        if any((int(row[0]), int(row[2])) in tags for row in scores):
            raise RuntimeError("a poisonous image")
        return scores

    engine.fails = fails

    def produce(worker: int) -> None:
        several: list[Submission[int]] = []
        for number in range(300):
            value = worker * 300 + number
            if worker % 2:
                batcher.submit(crops(value, 1 + value % 5), priority=value % 4, context=value)
            else:  # several at a time, of more crops than the queue takes at once
                several.append(Submission(crops(value, 1 + value % 5), value % 4, value))
                if len(several) == 30:
                    batcher.submit_several(several)
                    several = []

    with running(batcher, always(engine)) as told:
        producers = [threading.Thread(target=produce, args=(worker,), daemon=True) for worker in range(6)]
        for producer in producers:
            producer.start()
        for producer in producers:
            producer.join(30)
        told.wait_for(1800, timeout=30)
    assert told.fatal is None
    assert set(told.errors) == poison and all(isinstance(error, InferenceFailed) for error in told.errors.values())
    assert set(told.done) == set(range(1800)) - poison
    for value, scores in told.done.items():
        np.testing.assert_array_equal(scores, expected(value, 1 + value % 5))
    innocent = sum(1 + value % 5 for value in range(1800) if value not in poison)
    assert innocent < sum(report.size for report in reports) <= sum(1 + value % 5 for value in range(1800))
    assert sum(len(report.waits_s) for report in reports) == 1800
    assert {report.reason for report in reports} <= {"full", "timeout", "drain"}


def test_a_lone_item_leaves_after_the_delay_and_not_before() -> None:
    reports: list[BatchReport] = []
    batcher = make(reports, max_queue_delay_microseconds=30_000)
    with running(batcher, always(Echo())) as told:
        started = time.monotonic()
        batcher.submit(crops(7), 0, "one")
        told.wait_for(1)
        took = time.monotonic() - started
    assert took >= 0.030
    assert [report.reason for report in reports] == ["timeout"]
    assert 0.030 <= told.timings["one"].queue_s + told.timings["one"].infer_s <= took + 0.001


def test_a_preferred_size_leaves_an_idle_device_at_once() -> None:
    reports: list[BatchReport] = []
    batcher = make(reports, max_batch_size=8, preferred_batch_size=(4, 8), max_queue_delay_microseconds=60_000_000)
    with running(batcher, always(Echo())) as told:
        for value in range(4):
            batcher.submit(crops(value), 0, value)
        told.wait_for(4)
    assert [(report.size, report.reason) for report in reports] == [(4, "full")]


def test_a_busy_device_fills_the_next_batch_to_the_maximum() -> None:
    reports: list[BatchReport] = []
    batcher, engine = make(reports, max_batch_size=8, preferred_batch_size=(2,), max_queue_delay_microseconds=0), Echo()
    engine.gate.clear()
    with running(batcher, always(engine)) as told:
        batcher.submit(crops(0), 0, 0)
        assert engine.entered.wait(30)
        for value in range(1, 12):
            batcher.submit(crops(value), 0, value)
        engine.gate.set()
        told.wait_for(12)
    assert [report.size for report in reports] == [1, 8, 3]


def test_an_overlapping_engine_gets_a_whole_batch_behind_the_one_under_way_and_only_a_whole_one() -> None:
    batcher, engine = make(max_batch_size=4, max_queue_delay_microseconds=0), OverlappedEcho(0.001)
    engine.gate.clear()
    with running(batcher, always(engine)) as told:
        for value in range(21):
            batcher.submit(crops(value), 0, value)
        engine.gate.set()
        told.wait_for(21)
    assert engine.most_under_way == 2
    assert told.order == list(range(21))
    assert set(engine.sizes[1:-1]) == {4}


def test_the_next_batch_lies_ready_while_a_blocking_engine_computes() -> None:
    """And every call, the ones for a failure too, comes from one thread."""
    batcher, threads = make(max_batch_size=4, max_queue_delay_microseconds=0), set()

    class Watched(Echo):
        def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
            threads.add(threading.current_thread().name)
            return super().infer(batch)

    engine = Watched(0.001)
    with running(batcher, always(engine)) as told:
        for value in range(2):  # until the batcher knows how long four crops take
            batcher.submit(crops(value, 4), 0, value)
        told.wait_for(2)
        engine.gate.clear()
        engine.entered.clear()
        for value in range(2, 5):
            batcher.submit(crops(value, 4), 0, value)
        assert engine.entered.wait(30)
        deadline = time.monotonic() + 30
        while batcher.queued > 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert batcher.queued == 4, "one batch is under way, one lies behind it, one waits"
        engine.gate.set()
        told.wait_for(5)
    assert threads == {"device"} and told.order == list(range(5))


def test_a_full_level_holds_its_own_producers_and_no_others() -> None:
    batcher, engine = make(max_batch_size=4, max_queue_size=4, max_queue_delay_microseconds=0), Echo()
    engine.gate.clear()
    with running(batcher, always(engine)) as told:
        batcher.submit(crops(0), 1, "under way")
        assert engine.entered.wait(30)
        batcher.submit(crops(1, 4), 1, "waits")
        with pytest.raises(QueueFull):
            batcher.submit(crops(2), 1, "bulk", timeout=0)
        started = time.monotonic()
        with pytest.raises(QueueFull):
            batcher.submit(crops(2), 1, "bulk", timeout=0.05)
        assert time.monotonic() - started >= 0.05
        batcher.submit(crops(3), 0, "urgent", timeout=0)
        threading.Timer(0.05, engine.gate.set).start()
        batcher.submit(crops(4), 1, "patient")
        told.wait_for(4)
    assert set(told.done) == {"under way", "waits", "urgent", "patient"}


def test_several_that_fill_the_queue_wake_the_device_before_they_wait_for_room() -> None:
    reports: list[BatchReport] = []
    batcher = make(
        reports, max_batch_size=4, preferred_batch_size=(4,), max_queue_size=4, max_queue_delay_microseconds=60_000_000
    )
    with running(batcher, always(Echo())) as told:
        batcher.submit_several([Submission(crops(value), 1, value) for value in range(8)])
        told.wait_for(8)
    assert list(told.done) == list(range(8))
    assert [report.size for report in reports] == [4, 4]
    with pytest.raises(BatcherClosed):
        batcher.submit_several([Submission(crops(1), 1, 1)])


def test_of_several_with_one_of_wrong_crops_none_is_accepted() -> None:
    batcher = make()
    with pytest.raises(ValueError, match="crops must be"):
        batcher.submit_several([Submission(crops(1), 1, 1), Submission(crops(1)[:, 1:], 1, 2)])
    assert batcher.unfinished() == []


def test_an_item_larger_than_the_queue_is_taken_by_an_empty_level() -> None:
    batcher = make(max_batch_size=4, max_queue_size=8, max_queue_delay_microseconds=0)
    with running(batcher, always(Echo())) as told:
        batcher.submit(crops(1, 320), 0, "animation")
        told.wait_for(1)
    np.testing.assert_array_equal(told.done["animation"], expected(1, 320))


def test_drain_gives_every_accepted_item_its_scores_and_refuses_new_ones() -> None:
    reports: list[BatchReport] = []
    batcher, engine = make(reports, max_batch_size=4, max_queue_delay_microseconds=60_000_000), Echo()
    with running(batcher, always(engine)) as told:
        for value in range(3):
            batcher.submit(crops(value, 3), 0, value)
        engine.gate.clear()
        batcher.close()
        engine.gate.set()
        with pytest.raises(BatcherClosed):
            batcher.submit(crops(9), 0, 9)
    assert set(told.done) == {0, 1, 2}
    assert reports[-1].reason == "drain" and batcher.unfinished() == []


def test_close_without_drain_stops_after_the_batch_under_way_and_names_what_is_left() -> None:
    batcher, engine = make(max_batch_size=2, max_queue_delay_microseconds=0), Echo()
    engine.gate.clear()
    with running(batcher, always(engine)) as told:
        batcher.submit(crops(0, 2), 0, 0)
        assert engine.entered.wait(30)
        for value in (1, 2, 3):
            batcher.submit(crops(value), 0, value)
        batcher.close()
        batcher.close(drain=False)
        engine.gate.set()
    assert list(told.done) == [0] and batcher.unfinished() == [1, 2, 3]


def test_close_frees_those_who_wait_for_room() -> None:
    batcher = make(max_batch_size=1, max_queue_size=1)
    batcher.submit(crops(0), 0, 0)
    raised: list[Exception] = []

    def wait() -> None:
        try:
            batcher.submit(crops(1), 0, 1)
        except BatcherClosed as error:
            raised.append(error)

    waiters = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.05)
    batcher.close()
    for waiter in waiters:
        waiter.join(30)
    assert len(raised) == 3 and batcher.unfinished() == [0]


@pytest.mark.parametrize("kind", [Echo, OverlappedEcho])
def test_a_device_error_ends_run_blames_nobody_and_frees_the_waiting(kind: type[Echo]) -> None:
    def dies(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        raise DeviceError("Xid 79: the GPU has fallen off the bus")

    batcher, engine = make(max_batch_size=2, max_queue_size=2, max_queue_delay_microseconds=0), kind(fails=dies)
    engine.gate.clear()
    with running(batcher, always(engine)) as told:
        batcher.submit(crops(0, 2), 0, 0)
        assert engine.entered.wait(30)
        batcher.submit(crops(1, 2), 0, 1)
        threading.Timer(0.05, engine.gate.set).start()
        with pytest.raises(BatcherClosed) as caught:
            for value in range(2, 10):
                batcher.submit(crops(value, 2), 0, value)
    assert isinstance(told.fatal, DeviceError) and caught.value.__cause__ is told.fatal
    assert not told.done and not told.errors
    assert batcher.unfinished()[:2] == [0, 1]


def test_an_engine_that_fails_on_everything_is_the_engines_fault() -> None:
    def broken(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        raise RuntimeError("no kernel image is available")

    batcher = make(max_batch_size=4, max_queue_delay_microseconds=0)
    with running(batcher, always(Echo(fails=broken))) as told:
        batcher.submit(crops(1), 0, 1)
    assert isinstance(told.fatal, DeviceError) and "no kernel image" in str(told.fatal)
    assert not told.errors and batcher.unfinished() == [1]


def test_rows_that_are_not_numbers_fail_their_item_alone() -> None:
    def spoils(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        scores[scores[:, 0] == 3] = np.nan
        return scores

    batcher, engine = make(max_batch_size=8, max_queue_delay_microseconds=60_000_000), Echo(fails=spoils)
    with running(batcher, always(engine)) as told:
        for value in range(6):
            batcher.submit(crops(value, 1 + value % 2), 0, value)
    assert list(told.errors) == [3] and "finite" in str(told.errors[3])
    assert sorted(told.done) == [0, 1, 2, 4, 5]


def test_out_of_memory_halves_the_batch_and_goes_on_with_the_smaller_one() -> None:
    def small(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(scores) > 3:
            raise OutOfDeviceMemory(f"{len(scores)} crops")
        return scores

    reports: list[BatchReport] = []
    batcher, engine = make(reports, max_batch_size=16, max_queue_delay_microseconds=0), Echo(fails=small)
    engine.gate.clear()
    with running(batcher, always(engine)) as told:
        for value in range(40):
            batcher.submit(crops(value), 0, value)
        engine.gate.set()
        told.wait_for(40)
    assert told.fatal is None and len(told.done) == 40
    for value in range(40):
        np.testing.assert_array_equal(told.done[value], expected(value))
    assert reports[-1].cap is not None and reports[-1].cap <= 3
    assert max(report.size for report in reports[-3:]) <= 3


def test_out_of_memory_for_a_single_crop_is_fatal() -> None:
    def none(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        raise OutOfDeviceMemory("1 crop")

    batcher = make(max_batch_size=4, max_queue_delay_microseconds=0)
    with running(batcher, always(Echo(fails=none))) as told:
        batcher.submit(crops(0, 4), 0, 0)
    assert isinstance(told.fatal, DeviceError) and "single crop" in str(told.fatal)


def test_a_deadline_that_passes_in_the_queue_ends_the_item_without_device_time() -> None:
    batcher, engine = make(max_batch_size=1, max_queue_delay_microseconds=0), Echo()
    engine.gate.clear()
    with running(batcher, always(engine)) as told:
        batcher.submit(crops(0), 0, "under way")
        assert engine.entered.wait(30)
        batcher.submit(crops(1), 0, "late", deadline=time.monotonic() + 0.02)
        batcher.submit(crops(2), 0, "patient", deadline=time.monotonic() + 60)
        time.sleep(0.05)
        engine.gate.set()
        told.wait_for(3)
    assert isinstance(told.errors["late"], DeadlineExpired) and isinstance(told.errors["late"], TimeoutError)
    assert set(told.done) == {"under way", "patient"} and len(engine.sizes) == 2


def test_a_deadline_within_the_window_closes_the_window_early() -> None:
    batcher = make(max_batch_size=8, max_queue_delay_microseconds=60_000_000)
    with running(batcher, always(Echo())) as told:
        batcher.submit(crops(1), 0, "hurried", deadline=time.monotonic() + 0.4)
        told.wait_for(1)
    assert "hurried" in told.done


def test_a_swap_happens_between_batches_and_no_item_is_scored_by_two_engines() -> None:
    class Tagged(Echo):
        def __init__(self, tag: int) -> None:
            super().__init__()
            self.tag = tag

        def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
            return np.hstack([super().infer(batch), np.full((len(batch), 1), self.tag, np.float32)])

    engines = [Tagged(0), Tagged(1)]
    asked = iter([0, 0] + [1] * 1000)
    batcher = make(max_batch_size=4, max_queue_delay_microseconds=0)
    engines[0].gate.clear()
    with running(batcher, lambda: engines[next(asked)]) as told:
        batcher.submit(crops(0), 0, 0)
        assert engines[0].entered.wait(30)
        batcher.submit(crops(1, 10), 0, 1)
        batcher.submit(crops(2), 0, 2)
        engines[0].gate.set()
        told.wait_for(3)
    for value, k, tag in ((0, 1, 0), (1, 10, 1), (2, 1, 1)):
        np.testing.assert_array_equal(told.done[value][:, :3], expected(value, k))
        assert set(told.done[value][:, 3]) == {tag}
        assert told.timings[value].engine is engines[tag]
    assert engines[0].sizes == [1, 4]


def test_an_error_of_a_callback_reaches_the_owner() -> None:
    batcher = make(max_queue_delay_microseconds=0)

    def on_done(*_: object) -> None:
        raise ValueError("a mistake in the pipeline")

    batcher.submit(crops(1), 0, 1)
    with pytest.raises(ValueError, match="a mistake in the pipeline"):
        batcher.run(always(Echo()), on_done, lambda *_: None)
    with pytest.raises(BatcherClosed):
        batcher.submit(crops(1), 0, 1)


def test_wrong_crops_are_refused_in_the_producers_thread() -> None:
    batcher = make()
    for wrong in (np.zeros((0, *SHAPE), np.uint8), np.zeros((1, *SHAPE), np.float32), np.zeros(SHAPE, np.uint8)):
        with pytest.raises(ValueError, match="crops must be uint8"):
            batcher.submit(wrong, 0, None)  # type: ignore[arg-type]


def test_an_idle_batcher_uses_no_processor_time() -> None:
    batcher = make()
    with running(batcher, always(Echo())) as told:
        batcher.submit(crops(1), 0, 1)
        told.wait_for(1)
        before = time.process_time()
        time.sleep(0.5)
        used = time.process_time() - before
    assert used < 0.05


def test_those_who_wait_for_room_are_served_in_order_whatever_their_size() -> None:
    batcher = make(max_batch_size=4, max_queue_size=4, max_queue_delay_microseconds=0)
    batcher.submit(crops(0, 3), 0, "first")
    threads = []
    for name, k in (("large", 4), ("small", 1)):
        threads.append(threading.Thread(target=batcher.submit, args=(crops(1, k), 0, name), daemon=True))
        threads[-1].start()
        time.sleep(0.05)
    assert batcher.queued == 3, "the small one has overtaken the large one"
    with running(batcher, always(Echo())) as told:
        told.wait_for(3)
        for thread in threads:
            thread.join(30)
    assert told.order == ["first", "large", "small"]


@pytest.mark.parametrize("late", [True, False], ids=["expired", "guilty"])
def test_room_that_a_failed_item_leaves_is_given_to_those_who_wait(late: bool) -> None:
    def fails(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        if (scores[:, 0] == 7).any():
            raise RuntimeError("a poisonous image")
        return scores

    batcher = make(max_batch_size=4, max_queue_size=4, max_queue_delay_microseconds=60_000_000, preferred_batch_size=(4,))
    deadline = time.monotonic() + 0.3
    batcher.submit(crops(7, 3 if late else 100), 0, "fails", deadline=deadline if late else None)
    waiter = threading.Thread(target=batcher.submit, args=(crops(1, 4), 0, "waits"), daemon=True)
    waiter.start()
    engine = Echo(0.05, fails=fails)
    if late:
        time.sleep(0.35)
    with running(batcher, always(engine)) as told:
        told.wait_for(2)
        waiter.join(30)
    assert list(told.done) == ["waits"] and list(told.errors) == ["fails"]


def test_device_time_of_overlapping_batches_is_counted_once() -> None:
    reports: list[BatchReport] = []
    batcher, engine = make(reports, max_batch_size=4, max_queue_delay_microseconds=0), OverlappedEcho(0.02)
    for value in range(40):
        batcher.submit(crops(value), 0, value)
    started = time.monotonic()
    with running(batcher, always(engine)) as told:
        told.wait_for(40)
        took = time.monotonic() - started
    assert engine.most_under_way == 2
    assert 0.2 <= sum(report.infer_s for report in reports) <= took + 0.01


def test_batches_are_put_together_in_as_many_buffers_as_may_be_under_way() -> None:
    seen: set[int] = set()

    class Remembers(OverlappedEcho):
        def submit(self, batch: NDArray[np.uint8]) -> object:
            seen.add(batch.__array_interface__["data"][0])
            return super().submit(batch)

    batcher, engine = make(max_batch_size=4, max_queue_delay_microseconds=0), Remembers()
    with running(batcher, always(engine)) as told:
        for value in range(200):
            batcher.submit(crops(value), 0, value)
        told.wait_for(200)
    assert len(seen) <= 2


def test_the_batch_behind_one_under_way_is_put_together_late() -> None:
    """So that an urgent image waits for one batch and a bit, not for two."""

    class Timed(OverlappedEcho):
        def __init__(self) -> None:
            super().__init__()
            self.free_at = 0.0
            self.ahead: list[float] = []

        def submit(self, batch: NDArray[np.uint8]) -> object:
            now = time.monotonic()
            self.ahead.append(self.free_at - now)
            self.free_at = max(self.free_at, now) + 0.04
            super().submit(batch)
            return batch, self.free_at

        def collect(self, ticket: Any) -> NDArray[np.float32]:
            time.sleep(max(0.0, ticket[1] - time.monotonic()))
            return super().collect(ticket[0])

    batcher, engine = make(max_batch_size=4, max_queue_delay_microseconds=0), Timed()
    for value in range(4 * 24):
        batcher.submit(crops(value), 0, value)
    with running(batcher, always(engine)) as told:
        told.wait_for(4 * 24)
    steady = sorted(engine.ahead[8:-1])
    assert engine.most_under_way == 2
    assert steady[len(steady) // 2] < 0.03, "made ready long before the device was"


def test_who_hands_results_on_together_hears_of_the_end_of_each_batch() -> None:
    batcher, order = make(max_batch_size=2, max_queue_delay_microseconds=0), []
    for value in range(4):
        batcher.submit(crops(value), 0, value)
    batcher.close()
    batcher.run(always(Echo()), lambda context, *_: order.append(context), lambda *_: None, lambda: order.append("told"))
    assert order == [0, 1, "told", 2, 3, "told"]

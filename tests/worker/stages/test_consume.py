"""The consumer on a real broker: every record once through pauses and rebalances, commits that keep the promise."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, Literal

import kafka.record.default_records as default_records
import pytest
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.future import Future

from tests.worker.fake_clock import FakeClock
from tests.worker.kafka_topics import committed, log_ends, prepare, produce, until
from worker.clock import Deadline
from worker.errors import DependencyError
from worker.items import Record
from worker.kafka_clients import open_producer
from worker.ledger import Ledger, Partition
from worker.settings import KafkaSettings
from worker.stages import consume
from worker.stages.consume import Consumer, ConsumerObserver, UnreadableRecord
from worker.stages.pacing import READ_INTERVAL_S

pytestmark = pytest.mark.broker


class Observer(ConsumerObserver):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.repeated = 0
        self.commits: list[bool] = []

    def rebalanced(self, kind: Literal["assigned", "revoked", "lost"], partitions: frozenset[Partition], repeated: int) -> None:
        self.events.append((kind, len(partitions)))
        self.repeated += repeated

    def committed(self, ok: bool) -> None:
        self.commits.append(ok)


class Member:
    """A consumer with its ledger; `step` reads what there is room for and finishes nothing by itself."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.settings = settings
        self.ledger = Ledger()
        self.observer = Observer()
        self.consumer = Consumer(settings, self.ledger, self.observer)
        self.open: list[Record] = []
        self.seen: list[bytes] = []

    def step(self, room: int = 256, timeout_s: float = 0.05) -> None:
        records = self.consumer.poll(room, timeout_s)
        self.open += records
        self.seen += [record.value for record in records if record.value is not None]

    def finish(self, count: int | None = None, rng: random.Random | None = None) -> list[bool]:
        if rng is not None:
            rng.shuffle(self.open)
        count = len(self.open) if count is None else count
        done, self.open = self.open[:count], self.open[count:]
        return [self.ledger.finish(record.position) for record in done]

    def join(self) -> None:
        until(lambda: bool(self.consumer.assignment), lambda: self.step(0))


@contextmanager
def member(settings: KafkaSettings) -> Iterator[Member]:
    one = Member(settings)
    try:
        yield one
    finally:
        with suppress(Exception):
            one.consumer.close(Deadline(1), commit=False)


@contextmanager
def in_background(one: Member, room: int = 256, finish: bool = True) -> Iterator[None]:
    """Let a member work on a thread of its own, as its main thread would."""
    stop = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            while not stop.is_set():
                one.step(room)
                if finish:
                    one.finish()
                one.consumer.commit()
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    assert not failures, failures


def values(count: int) -> list[bytes]:
    return [b"%08d" % number for number in range(count)]


Settings = Callable[..., KafkaSettings]


def test_every_record_once_through_pauses_holds_spans_and_any_order(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings(max_offset_span=64, max_in_flight=100))
    topic = settings.upload_topics[0]
    produce(settings, topic, values(3_000))
    rng = random.Random(11)
    widest = 0
    with member(settings) as one:
        deadline = Deadline(40)
        while len(one.seen) < 3_000:
            assert not deadline.expired(), len(one.seen)
            one.consumer.hold(topic, rng.random() < 0.1)
            one.step(0 if rng.random() < 0.3 else max(0, 100 - len(one.open)), 0.01)
            widest = max(widest, *one.ledger.spans().values(), 0)
            one.finish(rng.randrange(len(one.open) + 1), rng)
            if rng.random() < 0.2:
                one.consumer.commit()
        assert sorted(one.seen) == values(3_000)
        assert 32 < widest <= 64
        assert all(one.finish())
        assert one.consumer.commit(Deadline(10))
        assert not any(one.consumer.lag().values())
        assert one.consumer.close(Deadline(10)) is None
        assert committed(settings, topic) == log_ends(settings, topic)
        assert one.observer.repeated == 0
        assert set(one.observer.commits) == {True}


def test_an_unfinished_record_holds_back_the_commit_of_those_behind_it(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings())
    topic = settings.upload_topics[0]
    with closing(open_producer(settings)) as producer:
        for number in range(10):
            producer.send(topic, b"%d" % number, partition=0).get(10)
    with member(settings) as one:
        until(lambda: len(one.open) == 10, one.step)
        held = one.open.pop(4)
        one.finish()
        assert one.consumer.commit(Deadline(5))
        assert committed(settings, topic) == {0: 4}
        assert one.consumer.lag()[topic, 0] == 6
        one.ledger.finish(held.position)
        one.consumer.close(Deadline(5))  # the last commit is part of closing
    assert committed(settings, topic) == {0: 10}


def test_closing_without_a_commit_leaves_everything_to_the_next(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings())
    produce(settings, settings.upload_topics[0], values(20))
    with member(settings) as one:
        until(lambda: len(one.open) == 20, one.step)
        one.finish()
        one.consumer.close(Deadline(5), commit=False)
    assert committed(settings, settings.upload_topics[0]) == {}


@pytest.mark.timing
def test_no_room_keeps_polling_and_wakes_at_once(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings(max_in_flight=40))
    produce(settings, settings.upload_topics[0], values(50))
    with member(settings) as one:
        one.join()
        assert one.consumer.paused_partitions == len(one.consumer.assignment) > 0
        one.step(9)  # less than a quarter of 40: not worth resuming
        assert one.seen == []
        threading.Timer(0.1, one.consumer.room_made, (9,)).start()  # as little does not end the wait
        threading.Timer(1.0, one.consumer.room_made, (10,)).start()
        began = time.monotonic()
        one.step(0, timeout_s=10)
        assert 0.9 < time.monotonic() - began < 3
        until(lambda: len(one.seen) == 50, lambda: one.step(40))
        assert one.consumer.paused_partitions == 0


def test_a_read_after_one_that_found_all_there_was_waits_for_company(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings())
    topic = settings.upload_topics[0]
    with member(settings) as one:
        one.join()
        clock = one.consumer._clock = FakeClock()

        def rested(room: int = 256) -> float:
            before = clock.monotonic()
            one.step(room)
            return clock.monotonic() - before

        produce(settings, topic, [b"upload"])
        until(lambda: len(one.seen) == 1, one.step)
        assert rested() == pytest.approx(READ_INTERVAL_S, rel=0.01)
        assert rested() == 0, "it found nothing: an idle worker is there at once"
        produce(settings, topic, values(30))
        until(lambda: len(one.seen) > 1, lambda: one.step(2))
        while len(one.seen) < 29:
            assert rested(2) == 0, "more is there"


def test_a_held_topic_waits_while_the_others_are_read(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings())
    produce(settings, settings.upload_topics[0], [b"upload"])
    produce(settings, settings.retry_topic, [b"retry"])
    with member(settings) as one:
        one.consumer.hold(settings.retry_topic, True)
        until(lambda: one.seen == [b"upload"], one.step)
        for _ in range(10):
            one.step()
        assert one.seen == [b"upload"]
        one.consumer.hold(settings.retry_topic, False)
        until(lambda: one.seen == [b"upload", b"retry"], one.step)


@pytest.mark.slow
def test_members_come_and_go_without_loss_and_without_double_work(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings())
    topic = settings.upload_topics[0]
    total = 4_000
    with member(settings) as first, member(settings) as second:
        first.join()
        writer = threading.Thread(target=produce, args=(settings, topic, values(total)[::2]))
        writer.start()
        with in_background(first, room=80):
            with in_background(second, room=80):
                until(lambda: bool(second.consumer.assignment), lambda: time.sleep(0.05))
                produce(settings, topic, values(total)[1::2])
                until(lambda: len(first.seen) + len(second.seen) >= total, lambda: time.sleep(0.05))
            second.consumer.close(Deadline(5))
            until(lambda: len(first.consumer.assignment) == 6, lambda: time.sleep(0.05))
        writer.join()
        first.consumer.close(Deadline(5))
        assert first.seen  # both had partitions of the uploads
        assert second.seen
        assert sorted(first.seen + second.seen) == values(total)  # none lost, none twice
        assert first.observer.repeated == second.observer.repeated == 0
        assert ("revoked", 3) in first.observer.events
    assert committed(settings, topic) == log_ends(settings, topic)


@pytest.mark.slow
def test_a_revoke_waits_for_records_in_flight(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings())
    produce(settings, settings.upload_topics[0], values(30))
    with member(settings) as first, member(settings) as second:
        until(lambda: len(first.open) == 30, first.step)
        threading.Timer(4.0, first.finish).start()  # the pipeline finishes while the main thread is in the revoke
        with in_background(first, finish=False):
            until(lambda: bool(second.consumer.assignment), second.step)
            for _ in range(20):
                second.step()
        assert second.seen == []
        assert first.observer.repeated == 0


@pytest.mark.slow
def test_a_revoke_waits_no_longer_than_a_fifth_of_the_poll_interval(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings(max_poll_interval_ms=5_000))
    produce(settings, settings.upload_topics[0], values(30))
    with member(settings) as first, member(settings) as second:
        until(lambda: len(first.open) == 30, first.step)
        with in_background(first, finish=False):
            until(lambda: bool(second.consumer.assignment), second.step)
            until(lambda: len(second.seen) == first.observer.repeated > 0, second.step)
        moved = {record.position[:2] for record in second.open}
        results = {record.position: first.ledger.finish(record.position) for record in first.open}
        for position, counted in results.items():
            assert counted is (position[:2] not in moved)  # late results of what was taken away count for nothing


@pytest.mark.slow
def test_what_only_waits_does_not_hold_up_a_revoke(kafka_settings: Settings) -> None:
    settings = prepare(kafka_settings())
    produce(settings, settings.upload_topics[0], values(30))
    with member(settings) as first, member(settings) as second:
        until(lambda: len(first.open) == 30, first.step)
        for record in first.open:
            first.ledger.abandon(record.position)
        with in_background(first, finish=False):
            until(lambda: len(second.seen) > 0, second.step, seconds=20)


@pytest.mark.slow
def test_an_expelled_member_loses_its_tenure_commits_nothing_of_it_and_claims_nothing(
    kafka_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = prepare(kafka_settings(max_poll_interval_ms=2_000))
    topic = settings.upload_topics[0]
    produce(settings, topic, values(12))
    claims: list[tuple[bool, int]] = []
    with member(settings) as one:
        metadata = CooperativeStickyAssignor.metadata

        def claimed(self: Any, topics: Any) -> Any:
            told = metadata(self, topics)
            claims.append((("lost", 6) in one.observer.events, len(told.owned_partitions)))
            return told

        monkeypatch.setattr(CooperativeStickyAssignor, "metadata", claimed)
        until(lambda: len(one.open) == 12, one.step)
        before = tuple(one.open)
        time.sleep(4)  # the main thread hangs: the client leaves the group by itself
        one.finish()
        until(lambda: len(one.seen) == 24, one.step)  # read anew: the first tenure's finished records were not committed
        assert ("lost", 6) in one.observer.events
        assert (True, 0) in claims  # a leader would believe it, and take the partitions from their owner at once
        assert committed(settings, topic) == {}
        assert not any(one.ledger.current(record.position) for record in before)


def test_a_batch_that_cannot_be_read_becomes_one_record_and_the_partition_goes_on(
    kafka_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = prepare(kafka_settings())
    topic = settings.upload_topics[0]

    def send(count: int) -> None:
        with closing(open_producer(settings, linger_ms=200)) as producer:
            for future in [producer.send(topic, b"x" * 1000, partition=0) for _ in range(count)]:
                future.get(10)

    send(2)
    with monkeypatch.context() as patched:
        patched.setattr(default_records, "lz4_encode", lambda _: b"this is not lz4")
        send(3)
    send(1)
    with member(settings) as one:
        until(lambda: len(one.open) == 4, one.step)
        bad = [record for record in one.open if isinstance(record, UnreadableRecord)]
        assert [record.position.offset for record in one.open] == [0, 1, 4, 5]
        assert [record.position.offset for record in bad] == [4]
        assert bad[0].reason.startswith("cannot be read at offsets 2 to 4: ")
        one.finish()
        one.consumer.close(Deadline(5))
    assert committed(settings, topic) == {0: 6}


@pytest.mark.timing
def test_short_polls_do_not_keep_a_member_from_joining(kafka_settings: Settings) -> None:
    """kafka-python 3.0.12 forgets a join that completes between two polls (see `kafka_workarounds`)."""
    settings = prepare(kafka_settings())
    with member(settings) as one:
        began = time.monotonic()
        while not one.consumer.assignment:
            assert time.monotonic() - began < 8
            one.consumer._read(0.0, 1)
            time.sleep(0.3)  # nearly always outside of poll
        assert one.observer.events == [("assigned", 6)]


def test_trouble_that_passes_is_not_an_error(kafka_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(kafka_settings())
    with member(settings) as one:
        one.join()

        def fail(**_: Any) -> None:
            raise consume.kafka_errors.NodeNotReadyError("1")

        monkeypatch.setattr(one.consumer._raw, "poll", fail)
        assert one.consumer.poll(10, 0.1) == []


@pytest.mark.parametrize("error", ["TopicAuthorizationFailedError", "FencedInstanceIdError", "SaslAuthenticationFailedError"])
def test_a_refusal_for_good_ends_the_worker(kafka_settings: Settings, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    settings = prepare(kafka_settings())
    with member(settings) as one:

        def refuse(**_: Any) -> None:
            raise getattr(consume.kafka_errors, error)("no")

        monkeypatch.setattr(one.consumer._raw, "poll", refuse)
        with pytest.raises(DependencyError, match=f"refuses this consumer.*{error}"):
            one.consumer.poll(10, 0.1)


def test_a_failed_commit_is_counted_and_sent_again(kafka_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(kafka_settings())
    topic = settings.upload_topics[0]
    produce(settings, topic, values(5))
    with member(settings) as one:
        until(lambda: len(one.open) == 5, one.step)
        one.finish()
        with monkeypatch.context() as patched:
            failing = Future().failure(consume.kafka_errors.CommitFailedError("rebalanced"))
            patched.setattr(one.consumer._raw, "commit_async", lambda offsets: failing)
            one.consumer.commit()
            one.consumer.commit()
        assert one.observer.commits[:1] == [False]
        assert one.consumer.commit(Deadline(5))
        assert Counter(one.observer.commits)[True] >= 1
    assert committed(settings, topic) == log_ends(settings, topic)

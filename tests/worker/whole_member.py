"""A whole member of the group, without images: reads, makes a verdict of each record, publishes, commits."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import closing
from typing import Any, Literal

from kafka import TopicPartition

from worker.clock import Deadline
from worker.items import Delivery, Record
from worker.kafka_clients import open_consumer
from worker.ledger import Ledger, Partition
from worker.outcomes import Receipts
from worker.settings import KafkaSettings
from worker.stages.consume import Consumer, ConsumerObserver
from worker.stages.publish import Publisher
from worker.stages.publish_records import RecordWriter
from worker.stages.transactions import TransactionalPublisher

ROOM = 200


class WholeMember(ConsumerObserver):
    """Two threads, as a worker has: one reads and commits, one works. Outputs come in random order; every `letters`-th
    record has a dead letter beside its verdict. With `rate`, so many records a second and no more."""

    def __init__(self, settings: KafkaSettings, *, seed: int = 0, letters: int = 10, rate: float = 0.0) -> None:
        self.settings = settings
        self.ledger = Ledger()
        self.done: list[bytes] = []
        self.transactions: Counter[bool] = Counter()
        self.repeated = 0
        self.error: Exception | None = None
        self.publisher = self._open_publisher()
        self.consumer = Consumer(settings, self.ledger, self)
        self.publisher.commit_as(self.consumer.group_metadata)
        self._letters = letters
        self._rate = rate
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._read: list[Record] = []
        self._in_hand = 0
        self._stop = threading.Event()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._reading, daemon=True), threading.Thread(target=self._working, daemon=True)]

    def start(self) -> WholeMember:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """As a drain: everything in hand is finished, then the group is left."""
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        if self.error is not None:
            raise self.error

    def rebalanced(self, kind: Literal["assigned", "revoked", "lost"], partitions: frozenset[Partition], repeated: int) -> None:
        self.repeated += repeated

    def _open_publisher(self) -> RecordWriter:
        if self.settings.delivery == "at_least_once":
            return Publisher(self.settings)
        return TransactionalPublisher(
            self.settings, self.ledger, observer=lambda committed, seconds: self.transactions.update([committed])
        )

    def _reading(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn(max(0, ROOM - self._in_hand))
            deadline = Deadline(90)
            while self._in_hand and not deadline.expired():
                self._turn(0)
        except Exception as error:  # noqa: BLE001 - raised by `stop`, or looked at by the test
            self.error = error
        finally:
            self.publisher.close(Deadline(10))
            self.consumer.close(Deadline(10), commit=self.error is None)
            self._over.set()

    def _turn(self, room: int) -> None:
        self.publisher.check()
        records = self.consumer.poll(room, 0.02)
        with self._lock:
            self._in_hand += len(records)
            self._read += records
        self.consumer.advance_idle()
        self.consumer.commit()

    def _working(self) -> None:
        began, published = time.monotonic(), 0
        while not self._over.is_set():
            with self._lock:
                self._rng.shuffle(self._read)
                count = self._rng.randrange(1 + len(self._read)) if len(self._read) > 3 else len(self._read)
                if self._rate:
                    count = min(count, int((time.monotonic() - began) * self._rate) - published)
                    if not self._read:  # what was not there to be done is not made up for
                        began, published = time.monotonic(), 0
                ready, self._read = self._read[: max(0, count)], self._read[max(0, count) :]
            published += len(ready)
            for record in ready:
                self._publish(record)
            time.sleep(0.002)

    def _publish(self, record: Record) -> None:
        key = record.key or b""
        letter = self._letters and int(key) % self._letters == 0

        def ended() -> None:
            with self._lock:
                self._in_hand -= 1
            self.consumer.wake()

        def done() -> None:
            if self.ledger.finish(record.position):
                self.done.append(key)
            ended()

        if not self.ledger.current(record.position):
            ended()
            return
        receipts = Receipts(2 if letter else 1, done, record.position, ended)
        if letter:
            self.publisher.dead_letter(record, "decode.corrupt", "m", Delivery(), receipts, receipts)
        self.publisher.verdict(b'{"event_id": "e", "attributes": {}}', key.decode(), [], receipts, receipts)


def visible(settings: KafkaSettings, topic: str, *, isolation: str = "read_committed", quiet_s: float = 2.0) -> Counter[bytes]:
    """How often each key stands in the topic, for a reader with this isolation."""
    with closing(open_consumer(settings, group=False, isolation_level=isolation)) as consumer:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        ends: dict[Any, int] = consumer.end_offsets(partitions)
        found: Counter[bytes] = Counter()
        deadline, quiet = Deadline(60), Deadline(quiet_s)
        while not deadline.expired() and (any(consumer.position(tp) < end for tp, end in ends.items()) or not quiet.expired()):
            for records in consumer.poll(timeout_ms=100).values():
                found.update(record.key for record in records)
                quiet = Deadline(quiet_s)
        return found

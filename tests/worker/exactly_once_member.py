"""A whole member of the group for the tests of exactly once: reads, makes a verdict of each record, publishes in transactions."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

from worker.clock import Deadline
from worker.items import Delivery, Record
from worker.kafka_clients import open_consumer
from worker.ledger import Ledger
from worker.outcomes import Receipts
from worker.settings import KafkaSettings
from worker.stages.consume import Consumer
from worker.stages.transactions import TransactionalPublisher

ROOM = 200


class TransactionalMember:
    """Runs in a thread of its own. Outputs come in random order; every `letters`-th record has two of them."""

    def __init__(self, settings: KafkaSettings, *, seed: int = 0, letters: int = 10) -> None:
        self.settings = settings
        self.ledger = Ledger()
        self.done: list[bytes] = []
        self.outcomes: Counter[bool] = Counter()
        self.error: Exception | None = None
        self.publisher = TransactionalPublisher(settings, self.ledger, observer=lambda ok, seconds: self.outcomes.update([ok]))
        self.consumer = Consumer(settings, self.ledger)
        self.publisher.commit_as(self.consumer.group_metadata)
        self._letters = letters
        self._rng = random.Random(seed)
        self._held: list[Record] = []
        self._stop = threading.Event()
        self._frozen = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> TransactionalMember:
        self._thread.start()
        return self

    def stop(self) -> None:
        """As a drain: everything in hand is finished, then the group is left."""
        self._stop.set()
        self._thread.join(90)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def freeze(self, on: bool) -> None:
        """As a stopped process whose heartbeats go on: nothing is read, nothing handed over."""
        (self._frozen.set if on else self._frozen.clear)()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn(max(0, ROOM - self.publisher.undelivered - len(self._held)))
            deadline = Deadline(60)
            while (self.publisher.undelivered or self._held) and not deadline.expired():
                self._turn(0)
        except Exception as error:  # noqa: BLE001 - raised by `stop`, or looked at by the test
            self.error = error
        finally:
            self.publisher.close(Deadline(10))
            self.consumer.close(Deadline(10), commit=self.error is None)

    def _turn(self, room: int) -> None:
        self.publisher.check()
        self._held += self.consumer.poll(room, 0.02)
        if self._frozen.is_set():
            return
        self._rng.shuffle(self._held)
        count = len(self._held) if room == 0 else self._rng.randrange(1 + len(self._held))
        ready, self._held = self._held[:count], self._held[count:]
        for record in ready:
            self._publish(record)
        self.consumer.advance_idle()
        self.consumer.commit()

    def _publish(self, record: Record) -> None:
        key = record.key or b""
        letter = self._letters and int(key) % self._letters == 0

        def done() -> None:
            if self.ledger.finish(record.position):
                self.done.append(key)
            self.consumer.wake()

        receipts = Receipts(2 if letter else 1, done, record.position)
        if letter:
            self.publisher.dead_letter(record, "decode.corrupt", "m", Delivery(), receipts, receipts)
        self.publisher.verdict(b'{"event_id": "e", "attributes": {}}', key.decode(), [], receipts, receipts)


def visible(settings: KafkaSettings, topic: str, *, isolation: str = "read_committed", quiet_s: float = 2.0) -> Counter[bytes]:
    """How often each key stands in the topic, for a reader with this isolation."""
    from contextlib import closing

    from kafka import TopicPartition

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

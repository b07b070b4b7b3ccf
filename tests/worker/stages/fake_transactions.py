"""A broker with transactions as `TransactionalPublisher` sees it, and which fails as a test says."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kafka import errors as kafka_errors
from kafka.coordinator.base import ConsumerGroupMetadata
from kafka.future import Future

from tests.worker.stages.fake_producer import Sent
from worker.kafka_transactions import CommitUnknown, GaveUp
from worker.ledger import Partition

Fault = Callable[["FakeTransactionalProducer"], None]


def group_moved_on(producer: FakeTransactionalProducer) -> None:
    """The offsets are refused: the member's generation is not the group's."""
    raise kafka_errors.CommitFailedError("consumer group metadata mismatch")


def fenced_by_itself(producer: FakeTransactionalProducer) -> None:
    """A static member that was away has joined again, and has another member id than the one the offsets name."""
    raise kafka_errors.FencedInstanceIdError


def fenced(producer: FakeTransactionalProducer) -> None:
    """Another producer has the id, or the transaction was too old."""
    raise kafka_errors.ProducerFencedError


def trouble(producer: FakeTransactionalProducer) -> None:
    """Something that a new producer cures."""
    raise kafka_errors.KafkaError("Unexpected error")


def lost_request(producer: FakeTransactionalProducer) -> None:
    """The commit never reached the broker, and nobody knows."""
    raise CommitUnknown("lost") from kafka_errors.KafkaTimeoutError()


def lost_answer(producer: FakeTransactionalProducer) -> None:
    """The commit took place, and nobody knows."""
    producer.apply()
    raise CommitUnknown("lost") from kafka_errors.KafkaTimeoutError()


def late(producer: FakeTransactionalProducer) -> None:
    """The answer never comes; the owner's closing ends the wait."""
    producer.hang()


class FakeTransactions:
    """What every producer of a test writes to. `faults` are used up one a commit; None: it succeeds."""

    def __init__(self) -> None:
        self.generation = 1
        self.visible: list[Sent] = []
        self.transactions: list[list[Sent]] = []
        self.offsets: dict[Partition, int] = {}
        self.faults: list[Fault | None] = []
        self.refuse: Callable[[Sent], Exception | None] = lambda sent: None
        self.max_request_size = 2**40
        self.opened = 0
        self.reachable = threading.Event()
        self.reachable.set()
        self.lock = threading.RLock()  # held from the look at the generation to the end: offsets that are pending are not read
        self.on_commit: Callable[[], None] = lambda: None

    def open(self, settings: Any, name: str, expired: Callable[[], bool]) -> FakeTransactionalProducer:
        self.opened += 1
        return FakeTransactionalProducer(self, name, expired)

    def committed_offsets(self, settings: Any, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return {partition: self.offsets[partition] for partition in partitions if partition in self.offsets}

    def member(self) -> ConsumerGroupMetadata:
        return ConsumerGroupMetadata(group_id="g", generation_id=self.generation, member_id="m")

    def times(self) -> Counter[bytes | None]:
        """How often each key is visible."""
        return Counter(key for _, key, _, _ in self.visible)


class FakeTransactionalProducer:
    """One transaction at a time; dead, with the error, after any refusal, as kafka-python's."""

    def __init__(self, broker: FakeTransactions, name: str, expired: Callable[[], bool]) -> None:
        self.name = name
        self.last_error: Exception | None = None
        self._broker = broker
        self._expired = expired
        self._sent: list[Sent] = []
        self._offsets: dict[Partition, int] = {}
        self._open = False

    def initialize(self, patience_s: float) -> None:
        while not self._broker.reachable.wait(0.01):
            if self._expired():
                raise GaveUp

    def begin(self) -> None:
        assert not self._open
        self._open, self._sent = True, []

    def send(self, topic: str, value: bytes | None, key: bytes | None, headers: Any, partition: int | None = None) -> Future:
        assert self._open
        if self.last_error is not None:
            raise kafka_errors.KafkaError("at least one previous request has failed")
        if sum(len(part or b"") for part in (key, value)) > self._broker.max_request_size:
            raise kafka_errors.MessageSizeTooLargeError("larger than max_request_size")
        sent = (topic, key, value, list(headers))
        future = Future()
        error = self._broker.refuse(sent)
        if error is None:
            self._sent.append(sent)
            return future.success(None)
        self.last_error = error
        return future.failure(error)

    def partitions_for(self, _topic: str) -> set[int]:
        return {0}

    def settle(self, futures: Iterable[Future], patience_s: float) -> list[Exception | None]:
        """All that were in flight fail with the error of one."""
        return [self.last_error for _ in futures]

    def commit(self, offsets: Mapping[Partition, int], member: ConsumerGroupMetadata, patience_s: float) -> None:
        assert self._open
        self._offsets = dict(offsets)
        self._broker.on_commit()
        with self._broker.lock:
            if member.generation_id != self._broker.generation:
                group_moved_on(self)
            fault = self._broker.faults.pop(0) if self._broker.faults else None
            if fault is not None:
                fault(self)
            self.apply()

    def apply(self) -> None:
        with self._broker.lock:
            assert self._open
            for partition, offset in self._offsets.items():
                assert offset > self._broker.offsets.get(partition, -1), "offsets never go back"
            self._broker.offsets |= self._offsets
            self._broker.visible += self._sent
            self._broker.transactions.append(self._sent)
            self._open = False

    def hang(self) -> None:
        while not self._expired():
            threading.Event().wait(0.01)
        raise CommitUnknown("closing") from GaveUp()

    def abort(self, patience_s: float, *, heed: bool = True) -> None:
        assert self.last_error is None
        self._open = False

    def discard(self, seconds: float = 0) -> None:
        self._open = False

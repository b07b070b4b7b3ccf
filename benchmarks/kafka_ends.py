"""What stands at both ends of a measured consumer: uploads go in, verdicts come out, by librdkafka.

Whoever measures must not be what is measured. A producer and a reader written in Python take half a core at a few hundred uploads
a second, and on a busy machine it is their queue that grows: librdkafka takes a third of that, in threads of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition

CLIENT_BATCH_BYTES = 16_384
"""What kafka-python's producer puts into one record batch where nobody says otherwise: images come alone then."""
WAIT_S = 60.0
_QUIET = {"log_level": 2}  # a broker that ends is no news here: every measurement ends its own


class Uploads:
    """Writes uploads, as an upload service would."""

    def __init__(self, bootstrap: str, linger_ms: int = 1, batch_bytes: int = CLIENT_BATCH_BYTES, **options: Any) -> None:
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "linger.ms": linger_ms,
                "batch.size": batch_bytes,
                "message.max.bytes": 32_000_000,
                "queue.buffering.max.kbytes": 200_000,
                **_QUIET,
                **options,
            }
        )

    def partitions(self, topic: str) -> int:
        """How many the topic has."""
        return len(self._producer.list_topics(topic, WAIT_S).topics[topic].partitions)

    def send(self, topic: str, value: bytes, headers: Iterable[tuple[str, bytes]], partition: int = -1) -> None:
        """On its way; waits where the queue is full."""
        given = list(headers)
        while True:
            try:
                self._producer.produce(topic, value, headers=given, partition=partition)
            except BufferError:
                self._producer.poll(0.01)
            else:
                self._producer.poll(0)
                return

    def flush(self) -> None:
        """Until the broker has them all.

        Raises:
            SystemExit: it has not taken them within a minute.
        """
        if left := self._producer.flush(WAIT_S):
            raise SystemExit(f"the broker did not take {left} uploads within {WAIT_S:.0f} s")


class Verdicts:
    """Reads all of a topic from its beginning, in no group."""

    def __init__(self, bootstrap: str, topic: str, **options: Any) -> None:
        self._consumer = _consumer(bootstrap, "reads-without-a-group", options)
        self._consumer.assign(_partitions(self._consumer, topic, OFFSET_BEGINNING))

    def read(self, wait_s: float, at_most: int = 1000) -> list[bytes]:
        """What is there, or the first that comes within `wait_s`.

        Raises:
            SystemExit: the broker's refusal, in its words.
        """
        found = self._consumer.consume(at_most, 0) or self._consumer.consume(1, wait_s)
        for record in found:
            if record.error() is not None:
                raise SystemExit(f"the verdicts cannot be read: {record.error()}")
        return [record.value() or b"" for record in found]

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()


class Committed:
    """How far a group has committed a topic."""

    def __init__(self, bootstrap: str, group: str, topic: str) -> None:
        self._consumer = _consumer(bootstrap, group, {})
        self._partitions = _partitions(self._consumer, topic, 0)

    def total(self) -> int:
        """The offsets of all partitions together; 0 where the broker does not say just now."""
        try:
            return sum(max(0, found.offset) for found in self._consumer.committed(self._partitions, 10))
        except KafkaException:
            return 0

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()


def _consumer(bootstrap: str, group: str, options: dict[str, Any]) -> Consumer:
    return Consumer({"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False, **_QUIET, **options})


def _partitions(consumer: Consumer, topic: str, offset: int) -> list[TopicPartition]:
    numbers = consumer.list_topics(topic, WAIT_S).topics[topic].partitions
    return [TopicPartition(topic, number, offset) for number in numbers]

"""Reads a topic without a group: to its present end, or on from there. For commands and tests, not for the worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from worker.clock import Deadline
from worker.errors import DependencyError
from worker.kafka_clients import describe, open_consumer
from worker.settings import KafkaSettings

if TYPE_CHECKING:
    from kafka import KafkaConsumer

POLL_MS = 200
QUIET_S = 5.0
"""Nothing for so long before the end: an open transaction holds the rest back."""


@contextlib.contextmanager
def _reading(settings: KafkaSettings, topic: str) -> Iterator[tuple[KafkaConsumer, list[Any]]]:
    """A consumer with all partitions of the topic. Raises DependencyError for a topic that does not exist."""
    from kafka import TopicPartition
    from kafka.errors import KafkaError

    with contextlib.closing(open_consumer(settings, group=False)) as consumer:
        try:
            partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]
            if not partitions:
                raise DependencyError(f"Kafka topic {topic} does not exist, or this user may not read it")
            consumer.assign(partitions)
            yield consumer, partitions
        except KafkaError as error:
            raise DependencyError(f"Kafka topic {topic}: {describe(error)}") from error


def read_to_end(settings: KafkaSettings, topic: str, since: float | None = None, quiet_s: float = QUIET_S) -> Iterator[Any]:
    """Every record (kafka-python's ConsumerRecord) up to where the log ends now; `since`: from this time on (POSIX seconds)."""
    with _reading(settings, topic) as (consumer, partitions):
        consumer.seek_to_beginning()
        if since is not None:
            for tp, found in consumer.offsets_for_times(dict.fromkeys(partitions, int(since * 1000))).items():
                if found is not None:
                    consumer.seek(tp, found.offset)
        ends: dict[Any, int] = {}
        quiet = Deadline(quiet_s)
        while not quiet.expired():
            for records in consumer.poll(timeout_ms=POLL_MS).values():
                yield from records
                quiet = Deadline(quiet_s)
            # From the fetch answers: asked for its ends, the embedded broker tells the beginning of the last batch.
            for tp in partitions:
                if tp not in ends and (end := consumer.highwater(tp)) is not None:
                    ends[tp] = end
            if len(ends) == len(partitions) and all(_position(consumer, tp) >= end for tp, end in ends.items()):
                return


def follow(settings: KafkaSettings, topic: str, from_beginning: bool) -> Iterator[Any]:
    """Every record from now on, or from the beginning, for ever; None whenever there is none for a moment."""
    with _reading(settings, topic) as (consumer, partitions):
        if from_beginning:
            consumer.seek_to_beginning()
        else:
            consumer.seek_to_end()
        ends: dict[Any, int] = dict.fromkeys(partitions, 0) if from_beginning else {}
        while True:
            answer = consumer.poll(timeout_ms=POLL_MS)
            for tp in partitions:
                if tp not in ends and (end := consumer.highwater(tp)) is not None:
                    ends[tp] = end
            for tp, records in answer.items():
                yield from (record for record in records if record.offset >= ends.get(tp, 0))
            yield None


def _position(consumer: KafkaConsumer, partition: Any) -> int:
    position = consumer.position(partition, timeout_ms=1_000)
    return -1 if position is None else int(position)

"""What the tests of the Kafka stages share: topics with records in them, and what stands in a topic or a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from kafka import TopicPartition

from worker.clock import Deadline
from worker.kafka_clients import ensure_topics, open_admin, open_consumer, open_producer
from worker.settings import KafkaSettings


def prepare(settings: KafkaSettings) -> KafkaSettings:
    """Create the settings' topics."""
    ensure_topics(settings, Deadline(30), create=True)
    return settings


def produce(settings: KafkaSettings, topic: str, values: Iterable[bytes], **producer_overrides: Any) -> None:
    """Write the values, spread over the partitions by their keys, which are the values' first 8 bytes."""
    producer = open_producer(settings, **producer_overrides)
    futures = [producer.send(topic, value, key=value[:8]) for value in values]
    for future in futures:
        future.get(30)
    producer.close()


def read_all(settings: KafkaSettings, topic: str, quiet_s: float = 0.4) -> list[Any]:
    """Every record of the topic, by partition and offset; the end is where nothing comes for a while."""
    with closing(open_consumer(settings, group=False)) as consumer:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        found: list[Any] = []
        quiet = Deadline(quiet_s)
        while not quiet.expired():
            for records in consumer.poll(timeout_ms=100).values():
                found += records
                quiet = Deadline(quiet_s)
        return sorted(found, key=lambda record: (record.partition, record.offset))


def committed(settings: KafkaSettings, topic: str) -> dict[int, int]:
    """The group's committed offset of each partition that has one."""
    with closing(open_admin(settings)) as admin:
        offsets = admin.list_group_offsets([settings.group_id])[settings.group_id]
        return {tp.partition: offset.offset for tp, offset in offsets.items() if tp.topic == topic and offset.offset > 0}


def log_ends(settings: KafkaSettings, topic: str) -> dict[int, int]:
    """The offset after the last record of each partition that has one.

    By reading: asked for its ends, the embedded broker answers with the beginning of the last batch.
    """
    return {record.partition: record.offset + 1 for record in read_all(settings, topic)}


def until(done: Callable[[], bool], step: Callable[[], object], seconds: float = 30.0) -> None:
    """Call `step` until `done`; an assertion fails when it takes longer than `seconds`."""
    deadline = Deadline(seconds)
    while not done():
        assert not deadline.expired(), "not done in time"
        step()

"""The ends of a measured consumer on a real broker: what went in comes out once and in order; commits of a group are counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest

from benchmarks.kafka_ends import Committed, Uploads, Verdicts
from worker.clock import Deadline
from worker.kafka_clients import ensure_topics, open_consumer
from worker.settings import KafkaSettings

pytestmark = pytest.mark.broker


def test_what_goes_in_comes_out_in_order_and_its_commits_are_counted(kafka_settings: Callable[..., KafkaSettings]) -> None:
    settings = kafka_settings(create_topics=True)
    topic, bootstrap = settings.upload_topics[0], settings.bootstrap_servers[0]
    ensure_topics(settings, Deadline(30))
    uploads = Uploads(bootstrap, linger_ms=5)
    assert uploads.partitions(topic) >= 1
    for number in range(200):
        uploads.send(topic, b"%03d" % number, [("event_id", b"%d" % number)], partition=0)
    uploads.flush()

    with closing(Verdicts(bootstrap, topic)) as verdicts:
        found: list[bytes] = []
        while len(found) < 200:
            found += verdicts.read(5.0, at_most=64)
        assert found == [b"%03d" % number for number in range(200)]
        assert verdicts.read(0.2) == []  # none of them twice

    with closing(Committed(bootstrap, settings.group_id, topic)) as committed:
        assert committed.total() == 0
        from kafka import OffsetAndMetadata, TopicPartition

        with closing(open_consumer(settings, group_id=settings.group_id)) as consumer:
            consumer.assign([TopicPartition(topic, 0)])
            consumer.commit({TopicPartition(topic, 0): OffsetAndMetadata(120, "", -1)})
        assert committed.total() == 120


def test_a_topic_without_a_broker_is_refused_in_time() -> None:
    from confluent_kafka import KafkaException

    from benchmarks import kafka_ends
    from worker.embedded import free_port

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kafka_ends, "WAIT_S", 1.0)
        with pytest.raises(KafkaException):
            Uploads(f"127.0.0.1:{free_port()}").partitions("nothing")

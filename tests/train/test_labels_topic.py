"""The label topic and single uploads on a real broker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train import refreshed
from tests.worker.kafka_topics import produce
from train import labels_sample
from train.labels import Upload
from train.labels_topic import KafkaOptions, TopicError, UploadReader, read_labels
from worker.clock import Deadline
from worker.kafka_clients import ensure_topics, open_producer
from worker.settings import KafkaSettings

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]


@pytest.fixture
def options(kafka_settings: Callable[..., KafkaSettings]) -> tuple[KafkaSettings, KafkaOptions]:
    settings = kafka_settings()
    ensure_topics(settings, Deadline(60), topics=[settings.label_topic, *settings.upload_topics], create=True)
    return settings, KafkaOptions(settings.bootstrap_servers, settings.label_topic, settings.upload_topics)


def test_what_is_published_is_read_to_the_end_and_noise_is_counted(
    options: tuple[KafkaSettings, KafkaOptions], tmp_path: Path
) -> None:
    settings, kafka = options
    assert read_labels(kafka)[0] == [], "an empty topic has an end too"
    file = refreshed.decisions(tmp_path, fakes=4, reals=2)
    assert labels_sample.publish(file, kafka) == 6
    produce(settings, settings.label_topic, [b"no label", b"\xff\x00" * 50])
    labels, tally = read_labels(kafka)
    assert sorted(label.label for label in labels) == [0, 0, 1, 1, 1, 1]
    assert tally.records == 8 and tally.skipped == {"not JSON": 2}
    assert all(settings.label_topic in name for name in tally.examples["not JSON"])


def test_single_uploads_and_the_ones_that_are_not_there(options: tuple[KafkaSettings, KafkaOptions]) -> None:
    settings, kafka = options
    (topic,) = settings.upload_topics
    producer = open_producer(settings)
    values = [b"%d upload" % number for number in range(4)]
    sent = [producer.send(topic, value, headers=[("Content-Type", b"image/png")]).get(60) for value in values]
    producer.close()
    reader = UploadReader(kafka)
    try:
        for value, found in reversed(list(zip(values, sent, strict=True))):
            read, headers = reader.read(Upload(topic, found.partition, found.offset))
            assert read == value and headers["content-type"] == b"image/png"
        for gone in (Upload(topic, 99, 0), Upload("someone.elses", 0, 0)):
            with pytest.raises(LookupError):
                reader.read(gone)
    finally:
        reader.close()


def test_a_topic_that_does_not_exist_is_named(options: tuple[KafkaSettings, KafkaOptions]) -> None:
    settings, _ = options
    with pytest.raises(TopicError, match=r"no\.such\.topic"):
        read_labels(KafkaOptions(settings.bootstrap_servers, "no.such.topic"))

"""Options for kafka-python from the settings, topics at start, and one clear line for what goes wrong."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from tests.worker.kafka_topics import prepare, produce, read_all
from worker import kafka_clients
from worker.clock import Deadline
from worker.embedded import EmbeddedBroker, free_port
from worker.errors import ConfigurationError, DependencyError
from worker.settings import KafkaSettings

SECURE = {
    "security_protocol": "SASL_SSL",
    "sasl_mechanism": "SCRAM-SHA-512",
    "sasl_username": "worker",
    "sasl_password": "geheim",
}


def known(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options, all of which this version of kafka-python knows."""
    assert set(options) <= set(kind.DEFAULT_CONFIG), set(options) - set(kind.DEFAULT_CONFIG)  # type: ignore[attr-defined]
    return options


@pytest.mark.parametrize("secure", [True, False])
def test_every_option_is_known_to_the_client(secure: bool, tmp_path: Path) -> None:
    files = {"ssl_cafile": tmp_path / "ca", "ssl_certfile": tmp_path / "cert", "ssl_keyfile": tmp_path / "key"}
    settings = KafkaSettings(**(SECURE | files if secure else {}))  # type: ignore[arg-type]
    consumer = known(KafkaConsumer, kafka_clients.consumer_options(settings))
    producer = known(KafkaProducer, kafka_clients.producer_options(settings))
    known(KafkaAdminClient, kafka_clients.connection_options(settings))
    for options in (consumer, producer):
        assert options.get("sasl_plain_password") == ("geheim" if secure else None)
        assert options.get("ssl_cafile") == (str(tmp_path / "ca") if secure else None)
    assert consumer["enable_auto_commit"] is False
    assert (producer["acks"], producer["enable_idempotence"]) == ("all", True)


def test_a_watcher_joins_no_group() -> None:
    assert "group_id" not in kafka_clients.consumer_options(KafkaSettings(), group=False)


def test_sizes_are_consistent() -> None:
    for record in (2**16, 2**20, 32 * 2**20, 100 * 2**20):
        for budget in (2**20, 256 * 2**20):
            settings = KafkaSettings(max_record_bytes=record, max_in_flight_bytes=budget)
            consumer = kafka_clients.consumer_options(settings)
            producer = kafka_clients.producer_options(settings)
            assert producer["max_request_size"] > record
            assert consumer["fetch_max_bytes"] <= max(budget, consumer["max_partition_fetch_bytes"])
            assert consumer["receive_message_max_bytes"] > max(record, consumer["fetch_max_bytes"])


def test_a_heartbeat_fits_into_the_shortest_session() -> None:
    assert kafka_clients.consumer_options(KafkaSettings(session_timeout_ms=1_000))["heartbeat_interval_ms"] <= 333


@pytest.mark.broker
def test_missing_topics_are_each_named(kafka_settings: Callable[..., KafkaSettings]) -> None:
    settings = kafka_settings(create_topics=False)
    with pytest.raises(DependencyError) as error:
        kafka_clients.ensure_topics(settings, Deadline(0.5))
    for topic in (*settings.upload_topics, settings.verdict_topic, settings.retry_topic, settings.dead_letter_topic):
        assert topic in str(error.value)
    assert "WORKER_KAFKA__CREATE_TOPICS" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.broker
def test_missing_topics_are_created_and_existing_ones_left_alone(kafka_settings: Callable[..., KafkaSettings]) -> None:
    settings = kafka_settings()
    with closing(kafka_clients.open_admin(settings)) as admin:
        admin.create_topics({settings.upload_topics[0]: {"num_partitions": 7, "replication_factor": 1}})
    kafka_clients.ensure_topics(settings, Deadline(20))
    kafka_clients.ensure_topics(settings, Deadline(20))
    with closing(kafka_clients.open_admin(settings)) as admin:
        found = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics([settings.upload_topics[0]])}
    assert found == {settings.upload_topics[0]: 7}


@pytest.mark.broker
def test_a_topic_that_appears_in_time_is_enough(kafka_settings: Callable[..., KafkaSettings]) -> None:
    settings = kafka_settings(create_topics=False)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        kafka_clients.ensure_topics(settings, Deadline(20), create=True)

    kafka_clients.ensure_topics(settings, Deadline(20), sleep=nap)
    assert len(naps) == 1


@pytest.mark.broker
@pytest.mark.parametrize("size", [3 * 2**20, 20 * 2**20])
def test_records_larger_than_a_fetch_come_whole(kafka_settings: Callable[..., KafkaSettings], size: int) -> None:
    settings = prepare(kafka_settings(max_in_flight_bytes=2**20))
    value = size.to_bytes(8, "big") + b"\xa5" * size
    produce(settings, settings.upload_topics[0], [value, b"small"])
    assert sorted(len(record.value) for record in read_all(settings, settings.upload_topics[0])) == [5, size + 8]


def test_nobody_listens() -> None:
    settings = KafkaSettings(bootstrap_servers=(f"127.0.0.1:{free_port()}",), startup_timeout_s=0.5)
    with pytest.raises(
        DependencyError, match=r"not usable: nothing listens there: check WORKER_KAFKA__BOOTSTRAP_SERVERS"
    ) as error:
        kafka_clients.ensure_topics(settings, Deadline(0.5))
    assert "\n" not in str(error.value)


def test_a_name_that_does_not_resolve() -> None:
    settings = KafkaSettings(bootstrap_servers=("broker.invalid:9092",), startup_timeout_s=0.5)
    with pytest.raises(DependencyError, match="the host name cannot be resolved"):
        kafka_clients.open_producer(settings)


@pytest.mark.broker
def test_tls_where_none_is_spoken(broker: EmbeddedBroker) -> None:
    settings = KafkaSettings(bootstrap_servers=(broker.bootstrap,), startup_timeout_s=1.0, security_protocol="SSL")
    with pytest.raises(DependencyError, match="WORKER_KAFKA__SECURITY_PROTOCOL"):
        kafka_clients.open_consumer(settings)


def test_somebody_else_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        settings = KafkaSettings(bootstrap_servers=(f"127.0.0.1:{stranger.getsockname()[1]}",), startup_timeout_s=0.5)
        with pytest.raises(DependencyError, match=r"no broker answered in time|connections are closed"):
            kafka_clients.open_producer(settings)


def test_unreadable_files_are_named_with_their_settings(tmp_path: Path) -> None:
    settings = KafkaSettings(security_protocol="SSL", ssl_cafile=tmp_path / "ca.pem", ssl_keyfile=tmp_path / "key.pem")
    with pytest.raises(ConfigurationError) as error:
        kafka_clients.open_admin(settings)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "WORKER_KAFKA__SSL_CAFILE",
        "WORKER_KAFKA__SSL_KEYFILE",
    ]


def test_a_malformed_address_is_a_matter_of_configuration() -> None:
    with pytest.raises(ConfigurationError, match="WORKER_KAFKA"):
        kafka_clients.open_producer(KafkaSettings(bootstrap_servers=("a:b:c",)))


def test_no_secret_in_any_error_or_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = KafkaSettings(bootstrap_servers=(f"127.0.0.1:{free_port()}",), startup_timeout_s=0.3, **SECURE)  # type: ignore[arg-type]
    with pytest.raises(DependencyError) as error:
        kafka_clients.open_consumer(settings)
    assert caplog.records
    assert "geheim" not in str(error.value) + repr(error.value.__cause__) + caplog.text

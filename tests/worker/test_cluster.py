"""On Apache Kafka itself: what the embedded broker cannot show. Skipped where there is none (`cluster_script`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from tests.conftest import KafkaCluster, unique_settings
from tests.worker.kafka_topics import committed, prepare, produce, read_all, until
from tests.worker.stages.test_consume import Member, in_background, member, values
from tests.worker.stages.test_publish import Receipts, upload
from worker import envelopes
from worker.clock import Deadline
from worker.errors import DependencyError
from worker.items import Delivery
from worker.kafka_clients import open_admin, open_consumer, open_producer
from worker.settings import KafkaSettings
from worker.stages import consume
from worker.stages.publish import Publisher

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300, func_only=True)]


def settings_for(cluster: KafkaCluster, **overrides: object) -> KafkaSettings:
    values = {"bootstrap_servers": tuple(cluster.run("env").split(",")), "session_timeout_ms": 6_000} | overrides
    return unique_settings("", **values)


def secure_settings(cluster: KafkaCluster, **overrides: object) -> KafkaSettings:
    values: dict[str, object] = {
        "bootstrap_servers": (cluster.run("env", "--secure"),),
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_username": "worker",
        "sasl_password": "worker-secret",
        "ssl_cafile": cluster.folder / "ca.pem",
        "session_timeout_ms": 6_000,
    }
    return unique_settings("", **(values | overrides))


def ends(settings: KafkaSettings, topic: str) -> dict[int, int]:
    with closing(open_consumer(settings, group=False)) as consumer:
        partitions = consumer.partitions_for_topic(topic)
        found = consumer.end_offsets([consume.TopicPartition(topic, number) for number in partitions])
        return {tp.partition: end for tp, end in found.items() if end}


def leader_of(settings: KafkaSettings, topic: str, partition: int = 0) -> int:
    with closing(open_admin(settings)) as admin:
        described = admin.describe_topics([topic])[0]
        return int(next(one["leader_id"] for one in described["partitions"] if one["partition_index"] == partition))


@pytest.mark.soak  # tests/chaos kills leaders under whole workers in `make test`
def test_leaders_die_while_events_become_verdicts(three: KafkaCluster) -> None:
    """Read, publish, commit through the death of one broker after another: each event its verdict, offsets at the end."""
    settings = prepare(settings_for(three))
    topic, total = settings.upload_topics[0], 6_000
    produce(settings, topic, values(total))
    publisher = Publisher(settings)
    with member(settings) as one:
        lock = threading.Lock()
        done: list[bytes] = []

        def turn() -> None:
            for record in one.consumer.poll(max(0, 256 - publisher.undelivered), 0.05):
                key = record.key or b""

                def receipt(record: consume.Record = record, key: bytes = key) -> None:
                    with lock:
                        if one.ledger.finish(record.position):
                            done.append(key)
                    one.consumer.wake()

                publisher.verdict(b"{}" * 50, key.decode(), [], receipt)
                time.sleep(0.0005)
            one.consumer.commit()
            publisher.check()

        deadline = Deadline(150)
        for number, node in enumerate((1, 2), start=1):
            until(lambda share=number: len(done) > total * share // 4, turn, deadline.remaining())  # type: ignore[misc]
            three.run("kill", str(node))
            until(lambda share=number: len(done) > total * (share + 0.7) // 4, turn, deadline.remaining())  # type: ignore[misc]
            three.run("restart", str(node))
        until(lambda: len(set(done)) >= total and not publisher.undelivered, turn, deadline.remaining())
        assert one.consumer.commit(Deadline(30))
        assert sorted(set(done)) == values(total)
        one.consumer.close(Deadline(10))
    assert publisher.close(Deadline(10))
    assert committed(settings, topic) == ends(settings, topic)
    published = [record.key for record in read_all(settings, settings.verdict_topic, quiet_s=2.0)]
    assert set(published) == set(values(total))  # none lost
    assert len(published) == len(done)  # and the idempotent producer doubled none


@pytest.mark.soak  # tests/chaos kills brokers, coordinators among them, under whole workers in `make test`
def test_the_groups_coordinator_dies_between_commits(three: KafkaCluster) -> None:
    settings = prepare(settings_for(three))
    topic = settings.upload_topics[0]
    produce(settings, topic, values(400))
    with member(settings) as one:
        until(lambda: len(one.seen) == 400, one.step)
        one.finish(200)
        assert one.consumer.commit(Deadline(20))
        coordinator = int(str(one.consumer._raw._coordinator.coordinator_id).removeprefix("coordinator-"))
        three.run("kill", str(coordinator))
        try:
            one.finish()
            assert one.consumer.commit(Deadline(60))
            assert committed(settings, topic) == ends(settings, topic)
        finally:
            three.run("restart", str(coordinator))
        one.consumer.close(Deadline(20))


def test_a_broker_without_enough_replicas_stops_the_flow_and_loses_nothing(three: KafkaCluster) -> None:
    settings = prepare(settings_for(three))
    receipts = Receipts()
    publisher = Publisher(settings)
    publisher.verdict(b"{}", "before", [], receipts.of("before"))
    assert publisher.flush(Deadline(20))
    for node in ("1", "2"):
        three.run("pause", node)
    try:
        for number in range(50):
            publisher.verdict(b"{}", str(number), [], receipts.of(str(number)))
        assert not publisher.flush(Deadline(8))
        publisher.check()
        assert publisher.seconds_without_receipt() > 5
    finally:
        for node in ("1", "2"):
            three.run("resume", node)
    assert publisher.flush(Deadline(90))
    assert publisher.close(Deadline(5))
    keys = [record.key.decode() for record in read_all(settings, settings.verdict_topic, quiet_s=2.0)]
    assert sorted(keys) == sorted(["before", *map(str, range(50))])


def test_a_dead_letter_too_large_for_its_topic_goes_without_its_value(three: KafkaCluster) -> None:
    """The client's idempotent producer dies of this refusal, and everything in flight with it."""
    settings = prepare(settings_for(three, compression="none"))
    with closing(open_admin(settings)) as admin:
        limit = ConfigResource(ConfigResourceType.TOPIC, settings.dead_letter_topic, {"max.message.bytes": "100000"})
        admin.alter_configs([limit])
    receipts = Receipts()
    publisher = Publisher(settings)
    for number in range(300):
        if number % 100 == 50:
            record = upload(b"x" * 400_000, str(number).encode())
            publisher.dead_letter(record, "decode.corrupt", "m", Delivery(), receipts.of(str(number)))
        else:
            publisher.verdict(b"{}" * 200, str(number), [], receipts.of(str(number)))
    assert publisher.flush(Deadline(60))
    publisher.check()
    assert sorted(receipts.names, key=int) == [str(number) for number in range(300)]
    assert publisher.close(Deadline(5))
    letters = [
        envelopes.open_dead(raw.key, raw.value, tuple(raw.headers)) for raw in read_all(settings, settings.dead_letter_topic)
    ]
    assert [letter.omitted for letter in letters if letter] == [{"value": 400_000}] * 3
    assert {record.key.decode() for record in read_all(settings, settings.verdict_topic)} == {
        str(number) for number in range(300) if number % 100 != 50
    }


def test_records_of_twenty_megabytes_pass(three: KafkaCluster) -> None:
    settings = prepare(settings_for(three))
    image = bytes(range(256)) * (20 * 2**20 // 256)
    produce(settings, settings.upload_topics[0], [b"%08d" % number + image for number in range(3)])
    receipts = Receipts()
    publisher = Publisher(settings)
    with member(settings) as one:
        until(lambda: len(one.open) == 3, one.step)
        for record in one.open:
            publisher.dead_letter(record, "decode.corrupt", "m", Delivery(), receipts.of("e"))
        assert publisher.flush(Deadline(60))
    publisher.close(Deadline(5))
    letters = read_all(settings, settings.dead_letter_topic, quiet_s=2.0)
    assert sorted(len(letter.value) for letter in letters) == [len(image) + 8] * 3


def test_what_a_transaction_took_back_is_not_read_and_lag_reaches_zero(
    three: KafkaCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consume, "IDLE_ADVANCE_S", 0.0)
    settings = prepare(settings_for(three))
    topic = settings.upload_topics[0]
    producer = open_producer(settings, transactional_id=f"tx-{topic}")
    producer.init_transactions()
    for number, outcome in enumerate((producer.commit_transaction, producer.abort_transaction, producer.commit_transaction)):
        producer.begin_transaction()
        producer.send(topic, b"%d" % number, partition=0)
        producer.flush()
        outcome()
    producer.close()
    with member(settings) as one:
        until(lambda: len(one.seen) == 2, one.step)
        one.finish()
        until(
            lambda: committed(settings, topic) == ends(settings, topic),
            lambda: (one.step(), one.consumer.advance_idle(), one.consumer.commit(Deadline(5))),
        )
        assert one.seen == [b"0", b"2"]
        assert not any(one.consumer.lag().values())
        one.consumer.close(Deadline(5))


def test_members_come_and_go_every_few_seconds(three: KafkaCluster) -> None:
    settings = prepare(settings_for(three))
    topic, total = settings.upload_topics[0], 20_000
    with member(settings) as first:
        first.join()
        writer = threading.Thread(target=produce, args=(settings, topic, values(total)))
        writer.start()
        others: list[Member] = []
        with in_background(first, room=100):
            for _ in range(3):
                with member(settings) as other:
                    others.append(other)
                    with in_background(other, room=100):
                        time.sleep(3)
                    other.consumer.close(Deadline(10))
                time.sleep(1)
            writer.join()
            seen = [first.seen, *(other.seen for other in others)]
            until(lambda: sum(map(len, seen)) >= total, lambda: time.sleep(0.1), seconds=60)
        first.consumer.close(Deadline(10))
    assert sorted(value for part in seen for value in part) == values(total)  # none lost, none twice
    assert all(one.observer.repeated == 0 for one in (first, *others))
    assert committed(settings, topic) == ends(settings, topic)


def test_a_static_member_replaced_by_another_of_its_name_ends(three: KafkaCluster) -> None:
    settings = prepare(settings_for(three, group_instance_id="pod-0"))
    produce(settings, settings.upload_topics[0], values(10))
    with member(settings) as first, member(settings) as second:
        until(lambda: len(first.open) == 10, first.step)
        second.join()
        first.finish()

        def go_on() -> None:
            first.step()
            first.consumer.commit()

        with pytest.raises(DependencyError, match=r"refuses this consumer.*FencedInstanceId"):
            until(lambda: False, go_on, seconds=30)
    assert committed(settings, settings.upload_topics[0]) == {}


def test_tls_and_scram(secure: KafkaCluster) -> None:
    settings = prepare(secure_settings(secure))
    produce(settings, settings.upload_topics[0], values(20))
    with member(settings) as one:
        until(lambda: len(one.open) == 20, one.step)
        one.finish()
        one.consumer.close(Deadline(10))
    assert sum(committed(settings, settings.upload_topics[0]).values()) == 20


PASSWORD = ({"sasl_password": "falsch"}, "SASL_PASSWORD|wrong user, password")


@pytest.mark.parametrize(
    ("client", "wrong", "advice"),
    [
        (open_producer, *PASSWORD),
        (open_admin, *PASSWORD),
        (open_consumer, *PASSWORD),
        (open_consumer, {"sasl_username": "nobody"}, "SASL_USERNAME|wrong user, password"),
        (open_consumer, {"sasl_mechanism": "PLAIN"}, "SASL_MECHANISM|SASL mechanism"),
        (open_consumer, {"ssl_cafile": None}, "WORKER_KAFKA__SSL_CAFILE"),
        (open_consumer, {"security_protocol": "PLAINTEXT"}, "WORKER_KAFKA__SECURITY_PROTOCOL"),
    ],
)
def test_a_wrong_login_is_told_in_one_line(
    secure: KafkaCluster, client: Callable[[KafkaSettings], object], wrong: dict[str, object], advice: str
) -> None:
    settings = secure_settings(secure, startup_timeout_s=2.0, **wrong)
    with pytest.raises(DependencyError, match=advice) as error:
        client(settings)
    assert "\n" not in str(error.value)
    assert "falsch" not in str(error.value)
    assert "worker-secret" not in str(error.value)


def test_the_secure_listener_checks_the_host_name(secure: KafkaCluster, tmp_path: Path) -> None:
    port = secure.run("env", "--secure").rpartition(":")[2]
    settings = secure_settings(secure, bootstrap_servers=(f"127.0.0.1:{port}",))
    open_producer(settings).close()  # the certificate names localhost and 127.0.0.1
    other = secure_settings(secure, bootstrap_servers=(f"127.0.0.2:{port}",), startup_timeout_s=2.0)
    with pytest.raises(DependencyError):
        open_producer(other)


@pytest.mark.soak  # and `make chaos SCENARIO=outage` on whole workers
def test_the_only_broker_dies_and_comes_back(secure: KafkaCluster) -> None:
    """Nobody restarts the worker: what was in flight is sent when the broker is back, nothing is lost or doubled."""
    settings = prepare(settings_for(secure, request_timeout_ms=5_000))
    topic, total = settings.upload_topics[0], 3_000
    produce(settings, topic, values(total))
    publisher = Publisher(settings)
    done: list[bytes] = []
    with member(settings) as one:

        def turn() -> None:
            for record in one.consumer.poll(max(0, 200 - publisher.undelivered), 0.05):

                def receipt(record: consume.Record = record) -> None:
                    if one.ledger.finish(record.position):
                        done.append(record.key or b"")
                    one.consumer.wake()

                publisher.verdict(b"{}" * 50, (record.key or b"").decode(), [], receipt)
                time.sleep(0.0005)
            one.consumer.commit()
            publisher.check()

        until(lambda: len(done) > total // 3, turn, 60)
        secure.run("kill", "1")
        away = Deadline(6)
        until(away.expired, turn, 60)
        assert len(done) < total
        secure.run("restart", "1")
        until(lambda: len(set(done)) == total and not publisher.undelivered, turn, 120)
        until(lambda: one.consumer.commit(Deadline(5)), turn, 60)
        one.consumer.close(Deadline(10))
    assert publisher.close(Deadline(10))
    assert committed(settings, topic) == ends(settings, topic)
    published = [record.key for record in read_all(settings, settings.verdict_topic, quiet_s=2.0)]
    assert set(published) == set(values(total))
    assert len(published) == len(done)

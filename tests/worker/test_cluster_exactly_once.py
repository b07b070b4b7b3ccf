"""Exactly once on Apache Kafka: each verdict visible once to a reader of committed records, whatever dies."""

from __future__ import annotations

import time
from contextlib import closing

import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from tests.conftest import KafkaCluster, unique_settings
from tests.worker.kafka_topics import committed, prepare, produce, until
from tests.worker.stages.test_consume import values
from tests.worker.test_cluster import secure_settings
from tests.worker.whole_member import WholeMember, visible
from worker.clock import Deadline
from worker.errors import ConfigurationError, DependencyError
from worker.items import Delivery, Position, Record
from worker.kafka_clients import open_admin
from worker.kafka_transactions import TransactionalProducer, transactional_id
from worker.ledger import Ledger
from worker.outcomes import Receipts
from worker.settings import KafkaSettings
from worker.stages.transactions import TransactionalPublisher

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(450, func_only=True)]


def settings_for(cluster: KafkaCluster, **overrides: object) -> KafkaSettings:
    chosen = {
        "bootstrap_servers": tuple(cluster.run("env").split(",")),
        "session_timeout_ms": 6_000,
        "delivery": "exactly_once",
        "max_poll_interval_ms": 120_000,
    }
    return unique_settings("", **(chosen | overrides))


def leader_of(settings: KafkaSettings, topic: str) -> int:
    with closing(open_admin(settings)) as admin:
        return int(admin.describe_topics([topic])[0]["partitions"][0]["leader_id"])


def check_books(settings: KafkaSettings, total: int) -> None:
    """Each event its verdict, each tenth its dead letter, once; offsets behind them."""
    verdicts = visible(settings, settings.verdict_topic)
    letters = visible(settings, settings.dead_letter_topic)
    assert sorted(verdicts) == values(total)
    assert set(verdicts.values()) == {1}
    assert sorted(letters) == [key for key in values(total) if int(key) % 10 == 0]
    assert set(letters.values()) == {1}
    assert sum(committed(settings, settings.upload_topics[0]).values()) == total


def test_each_verdict_once_while_a_leader_dies_and_members_come_and_go(three: KafkaCluster) -> None:
    """The leader of a verdict partition killed under transactions, a member that joins and leaves, a producer that is lost."""
    settings = prepare(settings_for(three))
    total = 2_000
    produce(settings, settings.upload_topics[0], values(total))
    first = WholeMember(settings, seed=1).start()
    deadline = Deadline(280)

    def done(share: float, *members: WholeMember) -> None:
        def reached() -> bool:
            assert first.error is None, first.error
            return sum(len(member.done) for member in members) >= total * share

        until(reached, lambda: time.sleep(0.05), deadline.remaining())

    done(0.2, first)
    victim = leader_of(settings, settings.verdict_topic)
    three.run("kill", str(victim))
    try:
        done(0.4, first)
    finally:
        three.run("restart", str(victim))
    second = WholeMember(settings, seed=2).start()
    done(0.7, first, second)
    second.stop()
    done(1.0, first, second)
    first.stop()
    check_books(settings, total)
    assert len(first.done) + len(second.done) == total  # nothing was done twice either


def test_a_worker_that_dies_in_its_transaction_leaves_nothing_half_done(three: KafkaCluster) -> None:
    """What it sent stays invisible; a successor of the same static name ends it at once and publishes each once."""
    settings = prepare(settings_for(three, group_instance_id="pod-0", transaction_timeout_ms=100_000))
    total = 200
    produce(settings, settings.upload_topics[0], values(total))
    dying = TransactionalProducer(settings, transactional_id(settings))
    dying.initialize(30)
    dying.begin()
    futures = [dying.send(settings.verdict_topic, b"{}", key, []) for key in values(total)[:50]]
    assert dying.settle(futures, 30) == [None] * 50
    assert sum(visible(settings, settings.verdict_topic, isolation="read_uncommitted", quiet_s=0.5).values()) == 50
    successor = WholeMember(settings).start()
    until(lambda: len(successor.done) == total or successor.error is not None, lambda: time.sleep(0.05), 120)
    successor.stop()
    check_books(settings, total)  # a reader would have waited for the 100 seconds of the first transaction
    with pytest.raises(Exception, match=r"(?i)fenced"):
        dying.commit({}, successor.consumer.group_metadata(), 10)
    dying.discard()


def test_a_fenced_worker_ends_with_one_line(three: KafkaCluster) -> None:
    settings = prepare(settings_for(three, group_instance_id="pod-1"))
    produce(settings, settings.upload_topics[0], values(50))
    old = WholeMember(settings).start()
    until(lambda: len(old.done) == 50, lambda: time.sleep(0.05), 120)
    usurper = TransactionalProducer(settings, transactional_id(settings))
    usurper.initialize(30)
    produce(settings, settings.upload_topics[0], [b"%08d" % number for number in range(50, 100)])
    until(lambda: old.error is not None, lambda: time.sleep(0.05), 120)
    assert isinstance(old.error, DependencyError)
    assert "fenced: another process has taken over the transactional id" in str(old.error)
    assert "\n" not in str(old.error)
    usurper.discard()
    assert set(visible(settings, settings.verdict_topic)) == set(values(50))


def test_a_dead_letter_too_large_for_its_topic_goes_without_its_value(three: KafkaCluster) -> None:
    settings = prepare(settings_for(three, compression="none"))
    with closing(open_admin(settings)) as admin:
        limit = ConfigResource(ConfigResourceType.TOPIC, settings.dead_letter_topic, {"max.message.bytes": "100000"})
        admin.alter_configs([limit])
    produce(
        settings, settings.upload_topics[0], [b"%08d" % number + b"x" * (number % 20 == 10) * 400_000 for number in range(60)]
    )
    one = WholeMember(settings).start()
    until(lambda: len(one.done) == 60 or one.error is not None, lambda: time.sleep(0.05), 120)
    one.stop()
    check_books(settings, 60)


def test_a_transaction_timeout_the_broker_does_not_allow_is_named(three: KafkaCluster) -> None:
    settings = settings_for(three, transaction_timeout_ms=16 * 60_000, max_poll_interval_ms=17 * 60_000)
    with pytest.raises(ConfigurationError, match="WORKER_KAFKA__TRANSACTION_TIMEOUT_MS"):
        TransactionalPublisher(settings, Ledger())


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", [10, 70])
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_the_broker_is_gone_for_a_while(secure: KafkaCluster, seconds: int, how: str) -> None:
    """Shorter and longer than the transaction timeout: recovery without a restart by hand, nothing lost or doubled."""
    settings = prepare(settings_for(secure, request_timeout_ms=10_000))
    total = 3_000
    produce(settings, settings.upload_topics[0], values(total))
    one = WholeMember(settings).start()
    until(lambda: len(one.done) > total / 4, lambda: time.sleep(0.05), 120)
    secure.run(how, "1")
    time.sleep(seconds)
    secure.run("restart" if how == "kill" else "resume", "1")
    until(lambda: len(one.done) == total or one.error is not None, lambda: time.sleep(0.1), 300)
    one.stop()
    check_books(settings, total)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_coordinator_hangs_while_a_commit_waits(three: KafkaCluster) -> None:
    """Stopped brokers answer nothing: commits whose outcome nobody knows are found out, not guessed."""
    settings = prepare(settings_for(three, request_timeout_ms=5_000, transaction_timeout_ms=10_000))
    total = 12_000
    produce(settings, settings.upload_topics[0], values(total))
    one = WholeMember(settings).start()
    for round_ in range(6):
        node = str(1 + round_ % 3)
        until(lambda share=round_: len(one.done) > total * (share + 1) / 8, lambda: time.sleep(0.01), 200)  # type: ignore[misc]
        three.run("pause", node)
        time.sleep(9)
        three.run("resume", node)
    until(lambda: len(one.done) == total or one.error is not None, lambda: time.sleep(0.1), 240)
    one.stop()
    check_books(settings, total)


def test_over_tls_and_scram(secure: KafkaCluster) -> None:
    settings = prepare(secure_settings(secure, delivery="exactly_once"))
    produce(settings, settings.upload_topics[0], values(30))
    one = WholeMember(settings).start()
    until(lambda: len(one.done) == 30 or one.error is not None, lambda: time.sleep(0.05), 120)
    one.stop()
    check_books(settings, 30)


def test_an_output_of_an_ended_tenure_is_not_published(three: KafkaCluster) -> None:
    settings = prepare(settings_for(three))
    produce(settings, settings.upload_topics[0], values(1))
    one = WholeMember(settings).start()
    until(lambda: len(one.done) == 1, lambda: time.sleep(0.05), 120)
    dropped: list[bool] = []
    stale = Position(settings.upload_topics[0], 0, 0, 99)
    receipts = Receipts(1, lambda: None, stale, lambda: dropped.append(True))
    one.publisher.dead_letter(Record(stale, b"k", b"v", (), 0), "decode.corrupt", "m", Delivery(), receipts, receipts)
    one.stop()
    assert dropped == [True]
    check_books(settings, 1)

"""Exactly once: outputs and offsets of the same records in the same transaction, whatever fails."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from kafka import errors as kafka_errors

from tests.worker.fake_clock import FakeClock
from tests.worker.kafka_topics import until
from tests.worker.stages import fake_transactions as fake
from tests.worker.stages.fake_transactions import FakeTransactions, Fault
from worker import kafka_transactions, kafka_workarounds
from worker.clock import Deadline
from worker.errors import DependencyError
from worker.items import Delivery, Position, Record
from worker.kafka_transactions import transactional_id
from worker.ledger import Ledger
from worker.outcomes import Receipts
from worker.settings import KafkaSettings
from worker.stages import transactions
from worker.stages.transactions import TransactionalPublisher

SETTINGS = KafkaSettings(delivery="exactly_once")
A = ("image.uploads", 0)
B = ("image.uploads", 1)


class Bench:
    """A publisher on a fake broker, with the ledger and what would be the pipeline's books."""

    def __init__(self, settings: KafkaSettings = SETTINGS) -> None:
        self.broker = FakeTransactions()
        self.ledger = Ledger()
        self.ended: list[bool] = []
        self.done: list[Position] = []
        self.dropped: list[Position] = []
        self.settings = settings
        self.publisher: TransactionalPublisher

    def start(self) -> Bench:
        self.publisher = TransactionalPublisher(self.settings, self.ledger, observer=lambda ok, seconds: self.ended.append(ok))
        self.publisher.commit_as(self.broker.member)
        self.ledger.assign([A, B])
        return self

    def read(self, offsets: range | list[int], partition: tuple[str, int] = A) -> list[Position]:
        return [self.ledger.track(*partition, offset) for offset in offsets]

    def receipts(self, position: Position, outputs: int = 1) -> Receipts:
        def done() -> None:
            if self.ledger.finish(position):
                self.done.append(position)

        return Receipts(outputs, done, position, lambda: self.dropped.append(position))

    def verdict(self, position: Position, body: bytes = b"{}", receipts: Receipts | None = None) -> None:
        receipts = receipts or self.receipts(position)
        self.publisher.verdict(body, f"{position.partition}/{position.offset}", [], receipts, receipts)

    def letter(self, position: Position, value: bytes = b"image", more: bool = True) -> Receipts:
        receipts = self.receipts(position, 2 if more else 1)
        record = Record(position, f"{position.partition}/{position.offset}".encode(), value, (), 0)
        self.publisher.dead_letter(record, "decode.corrupt", "m", Delivery(), receipts, receipts)
        return receipts

    def settled(self, count: int) -> None:
        def finished() -> bool:
            self.publisher.check()
            return len(self.done) >= count

        until(finished, lambda: time.sleep(0.002))

    def fails(self) -> str:
        """What ends the worker."""
        until(lambda: self.publisher.failed, lambda: time.sleep(0.002))
        with pytest.raises(DependencyError) as error:
            self.publisher.check()
        assert "\n" not in str(error.value)
        return str(error.value)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []
    monkeypatch.setattr(transactions, "BACKOFF_S", 0.002)
    monkeypatch.setattr(transactions, "TICK_S", 0.02)
    monkeypatch.setattr(transactions, "CLOSE_S", 0.2)
    monkeypatch.setattr(transactions, "STATIC_GRACE_S", 0.01)

    def make(**overrides: object) -> Bench:
        one = Bench(SETTINGS.model_copy(update=overrides))
        monkeypatch.setattr(transactions, "TransactionalProducer", one.broker.open)
        monkeypatch.setattr(transactions, "committed_offsets", one.broker.committed_offsets)
        benches.append(one)
        return one.start()

    yield make
    for one in benches:
        one.publisher.close(Deadline(0))


Make = Callable[..., Bench]


def test_outputs_wait_until_every_earlier_record_has_its_own(bench: Make) -> None:
    one = bench()
    positions = one.read(range(5))
    for position in positions[:0:-1]:
        one.verdict(position)
    assert not one.publisher.flush(Deadline(0.1))
    assert one.broker.visible == []
    assert one.publisher.undelivered == 4
    one.verdict(positions[0])
    one.settled(5)
    assert one.broker.transactions == [one.broker.visible]
    assert [key for _, key, _, _ in one.broker.visible] == [b"0/%d" % offset for offset in range(5)]
    assert one.broker.offsets == {A: 5}
    assert one.publisher.flush(Deadline(5))
    assert one.publisher.undelivered == 0
    assert one.ledger.take() == {}


def test_a_slow_record_holds_its_own_partition_only(bench: Make) -> None:
    one = bench()
    one.read(range(1))
    for position in one.read(range(3), B):
        one.verdict(position)
    one.settled(3)
    assert one.broker.offsets == {B: 3}


def test_all_outputs_of_a_record_go_in_one_transaction(bench: Make) -> None:
    one = bench()
    first, second = one.read(range(2))
    receipts = one.letter(first)
    one.verdict(second)
    assert not one.publisher.flush(Deadline(0.1))
    one.verdict(first, receipts=receipts)
    one.settled(2)
    topics = [topic for topic, _, _, _ in one.broker.transactions[0]]
    assert topics == ["image.uploads.dead", "image.verdicts", "image.verdicts"]


@pytest.mark.parametrize("fault", [fake.group_moved_on, fake.fenced_by_itself, fake.trouble, fake.lost_request, fake.lost_answer])
@pytest.mark.parametrize("times", [1, 3])
def test_what_failed_is_done_again_and_visible_once(bench: Make, fault: Fault, times: int) -> None:
    one = bench()
    one.broker.faults = [fault] * times
    for position in one.read(range(20)):
        one.verdict(position)
    one.settled(20)
    more = one.read(range(20, 25))
    for position in more:
        one.verdict(position)
    one.settled(25)
    assert set(one.broker.times().values()) == {1}
    assert one.broker.offsets == {A: 25}
    assert one.ended.count(True) == len(one.broker.transactions)


def test_a_commit_nobody_answered_is_not_repeated_where_it_took_place(bench: Make) -> None:
    one = bench()
    one.broker.faults = [fake.lost_answer]
    for position in one.read(range(3)):
        one.verdict(position)
    one.settled(3)
    assert len(one.broker.visible) == 3
    assert one.broker.opened >= 2  # a new producer made sure that the old transaction was over


def test_a_rebalance_between_the_look_at_the_group_and_the_commit_is_refused(bench: Make) -> None:
    one = bench()
    moved: list[int] = []

    def rebalance() -> None:
        if not moved:
            one.broker.generation += 1
            moved.append(1)
            one.ledger.revoke([A])

    one.broker.on_commit = rebalance
    for position in one.read(range(3)):
        one.verdict(position)
    for position in one.read(range(2), B):
        one.verdict(position)
    one.settled(2)
    until(lambda: len(one.dropped) == 3, lambda: time.sleep(0.002))
    assert one.broker.offsets == {B: 2}
    assert all(key is not None and key.startswith(b"1/") for _, key, _, _ in one.broker.visible)
    assert one.publisher.undelivered == 0


def test_what_is_late_is_dropped_and_never_published(bench: Make) -> None:
    one = bench()
    first, second = one.read(range(2))
    one.verdict(second)
    receipts = one.letter(first)
    one.ledger.revoke([A])
    one.ledger.assign([A])
    one.verdict(first, receipts=receipts)  # complete only now
    until(lambda: len(one.dropped) == 2, lambda: time.sleep(0.002))
    again = one.read(range(2))
    for position in again:
        one.verdict(position)
    one.settled(2)
    assert one.dropped == [first, second] or one.dropped == [second, first]
    assert one.done == again
    assert set(one.broker.times().values()) == {1}


def test_without_a_generation_nothing_is_published(bench: Make) -> None:
    """The broker takes offsets without a generation from anybody."""
    one = bench()
    one.broker.generation = -1
    for position in one.read(range(3)):
        one.verdict(position)
    assert not one.publisher.flush(Deadline(0.1))
    assert one.broker.visible == []
    one.broker.generation = 7
    one.settled(3)


def test_markers_behind_the_last_record_are_committed_past(bench: Make) -> None:
    one = bench()
    for position in one.read(range(3)):
        one.verdict(position)
    one.settled(3)
    until(lambda: one.ledger.take() == {}, lambda: time.sleep(0.002))
    one.ledger.advance(*A, 9)
    until(lambda: one.broker.offsets == {A: 9}, lambda: time.sleep(0.002))
    assert one.broker.transactions[-1] == []


@pytest.mark.parametrize("guilty", [{7}, {0, 3, 19}])
def test_a_record_too_large_for_its_topic_is_found_and_goes_smaller(bench: Make, guilty: set[int]) -> None:
    one = bench()
    one.broker.refuse = lambda sent: (
        kafka_errors.MessageSizeTooLargeError() if sent[0] == "image.uploads.dead" and len(sent[2] or b"") > 1000 else None
    )
    for position in one.read(range(20)):
        if position.offset in guilty:
            receipts = one.letter(position, b"x" * (5000 + 100 * position.offset))
            one.verdict(position, receipts=receipts)
        else:
            one.verdict(position)
    one.settled(20)
    letters = [sent for sent in one.broker.visible if sent[0] == "image.uploads.dead"]
    assert len(letters) == len(guilty)
    assert all(value in (None, b"") for _, _, value, _ in letters)
    assert all(dict(headers)["value_omitted"] for _, _, _, headers in letters)
    verdicts = [key for topic, key, _, _ in one.broker.visible if topic == "image.verdicts"]
    assert sorted(verdicts) == sorted(b"0/%d" % offset for offset in range(20))
    refused = len(one.ended) - one.ended.count(True)
    later = one.letter(one.read([20])[0], b"y" * 6000, more=False)
    assert later.outputs == 1
    one.settled(21)
    assert len(one.ended) - one.ended.count(True) == refused  # a size that was refused once is not offered again


def test_a_record_the_client_itself_refuses_aborts_nothing(bench: Make) -> None:
    one = bench()
    one.broker.max_request_size = 1000
    body = json.dumps({"event_id": "e", "attributes": {"a": "x" * 2000}}).encode()
    one.verdict(one.read([0])[0], body)
    one.settled(1)
    assert one.ended == [True]
    ((_, _, value, headers),) = one.broker.visible
    assert b"xxx" not in (value or b"")
    assert "attributes_omitted" in dict(headers)


def test_a_record_that_cannot_be_made_smaller_ends_the_worker(bench: Make) -> None:
    one = bench()
    one.broker.refuse = lambda sent: kafka_errors.MessageSizeTooLargeError()
    one.verdict(one.read([0])[0], b'{"attributes": {}}')
    assert "refuses a record of" in one.fails()
    assert one.broker.visible == []


def test_a_fenced_producer_ends_the_worker(bench: Make) -> None:
    one = bench(group_instance_id="pod-0")
    one.broker.faults = [fake.fenced]
    one.verdict(one.read([0])[0])
    assert "fenced: another process has taken over the transactional id code-worker-pod-0" in one.fails()
    assert one.broker.visible == []
    assert one.broker.opened == 1  # it does not take the name back


@pytest.mark.parametrize("instance", [None, "pod-0"])
def test_a_transaction_that_grew_too_old_is_done_again(
    bench: Make, monkeypatch: pytest.MonkeyPatch, instance: str | None
) -> None:
    """The broker says the same of it; only its age tells that nobody else is to blame."""
    one = bench(group_instance_id=instance)
    clock = FakeClock()
    monkeypatch.setattr(one.publisher, "_clock", clock)

    def old(producer: fake.FakeTransactionalProducer) -> None:
        clock.advance(SETTINGS.transaction_timeout_ms / 1000 + 1)
        fake.fenced(producer)

    one.broker.faults = [old]
    one.verdict(one.read([0])[0])
    one.settled(1)
    assert one.broker.offsets == {A: 1}


@pytest.mark.parametrize(
    "error",
    [
        kafka_errors.TopicAuthorizationFailedError("image.verdicts"),
        kafka_errors.GroupAuthorizationFailedError("code-worker"),
        kafka_errors.PolicyViolationError(),
    ],
)
def test_what_no_repeat_cures_ends_the_worker(bench: Make, error: Exception) -> None:
    one = bench()

    def refuse(producer: fake.FakeTransactionalProducer) -> None:
        raise error

    one.broker.faults = [refuse]
    one.verdict(one.read([0])[0])
    assert "Kafka refuses the worker's transactions" in one.fails()
    assert one.broker.visible == []


def test_the_broker_may_be_gone_for_as_long_as_it_likes(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    attempts: list[int] = []

    def unreachable(*_: object) -> object:
        attempts.append(1)
        if len(attempts) < 5:
            raise DependencyError("Kafka at localhost:9092 is not usable")
        return one.broker.open(*_)  # type: ignore[arg-type]

    monkeypatch.setattr(transactions, "TransactionalProducer", unreachable)
    one.broker.faults = [fake.trouble]
    for position in one.read(range(3)):
        one.verdict(position)
    one.settled(3)
    assert len(attempts) == 5
    assert one.publisher.seconds_without_receipt() == 0.0


def test_closing_does_not_wait_for_a_broker_that_never_answers(bench: Make) -> None:
    one = bench()
    one.broker.faults = [fake.late]
    one.verdict(one.read([0])[0])
    until(lambda: not one.broker.faults, lambda: time.sleep(0.002))
    assert one.publisher.seconds_without_receipt() > 0
    closed = threading.Event()
    threading.Thread(target=lambda: (one.publisher.close(Deadline(0.05)), closed.set()), daemon=True).start()
    assert closed.wait(30)
    assert one.done == []
    assert not one.publisher.failed


def test_a_receipt_that_fails_ends_the_worker(bench: Make) -> None:
    one = bench()
    position = one.read([0])[0]

    def broken() -> None:
        raise RuntimeError("a fault of ours")

    receipts = Receipts(1, broken, position)
    one.publisher.verdict(b"{}", "e", [], receipts, receipts)
    assert "a fault of ours" in one.fails()


def test_an_output_must_say_of_which_record_it_is(bench: Make) -> None:
    with pytest.raises(ValueError, match="of which record"):
        bench().publisher.verdict(b"{}", "e", [], lambda: None)


@pytest.mark.parametrize("seed", range(6))
def test_random_faults_revokes_and_orders(bench: Make, seed: int) -> None:
    """Every output visible once, offsets exactly behind them, whatever happens in between."""
    rng = random.Random(seed)
    one = bench()
    choices: list[Fault | None] = [None, None, fake.group_moved_on, fake.trouble, fake.lost_request, fake.lost_answer]
    one.broker.faults = [rng.choice(choices) for _ in range(60)]
    refusing = rng.random() < 0.5
    one.broker.refuse = lambda sent: kafka_errors.RecordListTooLargeError() if refusing and len(sent[2] or b"") > 1000 else None
    total = 150
    at = {A: 0, B: 0}
    open_: list[Position] = []

    def rebalance() -> None:
        """As the group does it: first the tenure ends, then the generation is another; the next begins at the commit."""
        partition = rng.choice([A, B])
        one.ledger.revoke([partition])
        with one.broker.lock:
            one.broker.generation += 1
            at[partition] = one.broker.offsets.get(partition, 0)
        one.ledger.assign([partition])

    deadline = Deadline(60)
    while any(one.broker.offsets.get(partition, 0) < total for partition in (A, B)):
        assert not deadline.expired()
        one.publisher.check()
        for partition in (A, B):
            for _ in range(rng.randrange(6)):
                if at[partition] < total:
                    open_ += one.read([at[partition]], partition)
                    at[partition] += 1
        rng.shuffle(open_)
        count = rng.randrange(12)
        done, open_ = open_[:count], open_[count:]
        for position in done:
            if rng.random() < 0.1:
                one.verdict(position, receipts=one.letter(position, b"x" * 2000))
            else:
                one.verdict(position)
        if rng.random() < 0.03:
            rebalance()
        time.sleep(rng.random() * 0.002)
    verdicts = [key for topic, key, _, _ in one.broker.visible if topic == "image.verdicts"]
    assert sorted(verdicts) == sorted(b"%d/%d" % (number, offset) for number in (0, 1) for offset in range(total))
    assert len(verdicts) == len(set(verdicts))


def test_the_transactional_id_is_this_processs_own_or_the_static_members() -> None:
    assert transactional_id(SETTINGS) != transactional_id(SETTINGS)
    assert transactional_id(SETTINGS).startswith("code-worker-")
    static = SETTINGS.model_copy(update={"group_instance_id": "pod-3"})
    assert transactional_id(static) == transactional_id(static) == "code-worker-pod-3"


def test_a_broker_without_transactions_is_told_by_what_it_lacks() -> None:
    class Versions:
        api_versions = dict.fromkeys([*kafka_transactions.NEEDED_APIS.values(), 0, 1])

    assert kafka_transactions.missing_apis(Versions()) == []
    del Versions.api_versions[65]
    assert kafka_transactions.missing_apis(Versions()) == ["DescribeTransactions"]


def test_a_coordinator_that_cannot_be_connected_to_is_no_reason_to_forget_the_request() -> None:
    """kafka-python asks whether it is ready, and gets an exception that it does not expect."""
    asked: list[float] = []

    class Client:
        def await_ready(self, node_id: str, timeout_ms: float) -> bool:
            asked.append(timeout_ms)
            if node_id == "gone":
                raise kafka_errors.KafkaConnectionError("Node gone not ready")
            return True

    class Sender:
        _client = Client()

    class Producer:
        _sender = Sender()

    kafka_workarounds.keep_requests(Producer())
    client = Producer._sender._client
    assert client.await_ready("there", timeout_ms=30_000) is True
    assert client.await_ready("gone", timeout_ms=30_000) is False
    assert max(asked) <= 1_000


@pytest.mark.broker
def test_the_embedded_broker_is_refused_in_one_line(kafka_settings: Callable[..., KafkaSettings]) -> None:
    """It takes transactions, and shows what was aborted: nothing would be exactly once."""
    with pytest.raises(DependencyError, match=r"has no transactions.*WORKER_KAFKA__DELIVERY=at_least_once") as error:
        TransactionalPublisher(kafka_settings(delivery="exactly_once"), Ledger())
    assert "\n" not in str(error.value)

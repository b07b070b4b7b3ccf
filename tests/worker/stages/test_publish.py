"""The publisher: nothing handed over is lost, whatever the broker refuses; the guilty record alone is cut."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka import errors as kafka_errors

from tests.worker.fake_clock import FakeClock
from tests.worker.kafka_topics import prepare, read_all
from tests.worker.stages.fake_producer import FakeBroker, Sent
from worker import envelopes
from worker.clock import Deadline
from worker.errors import DependencyError
from worker.items import Delivery, Headers, Position, Record
from worker.kafka_clients import BUSY_LINGER_MS, LINGER_MS
from worker.settings import KafkaSettings
from worker.stages import publish
from worker.stages.publish import Publisher

SETTINGS = KafkaSettings()


def upload(
    value: bytes | None = b"value", key: bytes | None = b"key", headers: Headers = (("a", b"b"), ("attempt", b"mine"))
) -> Record:
    return Record(Position("image.uploads", 2, 42, 1), key, value, headers, 0)


class Receipts:
    """Counts receipts by name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def of(self, name: str) -> Callable[[], None]:
        return lambda: self.names.append(name)


@pytest.fixture
def with_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Publisher, FakeBroker, Receipts]]]:
    """Makes a publisher on a fake broker."""
    made: list[Publisher] = []
    monkeypatch.setattr(publish, "BACKOFF_S", 0.005)
    monkeypatch.setattr(publish, "CLOSE_S", 0.5)

    def make(**broker_options: Any) -> tuple[Publisher, FakeBroker, Receipts]:
        broker = FakeBroker(**broker_options)
        monkeypatch.setattr(publish, "open_producer", broker.open_producer)
        publisher = Publisher(SETTINGS)
        made.append(publisher)
        return publisher, broker, Receipts()

    yield make
    for publisher in made:
        publisher.close(Deadline(0.2))


Make = Callable[..., tuple[Publisher, FakeBroker, Receipts]]


def too_large(sent: Sent, limit: int = 1_000) -> Exception | None:
    size = len(sent[1] or b"") + len(sent[2] or b"") + sum(len(name) + len(value) for name, value in sent[3])
    return kafka_errors.MessageSizeTooLargeError("no") if size > limit else None


def test_records_wait_longer_for_company_while_many_go_out(with_broker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(publish.kafka_speed, "linger", lambda _, milliseconds: set_to.append(milliseconds))
    publisher, _, receipts = with_broker()
    clock = publisher._clock = FakeClock()
    publisher._since = clock.monotonic()

    def send(count: int, over_s: float) -> None:
        for _ in range(count):
            clock.advance(over_s / count)
            publisher.verdict(b"{}", "event", (), receipts.of("x"))

    send(100, 1.0)
    assert set_to == [], "100 a second are not many"
    send(600, 1.0)
    assert set_to == [BUSY_LINGER_MS]
    clock.advance(60)
    send(1, 0.001)
    assert set_to == [BUSY_LINGER_MS, LINGER_MS], "the first record after a quiet time does not wait"


def test_verdict_dead_letter_and_retry_as_the_contract_says(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker()
    publisher.verdict(b"{}", "é1", [("content-type", b"application/json")], receipts.of("verdict"))
    publisher.dead_letter(upload(), "fetch.denied", "host not allowed", Delivery(3, 1.0), receipts.of("dead"))
    before = time.time()
    publisher.retry(upload(), Delivery(2, 1.0, None, Position("u", 1, 7, 0)), 30.0, "fetch.timeout", receipts.of("retry"))
    assert publisher.flush(Deadline(5))
    assert publisher.undelivered == 0
    assert receipts.names == ["verdict", "dead", "retry"]
    verdict, dead, retry = broker.taken
    assert verdict == ("image.verdicts", "é1".encode(), b"{}", [("content-type", b"application/json")])
    assert dead == (
        "image.uploads.dead",
        b"key",
        b"value",
        [
            ("a", b"b"),
            ("attempt", b"mine"),
            ("__streams.errors.exception", b"fetch.denied"),
            ("__streams.errors.message", b"host not allowed"),
            ("__streams.errors.topic", b"image.uploads"),
            ("__streams.errors.partition", b"2"),
            ("__streams.errors.offset", b"42"),
            ("attempt", b"3"),
            ("first_seen", b"1970-01-01T00:00:01.000Z"),
        ],
    )
    assert retry[:3] == ("image.uploads.retry", b"key", b"value")
    record, delivery = envelopes.open_retry(Record(Position("r", 0, 0, 1), retry[1], retry[2], tuple(retry[3]), 0))
    assert record.headers == upload().headers
    assert (delivery.attempt, delivery.first_seen, delivery.origin) == (3, 1.0, Position("u", 1, 7, 0))
    assert delivery.not_before == pytest.approx(before + 30, abs=2)


def test_the_first_retry_names_the_upload_it_stems_from(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker()
    publisher.retry(upload(), Delivery(), 1.0, "fetch.timeout", receipts.of("retry"))
    assert publisher.flush(Deadline(5))
    _, delivery = envelopes.open_retry(Record(Position("r", 0, 0, 1), None, None, tuple(broker.taken[0][3]), 0))
    assert (delivery.attempt, delivery.origin) == (2, Position("image.uploads", 2, 42, 0))
    assert delivery.first_seen == pytest.approx(time.time(), abs=5)


def test_trouble_that_passes_is_sat_out(with_broker: Make) -> None:
    failures = iter([kafka_errors.KafkaTimeoutError("t"), kafka_errors.NotLeaderForPartitionError(), None])
    publisher, broker, receipts = with_broker(refuse=lambda sent: next(failures))
    publisher.verdict(b"{}", "e", [], receipts.of("e"))
    assert publisher.flush(Deadline(5))
    assert receipts.names == ["e"]
    assert len(broker.producers) == 1  # the client is none the worse for it


def test_a_record_the_broker_finds_too_large_is_cut_and_no_other(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker(refuse=too_large)
    broker.answering.clear()  # so that all are in flight when the first is refused, and fail with its error
    for number in range(20):
        publisher.verdict(b"{}", f"small-{number}", [], receipts.of(f"small-{number}"))
    publisher.dead_letter(upload(b"x" * 5_000), "decode.corrupt", "m", Delivery(), receipts.of("large"))
    for number in range(20, 40):
        publisher.dead_letter(upload(b"y"), "decode.corrupt", "m", Delivery(), receipts.of(f"small-{number}"))
    broker.answering.set()
    assert publisher.flush(Deadline(20))
    assert sorted(receipts.names) == sorted(["large", *(f"small-{number}" for number in range(40))])
    letters = [envelopes.open_dead(key, value, tuple(headers)) for topic, key, value, headers in broker.taken if "dead" in topic]
    assert [letter.omitted for letter in letters if letter and letter.omitted] == [{"value": 5_000}]
    assert all(letter and letter.value == b"y" for letter in letters if letter and not letter.omitted)
    assert len(broker.taken) == 41


def test_what_the_broker_refused_once_is_not_offered_again(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker(refuse=too_large)
    publisher.dead_letter(upload(b"x" * 5_000), "decode.corrupt", "m", Delivery(), receipts.of("first"))
    assert publisher.flush(Deadline(10))
    producers = len(broker.producers)
    for _ in range(10):
        publisher.dead_letter(upload(b"x" * 6_000), "decode.corrupt", "m", Delivery(), receipts.of("next"))
    assert publisher.flush(Deadline(10))
    assert len(broker.producers) == producers  # no further refusal, and so no further producer
    assert receipts.names.count("next") == 10


def test_a_record_larger_than_a_request_is_cut_by_the_client(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker(max_request_size=1_000)
    publisher.dead_letter(upload(b"x" * 5_000, key=None), "event.too_large", "m", Delivery(), receipts.of("a"))
    publisher.dead_letter(upload(b"x", key=b"k" * 5_000), "event.malformed", "m", Delivery(), receipts.of("b"))
    assert publisher.flush(Deadline(10))
    first, second = (envelopes.open_dead(key, value, tuple(headers)) for _, key, value, headers in broker.taken)
    assert first is not None
    assert (first.omitted, first.headers) == ({"value": 5_000}, upload().headers)
    assert second is not None
    assert second.omitted == {"value": 1, "key": 5_000, "headers": 13}
    assert (second.code, second.offset, second.headers, second.key) == ("event.malformed", 42, (), None)
    assert len(broker.producers) == 1


def test_a_verdict_too_large_goes_without_the_uploaders_attributes(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker(refuse=too_large)
    body = json.dumps({"event_id": "e", "attributes": {"a": "x" * 2_000}, "item": None}).encode()
    publisher.verdict(body, "e", [], receipts.of("e"))
    assert publisher.flush(Deadline(10))
    _, _, value, headers = broker.taken[0]
    assert json.loads(value or b"") == {"event_id": "e", "attributes": {}, "item": None}
    assert [name for name, _ in headers] == ["attributes_omitted"]


def test_a_retry_too_large_for_its_topic_becomes_a_dead_letter(with_broker: Make) -> None:
    def refuse(sent: Sent) -> Exception | None:
        return too_large(sent) if sent[0] == SETTINGS.retry_topic else None

    publisher, broker, receipts = with_broker(refuse=refuse)
    publisher.retry(upload(b"x" * 5_000), Delivery(), 1.0, "fetch.timeout", receipts.of("e"))
    assert publisher.flush(Deadline(10))
    topic, key, value, headers = broker.taken[0]
    letter = envelopes.open_dead(key, value, tuple(headers))
    assert letter is not None
    assert (topic, letter.code, letter.attempt, letter.value) == (SETTINGS.dead_letter_topic, "fetch.timeout", 1, b"x" * 5_000)


def test_a_record_that_cannot_be_made_small_enough_ends_the_worker_and_no_receipt_is_given(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker(refuse=lambda sent: kafka_errors.MessageSizeTooLargeError("no"))
    publisher.verdict(b"{}", "e", [], receipts.of("e"))
    assert not publisher.flush(Deadline(10))
    with pytest.raises(DependencyError, match=r"image\.verdicts refuses a record of \d+ bytes: raise its max\.message\.bytes"):
        publisher.check()
    assert receipts.names == []
    assert broker.taken == []


@pytest.mark.parametrize("error", ["TopicAuthorizationFailedError", "ProducerFencedError", "InvalidRecordError"])
def test_a_refusal_for_good_ends_the_worker(with_broker: Make, error: str) -> None:
    publisher, _, receipts = with_broker(refuse=lambda sent: getattr(kafka_errors, error)("no"))
    publisher.check()
    publisher.verdict(b"{}", "e", [], receipts.of("e"))
    assert not publisher.flush(Deadline(5))
    assert publisher.failed
    with pytest.raises(DependencyError, match=f"image.verdicts refuses the worker: .*{error}"):
        publisher.check()
    assert receipts.names == []
    assert publisher.undelivered == 1


def test_a_producer_that_died_of_something_else_is_replaced(with_broker: Make) -> None:
    errors = iter([kafka_errors.OutOfOrderSequenceNumberError("gap")])
    publisher, broker, receipts = with_broker(refuse=lambda sent: next(errors, None))
    broker.answering.clear()
    for number in range(10):
        publisher.verdict(b"{}", str(number), [], receipts.of(str(number)))
    broker.answering.set()
    assert publisher.flush(Deadline(10))
    assert sorted(receipts.names) == sorted(str(number) for number in range(10))
    assert len(broker.producers) == 2


def test_the_broker_may_be_gone_while_the_producer_is_replaced(with_broker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([kafka_errors.UnknownError("?")])
    publisher, broker, receipts = with_broker(refuse=lambda sent: next(errors, None))
    attempts = iter([DependencyError("gone"), DependencyError("gone"), None])

    def open_producer(settings: KafkaSettings) -> Any:
        if (error := next(attempts)) is not None:
            raise error
        return broker.open_producer(settings)

    monkeypatch.setattr(publish, "open_producer", open_producer)
    publisher.verdict(b"{}", "e", [], receipts.of("e"))
    assert publisher.flush(Deadline(10))
    assert receipts.names == ["e"]


def test_many_threads_through_refusals_and_deaths(with_broker: Make) -> None:
    seen: dict[bytes | None, int] = {}

    def refuse(sent: Sent) -> Exception | None:
        count = seen[sent[1]] = seen.get(sent[1], 0) + 1
        number = int(sent[1] or b"0")
        if count == 1 and number % 97 == 0:
            return kafka_errors.OutOfOrderSequenceNumberError("gap")
        if count == 1 and number % 5 == 0:
            return kafka_errors.NotLeaderForPartitionError()
        return too_large(sent)

    publisher, broker, receipts = with_broker(refuse=refuse)

    def work(share: int) -> None:
        for number in range(share, 400, 4):
            body = b"x" * (2_000 if number % 131 == 7 else 10)
            publisher.dead_letter(upload(body, str(number).encode()), "c", "m", Delivery(), receipts.of(str(number)))

    threads = [threading.Thread(target=work, args=(share,)) for share in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert publisher.flush(Deadline(60))
    publisher.check()
    assert sorted(receipts.names, key=int) == [str(number) for number in range(400)]  # each once
    omitted = {int(key or b"") for _, key, _, headers in broker.taken if "value_omitted" in dict(headers)}
    assert omitted == {7, 138, 269}


def test_a_faulty_receipt_is_told(with_broker: Make) -> None:
    publisher, _, _ = with_broker()

    def faulty() -> None:
        raise KeyError("a fault of ours")

    publisher.verdict(b"{}", "e", [], faulty)
    publisher.flush(Deadline(5))
    with pytest.raises(DependencyError, match="a fault of ours"):
        publisher.check()


def test_seconds_without_receipt(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker()
    assert publisher.seconds_without_receipt() == 0
    broker.answering.clear()
    publisher.verdict(b"{}", "e", [], receipts.of("e"))
    time.sleep(0.05)
    assert publisher.seconds_without_receipt() >= 0.05
    assert not publisher.flush(Deadline(0.05))
    broker.answering.set()
    assert publisher.flush(Deadline(5))
    assert publisher.seconds_without_receipt() == 0


@pytest.mark.timing
def test_closing_gives_up_at_its_deadline_without_a_receipt(with_broker: Make) -> None:
    publisher, broker, receipts = with_broker()
    broker.answering.clear()
    publisher.verdict(b"{}", "e", [], receipts.of("e"))
    began = time.monotonic()
    assert publisher.close(Deadline(0.2)) is False
    assert time.monotonic() - began < 3
    assert receipts.names == []


@pytest.mark.broker
def test_on_a_broker_everything_comes_back_as_it_was(kafka_settings: Callable[..., KafkaSettings]) -> None:
    settings = prepare(kafka_settings(compression="zstd"))
    receipts = Receipts()
    publisher = Publisher(settings)
    records = [
        upload(),
        upload(None, b"k"),
        upload(None, None),
        upload(b"", b"", ()),
        upload(b"\xff" * 100_000, b"k" * 10_000, (("é", b"\x00"), ("null", None))),  # type: ignore[arg-type]
    ]
    for number, record in enumerate(records):
        publisher.dead_letter(record, "event.malformed", "m", Delivery(), receipts.of(str(number)))
        publisher.retry(record, Delivery(), 0.0, "fetch.timeout", receipts.of(str(number)))
        publisher.verdict(b"{}", str(number), [], receipts.of(str(number)))
    assert publisher.flush(Deadline(20))
    assert publisher.close(Deadline(5))
    assert sorted(receipts.names) == sorted(str(number) for number in range(5) for _ in range(3))

    def expected(record: Record) -> tuple[bytes | None, bytes | None, Headers]:
        value = b"" if record.key is None and record.value is None else record.value
        return record.key, value, tuple((name, content or b"") for name, content in record.headers)

    wanted = sorted(map(expected, records), key=repr)
    letters = [
        envelopes.open_dead(raw.key, raw.value, tuple(raw.headers)) for raw in read_all(settings, settings.dead_letter_topic)
    ]
    assert sorted(((one.key, one.value, one.headers) for one in letters if one), key=repr) == wanted
    retried = [
        envelopes.open_retry(Record(Position("r", 0, 0, 1), raw.key, raw.value, tuple(raw.headers), 0))[0]
        for raw in read_all(settings, settings.retry_topic)
    ]
    assert sorted(((one.key, one.value, one.headers) for one in retried), key=repr) == wanted
    assert len(read_all(settings, settings.verdict_topic)) == 5

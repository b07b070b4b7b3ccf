"""What the worker publishes, as Kafka records: verdicts, dead letters and retry records, and how each is made smaller.

`RecordWriter` is the face of both ways of publishing: `publish.Publisher` (at least once: every record goes as soon as it
is ready) and `transactions.TransactionalPublisher` (exactly once: with the offsets, in one transaction).
"""

from __future__ import annotations

import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from kafka import errors as kafka_errors

from worker import envelopes, kafka_refusals
from worker.clock import Clock, Deadline
from worker.errors import DependencyError
from worker.items import Delivery, Headers, Record
from worker.outcomes import Receipts
from worker.settings import KafkaSettings

if TYPE_CHECKING:
    from kafka.coordinator.base import ConsumerGroupMetadata

log = structlog.get_logger()

Receipt = Callable[[], None]
"""Called once, on a thread of the publisher, when the broker has the record (for good): must return at once."""

LONG_KEY_BYTES = 4_096
TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
REFUSALS = (*kafka_refusals.REFUSALS, kafka_errors.ProducerFencedError)
"""No re-send cures these: the worker ends."""


@dataclass(slots=True, eq=False)
class Sending:
    """One record on its way, until its receipt."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    on_receipt: Receipt
    shrink: Callable[[Sending], bool]
    """Makes it smaller in place; False where nothing is left to leave out."""
    attempts: int = 0
    omitted: int = 0

    @property
    def size_bytes(self) -> int:
        """What it has to carry, uncompressed."""
        return len(self.key or b"") + len(self.value or b"") + sum(len(name) + len(value) for name, value in self.headers)


class RecordWriter(ABC):
    """Takes what became of a record, from any thread; `check`, `flush` and `close` are the main thread's.

    `receipts` ties the outputs of one record together: needed for transactions, ignored where there are none.
    """

    def __init__(self, settings: KafkaSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._state = threading.Condition()
        self._undelivered = 0
        self._progress = clock.monotonic()
        self._failed: str | None = None
        self._refused_bytes: dict[str, int] = {}  # by topic the smallest size the broker has refused

    # ------------------------------------------------------------------ sending
    def verdict(
        self,
        body: bytes,
        event_id: str,
        headers: Sequence[tuple[str, bytes]],
        on_receipt: Receipt,
        receipts: Receipts | None = None,
    ) -> None:
        """Publish a verdict, keyed by the event id. One that is too large goes without the uploader's attributes."""
        sending = Sending(self._settings.verdict_topic, event_id.encode(), body, list(headers), on_receipt, _shrink_verdict)
        self._submit(sending, receipts)

    def dead_letter(
        self,
        record: Record,
        code: str,
        message: str,
        delivery: Delivery,
        on_receipt: Receipt,
        receipts: Receipts | None = None,
    ) -> None:
        """Publish the original key, value and headers with the reason (contract, section 5).

        `record` and `delivery` are what `envelopes.open_retry` gave where it came by the retry topic: the letter names
        the upload, not the retry. One that is too large goes without its value, then without key and headers.
        """
        origin = delivery.origin or record.position
        first_seen = delivery.first_seen if delivery.first_seen is not None else self._clock.time()
        headers = envelopes.dead_headers(record.headers, code, message, origin, delivery.attempt, first_seen)
        value = record.value
        if record.key is None and value is None:
            value = b""  # the client sends no record that has neither
        sending = Sending(self._settings.dead_letter_topic, record.key, value, headers, on_receipt, _shrink_dead_letter)
        self._submit(sending, receipts)

    def retry(
        self,
        record: Record,
        delivery: Delivery,
        delay_s: float,
        code: str,
        on_receipt: Receipt,
        receipts: Receipts | None = None,
    ) -> None:
        """Publish the record to the retry topic, to be tried again after `delay_s`. `delivery` is that of the try that failed.

        One that is too large for the retry topic becomes a dead letter.
        """
        now = self._clock.time()
        following = replace(
            delivery,
            attempt=delivery.attempt + 1,
            first_seen=delivery.first_seen if delivery.first_seen is not None else now,
            origin=delivery.origin or record.position,
        )
        headers = envelopes.retry_headers(record.headers, following, code, now + delay_s)
        value = b"" if record.key is None and record.value is None else record.value

        def to_dead_letter(sending: Sending) -> bool:
            letter = envelopes.dead_headers(
                record.headers,
                code,
                "too large for the retry topic",
                following.origin or record.position,
                delivery.attempt,
                following.first_seen or now,
            )
            sending.topic, sending.headers = self._settings.dead_letter_topic, letter
            sending.shrink = _shrink_dead_letter
            return True

        self._submit(Sending(self._settings.retry_topic, record.key, value, headers, on_receipt, to_dead_letter), receipts)

    # -------------------------------------------------------------------- state
    @property
    def undelivered(self) -> int:
        """Records without a receipt."""
        return self._undelivered

    @property
    def failed(self) -> bool:
        """Whether the broker refuses the worker for good."""
        return self._failed is not None

    def check(self) -> None:
        """Raise DependencyError where nothing can be published any more. The main loop calls it every round."""
        if self._failed is not None:
            raise DependencyError(self._failed)

    def seconds_without_receipt(self) -> float:
        """How long nothing was acknowledged though something should be; 0 where nothing is under way."""
        with self._state:
            return self._clock.monotonic() - self._progress if self._undelivered else 0.0

    def flush(self, deadline: Deadline) -> bool:
        """Wait for the receipts of everything handed over so far; False where the deadline or a refusal came first."""
        with self._state:
            return (
                self._state.wait_for(lambda: not self._undelivered or self._failed is not None, timeout=deadline.remaining())
                and not self._undelivered
            )

    def commit_as(self, membership: Callable[[], ConsumerGroupMetadata | None]) -> None:
        """In whose name a transaction commits offsets; nothing to know where the consumer commits them itself."""
        del membership

    @abstractmethod
    def close(self, deadline: Deadline) -> bool:
        """Flush, then stop. What is undelivered at the deadline is given up: it was not committed and comes again.

        Returns:
            Whether everything was delivered.
        """

    # ------------------------------------------------------------------- inside
    @abstractmethod
    def _submit(self, sending: Sending, receipts: Receipts | None) -> None: ...

    def _count_in(self) -> None:
        with self._state:
            if not self._undelivered:
                self._progress = self._clock.monotonic()
            self._undelivered += 1

    def _count_out(self, sendings: int) -> None:
        with self._state:
            self._undelivered -= sendings
            self._progress = self._clock.monotonic()
            if not self._undelivered:
                self._state.notify_all()

    def _fail(self, reason: str) -> None:
        with self._state:
            if self._failed is None:
                self._failed = reason
                log.error("publish.failed", error=reason)
            self._state.notify_all()

    def _too_large(self, sending: Sending) -> bool:
        """Whether the topic has refused this size before: not offered to it again until the worker restarts."""
        return sending.size_bytes >= self._refused_bytes.get(sending.topic, 2**62)

    def _remember_refusal(self, sending: Sending) -> None:
        self._refused_bytes[sending.topic] = min(sending.size_bytes, self._refused_bytes.get(sending.topic, 2**62))

    def _shrunk(self, sending: Sending) -> bool:
        """Leave something out; a record that cannot be made smaller ends the worker, for it would block its partition."""
        size = sending.size_bytes
        if sending.shrink(sending):
            log.warning("publish.too_large", topic=sending.topic, bytes=size)
            return True
        self._fail(f"Kafka topic {sending.topic} refuses a record of {size} bytes: raise its max.message.bytes")
        return False


class Producer(Protocol):
    """What sends: kafka-python's producer, and ours around it."""

    def send(self, topic: str, value: bytes | None, key: bytes | None, headers: Any, partition: int | None = None) -> Any:
        """The future of a record."""

    def partitions_for(self, topic: str) -> set[int]:
        """The topic's partitions."""


def send_to(producer: Producer, sending: Sending) -> Any:
    """Hand over to the client; its future. A long key is placed by its CRC: the client hashes in pure Python, 5 MB a second."""
    partition = None
    if sending.key is not None and len(sending.key) > LONG_KEY_BYTES:
        partitions = sorted(producer.partitions_for(sending.topic))
        partition = int(partitions[zlib.crc32(sending.key) % len(partitions)])
    return producer.send(sending.topic, sending.value, sending.key, sending.headers, partition=partition)


def _shrink_verdict(sending: Sending) -> bool:
    if sending.omitted or sending.value is None:
        return False
    smaller = envelopes.without_attributes(sending.value)
    sending.headers.append(("attributes_omitted", str(len(sending.value) - len(smaller)).encode()))
    sending.value, sending.omitted = smaller, 1
    return True


def _shrink_dead_letter(sending: Sending) -> bool:
    if sending.omitted == 0 and sending.value:
        sending.headers.append(("value_omitted", str(len(sending.value)).encode()))
        sending.value = None if sending.key is not None else b""
        sending.omitted = 1
        return True
    if sending.omitted <= 1:
        block = len(envelopes.DEAD_BLOCK) + sending.omitted
        kept: Headers = tuple(sending.headers[-block:])
        cut = sending.headers[:-block]
        sending.headers = [*kept, ("key_omitted", str(len(sending.key or b"")).encode())]
        sending.headers.append(("headers_omitted", str(sum(len(name) + len(value) for name, value in cut)).encode()))
        sending.key, sending.value, sending.omitted = None, b"", 2
        return True
    return False

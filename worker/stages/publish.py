"""Verdicts, retry records and dead letters to Kafka, each with a receipt when all in-sync replicas have it.

What was handed over is never given up: it stays *undelivered*, and its ledger entry open, until the broker takes it.

* Trouble that passes (no leader, no connection, a broker gone for an hour) is the client's: it re-sends in sequence,
  without duplicates, for ever (`kafka_clients.producer_options`).
* kafka-python's idempotent producer is dead after any refusal of a single record (one too large for the broker, say),
  and fails everything else in flight with that record's error. The mending thread then replaces the producer, finds the
  guilty record by sending the suspects alone, and sends the innocent again.
* A record the broker refuses for its size goes again without what made it large, and says so.
* A refusal that no re-send can cure (rights, login) makes `check` raise: the process ends with exit code 3, uncommitted.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from kafka import KafkaProducer
from kafka import errors as kafka_errors

from worker import envelopes
from worker.clock import Clock, Deadline, SystemClock
from worker.errors import ConfigurationError, DependencyError, FatalError
from worker.items import Delivery, Headers, Record
from worker.kafka_clients import describe, open_producer
from worker.settings import KafkaSettings

log = structlog.get_logger()

Receipt = Callable[[], None]
"""Called once, on the client's thread, when the broker has the record: must return at once."""

BACKOFF_S = 0.1
BACKOFF_MAX_S = 5.0
CLOSE_S = 2.0
LONG_KEY_BYTES = 4_096
"""The client hashes keys in pure Python, a second for each 5 MB: longer ones are placed by their CRC instead."""

TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
REFUSALS = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.UnsupportedCompressionTypeError,
    kafka_errors.InvalidTopicError,
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTimestampError,
    kafka_errors.PolicyViolationError,
    kafka_errors.ProducerFencedError,
)


@dataclass(slots=True)
class _Sending:
    """One record on its way, until its receipt."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    on_receipt: Receipt
    shrink: Callable[[_Sending], bool]
    """Makes it smaller in place; False where nothing is left to leave out."""
    attempts: int = 0
    omitted: int = 0

    @property
    def size_bytes(self) -> int:
        return len(self.key or b"") + len(self.value or b"") + sum(len(name) + len(value) for name, value in self.headers)


@dataclass(order=True, slots=True)
class _Failure:
    """A sending that has to go again."""

    due: float
    ticket: int
    sending: _Sending = field(compare=False)
    error: Exception | None = field(compare=False)
    producer: KafkaProducer | None = field(compare=False)


class Publisher:
    """Sends from any thread; `check`, `flush` and `close` are the main thread's.

    Raises:
        DependencyError: the broker is not usable at start, or from `check` when it refuses the worker for good.
    """

    def __init__(self, settings: KafkaSettings, *, clock: Clock | None = None) -> None:
        if settings.delivery == "exactly_once":
            raise ConfigurationError("WORKER_KAFKA__DELIVERY: exactly_once is not supported yet; use at_least_once")
        self._settings = settings
        self._clock = clock or SystemClock()
        self._state = threading.Condition()
        self._undelivered = 0
        self._progress = self._clock.monotonic()
        self._failures: list[_Failure] = []
        self._tickets = itertools.count()
        self._refused_bytes: dict[str, int] = {}  # by topic the smallest size the broker has refused
        self._gate_open = True
        self._failed: str | None = None
        self._stopping = False
        self._producer = open_producer(settings)
        self._mender = threading.Thread(target=self._mend, name="publish-mend", daemon=True)
        self._mender.start()

    # ------------------------------------------------------------------ sending
    def verdict(self, body: bytes, event_id: str, headers: Sequence[tuple[str, bytes]], on_receipt: Receipt) -> None:
        """Publish a verdict, keyed by the event id. One that is too large goes without the uploader's attributes."""
        sending = _Sending(self._settings.verdict_topic, event_id.encode(), body, list(headers), on_receipt, _shrink_verdict)
        self._submit(sending)

    def dead_letter(self, record: Record, code: str, message: str, delivery: Delivery, on_receipt: Receipt) -> None:
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
        sending = _Sending(self._settings.dead_letter_topic, record.key, value, headers, on_receipt, _shrink_dead_letter)
        self._submit(sending)

    def retry(self, record: Record, delivery: Delivery, delay_s: float, code: str, on_receipt: Receipt) -> None:
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

        def to_dead_letter(sending: _Sending) -> bool:
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

        self._submit(_Sending(self._settings.retry_topic, record.key, value, headers, on_receipt, to_dead_letter))

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
        """How long nothing was acknowledged though something should be; 0 where nothing is undelivered."""
        with self._state:
            return self._clock.monotonic() - self._progress if self._undelivered else 0.0

    def flush(self, deadline: Deadline) -> bool:
        """Wait for the receipts of everything handed over so far; False where the deadline or a refusal came first."""
        with self._state:
            return (
                self._state.wait_for(lambda: not self._undelivered or self._failed is not None, timeout=deadline.remaining())
                and not self._undelivered
            )

    def close(self, deadline: Deadline) -> bool:
        """Flush, then stop. What is undelivered at the deadline is given up: it was not committed and comes again.

        Returns:
            Whether everything was delivered.
        """
        delivered = self.flush(deadline)
        with self._state:
            self._stopping = True
            self._gate_open = False
            self._state.notify_all()
        _discard(self._producer, max(0.1, min(CLOSE_S, deadline.remaining())))
        self._mender.join(CLOSE_S)
        return delivered

    # ------------------------------------------------------------------- inside
    def _submit(self, sending: _Sending) -> None:
        with self._state:
            if not self._undelivered:
                self._progress = self._clock.monotonic()
            self._undelivered += 1
        self._send(sending)

    def _send(self, sending: _Sending) -> None:
        """Hand over to the client; what it does not take now goes to the mending thread."""
        with self._state:
            producer = self._producer if self._gate_open else None
        if producer is None:
            self._again(sending, None, None)
            return
        self._hand_over(sending, producer)

    def _hand_over(self, sending: _Sending, producer: KafkaProducer) -> Any:
        if sending.size_bytes >= self._refused_bytes.get(sending.topic, 2**62) and not self._shrunk(sending):
            return None
        try:
            future = producer.send(
                sending.topic, sending.value, sending.key, sending.headers, partition=self._long_key_partition(producer, sending)
            )
        except TOO_LARGE:  # larger than max_request_size: refused by the client, which is none the worse for it
            if self._shrunk(sending):
                self._again(sending, None, None)
            return None
        except (kafka_errors.KafkaError, ValueError) as error:  # ValueError: the topic vanished from the metadata
            self._again(sending, error if isinstance(error, REFUSALS) else None, producer)
            return None
        future.add_callback(lambda _: self._delivered(sending))
        future.add_errback(lambda error: self._again(sending, error, producer))
        return future

    def _delivered(self, sending: _Sending) -> None:
        try:
            sending.on_receipt()
        except Exception as error:  # noqa: BLE001 - the client would log and forget it, and the event stay open for ever
            self._fail(f"a receipt could not be processed: {error!r}")
        with self._state:
            self._undelivered -= 1
            self._progress = self._clock.monotonic()
            if not self._undelivered:
                self._state.notify_all()

    def _again(self, sending: _Sending, error: Exception | None, producer: KafkaProducer | None) -> None:
        """Queue for the mending thread. On the client's thread too: does next to nothing."""
        with self._state:
            wait = 0.0 if error is None else min(BACKOFF_S * 2 ** min(sending.attempts, 10), BACKOFF_MAX_S)
            sending.attempts += error is not None
            due = self._clock.monotonic() + wait
            heapq.heappush(self._failures, _Failure(due, next(self._tickets), sending, error, producer))
            self._state.notify_all()

    def _fail(self, reason: str) -> None:
        with self._state:
            if self._failed is None:
                self._failed = reason
                log.error("publish.failed", error=reason)
            self._state.notify_all()

    def _shrunk(self, sending: _Sending) -> bool:
        """Leave something out; a record that cannot be made smaller ends the worker, for it would block its partition."""
        size = sending.size_bytes
        if sending.shrink(sending):
            log.warning("publish.too_large", topic=sending.topic, bytes=size)
            return True
        self._fail(f"Kafka topic {sending.topic} refuses a record of {size} bytes: raise its max.message.bytes")
        return False

    def _long_key_partition(self, producer: KafkaProducer, sending: _Sending) -> int | None:
        if sending.key is None or len(sending.key) <= LONG_KEY_BYTES:
            return None
        partitions = sorted(producer.partitions_for(sending.topic))
        return int(partitions[zlib.crc32(sending.key) % len(partitions)])

    # ------------------------------------------------------- the mending thread
    def _mend(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._stopping or self._failures)
                if self._stopping:
                    return
                wait = self._failures[0].due - self._clock.monotonic()
                if wait > 0 or self._failed is not None:
                    self._state.wait(min(max(wait, 0.01), 1.0))
                    continue
                failures = self._take_due()
            try:
                self._treat(failures)
            except Exception as error:  # noqa: BLE001 - a dead mender would leave events open with nobody to tell
                self._fail(str(error) if isinstance(error, FatalError) else f"publishing failed: {error!r}")
                return

    def _take_due(self) -> list[_Failure]:
        now = self._clock.monotonic()
        due = []
        while self._failures and self._failures[0].due <= now:
            due.append(heapq.heappop(self._failures))
        return due

    def _treat(self, failures: list[_Failure]) -> None:
        for failure in failures:
            if isinstance(failure.error, REFUSALS):
                self._fail(f"Kafka topic {failure.sending.topic} refuses the worker: {describe(failure.error)}")
                return
        if any(failure.producer is self._producer and _kills_producer(failure.error) for failure in failures):
            self._renew()
        suspects = [failure.sending for failure in failures if isinstance(failure.error, TOO_LARGE)]
        try:
            for sending in suspects:
                self._probe(sending)
        finally:
            self._open_gate()
        for failure in failures:
            if not isinstance(failure.error, TOO_LARGE):
                self._send(failure.sending)

    def _renew(self) -> None:
        """Replace a dead producer; closes the gate, so that nothing but probes goes to the new one until it is opened."""
        with self._state:
            self._gate_open = False
        log.warning("publish.producer_replaced", undelivered=self._undelivered)
        _discard(self._producer, CLOSE_S)
        while not self._stopping:
            try:
                self._producer = open_producer(self._settings)
                return
            except DependencyError as error:
                log.warning("publish.broker_unreachable", error=str(error))

    def _open_gate(self) -> None:
        with self._state:
            self._gate_open = not self._stopping

    def _probe(self, sending: _Sending) -> None:
        """Send one suspect alone: refused again, it is guilty, and goes on without what made it large."""
        with self._state:
            self._gate_open = False
        done = threading.Event()
        outcomes: list[Exception | None] = []

        def settle(outcome: Exception | None) -> None:
            outcomes.append(outcome)
            done.set()

        try:
            future = self._producer.send(sending.topic, sending.value, sending.key, sending.headers)
        except kafka_errors.KafkaError as error:
            self._again(sending, error if not isinstance(error, TOO_LARGE) else None, None)
            return
        future.add_callback(lambda _: settle(None))
        future.add_errback(settle)
        while not done.wait(0.1):
            if self._stopping:
                return
        outcome = outcomes[0]
        if outcome is None:
            self._delivered(sending)
            return
        if _kills_producer(outcome):
            self._renew()
        if isinstance(outcome, TOO_LARGE):
            self._refused_bytes[sending.topic] = min(sending.size_bytes, self._refused_bytes.get(sending.topic, 2**62))
            if self._shrunk(sending):
                self._again(sending, None, None)
        else:
            self._again(sending, outcome, None)


def _kills_producer(error: Exception | None) -> bool:
    """Whether an idempotent kafka-python producer is of no use after failing a batch with this error."""
    return error is not None and not getattr(error, "retriable", False)


def _discard(producer: KafkaProducer, seconds: float) -> None:
    """Close without waiting for what cannot be delivered: its futures fail. `close` alone raises before it would."""
    producer._unregister_cleanup()
    sender = producer._sender
    sender.force_close()
    sender.join(seconds)
    with suppress(kafka_errors.KafkaError):
        producer.close(timeout=0)


def _shrink_verdict(sending: _Sending) -> bool:
    if sending.omitted or sending.value is None:
        return False
    smaller = envelopes.without_attributes(sending.value)
    sending.headers.append(("attributes_omitted", str(len(sending.value) - len(smaller)).encode()))
    sending.value, sending.omitted = smaller, 1
    return True


def _shrink_dead_letter(sending: _Sending) -> bool:
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

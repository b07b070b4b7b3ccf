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
from dataclasses import dataclass, field
from typing import Any

import structlog
from kafka import KafkaProducer
from kafka import errors as kafka_errors

from worker import kafka_speed
from worker.clock import Clock, Deadline, SystemClock
from worker.errors import DependencyError, FatalError
from worker.kafka_clients import BUSY_LINGER_MS, LINGER_MS, describe, open_producer
from worker.kafka_workarounds import discard
from worker.outcomes import Receipts
from worker.settings import KafkaSettings
from worker.stages.publish_records import REFUSALS, TOO_LARGE, RecordWriter, Sending, send_to

log = structlog.get_logger()

BACKOFF_S = 0.1
BACKOFF_MAX_S = 5.0
CLOSE_S = 2.0
BUSY_WINDOW_S = 0.25
BUSY_RECORDS_PER_S = 200
"""So many, as far as the last window shows, wait for company longer."""


@dataclass(order=True, slots=True)
class _Failure:
    """A sending that has to go again."""

    due: float
    ticket: int
    sending: Sending = field(compare=False)
    error: Exception | None = field(compare=False)
    producer: KafkaProducer | None = field(compare=False)


class Publisher(RecordWriter):
    """Publishes at least once: every record as soon as it is handed over.

    Raises:
        DependencyError: the broker is not usable at start, or from `check` when it refuses the worker for good.
    """

    def __init__(self, settings: KafkaSettings, *, clock: Clock | None = None) -> None:
        super().__init__(settings, clock or SystemClock())
        self._failures: list[_Failure] = []
        self._tickets = itertools.count()
        self._gate_open = True
        self._stopping = False
        self._producer = open_producer(settings)
        self._lingering = (self._producer, LINGER_MS)
        self._recent, self._since = 0, self._clock.monotonic()
        self._mender = threading.Thread(target=self._mend, name="publish-mend", daemon=True)
        self._mender.start()

    def close(self, deadline: Deadline) -> bool:
        """See `RecordWriter`."""
        delivered = self.flush(deadline)
        with self._state:
            self._stopping = True
            self._gate_open = False
            self._state.notify_all()
        discard(self._producer, max(0.1, min(CLOSE_S, deadline.remaining())))
        self._mender.join(CLOSE_S)
        return delivered

    # ------------------------------------------------------------------- inside
    def _submit(self, sending: Sending, receipts: Receipts | None) -> None:
        self._count_in()
        self._linger()
        self._send(sending)

    def _linger(self) -> None:
        """Let records wait longer for company while many go out."""
        now = self._clock.monotonic()
        self._recent += 1
        if (seconds := now - self._since) >= BUSY_WINDOW_S:
            wanted = (self._producer, BUSY_LINGER_MS if self._recent >= BUSY_RECORDS_PER_S * seconds else LINGER_MS)
            self._recent, self._since = 0, now
            if wanted != self._lingering:
                self._lingering = wanted
                kafka_speed.linger(*wanted)

    def _send(self, sending: Sending) -> None:
        """Hand over to the client; what it does not take now goes to the mending thread."""
        with self._state:
            producer = self._producer if self._gate_open else None
        if producer is None:
            self._again(sending, None, None)
            return
        self._hand_over(sending, producer)

    def _hand_over(self, sending: Sending, producer: KafkaProducer) -> Any:
        if self._too_large(sending) and not self._shrunk(sending):
            return None
        try:
            future = send_to(producer, sending)
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

    def _delivered(self, sending: Sending) -> None:
        try:
            sending.on_receipt()
        except Exception as error:  # noqa: BLE001 - the client would log and forget it, and the event stay open for ever
            self._fail(f"a receipt could not be processed: {error!r}")
        self._count_out(1)

    def _again(self, sending: Sending, error: Exception | None, producer: KafkaProducer | None) -> None:
        """Queue for the mending thread. On the client's thread too: does next to nothing."""
        with self._state:
            wait = 0.0 if error is None else min(BACKOFF_S * 2 ** min(sending.attempts, 10), BACKOFF_MAX_S)
            sending.attempts += error is not None
            due = self._clock.monotonic() + wait
            heapq.heappush(self._failures, _Failure(due, next(self._tickets), sending, error, producer))
            self._state.notify_all()

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
        discard(self._producer, CLOSE_S)
        while not self._stopping:
            try:
                self._producer = open_producer(self._settings)
                return
            except DependencyError as error:
                log.warning("publish.broker_unreachable", error=str(error))

    def _open_gate(self) -> None:
        with self._state:
            self._gate_open = not self._stopping

    def _probe(self, sending: Sending) -> None:
        """Send one suspect alone: refused again, it is guilty, and goes on without what made it large."""
        with self._state:
            self._gate_open = False
        done = threading.Event()
        outcomes: list[Exception | None] = []

        def settle(outcome: Exception | None) -> None:
            outcomes.append(outcome)
            done.set()

        try:
            future = send_to(self._producer, sending)
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
            self._remember_refusal(sending)
            if self._shrunk(sending):
                self._again(sending, None, None)
        else:
            self._again(sending, outcome, None)


def _kills_producer(error: Exception | None) -> bool:
    """Whether an idempotent kafka-python producer is of no use after failing a batch with this error."""
    return error is not None and not getattr(error, "retriable", False)

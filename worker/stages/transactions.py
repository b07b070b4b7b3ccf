"""Exactly once: what is published for a record and the record's offset, in one transaction of Kafka.

Events finish in any order, offsets are committed in theirs. So the outputs of a record (verdict, dead letter, retry
record) wait here, in memory, until every earlier record of its partition has its own; the in-flight budget, which is
refunded at the receipt, bounds them. One thread, back to back:

1. look at the membership in the group, and only then take the ready prefix of each partition (`Ledger.take`): offsets are
   committed in the name of the generation that was there *before*, so that a rebalance in between is refused (KIP-447);
2. begin a transaction, send the outputs, wait until the broker has every one;
3. put the offsets into it, commit;
4. only then: receipts, and the ledger is told.

Whatever fails aborts the transaction, and the same is taken again, or what is left of it. What is certain to be read
again by a partition's next owner (its tenure has ended) is dropped, never published. Errors by what happens next:

* the group has moved on: abort, take again with the new generation;
* a record is too large: abort, find the guilty by sending the suspects alone, make it smaller (`publish_records`);
* the commit was asked for and not answered: a new producer ends the old transaction one way or the other, then the
  group's offsets tell which; receipts or repeat;
* the coordinator ended the transaction for its age (a broker was away for too long): a new producer, again;
* another process has taken the transactional id over, or rights are missing: `check` raises, exit code 3;
* anything else: a new producer, again, for as long as it takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog
from kafka import errors as kafka_errors

from worker.clock import Clock, Deadline, SystemClock
from worker.errors import DependencyError, FatalError
from worker.kafka_clients import describe
from worker.kafka_transactions import (
    CommitUnknown,
    Fate,
    GaveUp,
    TransactionalProducer,
    TransactionsRefusedError,
    committed_offsets,
    fate,
    transactional_id,
)
from worker.ledger import Ledger
from worker.outcomes import Receipts
from worker.settings import KafkaSettings
from worker.stages.publish_records import TOO_LARGE, RecordWriter, Sending, send_to
from worker.stages.waiting_outputs import Taken, Unit, WaitingOutputs

if TYPE_CHECKING:
    from kafka.coordinator.base import ConsumerGroupMetadata

log = structlog.get_logger()

TICK_S = 0.2
"""How often is looked for what nobody announces: ended tenures, transaction markers to commit past."""
BACKOFF_S = 0.05
BACKOFF_MAX_S = 5.0
COMMIT_PATIENCE_S = 5.0
"""Granted to a commit even where sending has used up the time."""
INIT_PATIENCE_S = 30.0
"""For one attempt; the next one begins with a new connection."""
STATIC_GRACE_S = 5.0
CLOSE_S = 2.0
ABORT_S = 1.0
CAREFUL_AFTER = 3
"""After so many failures in a row every record is sent alone: batches may be what fails."""


class _RecordRefused(Exception):  # noqa: N818 - the transaction starts over, without what made the record too large
    pass


class _Ended(Exception):  # noqa: N818 - `_fail` was called: the thread ends
    pass


class TransactionalPublisher(RecordWriter):
    """Publishes exactly once, for readers with `isolation.level=read_committed`.

    Raises:
        DependencyError: the broker is not usable or has no transactions; or from `check`, when it refuses the worker for
            good or another process has fenced it.
        ConfigurationError: the broker does not accept an option.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        ledger: Ledger,
        *,
        clock: Clock | None = None,
        observer: Callable[[bool, float], None] = lambda committed, seconds: None,
    ) -> None:
        """`observer` is told of every transaction whether it was committed, and its seconds; must return at once."""
        super().__init__(settings, clock or SystemClock())
        self._ledger = ledger
        self._observer = observer
        self._timeout_s = settings.transaction_timeout_ms / 1000
        self._membership: Callable[[], ConsumerGroupMetadata | None] = lambda: None
        self._outputs = WaitingOutputs(ledger)
        self._suspects: set[Sending] = set()
        self._work = False
        self._stopping = False
        self._give_up_at = 0.0
        self._failures = 0
        self._trying_since: float | None = None
        self._unknown: tuple[Taken, float] | None = None
        self._name = transactional_id(settings)
        self._producer: TransactionalProducer | None = self._first_producer()
        self._thread = threading.Thread(target=self._run, name="transactions", daemon=True)
        self._thread.start()

    def commit_as(self, membership: Callable[[], ConsumerGroupMetadata | None]) -> None:
        """See `RecordWriter`. Without a membership nothing is published: it waits."""
        self._membership = membership

    def seconds_without_receipt(self) -> float:
        """How long the transaction under way, or its repeats, has been tried."""
        since = self._trying_since
        return 0.0 if since is None else self._clock.monotonic() - since

    def close(self, deadline: Deadline) -> bool:
        """See `RecordWriter`. A transaction under way gets a moment to end; what is open after it is aborted."""
        delivered = self.flush(deadline)
        with self._state:
            self._stopping = True
            self._give_up_at = self._clock.monotonic() + CLOSE_S
            self._state.notify_all()
        self._thread.join(CLOSE_S + 2 * ABORT_S)
        return delivered

    # ------------------------------------------------------- from any thread
    def _submit(self, sending: Sending, receipts: Receipts | None) -> None:
        """Keep it until the record has all of its outputs, then until it is its turn."""
        if receipts is None or receipts.position is None:
            raise ValueError("a transaction needs to know of which record this is an output")
        self._count_in()
        ready, late = self._outputs.add(sending, receipts, receipts.position)
        if ready:
            with self._state:
                self._work = True
                self._state.notify_all()
        if late is not None:
            self._drop(late)

    def _drop(self, unit: Unit) -> None:
        unit.receipts.dropped()
        self._count_out(len(unit.sendings))

    # ------------------------------------------------------------ the thread
    def _run(self) -> None:
        try:
            while self._await_work():
                self._turn()
        except (GaveUp, _Ended):
            pass
        except FatalError as error:
            self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - a dead thread would leave events open with nobody to tell
            self._fail(f"publishing failed: {error!r}")
        finally:
            self._retire()

    def _await_work(self) -> bool:
        with self._state:
            self._state.wait_for(lambda: self._stopping or self._work, timeout=TICK_S)
            self._work = False
            return not self._stopping and self._failed is None

    def _turn(self) -> None:
        """One transaction, if there is anything to commit."""
        for unit in self._outputs.remove_stale():
            self._suspects.difference_update(unit.sendings)
            self._drop(unit)
        if self._producer is None:
            self._reopen()
        member = self._membership()
        if member is None or member.generation_id < 0 or not member.member_id:
            return  # without a generation the broker would take the offsets of whoever sends them
        taken = self._ledger.take()
        if not taken:
            self._trying_since = None
            return
        began = self._clock.monotonic()
        self._trying_since = self._trying_since or began
        try:
            self._transact(taken, member, began)
        except GaveUp:
            self._abort(ABORT_S, heed=False)
            raise
        except CommitUnknown as error:
            log.warning("transactions.commit_unanswered", error=str(error))
            if isinstance(error.__cause__, Exception) and fate(error.__cause__) is Fate.FENCED:
                self._fenced(error.__cause__, began)
            self._unknown = (taken, began)
            self._retire()
            self._pause()
        except _RecordRefused:
            self._retire()
            self._aborted(began)
        except (kafka_errors.KafkaError, ValueError, RuntimeError) as error:  # ValueError: a topic vanished
            self._treat(error, taken, began)
            self._aborted(began)
            self._pause()
        else:
            self._done(taken, began)

    def _transact(self, taken: Taken, member: ConsumerGroupMetadata, began: float) -> None:
        if self._producer is None:
            raise RuntimeError("no producer")
        sendings = [sending for unit in self._outputs.of(taken) for sending in unit.sendings]
        self._producer.begin()
        self._send_suspects([sending for sending in sendings if sending in self._suspects], self._producer, began)
        self._send_together([sending for sending in sendings if sending not in self._suspects], self._producer, began)
        self._suspects.difference_update(sendings)
        offsets = {partition: prefix.next for partition, prefix in taken.items()}
        self._producer.commit(offsets, member, max(self._left(began), COMMIT_PATIENCE_S))

    def _send_suspects(self, suspects: list[Sending], producer: TransactionalProducer, began: float) -> None:
        """One at a time, the largest first: what is refused alone is guilty, and goes on without what made it large."""
        for sending in sorted(suspects, key=lambda sending: sending.size_bytes, reverse=True):
            (error,) = producer.settle([self._hand_over(sending, producer)], self._left(began))
            if isinstance(error, TOO_LARGE):
                self._remember_refusal(sending)
                self._shrink(sending)
                raise _RecordRefused
            if error is not None:
                raise error

    def _send_together(self, sendings: list[Sending], producer: TransactionalProducer, began: float) -> None:
        futures = []
        stopped: Exception | None = None
        for sending in sendings:
            try:
                futures.append(self._hand_over(sending, producer))
            except kafka_errors.KafkaError as error:  # an earlier one has failed meanwhile: it says why
                stopped = error
                break
        errors = producer.settle(futures, self._left(began))
        refused = {sending for sending, error in zip(sendings, errors, strict=False) if isinstance(error, TOO_LARGE)}
        if refused:  # all that were in flight fail with the error of one
            self._suspects |= refused
            raise _RecordRefused
        failed = stopped or next((error for error in errors if error is not None), None)
        if failed is not None:
            raise failed

    def _hand_over(self, sending: Sending, producer: TransactionalProducer) -> Any:
        if self._too_large(sending):
            self._shrink(sending)
        while True:
            try:
                return send_to(producer, sending)
            except TOO_LARGE:  # larger than max_request_size: refused by the client, which is none the worse for it
                self._shrink(sending)

    def _shrink(self, sending: Sending) -> None:
        if not self._shrunk(sending):
            raise _Ended

    def _done(self, taken: Taken, began: float) -> None:
        """The transaction is committed: receipts, then the ledger."""
        self._observer(True, self._clock.monotonic() - began)
        self._failures = 0
        self._trying_since = None
        for unit in self._outputs.remove(taken):
            try:
                for sending in unit.sendings:
                    sending.on_receipt()
            except Exception as error:  # noqa: BLE001 - the event would stay open for ever
                self._fail(f"a receipt could not be processed: {error!r}")
            self._count_out(len(unit.sendings))
        self._ledger.confirmed(taken)

    # ------------------------------------------------------------- failures
    def _treat(self, error: Exception, taken: Taken, began: float) -> None:
        """What happens next after an error of the client or the broker."""
        error = (self._producer.last_error if self._producer is not None else None) or error
        age_s = self._clock.monotonic() - began
        match fate(error):
            case Fate.GROUP:
                log.info("transactions.group_moved_on", error=describe(error))
                self._abort(self._timeout_s)
            case Fate.REFUSED:
                raise DependencyError(f"Kafka refuses the worker's transactions: {describe(error)}") from error
            case _:
                log.warning("transactions.aborted", error=describe(error), after_ms=round(age_s * 1000))
                if fate(error) is Fate.FENCED:
                    self._fenced(error, began)
                if self._failures >= CAREFUL_AFTER:
                    self._suspects.update(sending for unit in self._outputs.of(taken) for sending in unit.sendings)
                self._retire()

    def _fenced(self, error: Exception, began: float) -> None:
        """Either another process has our name, or the transaction grew too old: then only its age is to blame.

        A process that was stopped for long may be both. A static member then waits for its own consumer to hear that
        another one of its name has joined, which ends the worker, before it takes the name back.
        """
        if self._clock.monotonic() - began < self._timeout_s:
            raise DependencyError(
                f"fenced: another process has taken over the transactional id {self._name};"
                " is a second worker running with the same group_instance_id?"
            ) from error
        if self._settings.group_instance_id is not None:
            self._rest(STATIC_GRACE_S)

    def _aborted(self, began: float) -> None:
        self._observer(False, self._clock.monotonic() - began)
        self._work = True

    def _pause(self) -> None:
        wait_s = min(BACKOFF_S * 2 ** min(self._failures, 10), BACKOFF_MAX_S)
        self._failures += 1
        with self._state:
            self._state.wait_for(lambda: self._stopping, timeout=wait_s)
            self._work = True

    def _abort(self, patience_s: float, *, heed: bool = True) -> None:
        """End the open transaction with the producer that began it; where that fails, its successor does."""
        if self._producer is None:
            return
        try:
            self._producer.abort(patience_s, heed=heed)
        except (kafka_errors.KafkaError, RuntimeError) as error:
            log.debug("transactions.abort_failed", error=describe(error))
            self._retire()

    def _retire(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.discard(CLOSE_S)

    def _first_producer(self) -> TransactionalProducer:
        budget = Deadline(self._settings.startup_timeout_s, self._clock)
        while True:
            try:
                return self._open(min(INIT_PATIENCE_S, budget.remaining()))
            except kafka_errors.KafkaError as error:
                if budget.expired():
                    raise DependencyError(
                        f"Kafka does not begin transactions: {describe(error)}; are there as many brokers as"
                        " transaction.state.log.replication.factor and transaction.state.log.min.isr ask for?"
                    ) from error

    def _open(self, patience_s: float) -> TransactionalProducer:
        producer = TransactionalProducer(self._settings, self._name, self._expired)
        try:
            producer.initialize(patience_s)
        except (kafka_errors.KafkaError, FatalError, GaveUp):
            producer.discard()
            raise
        return producer

    def _reopen(self) -> None:
        """A new producer of the same name, for as long as it takes; then what the last commit has come to is found out."""
        while self._producer is None:
            self._give_up_if_closing()
            try:
                self._producer = self._open(INIT_PATIENCE_S)
            except TransactionsRefusedError:
                raise
            except (DependencyError, kafka_errors.KafkaError) as error:
                log.warning("transactions.broker_unreachable", error=describe(error))
                self._rest()
        if self._unknown is not None:
            taken, began = self._unknown
            if self._took_place(taken):
                self._done(taken, began)
            else:
                self._aborted(began)
            self._unknown = None

    def _took_place(self, taken: Taken) -> bool:
        """Whether the transaction was committed: the offsets are, and nobody but us commits those of a tenure that lasts."""
        while True:
            held = {key: prefix for key, prefix in taken.items() if self._ledger.holds(key, prefix.generation)}
            if not held:
                return False
            try:
                committed = committed_offsets(self._settings, held)
            except (DependencyError, kafka_errors.KafkaError) as error:
                log.warning("transactions.broker_unreachable", error=describe(error))
                self._rest()
                self._give_up_if_closing()
                continue
            took_place = all(committed.get(key, -1) >= prefix.next for key, prefix in held.items())
            log.info("transactions.commit_found_out", took_place=took_place)
            return took_place

    def _rest(self, seconds: float | None = None) -> None:
        with self._state:
            self._state.wait_for(lambda: self._stopping, timeout=BACKOFF_S * 10 if seconds is None else seconds)

    def _left(self, began: float) -> float:
        return max(0.0, began + self._timeout_s - self._clock.monotonic())

    def _expired(self) -> bool:
        return self._stopping and self._clock.monotonic() >= self._give_up_at

    def _give_up_if_closing(self) -> None:
        if self._stopping:
            raise GaveUp

"""A transactional producer of kafka-python 3.0.12, with an end to every wait and the fate of every error.

What the client gets wrong, and how this lives with it (each from reading its `producer/transaction_manager.py`):

* `commit_transaction` and its like wait for ever. Here every wait ends with the caller's patience.
* A request to a coordinator that cannot be connected to is forgotten (`kafka_workarounds.keep_requests`).
* A request to the coordinator that times out (not: whose connection breaks) ends the producer for good, and whether the
  transaction was committed is then unknown: `CommitUnknown`.
* A produce error that bumps the epoch lets a commit that is already asked for answer "done" without having asked the
  broker. So nothing is committed before every record has its acknowledgement.
* Offsets that an aborted transaction held are sent again with the next one: they are cleared.
* After a refused record the sequence numbers are wrong: whoever aborts for any reason but the group's must replace the
  producer. A new one of the same transactional id aborts what the old one left open, and fences it.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from kafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.structs import OffsetAndMetadata

from worker.errors import ConfigurationError, DependencyError
from worker.kafka_clients import describe, open_admin, open_producer
from worker.kafka_refusals import REFUSALS
from worker.kafka_workarounds import discard, keep_requests
from worker.settings import KafkaSettings, environment_name

if TYPE_CHECKING:
    from kafka.coordinator.base import ConsumerGroupMetadata

    from worker.ledger import Partition

WAIT_MS = 50
RETRY_BACKOFF_MS = 20
"""A transaction that begins while the markers of the last one are being written is told to ask again: nearly every one."""
NEEDED_APIS = {
    "InitProducerId": 22,
    "AddPartitionsToTxn": 24,
    "AddOffsetsToTxn": 25,
    "EndTxn": 26,
    "TxnOffsetCommit": 28,
    "DescribeTransactions": 65,
}
"""The last one is never sent: a broker that takes transactions but cannot describe them (the embedded one) does not hide
what was aborted either."""


class Fate(Enum):
    """What an error means for whoever holds the transaction."""

    GROUP = "the group has moved on: abort, and take what is still ours with the new generation"
    FENCED = "another producer has this transactional id now, or the coordinator ended the transaction for its age"
    REFUSED = "no repeat cures it"
    AGAIN = "abort, replace the producer, try again"


class TransactionsRefusedError(DependencyError):
    """The broker has no transactions, or not for this user: waiting does not help."""


class GaveUp(Exception):  # noqa: N818 - no error: the owner closes
    """The owner closes, and has no more time for this transaction."""


class CommitUnknown(Exception):  # noqa: N818 - a state of knowledge, not an error by itself
    """The commit was asked for and not answered: only the group's offsets tell whether it took place."""


def fate(error: Exception) -> Fate:
    """What to do about a foreign error of a transactional call or of a record sent in a transaction."""
    if isinstance(error, (kafka_errors.CommitFailedError, kafka_errors.FencedInstanceIdError)):
        # A static member that has just joined anew is fenced by itself; by another, its consumer ends the worker.
        return Fate.GROUP
    if isinstance(error, (kafka_errors.ProducerFencedError, kafka_errors.InvalidProducerEpochError)):
        return Fate.FENCED
    if isinstance(error, REFUSALS):
        return Fate.REFUSED
    return Fate.AGAIN


def transactional_id(settings: KafkaSettings) -> str:
    """Begins with the group, so that one prefixed ACL covers every worker; of this process alone, unless membership is static.

    With `group_instance_id` it outlives a restart: the new process ends what the old one left open, and fences it.
    """
    name = settings.group_instance_id or f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
    return f"{settings.group_id}-{name}"


def missing_apis(broker_version_data: Any) -> list[str]:
    """Which requests a broker would have to know for transactions and does not."""
    known = getattr(broker_version_data, "api_versions", None)
    return [] if not known else [name for name, key in NEEDED_APIS.items() if key not in known]


class TransactionalProducer:
    """One transaction at a time, for one thread. Every method may raise the client's errors: see `fate`."""

    def __init__(self, settings: KafkaSettings, name: str, expired: Callable[[], bool] = lambda: False) -> None:
        """Connect; `begin` only after `initialize`. `expired` is asked in every wait: true ends it with GaveUp.

        Raises:
            DependencyError: not reachable within `startup_timeout_s`, or refused; TransactionsRefusedError: it has none.
            ConfigurationError: an option is unusable.
        """
        self.name = name
        self._settings = settings
        self._expired = expired
        self._raw = open_producer(
            settings,
            transactional_id=name,
            transaction_timeout_ms=settings.transaction_timeout_ms,
            retry_backoff_ms=RETRY_BACKOFF_MS,
        )
        keep_requests(self._raw)
        self._manager = self._raw._transaction_manager
        missing = missing_apis(self._raw._sender._client._manager.broker_version_data)
        if missing:
            self.discard()
            raise TransactionsRefusedError(
                f"Kafka at {','.join(settings.bootstrap_servers)} has no transactions (it lacks {', '.join(missing)}):"
                f" use a broker that has, Apache Kafka 3.0 or later, or {environment_name('kafka', 'delivery')}=at_least_once"
            )

    def initialize(self, patience_s: float) -> None:
        """Take over the transactional id: what an earlier producer of this name left open is aborted, or its commit completed.

        Raises:
            TransactionsRefusedError: this user may not use the transactional id.
            ConfigurationError: the broker does not allow the transaction timeout.
        """
        try:
            self._wait(self._manager.initialize_transactions, patience_s)
        except kafka_errors.TransactionalIdAuthorizationFailedError as error:
            raise TransactionsRefusedError(
                f"Kafka refuses the transactional id {self.name}: allow this user Write and Describe on transactional ids"
                f" that begin with {self._settings.group_id}-"
            ) from error
        except kafka_errors.KafkaError as error:
            if "InvalidTransactionTimeout" in str(error):
                setting = environment_name("kafka", "transaction_timeout_ms")
                raise ConfigurationError(f"{setting}: more than the broker's transaction.max.timeout.ms") from error
            raise

    def begin(self) -> None:
        """Begin a transaction; nothing is sent yet."""
        self._raw.begin_transaction()

    def send(self, topic: str, value: bytes | None, key: bytes | None, headers: Any, partition: int | None = None) -> Any:
        """The future of a record in this transaction."""
        return self._raw.send(topic, value, key, headers, partition=partition)

    def partitions_for(self, topic: str) -> set[int]:
        """As KafkaProducer's."""
        found: set[int] = self._raw.partitions_for(topic)
        return found

    def settle(self, futures: Iterable[Any], patience_s: float) -> list[Exception | None]:
        """Wait for the acknowledgements of these records; for each the error, or None."""
        pending = list(futures)
        deadline = time.monotonic() + patience_s
        while not all(future.is_done for future in pending):
            self._check(deadline)
            try:
                self._raw.flush(timeout=WAIT_MS / 1000)
            except kafka_errors.KafkaTimeoutError:
                continue
        return [future.exception if future.failed() else None for future in pending]

    def commit(self, offsets: Mapping[Partition, int], member: ConsumerGroupMetadata, patience_s: float) -> None:
        """Put the offsets into the transaction, in the name of this member of the group, and commit it.

        Every record must be acknowledged (`settle`) before.

        Raises:
            CommitUnknown: the commit was asked for; whether it took place is not known.
        """
        positions = {TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}
        self._wait(lambda: self._manager.send_offsets_to_transaction(positions, member), patience_s)
        result = self._manager.begin_commit()
        try:
            self._wait(lambda: result, patience_s)
        except (kafka_errors.KafkaError, GaveUp, RuntimeError) as error:
            raise CommitUnknown(describe(error)) from error

    def abort(self, patience_s: float, *, heed: bool = True) -> None:
        """Abort, so that the producer can be used again: only after `Fate.GROUP`, or where nothing has failed.

        Without `heed` the owner's closing does not end the wait.
        """
        self._wait(self._manager.begin_abort, patience_s, heed=heed)
        self._manager._pending_txn_offset_commits.clear()

    def discard(self, seconds: float = 1.0) -> None:
        """Stop without another word to the broker; the next producer of this name ends what is open."""
        discard(self._raw, seconds)

    @property
    def last_error(self) -> Exception | None:
        """Why the client refuses further calls, where it does: its own exception then says only that it does."""
        error: Exception | None = self._manager.last_error
        return error

    def _wait(self, ask: Callable[[], Any], patience_s: float, *, heed: bool = True) -> None:
        result = ask()
        self._raw._sender.wakeup()
        deadline = time.monotonic() + patience_s
        while not result.wait(timeout_ms=WAIT_MS):
            self._check(deadline, heed=heed)

    def _check(self, deadline: float, *, heed: bool = True) -> None:
        if heed and self._expired():
            raise GaveUp
        if time.monotonic() >= deadline:
            raise kafka_errors.KafkaTimeoutError("the broker has not answered in time")


def committed_offsets(settings: KafkaSettings, partitions: Iterable[Partition]) -> dict[Partition, int]:
    """The group's committed offsets, asked of the broker in a connection of its own. Raises as `open_admin`, and KafkaError."""
    wanted = [TopicPartition(*partition) for partition in partitions]
    admin = open_admin(settings)
    try:
        found = admin.list_group_offsets({settings.group_id: wanted})[settings.group_id]
        return {(tp.topic, tp.partition): offset.offset for tp, offset in found.items() if offset.offset >= 0}
    finally:
        admin.close()

"""Poll, pause, rebalance, commit: the one owner of the Kafka consumer, called by the main thread alone.

The client (kafka-python 3) does its network work on a thread of its own and calls the rebalance listener there, but
only while the main thread waits inside `poll` or `close`: the two never act at the same time. While a revoked
partition's records are finished, `poll` blocks, for a fifth of the poll interval at most; heartbeats go on meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import structlog
from kafka import KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.structs import OffsetAndMetadata

from worker.batch_guard import Unreadable
from worker.clock import Clock, Deadline, SystemClock
from worker.errors import ConfigurationError, DependencyError
from worker.items import Record
from worker.kafka_clients import describe, open_consumer
from worker.kafka_workarounds import before_poll, forget_owned
from worker.ledger import Ledger, Partition
from worker.settings import KafkaSettings
from worker.stages.pacing import Pacing

if TYPE_CHECKING:
    from kafka.coordinator.base import ConsumerGroupMetadata

log = structlog.get_logger()

REVOKE_WAIT_SHARE = 5
"""A revoke waits at most the poll interval divided by this for records in flight."""
REVOKE_CHECK_S = 0.01
REVOKE_COMMIT_S = 5.0
IDLE_ADVANCE_S = 2.0
ERROR_PAUSE_S = 0.2
COMPLAIN_INTERVAL_S = 10.0

REFUSALS = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.FencedInstanceIdError,
    kafka_errors.GroupMaxSizeReachedError,
    kafka_errors.InconsistentGroupProtocolError,
    kafka_errors.UnsupportedVersionError,
)
MISSETTINGS = (
    kafka_errors.InvalidSessionTimeoutError,
    kafka_errors.InvalidGroupIdError,
    kafka_errors.KafkaConfigurationError,
)


class ConsumerObserver:
    """What the consumer tells; override what you need. Every call must return at once and must not raise."""

    def revoking(self, partitions: frozenset[Partition]) -> None:
        """These partitions will be given up as soon as their records in flight are finished.

        Called on the client's thread. Whatever waits and is not being worked on (delayed retries) should be dropped now,
        with `Ledger.abandon` for each, or the revoke waits for it.
        """

    def rebalanced(self, kind: Literal["assigned", "revoked", "lost"], partitions: frozenset[Partition], repeated: int) -> None:
        """Partitions came or went; `repeated` records of those that went will be read again by their next owner."""

    def committed(self, ok: bool) -> None:
        """A commit was confirmed or failed; a failed one is tried again."""


@dataclass(frozen=True, slots=True)
class UnreadableRecord(Record):
    """Where a record or a whole batch stands that cannot be decoded: owed one dead letter (`event.malformed`)."""

    reason: str


class Consumer:
    """Reads the upload topics and the retry topic; commits the contiguous finished prefix of each partition.

    Raises (every method that talks to the broker):
        DependencyError: the broker refuses this member for good (rights, login, fenced by another of the same name).
        ConfigurationError: the broker does not accept the group's settings.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        ledger: Ledger,
        observer: ConsumerObserver | None = None,
        *,
        clock: Clock | None = None,
        topics: Iterable[str] | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._observer = observer or ConsumerObserver()
        self._clock = clock or SystemClock()
        self._transactional = settings.delivery == "exactly_once"
        self._held: set[str] = set()
        self._paused: set[Partition] = set()
        self._full = False
        self._spare: list[Record] = []
        self._wake = threading.Event()
        self._commit: tuple[Any, dict[Partition, int]] | None = None
        self._may_commit = True
        self._quiet_until: dict[str, float] = {}
        self._closing: Deadline | None = None
        self._advanced = self._clock.monotonic()
        self._pacing = Pacing(settings.commit_interval_ms / 1000)
        self._raw: KafkaConsumer = open_consumer(settings)
        chosen = list(topics) if topics is not None else [*settings.upload_topics, settings.retry_topic]
        self._raw.subscribe(topics=chosen, listener=_Listener(self))

    # ------------------------------------------------------------------ reading
    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """Read at most `max_records` within `timeout_s`, already tracked in the ledger.

        `max_records` is the room in the in-flight budget. At 0 every partition is paused and the call only keeps the
        membership alive and waits (until `wake`); reading resumes once a quarter of `max_in_flight` is free, so that a
        budget that is always nearly spent does not pause and resume at every record.
        """
        if self._spare:
            records, self._spare = self._spare, []
            return records
        self._full = max_records < (self.resumes_at if self._full else 1)
        room = self._apply_pauses(0 if self._full else max_records)
        if room == 0:
            self._wake.clear()
            records = self._read(0.0, 1)
            if not records:
                self._wake.wait(timeout_s)
            return records
        if rest_s := min(self._pacing.rest_s(self._clock.monotonic()), timeout_s):
            self._clock.sleep(rest_s)
        records = self._read(timeout_s, room)
        if records:
            size_bytes = sum(record.size_bytes for record in records)
            more = len(records) == room or self._lags_behind(records)
            self._pacing.has_read(self._clock.monotonic(), len(records), size_bytes, more=more)
        return records

    def _lags_behind(self, records: list[Record]) -> bool:
        """Whether there was more behind these when the broker answered; no round trip."""
        last = {(record.position.topic, record.position.partition): record.position.offset for record in records}
        try:
            ends = [(offset, self._raw.highwater(TopicPartition(*partition))) for partition, offset in last.items()]
        except kafka_errors.KafkaError:
            return True  # the assignment is about to change: nobody knows
        return any(end is None or end - offset > 2 for offset, end in ends)  # a transaction's marker may be the last

    def hold(self, topic: str, on: bool) -> None:
        """Pause a topic (the retry topic while too many records wait for their time), or let it go on."""
        (self._held.add if on else self._held.discard)(topic)

    @property
    def resumes_at(self) -> int:
        """So much room lets reading go on that had stopped for want of it."""
        return max(1, self._settings.max_in_flight // 4)

    def room_made(self, room: int) -> None:
        """So much room there is by now: ends a `poll` that waits for it, once it would read. From any thread.

        Waking for every event that leaves would cost a turn of the client each, as much as a small image's decoding.
        """
        if room >= self.resumes_at:
            self.wake()

    def wake(self) -> None:
        """End a `poll` that waits for room. From any thread."""
        self._wake.set()

    @property
    def paused_partitions(self) -> int:
        """Partitions that are not read at the moment though they are ours."""
        return len(self._paused)

    @property
    def assignment(self) -> frozenset[Partition]:
        """The partitions that are ours."""
        return frozenset(self._ledger.spans())

    def lag(self) -> dict[Partition, int]:
        """By partition how many offsets are not finished up to the log's end as of the last fetch; no round trip."""
        found = {}
        for partition, low in self._ledger.low_water().items():
            tp = TopicPartition(*partition)
            try:
                end = self._raw.highwater(tp)
                low = self._raw.position(tp, timeout_ms=0) if low is None else low
            except kafka_errors.KafkaError:
                continue  # the assignment is about to change
            if end is not None and low is not None:
                found[partition] = max(0, end - low)
        return found

    def group_metadata(self) -> ConsumerGroupMetadata:
        """Generation and member of this consumer, for offsets in a transaction (KIP-447). From any thread: a snapshot."""
        return self._raw.group_metadata()

    def _apply_pauses(self, room: int) -> int:
        """Pause and resume what has to be; returns how many records may be read without overrunning a span."""
        limit = self._settings.max_offset_span
        spans = self._ledger.spans()
        wanted = set()
        room = min(room, limit)  # of partitions that are assigned in this poll, too
        for partition, span in spans.items():
            # With hysteresis: a partition that was paused for its span goes on when half of it is finished.
            too_wide = span >= limit or (partition in self._paused and not self._full and span > limit // 2)
            if room == 0 or partition[0] in self._held or too_wide:
                wanted.add(partition)
            else:
                room = min(room, limit - span)
        if pause := wanted - self._paused:
            self._raw.pause(*(TopicPartition(*partition) for partition in pause))
        if resume := self._paused - wanted:
            self._raw.resume(*(TopicPartition(*partition) for partition in resume))
        self._paused = wanted
        return room if len(wanted) < len(spans) or not spans else 0

    def _read(self, timeout_s: float, max_records: int) -> list[Record]:
        try:
            before_poll(self._raw)
            answer = self._raw.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records)
        except REFUSALS as error:
            raise DependencyError(f"Kafka refuses this consumer: {describe(error)}") from error
        except MISSETTINGS as error:
            raise ConfigurationError(f"WORKER_KAFKA: {describe(error)}") from error
        except kafka_errors.KafkaError as error:
            if error.__cause__ is not None:
                raise  # our own listener failed: a fault of ours, not the broker's
            self._complain("consumer.poll_failed", error)
            self._wake.wait(ERROR_PAUSE_S)
            return []
        return [self._record(raw) for batch in answer.values() for raw in batch]

    def _record(self, raw: Any) -> Record:
        position = self._ledger.track(raw.topic, raw.partition, raw.offset)
        if isinstance(raw.value, Unreadable):
            first = raw.value.first_offset
            stretch = f"offset {raw.offset}" if first >= raw.offset else f"offsets {first} to {raw.offset}"
            reason = f"cannot be read at {stretch}: {raw.value.reason}"
            log.error("consumer.unreadable", topic=raw.topic, partition=raw.partition, offset=raw.offset, reason=reason)
            return UnreadableRecord(position, None, None, (), int(self._clock.time() * 1000), reason)
        return Record(position, raw.key, raw.value, tuple(raw.headers), raw.timestamp)

    # --------------------------------------------------------------- committing
    def commit_if_due(self) -> None:
        """Commit when `Pacing` says so."""
        if self._pacing.commits(self._clock.monotonic(), self._ledger.finished_in_all):
            self.advance_idle()
            self.commit()

    def commit(self, deadline: Deadline | None = None) -> bool:
        """Commit what is finished.

        In this order, and only this order keeps the promise:
        1. a record is finished in the ledger only when the broker has acknowledged what was made of it;
        2. the ledger gives the contiguous finished prefix of each partition, so nothing unacknowledged lies before it;
        3. the offsets are sent explicitly, in the current generation of the group;
        4. the answer is checked for every partition, and only what is confirmed counts as committed; the rest is sent
           again, with what was finished since.

        Without a deadline the call does not wait: it looks at the answer to the last commit and sends the next one.
        With one it goes on until everything finished is committed.

        Returns:
            Whether everything that is finished is committed.

        With `delivery=exactly_once` there is nothing to do: offsets are committed by transactions, and only there.
        """
        if self._transactional:
            return True
        while True:
            self._harvest()
            offsets = self._ledger.committable()
            if self._commit is None and offsets:
                self._commit = (self._raw.commit_async(_to_kafka(offsets)), offsets)
            if deadline is None or deadline.expired():
                return self._commit is None
            if self._commit is None:
                return True
            self.keep_alive(min(0.05, deadline.remaining()))

    def _harvest(self) -> None:
        """Take the answer to the commit in flight, if there is one."""
        if self._commit is None or not self._commit[0].is_done:
            return
        future, offsets = self._commit
        self._commit = None
        if future.succeeded() and future.value is None:
            self._ledger.committed(offsets)
            self._observer.committed(True)
        elif future.failed():
            self._commit_failed(future.exception)
        # Otherwise the client only looked up the coordinator and committed afterwards, unseen: asked again next time.

    def _commit_failed(self, error: Exception) -> None:
        self._observer.committed(False)
        if isinstance(error, REFUSALS):
            raise DependencyError(f"Kafka refuses this consumer's commits: {describe(error)}") from error
        self._complain("consumer.commit_failed", error)

    def _complain(self, event: str, error: Exception) -> None:
        """Log what goes wrong again and again while a broker is away once in a while only."""
        now = self._clock.monotonic()
        if now >= self._quiet_until.get(event, 0.0):
            self._quiet_until[event] = now + COMPLAIN_INTERVAL_S
            log.warning(event, error=describe(error))

    def keep_alive(self, timeout_s: float) -> None:
        """Wait a little with all partitions paused, polling for the sake of the membership. Raises as `poll`."""
        self._full = True  # partitions that are assigned meanwhile are paused too
        self._apply_pauses(0)
        self._spare += self._read(timeout_s, 1)

    def advance_idle(self) -> None:
        """Move past transaction markers at the end of partitions that have nothing in flight, so that their lag is 0."""
        if self._clock.monotonic() - self._advanced < IDLE_ADVANCE_S:
            return
        self._advanced = self._clock.monotonic()
        for partition in self._ledger.spans():
            if self._ledger.finished(partition) and partition not in self._paused:
                position = self._raw.position(TopicPartition(*partition), timeout_ms=0)
                if position is not None:
                    self._ledger.advance(*partition, position)

    def close(self, deadline: Deadline, *, commit: bool = True) -> None:
        """Commit what is finished and leave the group. With `commit` false (a fatal error) only leave."""
        self._may_commit = commit
        self._closing = deadline
        try:
            if commit:
                self.commit(deadline)
        finally:
            try:
                self._raw.close(autocommit=False, timeout_ms=max(100, int(deadline.remaining() * 1000)))
            except kafka_errors.KafkaError as error:
                log.warning("consumer.close_failed", error=describe(error))

    # ---------------------------------------------- rebalances, on the client's thread
    def _on_assigned(self, partitions: frozenset[Partition]) -> None:
        self._ledger.assign(partitions)
        paused = {partition for partition in partitions if self._full or partition[0] in self._held}
        if paused:  # before `poll`, in which this happens, reads from them
            self._raw.pause(*(TopicPartition(*partition) for partition in paused))
        self._paused = (self._paused - partitions) | paused
        self._observer.rebalanced("assigned", partitions, 0)

    async def _on_revoked(self, partitions: frozenset[Partition]) -> None:
        self._paused -= partitions
        self._observer.revoking(partitions)
        deadline = self._revoke_deadline(self._settings.max_poll_interval_ms / 1000 / REVOKE_WAIT_SHARE)
        while self._may_commit and any(self._ledger.awaited(partition) for partition in partitions):
            if deadline.expired():
                break
            await self._raw._net.sleep(REVOKE_CHECK_S)
        if self._may_commit and not self._transactional:
            await self._commit_revoked(partitions)
        self._observer.rebalanced("revoked", partitions, self._ledger.revoke(partitions))

    async def _commit_revoked(self, partitions: frozenset[Partition]) -> None:
        """The last commit of these partitions in this tenure, by explicit offsets: they are not in the assignment any more."""
        deadline = self._revoke_deadline(REVOKE_COMMIT_S)
        while offsets := self._ledger.committable(partitions):
            try:
                # None is a commit's answer; anything else means that the client only found the coordinator.
                if await self._raw.commit_async(_to_kafka(offsets)) is None:
                    self._ledger.committed(offsets)
                    self._observer.committed(True)
            except kafka_errors.KafkaError as error:
                self._observer.committed(False)
                self._complain("consumer.commit_failed", error)
                if not error.retriable:
                    return
            if deadline.expired():
                return
            await self._raw._net.sleep(REVOKE_CHECK_S)

    def _revoke_deadline(self, seconds: float) -> Deadline:
        """So many seconds from now, but no later than the end of `close`."""
        return Deadline(seconds if self._closing is None else min(seconds, self._closing.remaining()), self._clock)

    def _on_lost(self, partitions: frozenset[Partition]) -> None:
        self._paused -= partitions
        forget_owned(self._raw)
        log.warning("consumer.partitions_lost", partitions=sorted(f"{topic}/{number}" for topic, number in partitions))
        self._observer.rebalanced("lost", partitions, self._ledger.revoke(partitions))


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc] # kafka-python is untyped
    def __init__(self, owner: Consumer) -> None:
        self._owner = owner

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._owner._on_assigned(_partitions(assigned))

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._owner._on_revoked(_partitions(revoked))

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        self._owner._on_lost(_partitions(lost))


def _partitions(partitions: Iterable[TopicPartition]) -> frozenset[Partition]:
    return frozenset((tp.topic, tp.partition) for tp in partitions)


def _to_kafka(offsets: dict[Partition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}

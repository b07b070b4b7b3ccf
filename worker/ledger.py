"""Which offsets may be committed: every record read and not yet finished, by partition and tenure.

Records of a partition are tracked in the order they were read and finish in any order. What may be committed is the
position after the last record of the contiguous finished prefix. Offsets may have gaps (compaction, transaction
markers): the prefix runs over tracked records, not over numbers.

Where offsets are committed in transactions, a record is first *ready*: everything that is published for it is known, and
waits. What a transaction may hold is the contiguous ready prefix: the outputs of exactly the records before its offset.

A tenure is one assignment of a partition to this process. Its number (`Position.generation`) only grows, so that a
result that arrives after its partition was revoked, even if it came back since, is told from a current one.

Every call is amortised O(1) in the number of tracked records, except `revoke` and the calls that answer for all
partitions, which are O(partitions). Thread-safe: receipts come from the producer's thread, the rest from the main one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from worker.items import Position

Partition = tuple[str, int]
"""(topic, partition); kafka-python's TopicPartition is equal to it and may be passed for it."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a transaction may take of one partition: the records that are ready, from the first unfinished one on."""

    generation: int
    offsets: tuple[int, ...]
    next: int
    """The offset to commit with them."""


class _Tenure:
    """The records of one partition in one tenure. Not thread-safe: the ledger's lock guards it."""

    __slots__ = ("abandoned", "committed", "generation", "last", "next", "open", "order", "ready")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.order: deque[int] = deque()  # offsets from the first unfinished one on, finished ones among them, ascending
        self.open: set[int] = set()  # those of them that are not finished
        self.abandoned: set[int] = set()  # of the open ones, those that nobody works on any more
        self.ready: set[int] = set()  # of the open ones, those whose outputs wait for their transaction
        self.last: int | None = None  # the furthest offset tracked
        self.next: int | None = None  # after the contiguous finished prefix: what may be committed; None before the first
        self.committed: int | None = None  # the last offset the broker confirmed in this tenure

    def track(self, offset: int) -> None:
        self.order.append(offset)
        self.open.add(offset)
        self.last = offset

    def finish(self, offset: int) -> bool:
        if offset not in self.open:
            return False
        self.open.remove(offset)
        self.abandoned.discard(offset)
        self.ready.discard(offset)
        order = self.order
        while order and order[0] not in self.open:
            self.next = order.popleft() + 1
        return True

    def prefix(self) -> Prefix | None:
        offsets = []
        following = self.next
        for offset in self.order:
            if offset in self.ready:
                offsets.append(offset)
            elif offset in self.open:
                break
            following = offset + 1
        if following is None or following <= (self.committed if self.committed is not None else -1):
            return None
        return Prefix(self.generation, tuple(offsets), following)

    @property
    def span(self) -> int:
        if not self.order or self.last is None:
            return 0
        return self.last - self.order[0] + 1


class Ledger:
    """Tracks records from read to finished and says what may be committed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenures: dict[Partition, _Tenure] = {}
        self._generations: dict[Partition, int] = {}
        self._finished = 0

    @property
    def finished_in_all(self) -> int:
        """Records finished so far, of all tenures."""
        return self._finished

    def assign(self, partitions: Iterable[Partition]) -> None:
        """Begin a tenure of each partition; one that is still held begins anew, and what it tracked becomes stale."""
        with self._lock:
            for partition in partitions:
                self._begin(_key(partition))

    def revoke(self, partitions: Iterable[Partition]) -> int:
        """End the tenure of each partition: results that come later are stale.

        Returns:
            How many records the next owner will work on again: all that the broker holds no commit for, but those that only
            waited here (abandoned).
        """
        repeated = 0
        with self._lock:
            for partition in partitions:
                tenure = self._tenures.pop(_key(partition), None)
                if tenure is not None:
                    repeated += len(tenure.order) - len(tenure.abandoned)
        return repeated

    def track(self, topic: str, partition: int, offset: int) -> Position:
        """Note that a record was read; the caller owes a `finish` (or `abandon`) for the position it gets.

        Offsets of a partition come in ascending order. A lower one than the last means that the log was cut or the
        position reset: a new tenure begins, and what was in flight is stale.
        """
        key = (topic, partition)
        with self._lock:
            tenure = self._tenures.get(key)
            if tenure is None or (tenure.last is not None and offset <= tenure.last):
                tenure = self._begin(key)
            tenure.track(offset)
            return Position(topic, partition, offset, tenure.generation)

    def finish(self, position: Position) -> bool:
        """The record's verdict, dead letter or retry was acknowledged.

        Returns:
            False where the position is of an earlier tenure, or is finished already: neither count nor commit it.
        """
        with self._lock:
            tenure = self._tenure_of(position)
            done = tenure is not None and tenure.finish(position.offset)
            self._finished += done
            return done

    def ready(self, position: Position) -> bool:
        """Everything that is published for the record is known and waits for its transaction.

        Returns:
            False where the position is of an earlier tenure, or is finished already: drop what was made of it.
        """
        with self._lock:
            tenure = self._tenure_of(position)
            if tenure is None or position.offset not in tenure.open:
                return False
            tenure.ready.add(position.offset)
            return True

    def take(self) -> dict[Partition, Prefix]:
        """By partition what the next transaction may hold; no partition of which there is nothing new to commit.

        Taking changes nothing: until the records are finished (`finish`, then `committed`), the same is taken again.
        """
        with self._lock:
            found = {partition: tenure.prefix() for partition, tenure in self._tenures.items()}
            return {partition: prefix for partition, prefix in found.items() if prefix is not None}

    def awaited(self, partition: Partition) -> bool:
        """Whether a revoke should wait: the first unfinished record is being worked on, so that the commit may yet advance."""
        with self._lock:
            tenure = self._tenures.get(_key(partition))
            return tenure is not None and bool(tenure.order) and tenure.order[0] not in tenure.abandoned

    def abandon(self, position: Position) -> None:
        """Nobody works on this record any more, though it is not finished: a revoke need not wait for it.

        Its offset, and every later one, stays uncommitted in this tenure unless it is finished after all.
        """
        with self._lock:
            tenure = self._tenure_of(position)
            if tenure is not None and position.offset in tenure.open:
                tenure.abandoned.add(position.offset)

    def resume(self, position: Position) -> None:
        """Somebody works on an abandoned record again."""
        with self._lock:
            tenure = self._tenure_of(position)
            if tenure is not None:
                tenure.abandoned.discard(position.offset)

    def current(self, position: Position) -> bool:
        """Whether the tenure in which this record was read still lasts. Work on one of an ended tenure is wasted."""
        with self._lock:
            return self._tenure_of(position) is not None

    def committable(self, partitions: Iterable[Partition] | None = None) -> dict[Partition, int]:
        """Next offset by partition, where the finished prefix has grown since the last confirmed commit."""
        with self._lock:
            chosen = self._tenures if partitions is None else map(_key, partitions)
            found = {}
            for partition in chosen:
                tenure = self._tenures.get(partition)
                if tenure is not None and tenure.next is not None and tenure.next > (tenure.committed or -1):
                    found[partition] = tenure.next
            return found

    def committed(self, offsets: Mapping[Partition, int]) -> None:
        """The broker confirmed these offsets."""
        with self._lock:
            for partition, offset in offsets.items():
                tenure = self._tenures.get(_key(partition))
                # One that was revoked and came back since: what an earlier tenure committed says nothing about this one.
                if tenure is not None and tenure.next is not None and offset <= tenure.next:
                    tenure.committed = max(offset, tenure.committed or -1)

    def confirmed(self, taken: Mapping[Partition, Prefix]) -> None:
        """The transaction with these prefixes was committed, and its records are finished."""
        with self._lock:
            for partition, prefix in taken.items():
                tenure = self._tenures.get(partition)
                if tenure is not None and tenure.generation == prefix.generation:
                    tenure.committed = prefix.next

    def holds(self, partition: Partition, generation: int) -> bool:
        """Whether this tenure of the partition still lasts."""
        with self._lock:
            tenure = self._tenures.get(partition)
            return tenure is not None and tenure.generation == generation

    def advance(self, topic: str, partition: int, offset: int) -> None:
        """Everything before `offset` was read and nothing is in flight: let it be committed (transaction markers at the end).

        Ignored unless every tracked record of the partition is finished.
        """
        with self._lock:
            tenure = self._tenures.get((topic, partition))
            if tenure is not None and not tenure.order and tenure.next is not None and offset > tenure.next:
                tenure.next = offset
                tenure.last = offset - 1

    def span(self, partition: Partition) -> int:
        """Offsets from the first unfinished record to the furthest one read, both included; 0 where all are finished."""
        with self._lock:
            tenure = self._tenures.get(_key(partition))
            return tenure.span if tenure is not None else 0

    def finished(self, partition: Partition) -> bool:
        """Whether no record of this partition is unfinished."""
        with self._lock:
            tenure = self._tenures.get(_key(partition))
            return tenure is None or not tenure.order

    def spans(self) -> dict[Partition, int]:
        """`span` of every partition with a tenure."""
        with self._lock:
            return {partition: tenure.span for partition, tenure in self._tenures.items()}

    def low_water(self) -> dict[Partition, int | None]:
        """By partition the first offset that is not finished; None where nothing was read in this tenure."""
        with self._lock:
            return {partition: tenure.order[0] if tenure.order else tenure.next for partition, tenure in self._tenures.items()}

    def _begin(self, key: Partition) -> _Tenure:
        generation = self._generations.get(key, 0) + 1
        self._generations[key] = generation
        tenure = self._tenures[key] = _Tenure(generation)
        return tenure

    def _tenure_of(self, position: Position) -> _Tenure | None:
        tenure = self._tenures.get((position.topic, position.partition))
        return tenure if tenure is not None and tenure.generation == position.generation else None


def _key(partition: Partition) -> Partition:
    """A plain tuple, so that what is handed out never is a foreign type."""
    topic, number = partition
    return (topic, number)

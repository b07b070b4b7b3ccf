"""The ledger against a naive model: random completions, revokes, losses, gaps and restarts."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from worker.items import Position
from worker.ledger import Ledger, Partition, Prefix

PARTITIONS: list[Partition] = [("a", 0), ("a", 1), ("b", 0)]


class Model:
    """What the ledger promises, computed the slow way: every record of a tenure in a list."""

    def __init__(self) -> None:
        self.records: dict[Partition, list[list[int | bool]]] = {}  # [offset, finished, abandoned], in order
        self.committed: dict[Partition, int] = {}

    def begin(self, partition: Partition) -> None:
        self.records[partition] = []
        self.committed.pop(partition, None)

    def end(self, partition: Partition) -> int:
        prefix = self.prefix_length(partition)
        behind = self.records.pop(partition, [])[prefix:]
        repeated = sum(finished or not abandoned for _, finished, abandoned in behind)
        self.committed.pop(partition, None)
        return repeated

    def prefix_length(self, partition: Partition) -> int:
        length = 0
        for _, finished, _ in self.records.get(partition, []):
            if not finished:
                break
            length += 1
        return length

    def next_offset(self, partition: Partition) -> int | None:
        length = self.prefix_length(partition)
        return int(self.records[partition][length - 1][0]) + 1 if length else None

    def committable(self) -> dict[Partition, int]:
        found = {}
        for partition in self.records:
            offset = self.next_offset(partition)
            if offset is not None and offset > self.committed.get(partition, -1):
                found[partition] = offset
        return found

    def span(self, partition: Partition) -> int:
        records = self.records.get(partition, [])
        length = self.prefix_length(partition)
        return 0 if length == len(records) else int(records[-1][0]) - int(records[length][0]) + 1

    def awaited(self, partition: Partition) -> bool:
        """Whether the first record that is not finished is being worked on."""
        behind = self.records.get(partition, [])[self.prefix_length(partition) :]
        return bool(behind) and not behind[0][2]


class LedgerMachine(RuleBasedStateMachine):
    """Drives ledger and model side by side; the broker's committed offsets outlive every tenure."""

    positions = Bundle("positions")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.model = Model()
        self.broker: dict[Partition, int] = {}
        self.log_end = dict.fromkeys(PARTITIONS, 0)
        self.reading_at: dict[Partition, int] = {}
        self.tenures: dict[Partition, int] = {}
        self.acknowledged: dict[Partition, set[int]] = {partition: set() for partition in PARTITIONS}
        self.written: dict[Partition, set[int]] = {partition: set() for partition in PARTITIONS}

    @rule(partition=st.sampled_from(PARTITIONS))
    def assign(self, partition: Partition) -> None:
        if partition in self.tenures:
            return
        self.ledger.assign([partition])
        self.model.begin(partition)
        self.tenures[partition] = 0
        self.reading_at[partition] = self.broker.get(partition, 0)

    @precondition(lambda self: self.tenures)
    @rule(target=positions, data=st.data(), gap=st.integers(0, 3))
    def read(self, data: st.DataObject, gap: int) -> Position:
        partition = data.draw(st.sampled_from(sorted(self.tenures)))
        offset = self.reading_at[partition]
        later = sorted(known for known in self.written[partition] if known >= offset)
        offset = later[0] if later else offset + gap  # gaps are made once: a log does not change when it is read again
        self.written[partition].add(offset)
        self.reading_at[partition] = offset + 1
        self.model.records[partition].append([offset, False, False])
        return self.ledger.track(*partition, offset)

    @rule(position=consumes(positions))
    def finish(self, position: Position) -> None:
        partition = (position.topic, position.partition)
        current = self.ledger.current(position)
        expected = False
        for record in self.model.records.get(partition, []) if current else []:
            if record[0] == position.offset and not record[1]:
                record[1], expected = True, True
        assert self.ledger.finish(position) is expected
        assert self.ledger.finish(position) is False  # a second receipt counts for nothing
        self.acknowledged[partition].add(position.offset)

    @rule(position=positions)
    def abandon(self, position: Position) -> None:
        if self.ledger.current(position):
            for record in self.model.records[(position.topic, position.partition)]:
                if record[0] == position.offset and not record[1]:
                    record[2] = True
        self.ledger.abandon(position)

    @rule(position=positions)
    def resume(self, position: Position) -> None:
        if self.ledger.current(position):
            for record in self.model.records[(position.topic, position.partition)]:
                if record[0] == position.offset:
                    record[2] = False
        self.ledger.resume(position)

    @rule(partition=st.sampled_from(PARTITIONS))
    def revoke(self, partition: Partition) -> None:
        self.tenures.pop(partition, None)
        assert self.ledger.revoke([partition]) == self.model.end(partition)

    @rule(confirmed=st.booleans(), stale=st.booleans())
    def commit(self, confirmed: bool, stale: bool) -> None:
        offsets = self.ledger.committable()
        assert offsets == self.model.committable()
        if not confirmed:
            return
        self.broker |= offsets
        if stale:  # the answer arrives only after every partition has gone and come back
            for partition in list(self.tenures):
                self.revoke(partition)
                self.assign(partition)
        self.ledger.committed(offsets)
        if not stale:
            self.model.committed |= offsets

    @rule()
    def restart(self) -> None:
        self.ledger, self.model, self.tenures = Ledger(), Model(), {}

    @invariant()
    def agrees_with_the_model(self) -> None:
        for partition in PARTITIONS:
            assert self.ledger.span(partition) == self.model.span(partition)
            assert self.ledger.awaited(partition) == self.model.awaited(partition)
            assert self.ledger.finished(partition) == (self.model.span(partition) == 0)
        assert set(self.ledger.spans()) == set(self.tenures)

    @invariant()
    def nothing_is_committed_before_it_is_acknowledged(self) -> None:
        for partition, offset in self.broker.items():
            unacknowledged = {known for known in self.written[partition] if known < offset} - self.acknowledged[partition]
            assert not unacknowledged


TestLedger = LedgerMachine.TestCase
TestLedger.settings = hypothesis_settings(max_examples=60, stateful_step_count=60, deadline=None)


class TransactionMachine(RuleBasedStateMachine):
    """Two members and a broker with transactions: every output becomes visible once, whatever comes between.

    The broker is modelled by what it promises: outputs and offsets of a transaction become visible together, and only for
    a member of the current generation of the group (KIP-447). A transaction is begun, and ends two rules later at the
    earliest, so that revokes, restarts and further records fall in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.broker: dict[Partition, int] = {}
        self.visible: Counter[tuple[Partition, int]] = Counter()
        self.generation = 0
        self.owner: dict[Partition, int] = {}
        self.ledgers = [Ledger(), Ledger()]
        self.reading_at: dict[Partition, int] = {}
        self.working: list[list[Position]] = [[], []]
        self.open: list[tuple[int, dict[Partition, Prefix]] | None] = [None, None]

    @rule(partition=st.sampled_from(PARTITIONS), to=st.sampled_from([0, 1, None]))
    def move(self, partition: Partition, to: int | None) -> None:
        """A rebalance: the old owner's tenure ends, the new one begins where the group's commit stands."""
        owner = self.owner.pop(partition, None)
        if owner is not None:
            self.ledgers[owner].revoke([partition])
        self.generation += 1
        if to is not None:
            self.owner[partition] = to
            self.ledgers[to].assign([partition])
            self.reading_at[partition] = self.broker.get(partition, 0)

    @precondition(lambda self: self.owner)
    @rule(data=st.data(), records=st.integers(1, 4))
    def read(self, data: st.DataObject, records: int) -> None:
        """Every fifth offset is a gap, as a transaction marker leaves one."""
        partition = data.draw(st.sampled_from(sorted(self.owner)))
        for _ in range(records):
            offset = self.reading_at[partition]
            self.reading_at[partition] = offset + 1
            owner = self.owner[partition]
            if offset % 5 != 4:
                self.working[owner].append(self.ledgers[owner].track(*partition, offset))

    @rule(member=st.sampled_from([0, 1]), rng=st.randoms(use_true_random=False), count=st.integers(1, 6))
    def complete(self, member: int, rng: random.Random, count: int) -> None:
        """Outputs are known in any order; those of an ended tenure are dropped."""
        working = self.working[member]
        rng.shuffle(working)
        done, self.working[member] = working[:count], working[count:]
        for position in done:
            assert self.ledgers[member].ready(position) is self.ledgers[member].current(position)

    @rule(member=st.sampled_from([0, 1]))
    def begin(self, member: int) -> None:
        """The generation is looked at before the prefix is taken: the other order would lose the fence."""
        if self.open[member] is None:
            generation = self.generation
            self.open[member] = (generation, self.ledgers[member].take())

    @rule(member=st.sampled_from([0, 1]), fails=st.booleans())
    def end(self, member: int, fails: bool) -> None:
        transaction, self.open[member] = self.open[member], None
        if transaction is None or fails or transaction[0] != self.generation:
            return  # aborted: the next one takes the same again, or what is left of it
        for partition, prefix in transaction[1].items():
            assert prefix.next > self.broker.get(partition, 0)
            self.broker[partition] = prefix.next
            self.visible.update((partition, offset) for offset in prefix.offsets)
            for offset in prefix.offsets:
                assert self.ledgers[member].finish(Position(*partition, offset, prefix.generation))
        self.ledgers[member].confirmed(transaction[1])

    @rule(member=st.sampled_from([0, 1]))
    def crash(self, member: int) -> None:
        """Its open transaction is aborted; its partitions are nobody's until they are moved."""
        self.ledgers[member], self.working[member], self.open[member] = Ledger(), [], None
        self.owner = {partition: owner for partition, owner in self.owner.items() if owner != member}
        self.generation += 1

    @invariant()
    def each_output_is_visible_at_most_once_and_just_those_before_the_commit(self) -> None:
        assert not self.visible or max(self.visible.values()) == 1
        for partition, offset in self.visible:
            assert offset < self.broker[partition]

    def teardown(self) -> None:
        """Left alone, the group finishes what was ever read, and no record before a commit is missing."""
        ends = dict(self.reading_at)
        for partition in PARTITIONS:
            self.move(partition, 0)
        self.open = [None, None]
        for partition, end in ends.items():
            while self.reading_at[partition] <= end:
                offset = self.reading_at[partition]
                self.reading_at[partition] = offset + 1
                if offset % 5 != 4:
                    self.working[0].append(self.ledgers[0].track(*partition, offset))
        self.complete(0, random.Random(0), 10_000)
        self.begin(0)
        self.end(0, fails=False)
        self.each_output_is_visible_at_most_once_and_just_those_before_the_commit()
        for partition, end in ends.items():
            assert self.broker[partition] >= end
            assert all(self.visible[(partition, offset)] for offset in range(self.broker[partition]) if offset % 5 != 4)


TestTransactions = TransactionMachine.TestCase
TestTransactions.settings = hypothesis_settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_gaps_in_offsets_are_bridged() -> None:
    ledger = Ledger()
    ledger.assign([("a", 0)])
    first, second = ledger.track("a", 0, 5), ledger.track("a", 0, 9)
    ledger.finish(first)
    assert ledger.committable() == {("a", 0): 6}  # 6 to 8 were never seen: not ours to commit until 9 is
    ledger.finish(second)
    assert ledger.committable() == {("a", 0): 10}


def test_the_position_behind_the_last_record_may_be_committed_when_idle() -> None:
    ledger = Ledger()
    ledger.assign([("a", 0)])
    position = ledger.track("a", 0, 5)
    ledger.advance("a", 0, 8)
    assert ledger.committable() == {}  # not while a record is open
    ledger.finish(position)
    ledger.advance("a", 0, 8)
    assert ledger.committable() == {("a", 0): 8}
    ledger.committed({("a", 0): 8})
    following = ledger.track("a", 0, 8)
    assert ledger.current(following)
    ledger.finish(following)
    assert ledger.committable() == {("a", 0): 9}


def test_a_log_that_was_cut_begins_a_new_tenure() -> None:
    ledger = Ledger()
    ledger.assign([("a", 0)])
    old = ledger.track("a", 0, 100)
    new = ledger.track("a", 0, 40)
    assert not ledger.current(old)
    assert ledger.finish(old) is False
    assert ledger.finish(new)
    assert ledger.committable() == {("a", 0): 41}


def test_what_a_transaction_takes_stops_at_the_first_record_that_is_not_ready() -> None:
    ledger = Ledger()
    ledger.assign([("a", 0)])
    positions = [ledger.track("a", 0, offset) for offset in (3, 4, 7, 8)]
    for position in (positions[0], positions[1], positions[3]):
        assert ledger.ready(position)
    (prefix,) = ledger.take().values()
    assert (prefix.offsets, prefix.next) == ((3, 4), 5)
    assert ledger.take() == {("a", 0): prefix}  # an aborted one takes the same again
    for position in positions[:2]:
        assert ledger.finish(position)
    ledger.confirmed({("a", 0): prefix})
    assert ledger.take() == {}
    ledger.abandon(positions[2])
    assert not ledger.awaited(("a", 0))  # 8 is ready, but cannot be committed before 7
    ledger.resume(positions[2])
    assert ledger.awaited(("a", 0))
    ledger.ready(positions[2])
    assert ledger.take()[("a", 0)].next == 9


def test_a_transaction_of_an_earlier_tenure_confirms_nothing() -> None:
    ledger = Ledger()
    ledger.assign([("a", 0)])
    position = ledger.track("a", 0, 100)
    ledger.ready(position)
    taken = ledger.take()
    assert ledger.holds(("a", 0), position.generation)
    ledger.revoke([("a", 0)])
    ledger.assign([("a", 0)])
    assert not ledger.holds(("a", 0), position.generation)
    ledger.ready(ledger.track("a", 0, 40))
    ledger.confirmed(taken)
    assert ledger.take()[("a", 0)].next == 41


def test_a_commit_of_an_earlier_tenure_hides_nothing() -> None:
    ledger = Ledger()
    ledger.assign([("a", 0)])
    ledger.finish(ledger.track("a", 0, 100))
    offsets = ledger.committable()
    ledger.revoke([("a", 0)])
    ledger.assign([("a", 0)])
    ledger.finish(ledger.track("a", 0, 40))  # somebody set the group back meanwhile
    ledger.committed(offsets)
    assert ledger.committable() == {("a", 0): 41}


def test_receipts_from_many_threads() -> None:
    ledger = Ledger()
    ledger.assign([("a", 0)])
    positions = [ledger.track("a", 0, offset) for offset in range(20_000)]
    random.Random(7).shuffle(positions)
    counts = [0] * 4

    def finish(thread: int) -> None:
        counts[thread] = sum(ledger.finish(position) for position in positions[thread::3])  # shares overlap

    threads = [threading.Thread(target=finish, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == len(positions)  # each counted once
    assert ledger.committable() == {("a", 0): 20_000}


@pytest.mark.timing
def test_cost_does_not_grow_with_what_is_in_flight() -> None:
    """One open record at the head and 50,000 behind it: asking and finishing must not scan them."""

    def cost(size: int) -> float:
        ledger = Ledger()
        ledger.assign([("a", 0)])
        positions = [ledger.track("a", 0, offset) for offset in range(size)]
        begin = time.perf_counter()
        for position in positions[-2_000:]:
            ledger.finish(position)
            ledger.committable()
            ledger.span(("a", 0))
        return time.perf_counter() - begin

    small = min(cost(2_100) for _ in range(3))
    large = min(cost(50_000) for _ in range(3))
    assert large < small * 5


def test_a_revoke_tells_how_much_will_be_done_again() -> None:
    ledger = Ledger()
    ledger.assign([("a", 0)])
    positions = [ledger.track("a", 0, offset) for offset in range(5)]
    for position in (positions[0], positions[2], positions[3]):
        ledger.finish(position)
    assert ledger.revoke([("a", 0), ("never", 1)]) == 4  # 1 and 4 are open, 2 and 3 finished in vain

"""The ledger against a naive model: random completions, revokes, losses, gaps and restarts."""

from __future__ import annotations

import random
import threading
import time

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from worker.items import Position
from worker.ledger import Ledger, Partition

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
        repeated = len(self.records.pop(partition, [])) - prefix
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

    def in_flight(self, partition: Partition) -> int:
        return sum(not finished and not abandoned for _, finished, abandoned in self.records.get(partition, []))


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
            assert self.ledger.in_flight(partition) == self.model.in_flight(partition)
            assert self.ledger.finished(partition) == (self.model.span(partition) == 0)
        assert set(self.ledger.spans()) == set(self.tenures)

    @invariant()
    def nothing_is_committed_before_it_is_acknowledged(self) -> None:
        for partition, offset in self.broker.items():
            unacknowledged = {known for known in self.written[partition] if known < offset} - self.acknowledged[partition]
            assert not unacknowledged


TestLedger = LedgerMachine.TestCase
TestLedger.settings = hypothesis_settings(max_examples=60, stateful_step_count=60, deadline=None)


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

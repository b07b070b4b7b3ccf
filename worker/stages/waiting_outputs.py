"""Outputs that wait for their transaction: by record, complete or not yet, until their partition's earlier records are ready."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from worker.items import Position
from worker.ledger import Ledger, Partition, Prefix
from worker.outcomes import Receipts
from worker.stages.publish_records import Sending

Taken = Mapping[Partition, Prefix]
"""What a transaction takes: by partition the records that are ready, and the offset to commit with them."""


@dataclass(slots=True, eq=False)
class Unit:
    """Everything that is published for one record."""

    receipts: Receipts
    sendings: list[Sending]


class WaitingOutputs:
    """Keeps units by partition and tenure. Thread-safe: stages add, the transactions' thread takes out."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._partial: dict[Position, list[Sending]] = {}
        self._units: dict[tuple[Partition, int], dict[int, Unit]] = {}

    def add(self, sending: Sending, receipts: Receipts, position: Position) -> tuple[bool, Unit | None]:
        """Keep an output.

        Returns:
            Whether its record is ready now; and the unit, not kept, where the record's tenure has ended meanwhile.
        """
        with self._lock:
            sendings = self._partial.setdefault(position, [])
            sendings.append(sending)
            if len(sendings) < receipts.outputs:
                return False, None
            del self._partial[position]
            unit = Unit(receipts, sendings)
            if not self._ledger.ready(position):
                return False, unit
            # Nobody looks for it before the lock is given back: what the ledger says is ready is there.
            partition = (position.topic, position.partition)
            self._units.setdefault((partition, position.generation), {})[position.offset] = unit
            return True, None

    def of(self, taken: Taken) -> list[Unit]:
        """The units of these prefixes, in the order of their offsets. For the thread that removes: all are there."""
        with self._lock:
            return [
                self._units[partition, prefix.generation][offset]
                for partition, prefix in taken.items()
                for offset in prefix.offsets
            ]

    def remove(self, taken: Taken) -> list[Unit]:
        """As `of`, without those whose tenure has ended since, and they are not kept any longer."""
        with self._lock:
            found = []
            for partition, prefix in taken.items():
                kept = self._units.get((partition, prefix.generation), {})
                found += [kept.pop(offset) for offset in prefix.offsets if offset in kept]
            return found

    def remove_stale(self) -> list[Unit]:
        """Those of tenures that have ended: their partition's next owner makes them again."""
        with self._lock:
            ended = [key for key in self._units if not self._ledger.holds(*key)]
            return [unit for key in ended for unit in self._units.pop(key).values()]

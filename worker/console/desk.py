"""The review desk: what waits for a decision, in which order, who has it, what was decided. Fed by the two topics; thread-safe.

One entry is one image: a flood of it is one entry, and its decision is that of all of them, also of those still to come.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from worker.clock import Clock
from worker.console.labels import Course, LabelRecord, entry_of
from worker.contracts.verdict import rfc3339

KEPT_EVENT_IDS = 100
SECONDS_A_RANK = 86_400.0
"""A day of waiting weighs as much as the step from a certain score to a score of one half."""
APPEAL_RANK = 1_000_000.0
MAX_DECIDED_LISTED = 200
MAX_SCANNED = 5_000
"""Entries looked at for a listing: as many as one person may have skipped."""


@dataclass(slots=True)
class Entry:
    """One image, or one event without one."""

    key: str
    course: Course = field(default_factory=Course)
    verdict: dict[str, Any] | None = None
    """The latest that the policy sent to review; None where only label records are known."""
    first_seen: float = 0.0
    """POSIX seconds."""
    count: int = 0
    event_ids: list[str] = field(default_factory=list)
    """The first of them."""
    rank: float | None = None
    """Its place in the queue, None where it is in none."""

    @property
    def waits(self) -> bool:
        """Whether it belongs into the queue."""
        return self.verdict is not None and self.course.open


def uncertainty(score: float | None) -> float:
    """From 0 (the score is 0 or 1) to 1 (it is one half, or there is none)."""
    return 1.0 if score is None else 1.0 - abs(2 * score - 1)


class Desk:
    """All entries. Feeds call `verdict` and `label`; pages read and wait."""

    def __init__(self, max_entries: int, clock: Clock) -> None:
        self._max_entries = max_entries
        self._clock = clock
        self._lock = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._queue: list[tuple[float, str]] = []  # (minus rank, key): the most urgent first, and a static order
        self._decided: OrderedDict[str, None] = OrderedDict()
        self._effects: OrderedDict[str, bool] = OrderedDict()
        self._verdicts: dict[str, dict[str, Any]] = {}  # each entry's verdict, by its event
        self._left_out = 0
        self._version = 0

    # -- fed by the topics -------------------------------------------------------------------------------------------

    def verdict(self, verdict: dict[str, Any], at: float) -> None:
        """Take a verdict that the policy sent to review; `at`: the record's time, POSIX seconds."""
        key = entry_of(verdict)
        with self._lock:
            entry = self._entries.setdefault(key, Entry(key))
            if not entry.count:
                entry.first_seen = at
            entry.count += 1
            if len(entry.event_ids) < KEPT_EVENT_IDS and verdict["event_id"] not in entry.event_ids:
                entry.event_ids.append(verdict["event_id"])
            self._forget_verdict(entry)
            entry.verdict = self._verdicts[verdict["event_id"]] = verdict
            self._place(entry)
            self._changed()

    def label(self, record: LabelRecord) -> None:
        """Take a record of the label topic."""
        with self._lock:
            entry = self._entries.setdefault(record.entry, Entry(record.entry))
            effective = entry.course.fold(record)
            self._effects[record.record_id] = effective
            while len(self._effects) > self._max_entries:
                self._effects.popitem(last=False)
            if effective and record.kind == "decision":
                self._decided[entry.key] = None
                self._decided.move_to_end(entry.key)
            self._place(entry)
            self._changed()

    def _place(self, entry: Entry) -> None:
        """Put the entry where it belongs in the queue, or take it out."""
        rank: float | None = None
        if entry.waits and entry.verdict is not None:
            rank = uncertainty(entry.verdict["score"]) - entry.first_seen / SECONDS_A_RANK
            rank += APPEAL_RANK if entry.course.appeal else 0.0
        if rank == entry.rank:
            return
        if entry.rank is not None:
            del self._queue[bisect.bisect_left(self._queue, (-entry.rank, entry.key))]
        entry.rank = rank
        if rank is not None:
            bisect.insort(self._queue, (-rank, entry.key))
        self._bound()

    def _bound(self) -> None:
        while len(self._queue) > self._max_entries:
            _, key = self._queue.pop()
            self._forget_verdict(self._entries.pop(key))
            self._left_out += 1
        while len(self._decided) > self._max_entries:
            key, _ = self._decided.popitem(last=False)
            if key in self._entries and not self._entries[key].waits:
                self._forget_verdict(self._entries.pop(key))

    def _forget_verdict(self, entry: Entry) -> None:
        if entry.verdict is not None:
            self._verdicts.pop(entry.verdict["event_id"], None)

    def _changed(self) -> None:
        self._version += 1
        self._lock.notify_all()

    # -- read by the pages -------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._version

    def effect(self, record_id: str, timeout_s: float) -> bool | None:
        """Wait until a record was read back from the topic: whether it had an effect; None if it did not come in time."""
        with self._lock:
            self._lock.wait_for(lambda: record_id in self._effects, timeout_s)
            return self._effects.get(record_id)

    def listing(self, person: str, limit: int) -> dict[str, Any]:
        """The head of the queue: what this person skipped comes after the rest of it."""
        with self._lock:
            head: list[Entry] = []
            later: list[Entry] = []
            for _, key in itertools.islice(self._queue, MAX_SCANNED):
                entry = self._entries[key]
                (later if _skipped(entry, person) else head).append(entry)
                if len(head) == limit:
                    break
            head = [*head, *later][:limit]
            rows = [self._row(entry) | {"skipped": _skipped(entry, person)} for entry in head]
            return {"version": self._version, "waiting": len(self._queue), "left_out": self._left_out, "entries": rows}

    def decided(self, search: str = "", limit: int = MAX_DECIDED_LISTED) -> list[dict[str, Any]]:
        """Entries with a decision, the latest first; `search`: part, in lower case, of key, event id, or who decided."""
        with self._lock:
            entries = (self._entries[key] for key in reversed(self._decided) if key in self._entries)
            found = (entry for entry in entries if not search or search in _searched(entry))
            return [self._row(entry) for entry in itertools.islice(found, limit)]

    def verdict_of_event(self, event_id: str) -> dict[str, Any] | None:
        """The verdict of the entry of which this is the latest event."""
        with self._lock:
            return self._verdicts.get(event_id)

    def details(self, key: str) -> dict[str, Any] | None:
        """An entry with its history; None where nothing is known of it."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            return self._row(entry) | {
                "verdict": entry.verdict,
                "event_ids": list(entry.event_ids),
                "history": [record.public() for record in entry.course.history],
            }

    def course(self, key: str) -> Course | None:
        """A copy of what the topic says of an entry."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            course = entry.course
            return Course(list(course.decisions), course.appeal, course.claim, list(course.history))

    def holder(self, key: str) -> str | None:
        """Who has the entry now."""
        with self._lock:
            entry = self._entries.get(key)
            return self._holder(entry) if entry else None

    def _holder(self, entry: Entry) -> str | None:
        claim = entry.course.claim
        return claim.by if claim and claim.in_force(self._clock.time()) else None

    def _row(self, entry: Entry) -> dict[str, Any]:
        verdict, latest, appeal = entry.verdict, entry.course.latest, entry.course.appeal
        row: dict[str, Any] = {
            "entry": entry.key,
            "count": entry.count,
            "first_seen": rfc3339(entry.first_seen) if entry.count else None,
            "open": entry.course.open,
            "holder": self._holder(entry),
            "decision": latest.public() if latest else None,
            "appeal": appeal.public() if appeal else None,
        }
        if verdict is not None:
            row |= {name: verdict[name] for name in ("event_id", "tenant", "label", "score", "uncertain", "reason")}
        elif latest is not None:
            row |= _remembered(latest)
        return row


def _remembered(decision: LabelRecord) -> dict[str, Any]:
    """What a decision says of its verdict: others may write to the topic, and need not say anything."""
    said = decision.content.get("verdict")
    said = said if isinstance(said, dict) else {}
    texts = {name: said.get(name) if isinstance(said.get(name), str) else None for name in ("event_id", "tenant", "label")}
    score = said.get("score")
    return texts | {"score": score if isinstance(score, int | float) and not isinstance(score, bool) else None}


def _searched(entry: Entry) -> str:
    return " ".join((entry.key, *entry.event_ids, *(record.by for record in entry.course.decisions))).lower()


def _skipped(entry: Entry, person: str) -> bool:
    return any(record.kind == "release" and record.by == person for record in entry.course.history)

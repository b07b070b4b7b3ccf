"""The live view's numbers: rates, shares, latencies over the last minute, and a sample of rows no faster than eyes.

Everything is counted; only the rows are sampled, and the page is told one in how many. Thread-safe: the feed adds, pages read.
"""

from __future__ import annotations

import bisect
import itertools
import random
import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from worker.clock import Clock

WINDOW_S = 60
STAGES = ("fetch", "decode", "queue", "infer", "total")
_EDGES_MS = tuple(0.05 * 1.25**step for step in range(64))
"""From 0.05 ms to a minute; a percentile is right to 12%."""
RECENT_ROWS = 60_000
"""What a new filter is filled from: a minute at a thousand a second."""
MAX_TENANTS = 200


@dataclass(frozen=True, slots=True)
class Row:
    """What the live view needs of a verdict."""

    event_id: str
    tenant: str
    label: str
    action: str
    score: float | None
    uncertain: bool
    reason: str | None
    cache: str
    timings_ms: dict[str, float | None]
    at: float
    """POSIX seconds: the record's time, never later than now."""

    def public(self) -> dict[str, Any]:
        """For the page."""
        names = ("event_id", "tenant", "label", "action", "score", "uncertain", "reason", "cache", "at")
        return {name: getattr(self, name) for name in names} | {"total_ms": self.timings_ms.get("total")}


@dataclass(frozen=True, slots=True)
class Filter:
    """Which verdicts a page wants; None: all."""

    tenant: str | None = None
    label: str | None = None
    action: str | None = None
    low: float | None = None
    """Least score; one without a score does not pass."""
    high: float | None = None

    def passes(self, row: Row) -> bool:
        """Whether the row is wanted."""
        if self.tenant is not None and row.tenant != self.tenant:
            return False
        if (self.label is not None and row.label != self.label) or (self.action is not None and row.action != self.action):
            return False
        if self.low is None and self.high is None:
            return True
        return row.score is not None and (self.low or 0.0) <= row.score <= (1.0 if self.high is None else self.high)


NO_FILTER = Filter()


@dataclass(slots=True)
class _Second:
    """Counts of one second."""

    verdicts: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    hits: int = 0
    uncertain: int = 0
    times: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        self.verdicts += 1
        self.outcomes[row.label, row.action] += 1
        self.hits += row.cache == "hit"
        self.uncertain += row.uncertain
        if row.reason is not None:
            self.reasons[row.reason] += 1
        for stage, milliseconds in row.timings_ms.items():
            if milliseconds is not None:
                self.times[stage, bisect.bisect_left(_EDGES_MS, milliseconds)] += 1


class Window:
    """The last minute, second by second."""

    def __init__(self) -> None:
        self._seconds: dict[int, _Second] = {}

    def add(self, row: Row) -> None:
        """Count a verdict."""
        second = int(row.at)
        if second not in self._seconds:
            self._seconds[second] = _Second()
            for old in [past for past in self._seconds if past < second - 2 * WINDOW_S]:
                del self._seconds[old]
        self._seconds[second].add(row)

    def summary(self, now: float) -> dict[str, Any]:
        """Totals of the last whole minute; the second that still runs is left out."""
        current = int(now)
        span = range(current - WINDOW_S, current)
        total = _Second()
        for second in (self._seconds[each] for each in span if each in self._seconds):
            total.verdicts += second.verdicts
            total.hits += second.hits
            total.uncertain += second.uncertain
            total.outcomes.update(second.outcomes)
            total.reasons.update(second.reasons)
            total.times.update(second.times)
        rates = [self._seconds[each].verdicts if each in self._seconds else 0 for each in span]
        return {
            "window_s": WINDOW_S,
            "verdicts": total.verdicts,
            "per_s": round(sum(rates[-5:]) / 5, 1),
            "rates": rates,
            "labels": _sums(total.outcomes, 0),
            "actions": _sums(total.outcomes, 1),
            "outcomes": {f"{label}/{action}": count for (label, action), count in total.outcomes.items()},
            "reasons": dict(total.reasons.most_common(20)),
            "cache_hits": total.hits,
            "uncertain": total.uncertain,
            "latency_ms": {stage: _percentiles(total.times, stage) for stage in STAGES},
        }


class Subscription:
    """One open page: its filter, its window, and the rows it has not been sent yet."""

    def __init__(self, wanted: Filter, window: Window | None, rows_a_tick: int) -> None:
        self.filter = wanted
        self._shared = window is not None
        self.window = window or Window()
        self._most = rows_a_tick
        self._rows: list[tuple[int, Row]] = []
        self._seen = 0

    def offer(self, row: Row) -> None:
        """Count it and, as one of all since the last tick with equal chances, keep it for the page."""
        if not self.filter.passes(row):
            return
        if not self._shared:
            self.window.add(row)
        self._seen += 1
        if len(self._rows) < self._most:
            self._rows.append((self._seen, row))
        elif (place := random.randrange(self._seen)) < self._most:
            self._rows[place] = (self._seen, row)

    def fill(self, rows: list[Row]) -> None:
        """Begin with these rows, all of them shown."""
        self._rows, self._seen = list(enumerate(rows)), len(rows)

    def take(self) -> tuple[list[Row], int]:
        """The rows since the last call, in their order, and how many there were of which they are the sample."""
        rows, seen = [row for _, row in sorted(self._rows, key=lambda kept: kept[0])], self._seen
        self._rows, self._seen = [], 0
        return rows, seen


class Live:
    """All open pages and the minute that they share."""

    def __init__(self, rows_per_s: int, ticks_per_s: int, clock: Clock) -> None:
        self._rows_a_tick = max(1, rows_per_s // ticks_per_s)
        self._clock = clock
        self._lock = threading.Lock()
        self._window = Window()
        self._recent: deque[Row] = deque(maxlen=RECENT_ROWS)
        self._subscriptions: set[Subscription] = set()
        self._summed: tuple[int, dict[str, Any]] = (0, {})  # the shared window's, of this second
        self._tenants: dict[str, None] = {}

    @property
    def subscribers(self) -> int:
        """Open pages."""
        return len(self._subscriptions)

    def add(self, row: Row) -> None:
        """Take a verdict."""
        fresh = row.at > self._clock.time() - WINDOW_S  # older ones are read at start, or come from a worker that lags
        with self._lock:
            self._recent.append(row)
            if fresh:
                self._window.add(row)
            if row.tenant not in self._tenants and len(self._tenants) < MAX_TENANTS:
                self._tenants[row.tenant] = None
            for subscription in self._subscriptions if fresh else ():
                subscription.offer(row)

    def subscribe(self, wanted: Filter, backlog: int = 20) -> Subscription:
        """Open a page: its minute is filled from what is remembered, and its first rows are the latest ones."""
        with self._lock:
            subscription = Subscription(wanted, self._window if wanted == NO_FILTER else None, self._rows_a_tick)
            if wanted == NO_FILTER:
                latest: Iterable[Row] = [self._recent[-1 - back] for back in range(min(backlog, len(self._recent)))][::-1]
            else:
                passing = [row for row in self._recent if wanted.passes(row)]
                for row in passing:
                    subscription.window.add(row)
                latest = passing[-backlog:]
            subscription.fill(list(latest))
            self._subscriptions.add(subscription)
            return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Close it."""
        with self._lock:
            self._subscriptions.discard(subscription)

    def take(self, subscription: Subscription) -> tuple[list[Row], int]:
        """New rows of a page and how many there were."""
        with self._lock:
            return subscription.take()

    def summary(self, subscription: Subscription) -> dict[str, Any]:
        """The minute as this page sees it."""
        now = self._clock.time()
        with self._lock:
            if subscription.window is not self._window:
                return subscription.window.summary(now) | {"tenants": list(self._tenants)}
            if self._summed[0] != int(now):
                self._summed = (int(now), self._window.summary(now) | {"tenants": list(self._tenants)})
            return self._summed[1]


def row_of(verdict: dict[str, Any], at: float) -> Row:
    """What the live view needs of a verdict."""
    timings = {stage: verdict["timings_ms"].get(stage) for stage in STAGES}
    names = ("event_id", "tenant", "label", "action", "score", "uncertain", "reason", "cache")
    return Row(**{name: verdict[name] for name in names}, timings_ms=timings, at=at)


def _sums(outcomes: Counter[tuple[str, str]], index: int) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for outcome, count in outcomes.items():
        sums[outcome[index]] += count
    return dict(sums)


def _percentiles(times: Counter[tuple[str, int]], stage: str) -> dict[str, float] | None:
    counts = sorted((index, count) for (name, index), count in times.items() if name == stage)
    total = sum(count for _, count in counts)
    if not total:
        return None
    return {"p50": _at(counts, 0.5 * total), "p95": _at(counts, 0.95 * total), "count": total}


def _at(counts: list[tuple[int, int]], wanted: float) -> float:
    """The middle of the bucket in which the wanted one of all values lies, in milliseconds."""
    seen = itertools.accumulate(count for _, count in counts)
    index = next(index for (index, _), below in zip(counts, seen, strict=True) if below >= wanted)
    upper = _EDGES_MS[min(index, len(_EDGES_MS) - 1)]
    return float(f"{upper / 1.25**0.5:.3g}")

"""The live numbers against slow, plain recounts; sampling; filters."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.worker.console.stage import verdict
from tests.worker.fake_clock import FakeClock
from worker.console.live import Filter, Live, Row, row_of


def row(event_id: str, at: float, score: float | None = 0.5, *, total: float = 10.0, **more: object) -> Row:
    found = verdict(event_id, score, **more)
    return row_of(found | {"timings_ms": {"fetch": None, "decode": None, "queue": None, "infer": 1.0, "total": total}}, at)


def live(clock: FakeClock) -> Live:
    return Live(rows_per_s=20, ticks_per_s=4, clock=clock)


def test_totals_of_a_minute() -> None:
    clock = FakeClock()
    page = live(clock)
    everything = page.subscribe(Filter())
    rng, now = random.Random(5), clock.time()
    added = []
    for number in range(3_000):
        at = now - rng.random() * 90
        added.append(row(str(number), at, rng.choice([None, 0.1, 0.5, 0.97]), reason="decode.corrupt", total=rng.uniform(1, 500)))
        page.add(added[-1])
    counted = [each for each in added if int(now) - 60 <= int(each.at) < int(now)]
    summary = page.summary(everything)
    assert summary["verdicts"] == len(counted) == sum(summary["rates"])
    assert summary["labels"] == dict(Counter(each.label for each in counted))
    assert summary["actions"] == dict(Counter(each.action for each in counted))
    times = sorted(each.timings_ms["total"] or 0.0 for each in counted)
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        assert summary["latency_ms"]["total"][name] == pytest.approx(times[int(share * len(times))], rel=0.15)
    assert summary["latency_ms"]["fetch"] is None


def test_a_filter_counts_what_passes_also_from_before_it_was_opened() -> None:
    clock = FakeClock()
    page = live(clock)
    at = clock.time() - 5
    for number in range(100):
        page.add(row(str(number), at, 0.2 if number % 4 else 0.8, tenant="acme" if number % 2 else "other"))
    chosen = page.subscribe(Filter(tenant="other", low=0.5))
    page.add(row("late", at, 0.9, tenant="other"))
    page.add(row("no score", at, None, tenant="other"))
    assert page.summary(chosen)["verdicts"] == 26
    rows, seen = page.take(chosen)
    assert all(each.tenant == "other" and (each.score or 0) >= 0.5 for each in rows)
    assert seen >= len(rows) > 0
    page.unsubscribe(chosen)
    assert page.subscribers == 0


def test_rows_are_a_fair_sample_and_never_more_than_eyes_can_follow() -> None:
    clock = FakeClock()
    page = live(clock)
    chosen = page.subscribe(Filter())
    page.take(chosen)
    picked: Counter[int] = Counter()
    for _ in range(400):
        for number in range(50):
            page.add(row(str(number), clock.time()))
        rows, seen = page.take(chosen)
        assert seen == 50
        assert len(rows) == 5
        assert [int(each.event_id) for each in rows] == sorted(int(each.event_id) for each in rows)
        picked.update(int(each.event_id) for each in rows)
    # Each of 50 is kept with probability 1/10: 40 times of 400, give or take five standard deviations (6).
    assert all(10 <= picked[number] <= 70 for number in range(50))


def test_a_second_is_counted_when_it_is_over() -> None:
    clock = FakeClock()
    page = live(clock)
    chosen = page.subscribe(Filter())
    page.add(row("now", clock.time() + 0.5))
    assert page.summary(chosen)["verdicts"] == 0
    clock.advance(1.0)
    assert page.summary(chosen)["verdicts"] == 1
    clock.advance(60.0)
    assert page.summary(chosen)["verdicts"] == 0


def test_old_verdicts_are_remembered_but_not_counted() -> None:
    clock = FakeClock()
    page = live(clock)
    page.add(row("old", clock.time() - 3600))
    chosen = page.subscribe(Filter())
    assert page.summary(chosen)["verdicts"] == 0
    rows, _ = page.take(chosen)
    assert [each.event_id for each in rows] == ["old"]

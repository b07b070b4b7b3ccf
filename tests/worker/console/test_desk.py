"""The queue: its order, floods, what is left out, and what each person skipped."""

from __future__ import annotations

import threading
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.worker.console.stage import verdict
from tests.worker.console.test_labels import claim, decision
from tests.worker.fake_clock import FakeClock
from worker.console.desk import Desk, uncertainty
from worker.console.labels import LabelRecord

DAY_S = 86_400.0


def sha(number: int) -> str:
    return f"{number:064x}"


def desk(max_entries: int = 100) -> Desk:
    return Desk(max_entries, FakeClock())


def entries(found: Desk, person: str = "ada", limit: int = 100) -> list[str]:
    return [row["event_id"] for row in found.listing(person, limit)["entries"]]


def on(number: int, record: LabelRecord) -> LabelRecord:
    return LabelRecord(record.kind, f"sha256:{sha(number)}", record.by, record.at, record.record_id, record.content)


def test_uncertain_ones_come_first_and_waiting_makes_urgent() -> None:
    queue = desk()
    queue.verdict(verdict("sure", 0.9, sha(1)), at=DAY_S)
    queue.verdict(verdict("unsure", 0.55, sha(2)), at=DAY_S)
    queue.verdict(verdict("none", None, sha(3)), at=DAY_S)
    queue.verdict(verdict("old", 0.9, sha(4)), at=0)
    assert entries(queue) == ["old", "none", "unsure", "sure"]


def test_a_flood_of_one_image_is_one_entry_decided_once_for_all() -> None:
    queue = desk()
    for number in range(500):
        queue.verdict(verdict(f"copy-{number}", 0.6, sha(1)), at=float(number))
    listing = queue.listing("ada", 10)
    assert listing["waiting"] == 1
    assert listing["entries"][0]["count"] == 500
    assert listing["entries"][0]["first_seen"].startswith("1970-01-01T00:00:00"), "it waits since the first of them"
    details = queue.details(f"sha256:{sha(1)}")
    assert details is not None and len(details["event_ids"]) == 100
    queue.label(on(1, decision("ada")))
    assert queue.listing("ada", 10)["waiting"] == 0
    queue.verdict(verdict("late copy", 0.6, sha(1)), at=1000.0)
    assert queue.listing("ada", 10)["waiting"] == 0
    assert [row["count"] for row in queue.decided()] == [501]


def test_a_decision_read_before_its_verdict_counts_too() -> None:
    queue = desk()
    queue.label(on(1, decision("ada")))
    queue.verdict(verdict("one", 0.6, sha(1)), at=0)
    assert entries(queue) == []


def test_an_appeal_comes_first() -> None:
    queue = desk()
    queue.verdict(verdict("one", 0.9, sha(1)), at=DAY_S)
    queue.verdict(verdict("two", 0.5, sha(2)), at=0)
    queue.label(on(1, decision("ada")))
    queue.label(on(1, LabelRecord("appeal", "", "grace", 5.0, content={"note": "no"})))
    assert entries(queue) == ["one", "two"]


def test_what_one_person_skipped_is_last_for_them_alone() -> None:
    queue = desk()
    for number in range(3):
        queue.verdict(verdict(str(number), 0.5, sha(number)), at=float(number))
    queue.label(on(0, claim("ada", 0)))
    queue.label(on(0, LabelRecord("release", "", "ada", 1.0, content={"skipped": True})))
    assert entries(queue, "ada") == ["1", "2", "0"]
    assert entries(queue, "grace") == ["0", "1", "2"]
    assert entries(queue, "ada", limit=2) == ["1", "2"]


def test_the_least_urgent_are_left_out_and_counted() -> None:
    queue = desk(max_entries=10)
    for number in range(25):
        queue.verdict(verdict(str(number), 0.5, sha(number)), at=float(number))
    listing = queue.listing("ada", 100)
    assert [row["event_id"] for row in listing["entries"]] == [str(number) for number in range(10)]
    assert listing["left_out"] == 15
    assert queue.verdict_of_event("24") is None
    assert queue.verdict_of_event("9") is not None


def test_who_holds_it_is_told_until_the_claim_runs_out() -> None:
    clock = FakeClock()
    queue = Desk(10, clock)
    queue.verdict(verdict("one", 0.5, sha(1)), at=0)
    queue.label(on(1, claim("ada", clock.time(), seconds=60)))
    assert queue.holder(f"sha256:{sha(1)}") == "ada"
    clock.advance(61)
    assert queue.holder(f"sha256:{sha(1)}") is None


def test_waiting_for_a_record_that_is_read_back() -> None:
    queue, record = desk(), on(1, decision("ada"))
    threading.Timer(0.05, lambda: queue.label(record)).start()
    assert queue.effect(record.record_id, timeout_s=5) is True
    assert queue.effect("never", timeout_s=0.01) is None


@given(st.floats(0, 1))
def test_uncertainty_is_a_share(score: float) -> None:
    assert 0 <= uncertainty(score) <= uncertainty(0.5) == 1 == uncertainty(None)


STEPS = st.lists(
    st.tuples(st.sampled_from(["verdict", "claim", "decision", "appeal", "release"]), st.integers(0, 4), st.floats(0, 1)),
    max_size=60,
)


@given(STEPS)
def test_the_queue_holds_exactly_what_waits(steps: list[tuple[str, int, float]]) -> None:
    queue = desk()
    known: dict[int, dict[str, Any]] = {}
    for at, (kind, number, score) in enumerate(steps):
        key = f"sha256:{sha(number)}"
        if kind == "verdict":
            known[number] = verdict(f"{at}", score, sha(number))
            queue.verdict(known[number], at=float(at))
        elif kind == "decision":
            course = queue.course(key)
            queue.label(on(number, decision("ada", course.latest if course else None)))
        elif kind == "claim":
            queue.label(on(number, claim("ada", float(at))))
        else:
            queue.label(on(number, LabelRecord(kind, "", "ada", float(at))))  # type: ignore[arg-type]
    expected = {number for number in known if (course := queue.course(f"sha256:{sha(number)}")) and course.open}
    listing = queue.listing("grace", 100)
    assert {int(row["entry"][7:], 16) for row in listing["entries"]} == expected
    assert listing["waiting"] == len(expected)


@given(
    st.none()
    | st.lists(st.integers())
    | st.dictionaries(st.sampled_from(["event_id", "label", "score"]), st.integers() | st.text())
)
def test_a_decision_that_says_nothing_of_its_verdict_is_listed(said: object) -> None:
    """`train labels sample --publish` and other tools write to the topic too."""
    queue = desk()
    made = decision("ada")
    queue.label(on(1, LabelRecord(made.kind, made.entry, made.by, made.at, made.record_id, made.content | {"verdict": said})))
    (row,) = queue.decided()
    assert row["decision"]["by"] == "ada"
    assert all(row[name] is None or isinstance(row[name], str) for name in ("event_id", "tenant", "label"))

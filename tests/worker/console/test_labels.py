"""The label topic's one rule: in any order of records, one decision at a time is in effect."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.console.stage import verdict
from worker.console.labels import Course, LabelRecord, entry_of, read


def decision(by: str, previous: LabelRecord | None = None, label: str = "authentic", at: float = 0.0) -> LabelRecord:
    content = {"label": label, "decision": "overturn", "previous": previous.record_id if previous else None}
    return LabelRecord("decision", "e", by, at, content=content)


def claim(by: str, at: float, seconds: float = 60) -> LabelRecord:
    return LabelRecord("claim", "e", by, at, content={"seconds": seconds})


def test_of_two_first_decisions_the_first_in_the_topic_counts() -> None:
    course, first, second = Course(), decision("ada"), decision("grace")
    assert course.fold(first)
    assert not course.fold(second)
    assert course.latest is first
    assert [record.by for record in course.history] == ["ada"]


def test_a_claim_keeps_others_out_until_it_runs_out() -> None:
    course = Course()
    assert course.fold(claim("ada", at=0))
    assert not course.fold(claim("grace", at=59))
    assert course.fold(claim("ada", at=59)), "one may keep it longer"
    assert not course.fold(claim("grace", at=100))
    assert course.fold(claim("grace", at=119))
    assert not course.fold(LabelRecord("release", "e", "ada", 120.0)), "only who has it gives it back"
    assert course.fold(LabelRecord("release", "e", "grace", 120.0))
    assert course.claim is None


def test_appeal_and_reversal() -> None:
    course, first = Course(), decision("ada")
    assert not course.fold(LabelRecord("appeal", "e", "grace", 0.0)), "there is nothing to appeal against"
    course.fold(first)
    assert not course.fold(decision("ada", first)), "without an appeal a decision stands"
    assert course.fold(LabelRecord("appeal", "e", "grace", 1.0))
    assert course.open
    assert not course.fold(decision("ada")), "it does not know of the first one"
    reversal = decision("grace", first, "ai_generated")
    assert course.fold(reversal)
    assert course.latest is reversal
    assert not course.open
    assert [record.kind for record in course.history] == ["decision", "appeal", "decision"]


PEOPLE = st.sampled_from(["ada", "grace", "linus"])


@given(st.lists(st.tuples(st.sampled_from(["claim", "release", "decision", "appeal"]), PEOPLE, st.integers(0, 3)), max_size=40))
def test_whatever_stands_in_the_topic_decisions_form_one_chain(steps: list[tuple[str, str, int]]) -> None:
    """Consoles that know more or less of the topic write at will: `lag` is how far back their knowledge ends."""
    course = Course()
    known: list[LabelRecord | None] = [None]
    for at, (kind, by, lag) in enumerate(steps):
        if kind == "decision":
            record = decision(by, known[max(0, len(known) - 1 - lag)], at=at)
        elif kind == "claim":
            record = claim(by, at, seconds=5)
        else:
            record = LabelRecord(kind, "e", by, at)  # type: ignore[arg-type]
        holder = course.claim.by if course.claim and course.claim.in_force(at) else None
        effective = course.fold(record)
        if kind == "claim" and holder not in (None, by):
            assert not effective
        if kind == "decision" and effective:
            known.append(record)
    previous = None
    for made in course.decisions:
        assert made.content["previous"] == previous
        previous = made.record_id
    assert len(course.decisions) <= 1 + sum(record.kind == "appeal" for record in course.history)


def test_records_come_back_from_their_bytes() -> None:
    written = decision("ada", at=1_700_000_000.25)
    found = read(written.to_json())
    assert found == written


@given(st.binary() | st.none())
def test_what_is_no_record_is_passed_over(value: bytes | None) -> None:
    assert read(value) is None


@pytest.mark.parametrize(
    "change",
    [
        {"specversion": "other/1"},
        {"type": "coup"},
        {"by": ""},
        {"at": "yesterday"},
        {"at": 5},
        {"label": "maybe"},
        {"entry": None},
    ],
)
def test_a_damaged_record_is_passed_over(change: dict[str, object]) -> None:
    assert read(json.dumps({**json.loads(decision("ada").to_json()), **change}).encode()) is None


@pytest.mark.parametrize("seconds", [0, -1, "60", None, 10**400, float("inf"), float("nan")])
def test_a_claim_of_no_sensible_length_is_passed_over(seconds: object) -> None:
    assert read(claim("ada", 0.0).to_json()) is not None
    assert read(LabelRecord("claim", "e", "ada", 0.0, content={"seconds": seconds}).to_json()) is None


def test_an_entry_is_the_image_or_the_event() -> None:
    assert entry_of(verdict("one", 0.5, "ab" * 32)) == entry_of(verdict("two", 0.6, "ab" * 32))
    assert entry_of(verdict("one", None, reason="fetch.not_found")) == "event:one"

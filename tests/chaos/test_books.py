"""The books find what is lost, doubled, wrong or blamed, and nothing in a run where all is well."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chaos.books import SLACK_S, Balance, Books, Disturbance
from tests.chaos.load import GREYS, Planned, plan, sha256_of
from worker.contracts import verdict_id

SCORES = {grey: grey / 100 for grey in range(GREYS)}
COUNT = 400
START = 1_000_000.0
Record = dict[str, Any]


@pytest.fixture
def plans() -> list[Planned]:
    return [plan(7, number, "host:1") for number in range(COUNT)]


def verdict_of(number: int, planned: Planned) -> Record:
    event_id = planned.event_id or ""
    return {
        "verdict_id": verdict_id(event_id, "v1"),
        "event_id": event_id,
        "reason": planned.code,
        "score": None if planned.code else SCORES[planned.grey or 0],
        "image": None if planned.code else {"sha256": sha256_of(planned, number)},
        "model": {"version": "v1"},
        "source": {"partition": number % 4, "offset": number},
    }


class Run:
    """Writes what a faultless worker would, except where a test says otherwise."""

    def __init__(self, plans: list[Planned]) -> None:
        self.plans = plans
        self.books = Books(plans, {"v1": SCORES})

    def write(self, number: int, stamp: float = START, **changes: object) -> None:
        planned = self.plans[number]
        if planned.event_id is not None:
            self.books.verdict(json.dumps(verdict_of(number, planned) | changes).encode(), stamp)
        if planned.code is not None:
            self.letter(number, stamp, planned.code)

    def letter(self, number: int, stamp: float, code: str) -> None:
        headers = {"__streams.errors.exception": code.encode()}
        self.books.letter(self.plans[number].key, self.plans[number].value, headers, stamp)

    def balance(self, *disturbances: Disturbance, exactly_once: bool = False) -> Balance:
        sources = {number: {(number % 4, number)} for number in range(COUNT)}
        return self.books.balance(sources, list(disturbances), exactly_once=exactly_once)


@pytest.fixture
def run(plans: list[Planned]) -> Run:
    return Run(plans)


def first(run: Run, kind: str) -> int:
    return next(number for number, planned in enumerate(run.plans) if planned.kind == kind)


def test_a_faultless_run_balances(run: Run) -> None:
    assert {planned.kind for planned in run.plans} == {"unique", "popular", "url", "broken", "malformed", "no id"}
    for number in range(COUNT):
        assert not run.books.complete
        run.write(number)
    assert run.books.complete
    found = run.balance(exactly_once=True)
    assert (found.problems, found.lost, found.duplicates, found.duplicate_letters) == ([], [], 0, 0)
    assert found.verdicts + sum(planned.kind == "no id" for planned in run.plans) == COUNT


@pytest.mark.parametrize("kind", ["unique", "popular", "url", "broken", "malformed", "no id"])
def test_a_lost_event_is_found(run: Run, kind: str) -> None:
    missing = first(run, kind)
    for number in range(COUNT):
        if number != missing:
            run.write(number)
    assert not run.books.complete
    assert len(run.balance().lost) == 1
    assert run.balance().problems


def test_a_failed_event_without_its_dead_letter_is_lost(run: Run) -> None:
    number = first(run, "broken")
    run.books.verdict(json.dumps(verdict_of(number, run.plans[number])).encode(), START)
    assert run.plans[number].event_id in run.balance().lost


def test_duplicates_are_counted_and_need_a_cause(run: Run) -> None:
    for number in range(COUNT):
        run.write(number)
    run.write(first(run, "unique"), START + 10)
    kill = Disturbance("worker_kill", START + 5, START + 5)
    assert run.balance(kill).duplicates == 1
    assert run.balance(kill).problems == []
    for elsewhen in ([], [Disturbance("worker_kill", START - 2 * SLACK_S, START - SLACK_S - 1)]):
        assert "duplicates without a cause" in run.balance(*elsewhen).problems[0]
    assert run.balance(kill, exactly_once=True).problems == ["1 verdicts and 0 dead letters twice, read committed"]


def test_a_retried_event_was_doubled_before_its_verdicts(run: Run) -> None:
    """An expelled member and its successor both send it to the retry topic; both verdicts come of that, later."""
    for number in range(COUNT):
        run.write(number)
    run.write(first(run, "url"), START + 1)
    stopped = Disturbance("worker_stop", START - SLACK_S - 30, START - SLACK_S - 10)
    assert run.balance(stopped).problems == []
    assert run.balance(Disturbance("worker_stop", START - SLACK_S - 90, START - SLACK_S - 70)).problems


def test_a_dead_letter_twice_is_a_duplicate_too(run: Run) -> None:
    for number in range(COUNT):
        run.write(number)
    run.letter(first(run, "no id"), START + 1, "event.malformed")
    assert run.balance().duplicate_letters == 1
    assert run.balance(exactly_once=True).problems


@pytest.mark.parametrize(
    "changes",
    [
        {"score": 0.99},
        {"image": {"sha256": "0" * 64}},
        {"verdict_id": "another"},
        {"model": {"version": "v2"}},
        {"reason": "decode.corrupt"},
        {"source": {"partition": 3, "offset": 999}},
        {"event_id": "never sent"},
    ],
)
def test_a_wrong_verdict_is_found(run: Run, changes: Record) -> None:
    wrong = first(run, "unique")
    for number in range(COUNT):
        run.write(number, **(changes if number == wrong else {}))
    assert run.balance().problems


def test_a_wrong_code_is_found(run: Run) -> None:
    run.write(first(run, "broken"), reason="decode.corrupt")
    assert any("instead of decode.unsupported" in problem for problem in run.balance().problems)


def test_a_dead_letter_of_a_good_event_is_found(run: Run) -> None:
    number = first(run, "unique")
    run.write(number)
    run.letter(number, START, "decode.crashed")
    assert any("no verdict that tells of a failure" in problem for problem in run.balance().problems)


def test_a_good_image_is_blamed_only_while_decoders_are_hurt(run: Run) -> None:
    number = first(run, "unique")
    for other in range(COUNT):
        run.write(other, **({"reason": "decode.timeout"} if other == number else {}))
    assert run.balance(Disturbance("decoder_stop", START - 1, START)).problems == []
    assert run.balance(Disturbance("decoder_stop", START - 1, START)).blamed == 1
    assert run.balance(Disturbance("cache_kill", START - 1, START)).problems


def test_a_host_may_fail_for_its_own_events_only(run: Run) -> None:
    run.write(first(run, "url"), reason="fetch.unavailable")
    assert run.balance().host_failed == 1
    run.write(first(run, "unique"), reason="fetch.unavailable")
    assert any("fetch.unavailable for a good image" in problem for problem in run.balance().problems)


def test_a_record_that_its_producer_wrote_twice_has_two_places(run: Run) -> None:
    acknowledged = {number: (number % 4, number) for number in range(COUNT)}
    for number in range(COUNT):
        run.write(number)
    assert not run.books.misplaced(acknowledged)
    number = first(run, "unique")
    source = verdict_of(number, run.plans[number])["source"] | {"offset": COUNT + 1}
    run.write(number, source=source)
    assert run.books.misplaced(acknowledged)
    kill = Disturbance("broker_kill", START, START)
    assert run.balance(kill).problems  # it stands nowhere but where the uploader was told
    places = {other: {place} for other, place in acknowledged.items()}
    places[number].add((number % 4, COUNT + 1))
    assert run.books.balance(places, [kill]).problems == []

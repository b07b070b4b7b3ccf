"""Too many dead letters in a row: a whole worker stops reading, says so, stays alive, and goes on by itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.chaos import load
from tests.chaos.brokers import EmbeddedBrokers
from tests.chaos.run import Plan, Run
from worker.embedded import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(600)]

IN_A_ROW, IN_FLIGHT, RESET_S = 20, 64, 1.5
PROBES = IN_FLIGHT // 4
SETTINGS: dict[str, object] = {
    "CIRCUIT__FAILURES_IN_A_ROW": IN_A_ROW,
    "CIRCUIT__RESET_S": RESET_S,
    "KAFKA__MAX_IN_FLIGHT": IN_FLIGHT,
}
RECEIVED = "code_worker_events_received_total"
OPEN = "code_worker_dead_letter_circuit_open"


def of_kind(kind: str, count: int, first: int) -> list[load.Planned]:
    """Events of one kind with numbers of their own."""
    numbers = range(first, first + 1_000 * count)
    return [planned for number in numbers if (planned := load.plan(31, number, "127.0.0.1:1")).kind == kind][:count]


def test_the_circuit_of_a_whole_worker_opens_holds_and_closes(broker: EmbeddedBroker, tmp_path: Path) -> None:
    plan = Plan(31, seconds=0, events=0, workers=1, partitions=1, worker_settings=SETTINGS)
    good, bad, later = of_kind("unique", 30, 0), of_kind("malformed", 140, 100), of_kind("unique", 40, 1_000)
    with Run(plan, EmbeddedBrokers(broker), tmp_path) as run:
        for planned in [*good, *bad, *later]:
            run.books.expect(planned)
        sent = {"good": True, "bad": False}

        def wait_s(number: int) -> float:
            """Bad ones wait for the scores of the good (one in between begins the count anew), later ones for an open circuit."""
            if number >= len(good) + len(bad):
                return 0.05 if sent["good"] else 0.0
            return 0.05 if number >= len(good) and not sent["bad"] else 0.0

        def scored() -> bool:
            verdicts = (value for name, value in run.workers.metrics(0).items() if name.startswith("code_worker_verdicts_total{"))
            return sum(verdicts) >= len(good)

        run.start()
        begun = closed_at = time.monotonic()
        uploader = run.upload([*good, *bad, *later], wait_s)
        run.wait(scored, 120, "verdicts of the good ones")
        sent["bad"] = True
        begun = time.monotonic()

        def intake() -> bool:
            """What /readyz says; it answers 503 exactly while something is missing."""
            status, body = run.workers.get(0, "readyz")
            conditions = json.loads(body)
            assert (status == 200) == all(conditions.values()), (status, body)
            return bool(conditions["intake"])

        while intake():
            closed_at = time.monotonic()
            assert closed_at < begun + 120, run.workers.log(0)[-2000:]
            run.reader.look(0.05)
        run.wait(lambda: run.workers.metrics(0)[OPEN] == 1, 60, "gauge of the open circuit")  # it is set once a second
        sent["good"] = False  # from here on events that could be scored stand behind the bad ones
        looks = 0
        while True:  # only the probes are read on top, and the worker is alive
            received = run.workers.metrics(0)[RECEIVED]
            rounds = int((time.monotonic() - closed_at) / RESET_S)
            if intake():
                break
            assert received <= len(good) + IN_A_ROW + IN_FLIGHT + PROBES * rounds, (received, rounds)
            assert run.workers.get(0, "livez")[0] == 200
            looks += 1
            assert time.monotonic() < closed_at + 240, run.workers.log(0)[-2000:]
            run.reader.look(0.05)
        assert looks
        run.watch(lambda: uploader.done, begun)
        run.wait(lambda: run.workers.metrics(0)[OPEN] == 0, 60, "gauge of the closed circuit")
        report = run.finish(uploader, begun)
        log = run.workers.log(0)
    assert not report.problems, report.problems
    assert report.balance.duplicates == report.balance.duplicate_letters == 0
    assert not run.workers.exits or all(one.wanted for one in run.workers.exits)
    told = [json.loads(line)["event"] for line in log.splitlines() if '"circuit.' in line]
    assert told[0] == "circuit.opened"
    assert told[-1] == "circuit.closed"

"""Exactly once on whole worker processes: a partition's leader dies under transactions, and somebody takes the worker's name."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.chaos.brokers import ApacheBrokers
from tests.chaos.run import Plan, Run
from tests.chaos.schedule import Fault
from tests.conftest import KafkaCluster
from worker.kafka_clients import open_admin
from worker.kafka_transactions import TransactionalProducer, transactional_id

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

NAME = "pod-0"
HALF = 300


def read_until(run: Run, done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 180
    while not done():
        assert time.monotonic() < deadline, f"no {what}: {run.workers.log(0)[-2000:]}"
        run.reader.look()


def test_a_leader_killed_and_a_name_taken_under_transactions(three: KafkaCluster, tmp_path: Path) -> None:
    plan = Plan(
        41,
        seconds=0,
        events=2 * HALF,
        workers=1,
        delivery="exactly_once",
        partitions=4,
        worker_settings={"KAFKA__GROUP_INSTANCE_ID": NAME, "KAFKA__MAX_IN_FLIGHT": 64},
    )
    with Run(plan, ApacheBrokers(three, 3), tmp_path) as run:
        run.start()
        begun, held = time.monotonic(), [True]
        uploader = run.upload(run.plans, lambda number: 0.05 if number >= HALF and held[0] else 0.0)
        read_until(run, lambda: run.books.accounted >= 50, "verdicts")
        with closing(open_admin(run.settings)) as admin:
            leader = admin.describe_topics([run.settings.verdict_topic])[0]["partitions"][0]["leader_id"]
        run.hurt(Fault(0, "broker_kill", leader - 1, 2.0))
        read_until(run, lambda: run.books.accounted >= HALF, "verdicts after the leader's death")
        assert not run.workers.exits

        settings = run.settings.model_copy(update={"group_instance_id": NAME})
        usurper = TransactionalProducer(settings, transactional_id(settings))
        usurper.initialize(60)
        held[0] = False
        read_until(run, lambda: bool(run.workers.exits), "end of the fenced worker")
        usurper.discard()
        run.watch(lambda: uploader.done, begun)  # the one that is started in its place takes the name back
        report = run.finish(uploader, begun)
    assert not report.problems, report.problems
    assert report.balance.duplicates == report.balance.duplicate_letters == 0
    (fenced,) = (one for one in run.workers.exits if not one.wanted)
    assert fenced.code == 3
    assert fenced.last_line.startswith("fatal: "), fenced.last_line
    assert f"fenced: another process has taken over the transactional id {transactional_id(settings)}" in fenced.last_line

"""A short schedule of faults under whole worker processes, and the books afterwards. The long ones: `make chaos`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import netns
from tests.chaos.brokers import ApacheBrokers, Brokers, EmbeddedBrokers
from tests.chaos.run import Plan, Report, Run
from tests.chaos.schedule import BY_NAME, EMBEDDED, draw
from tests.conftest import KafkaCluster, cluster_script
from worker.embedded import EmbeddedBroker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ON_KAFKA = Plan(seed=78, seconds=25, events=1_500, workers=2, hurts=6, longest_s=5)
ON_THE_EMBEDDED_BROKER = Plan(seed=69, seconds=15, events=800, workers=2, hurts=6, partitions=3, longest_s=4)


@pytest.fixture
def own_broker() -> Iterator[EmbeddedBroker]:
    """A broker that may be stopped without hurting other tests."""
    with EmbeddedBroker() as broker:
        yield broker


def go(plan: Plan, brokers: Brokers, folder: Path) -> Report:
    with Run(plan, brokers, folder) as run:
        report = run.go()
    repeat = f"SEED={plan.seed}; faults: {report.disturbances}"
    assert not report.problems, f"{repeat}\n" + "\n".join(report.problems)
    assert report.faults, repeat
    return report


@pytest.mark.cluster
def test_faults_on_apache_kafka(three: KafkaCluster, tmp_path: Path) -> None:
    go(dataclasses.replace(ON_KAFKA, namespaces=netns.missing() is None), ApacheBrokers(three, 3), tmp_path)


@pytest.mark.broker
@pytest.mark.skipif(cluster_script()[0] is not None, reason="Apache Kafka is here and bears more")
def test_faults_on_the_embedded_broker(own_broker: EmbeddedBroker, tmp_path: Path) -> None:
    go(ON_THE_EMBEDDED_BROKER, EmbeddedBrokers(own_broker), tmp_path)


def test_the_short_schedules_hold_what_matters() -> None:
    """Or the seeds have to be chosen again."""
    drawn = draw(ON_KAFKA.seed, 25, 6, workers=2, nodes=3, allowed=BY_NAME, longest_s=5)
    assert {fault.kind for fault in drawn} >= {"worker_kill", "worker_stop", "broker_kill", "leaders_move", "network_cut"}
    drawn = draw(ON_THE_EMBEDDED_BROKER.seed, 15, 6, workers=2, nodes=1, allowed=EMBEDDED, longest_s=4)
    assert {fault.kind for fault in drawn} >= {"worker_kill", "worker_stop", "decoder_stop", "broker_stop", "cache_kill"}

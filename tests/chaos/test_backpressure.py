"""What stops the intake: a broker that refuses verdicts, a slow engine, images of 20 MB; and a full disk, which must not matter.

Whole worker processes; polling goes on, memory stays within the budget, nothing is lost.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from tests.chaos import load
from tests.chaos.books import Disturbance
from tests.chaos.brokers import ApacheBrokers, Brokers, EmbeddedBrokers
from tests.chaos.run import Plan, Run
from tests.conftest import KafkaCluster
from worker.embedded import EmbeddedBroker
from worker.kafka_clients import open_admin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
MIB = 2**20
IN_FLIGHT = "code_worker_in_flight_events"


@contextmanager
def started(plan: Plan, brokers: Brokers, folder: Path, prefix: tuple[str, ...] = ()) -> Iterator[Run]:
    with Run(plan, brokers, folder, prefix=prefix) as run:
        run.start()
        yield run


def finished(run: Run, uploader: load.Uploader) -> None:
    """Everything accounted for, once, and every offset committed."""
    begun = time.monotonic()
    run.watch(lambda: uploader.done, begun)
    report = run.finish(uploader, begun)
    assert not report.problems, report.problems


@pytest.mark.broker
def test_a_slow_engine_pauses_the_intake_and_polling_goes_on(broker: EmbeddedBroker, tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "CHAOS_ENGINE_MS": 250,
        "BATCH__MAX_BATCH_SIZE": 8,
        "KAFKA__MAX_IN_FLIGHT": 32,
        "KAFKA__MAX_POLL_INTERVAL_MS": 35_000,
    }
    plan = Plan(5, seconds=0, events=300, workers=1, partitions=3, worker_settings=settings)
    with started(plan, EmbeddedBrokers(broker), tmp_path) as run:
        uploader = run.upload(run.plans, load.steadily(300, 0))
        seen = []

        def paused() -> bool:
            metrics = run.workers.metrics(0)
            seen.append(metrics.get(IN_FLIGHT, 0))
            return metrics.get("code_worker_paused_partitions", 0) > 0

        run.wait(paused, 60, "paused partitions")
        while not run.books.complete:
            run.reader.look()
            paused()
            assert run.workers.get(0, "livez")[0] == 200
        assert max(seen) <= 32
        finished(run, uploader)


@pytest.mark.cluster
def test_a_topic_that_refuses_verdicts_stops_the_intake(three: KafkaCluster, tmp_path: Path) -> None:
    """The verdict topic asks for all three replicas, and one broker stands still: uploads go on, verdicts do not."""
    plan = Plan(6, seconds=0, events=600, workers=1, partitions=4, worker_settings={"KAFKA__MAX_IN_FLIGHT": 64})
    brokers = ApacheBrokers(three, 3)
    with started(plan, brokers, tmp_path) as run:

        def ask_for(replicas: int) -> None:
            with closing(open_admin(run.settings)) as admin:
                topic = run.settings.verdict_topic
                admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"min.insync.replicas": str(replicas)})])

        ask_for(3)
        began = time.time()
        brokers.stop(2)
        try:
            uploader = run.upload(run.plans, load.steadily(600, 0))
            # Not until 64 are in flight: dead letters still go, and reading goes on only when a quarter of the budget is free.
            run.wait(lambda: run.workers.metrics(0).get("code_worker_paused_partitions", 0) > 0, 120, "spent budget")
            assert 64 * 3 / 4 < run.workers.metrics(0)[IN_FLIGHT] <= 64
            received = run.workers.metrics(0)["code_worker_events_received_total"]
            waited = time.monotonic()
            while time.monotonic() < waited + 4:
                metrics = run.workers.metrics(0)
                assert metrics["code_worker_events_received_total"] == received  # nothing is read on top
                assert run.workers.get(0, "livez")[0] == 200
                time.sleep(0.2)
        finally:
            brokers.resume(2)
            ask_for(2)
        run.disturbances.append(Disturbance("refused", began, time.time()))
        finished(run, uploader)


@pytest.mark.broker
def test_a_full_disk_does_not_matter(broker: EmbeddedBroker) -> None:
    """The worker writes to no disk: with /tmp, /var/tmp and /dev/shm full to the last byte everything goes on."""
    # Whoever has the checkout below one of them keeps it: it is bound to its place again before the rest is filled.
    fill = (
        'mount --bind "$1" /mnt || exit 71;'
        " for folder in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o size=64k tmpfs $folder || exit 70;"
        ' case "$1" in $folder/*) mkdir -p "$1" && mount --bind /mnt "$1" || exit 71;; esac;'
        ' dd if=/dev/zero of=$folder/full bs=4k >/dev/null 2>&1; done; cd "$1"; mkdir -p "$0"; shift; exec "$@"'
    )
    private = ("unshare", "--mount", "--propagation", "private", "sh", "-c", fill)
    prefix = (*private, "/proc", str(ROOT))
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("a full disk needs mount namespaces: root and unshare")
    # What the run itself writes must not lie under the full folders.
    outside = Path(tempfile.mkdtemp(prefix="chaos-", dir="/var/lib"))
    try:
        plan = Plan(8, seconds=0, events=400, workers=1, partitions=3, worker_settings={"DECODE__PROCESSES": 2})
        with started(plan, EmbeddedBrokers(broker), outside, prefix) as run:
            uploader = run.upload(run.plans, load.steadily(400, 0))
            finished(run, uploader)
    finally:
        shutil.rmtree(outside)


def memory_of_large_images(brokers: Brokers, folder: Path, events: int, seconds: float) -> dict[str, float]:
    """Peak resident MiB of a worker without its decoders over `seconds` while `events` images of 20 MB wait; how many it did."""
    settings: dict[str, object] = {
        "CHAOS_ENGINE_MS": 50,
        "KAFKA__MAX_IN_FLIGHT_BYTES": 128 * MIB,
        "FETCH__CONCURRENCY": 8,
        "FETCH__TIMEOUT_S": 120,  # the host shares the cores of a busy machine
        "DECODE__TIMEOUT_S": 60,
    }
    plan = Plan(9, seconds=0, events=0, workers=1, partitions=3, worker_settings=settings)
    with started(plan, brokers, folder) as run:
        process = psutil.Process(run.workers.pid(0))
        idle = process.memory_info().rss
        peak = [idle]
        waiting = (load.large(number, run.host.address) for number in range(events))
        uploader = run.upload(waiting, load.steadily(events, 0))
        run.wait(lambda: uploader.done, 300, "events in the topic")
        begun, verdicts = time.monotonic(), 0.0
        while time.monotonic() < begun + seconds or (not verdicts and time.monotonic() < begun + 240):
            for _ in range(20):
                peak.append(process.memory_info().rss)
                time.sleep(0.05)
            metrics = run.workers.metrics(0)
            verdicts = sum(value for name, value in metrics.items() if name.startswith("code_worker_verdicts_total"))
        assert not any(value for name, value in metrics.items() if name.startswith("code_worker_dead_letters_total")), metrics
        return {"idle_mib": idle / MIB, "peak_mib": max(peak) / MIB, "budget_mib": 128, "done": verdicts}


BESIDE_MIB = 160
"""Beside the budget: copies of the image that is being handed to the decoder and of what the allocator keeps."""


@pytest.mark.broker
def test_images_of_twenty_megabytes_stay_within_the_budget(broker: EmbeddedBroker, tmp_path: Path) -> None:
    found = memory_of_large_images(EmbeddedBrokers(broker), tmp_path, events=1_000, seconds=12)
    assert found["done"] > 0, found
    assert found["peak_mib"] < found["idle_mib"] + found["budget_mib"] + BESIDE_MIB, found


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_images_of_twenty_megabytes_wait(three: KafkaCluster, tmp_path: Path) -> None:
    found = memory_of_large_images(ApacheBrokers(three, 3), tmp_path, events=100_000, seconds=300)
    print(found)
    assert found["done"] > 100, found
    assert found["peak_mib"] < found["idle_mib"] + found["budget_mib"] + BESIDE_MIB, found

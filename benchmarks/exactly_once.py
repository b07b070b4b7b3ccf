"""What exactly-once delivery costs against at-least-once: the same events, the same worker, three brokers of Apache Kafka.

`python -m benchmarks.exactly_once`. The engine is the null one, so that the path is what is measured. The modes take turns,
each run with topics and a group of its own; events wait in the topic before a worker starts. Rates are of verdicts as a reader
of committed records sees them. Needs the script that starts Apache Kafka (environment KAFKA_CLUSTER, or beside the checkout).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record
from benchmarks.kafka_ends import Uploads, Verdicts
from benchmarks.pipeline import jpegs
from worker.clock import Deadline
from worker.embedded import EmbeddedCache
from worker.kafka_clients import ensure_topics
from worker.settings import KafkaSettings

MODES = ("at_least_once", "exactly_once")
BESIDE_THE_CHECKOUT = Path(__file__).parents[2] / "shared" / "kafka" / "cluster"


def cluster_script() -> Path | None:
    """The script that starts Apache Kafka, or None."""
    named = os.environ.get("KAFKA_CLUSTER")
    script = BESIDE_THE_CHECKOUT if named is None else Path(named)
    return script if script.is_file() and shutil.which("java") else None


@contextmanager
def brokers(script: Path, folder: Path, nodes: int = 3) -> Iterator[tuple[str, ...]]:
    """A cluster of its own; its bootstrap servers."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(script), *arguments, "--dir", str(folder)],
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.stdout.strip()

    try:
        yield tuple(run("start", "--nodes", str(nodes)).split(","))
    finally:
        run("stop")


def one_run(
    mode: str, pictures: list[bytes], bootstrap: tuple[str, ...], cache: EmbeddedCache, max_in_flight: int
) -> dict[str, Any]:
    """Events a second and CPU of a worker process in this mode, after a fifth of the events as warm-up."""
    name = uuid.uuid4().hex[:6]
    settings = KafkaSettings(
        bootstrap_servers=bootstrap,
        group_id=f"group-{name}",
        upload_topics=(f"uploads-{name}",),
        verdict_topic=f"verdicts-{name}",
        retry_topic=f"retry-{name}",
        dead_letter_topic=f"dead-{name}",
        create_topics=True,
    )
    ensure_topics(settings, Deadline(60))
    _produce(pictures, settings)
    with (
        tempfile.TemporaryDirectory() as scratch,
        _worker(mode, settings, cache, Path(scratch), max_in_flight) as process,
        closing(_Verdicts(settings)) as verdicts,
    ):
        first = verdicts.wait(len(pictures) // 5, process)
        cpu, wall = _cpu(process), time.perf_counter()
        verdicts.wait(len(pictures), process)
        wall = time.perf_counter() - wall
        cpu = _cpu(process) - cpu
    events = len(pictures) - first
    return {"events_per_s": events / wall, "cpu_s_per_1000": cpu / events * 1000, "events": events}


@contextmanager
def _worker(
    mode: str, settings: KafkaSettings, cache: EmbeddedCache, scratch: Path, max_in_flight: int
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WORKER_")}
    environment |= {
        "WORKER_KAFKA__BOOTSTRAP_SERVERS": ",".join(settings.bootstrap_servers),
        "WORKER_KAFKA__GROUP_ID": settings.group_id,
        "WORKER_KAFKA__UPLOAD_TOPICS": settings.upload_topics[0],
        "WORKER_KAFKA__VERDICT_TOPIC": settings.verdict_topic,
        "WORKER_KAFKA__RETRY_TOPIC": settings.retry_topic,
        "WORKER_KAFKA__DEAD_LETTER_TOPIC": settings.dead_letter_topic,
        "WORKER_KAFKA__DELIVERY": mode,
        "WORKER_KAFKA__MAX_IN_FLIGHT": str(max_in_flight),
        "WORKER_CACHE__URL": cache.url,
        "WORKER_HTTP__PORT": "0",
        "WORKER_LOG__LEVEL": "WARNING",
    }
    with (scratch / "worker.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.null_worker"], env=environment, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(90)
        sys.stderr.write((scratch / "worker.log").read_text()[-2000:])


def _produce(pictures: list[bytes], settings: KafkaSettings) -> None:
    producer = Uploads(",".join(settings.bootstrap_servers), linger_ms=5, acks="all")
    for number, picture in enumerate(pictures):
        headers = [("content-type", b"image/jpeg"), ("event_id", f"picture-{number}".encode())]
        producer.send(settings.upload_topics[0], picture, headers, number % 4)
    producer.flush()


class _Verdicts:
    """Counts verdicts as a reader of committed records."""

    def __init__(self, settings: KafkaSettings) -> None:
        bootstrap = ",".join(settings.bootstrap_servers)
        self._verdicts = Verdicts(bootstrap, settings.verdict_topic, **{"isolation.level": "read_committed"})
        self._seen = 0

    def wait(self, count: int, process: subprocess.Popen[bytes]) -> int:
        """Until `count` were seen; how many were."""
        deadline = time.monotonic() + 900
        while self._seen < count:
            self._seen += len(self._verdicts.read(0.1))
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the worker ended or stalled at {self._seen} of {count} verdicts")
        return self._seen

    def close(self) -> None:
        """Let go of the broker."""
        self._verdicts.close()


def _cpu(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds of the worker and its decoder processes."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.cpu_times().user + member.cpu_times().system for member in family)


def main(events: int, rounds: int, max_in_flight: int) -> dict[str, Any] | None:
    """Run both modes `rounds` times and write the result file; None, with one line, where there is no Kafka."""
    script = cluster_script()
    if script is None:
        print(
            "exactly_once: skipped, no Apache Kafka to start (KAFKA_CLUSTER, and java)",
            file=sys.stderr,
        )
        return None
    pictures = jpegs(events)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder, brokers(script, Path(folder) / "kafka") as bootstrap, EmbeddedCache() as cache:
        for number in range(2 * rounds):
            mode = MODES[number % 2]
            fresh = [picture + number.to_bytes(2, "big") for picture in pictures]  # no run finds another's scores in the cache
            runs[mode].append(one_run(mode, fresh, bootstrap, cache, max_in_flight))
            print(mode, runs[mode][-1], file=sys.stderr)
    figures: dict[str, Any] = {"brokers": 3, "partitions": 4, "rounds": rounds, "max_in_flight": max_in_flight, "runs": runs}
    for name in ("events_per_s", "cpu_s_per_1000"):
        for mode in MODES:
            figures.setdefault(mode, {})[name] = statistics.median(run[name] for run in runs[mode])
        figures[f"{name}_ratio"] = figures["exactly_once"][name] / figures["at_least_once"][name]
    record.write("exactly_once", figures)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactly_once", description=__doc__)
    parser.add_argument("--events", type=int, default=3000, help="events of each run (3000)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each mode (3)")
    parser.add_argument("--max-in-flight", type=int, default=256, help="WORKER_KAFKA__MAX_IN_FLIGHT of the workers (256)")
    chosen = parser.parse_args()
    print(main(chosen.events, chosen.rounds, chosen.max_in_flight) or "")

"""A worker as an operator runs it: a process of its own, told by the environment, seen through Kafka and HTTP only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from confluent_kafka import Consumer, TopicPartition

from worker.embedded import free_port


class WorkerProcess:
    """`python -m worker run` with the given settings."""

    def __init__(self, log_file: Path, **settings: object) -> None:
        self.port = free_port()
        self._log_file = log_file
        self._settings = {f"WORKER_{name}": str(value) for name, value in settings.items()}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ready_within_s: float = 60) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
        if bundle := os.environ.get("BLACKBOX_BUNDLE"):
            environment["WORKER_ENGINE__BUNDLE"] = bundle
        environment |= {
            "WORKER_HTTP__PORT": str(self.port),
            "WORKER_KAFKA__CREATE_TOPICS": "true",
            "WORKER_KAFKA__SESSION_TIMEOUT_MS": "6000",
            **self._settings,
        }
        with self._log_file.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "worker", "run"], env=environment, stderr=log, stdout=log)
        deadline = time.monotonic() + ready_within_s
        while not self.ready():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        return self

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def metrics(self) -> dict[str, float]:
        """Every series of /metrics by its full name, labels included."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and not line.startswith("#")}

    def rss_bytes(self) -> int:
        """Resident bytes of the worker and all of its children."""
        assert self.process is not None
        family = psutil.Process(self.process.pid)
        total = 0
        for member in [family, *family.children(recursive=True)]:
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def stop(self, number: signal.Signals = signal.SIGTERM, within_s: float = 40) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(within_s)

    def log(self) -> str:
        return self._log_file.read_text()[-6000:]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class MemoryLog:
    """Samples, every half second, how many verdicts a worker has published and how many bytes it and its children hold."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.samples: list[tuple[int, int]] = []
        self._worker = worker
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def sample(self) -> None:
        counted = sum(value for name, value in self._worker.metrics().items() if name.startswith("code_worker_verdicts_total"))
        self.samples.append((int(counted), self._worker.rss_bytes()))

    def _run(self) -> None:
        while not self._done.wait(0.5):
            with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it is ending
                self.sample()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()


class Topic:
    """Everything in a topic, read again and again from where the last look ended."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._topic = topic
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": f"look-{topic}",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 50,
                "log_level": 0,
            }
        )
        self._assigned = False
        self.ends: dict[int, int] = defaultdict(int)
        """By partition the offset after the last record seen."""
        self.records: list[tuple[bytes | None, bytes | None, dict[str, bytes]]] = []

    def look(self) -> list[tuple[bytes | None, bytes | None, dict[str, bytes]]]:
        if not self._assigned:
            partitions = self._consumer.list_topics(self._topic, timeout=10).topics[self._topic].partitions
            self._consumer.assign([TopicPartition(self._topic, partition, 0) for partition in partitions])
            self._assigned = True
        while True:
            batch = self._consumer.consume(500, 0.3)
            if not batch:
                return self.records
            for message in batch:
                assert message.error() is None, message.error()
                self.ends[message.partition()] = max(self.ends[message.partition()], message.offset() + 1)
                self.records.append((message.key(), message.value(), dict(message.headers() or [])))

    def close(self) -> None:
        self._consumer.close()


def verdicts_by_event(topic: Topic) -> dict[str, dict[str, dict[str, object]]]:
    """event id -> verdict id -> verdict."""
    found: dict[str, dict[str, dict[str, object]]] = defaultdict(dict)
    for _key, value, _headers in topic.look():
        verdict = json.loads(value or b"")
        found[verdict["event_id"]][verdict["verdict_id"]] = verdict
    return found


def uncommitted(bootstrap: str, group: str, topic: str) -> int:
    """Records of the topic at or after the group's committed offsets; negative where it committed beyond the last one.

    The end is found by reading: the embedded broker's own answer for it lags behind by a batch.
    """
    everything = Topic(bootstrap, topic)
    everything.look()
    everything.close()
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False, "log_level": 0})
    try:
        committed = consumer.committed([TopicPartition(topic, partition) for partition in everything.ends], timeout=10)
        return sum(everything.ends[partition.partition] - max(partition.offset, 0) for partition in committed)
    finally:
        consumer.close()

"""A console as a process on a real broker, producers of uploads and verdicts, and a caller of its pages."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worker import kafka_clients
from worker.clock import Deadline
from worker.console.labels import SPECVERSION
from worker.contracts.verdict import build_verdict, rfc3339
from worker.embedded import Child
from worker.items import Decision, Event, ImageInfo, ModelRef, Position, Scores, Timings
from worker.settings import KafkaSettings

TOKENS = {"ada": "ada-token-0123456789", "grace": "grace-token-0123456789", "victor": "victor-token-0123456789"}
ROLES = {"ada": "reviewer", "grace": "reviewer", "victor": "viewer"}
SIGNING_KEY = "k" * 40
POLICY = """
name = "house"
version = "2026-11"

[tenants.default]
review = 0.3
block = 0.95
"""


def picture(seed: int, size: tuple[int, int] = (480, 360)) -> bytes:
    """A drawing as JPEG, another one for each seed."""
    from worker import samples

    drawn = samples._dunes(np.random.default_rng(seed), *size)
    output = io.BytesIO()
    drawn.save(output, "JPEG", quality=88)
    return output.getvalue()


class ConsoleProcess(Child):
    """`python -m worker console` with three people who may come in."""

    name = "console"
    ready_timeout_s = 180.0

    def __init__(self, kafka: KafkaSettings, bundle: Path, policy: Path, log_file: Path, **more: str) -> None:
        super().__init__(log_file)
        self._settings = {
            "KAFKA__BOOTSTRAP_SERVERS": ",".join(kafka.bootstrap_servers),
            "KAFKA__UPLOAD_TOPICS": ",".join(kafka.upload_topics),
            "KAFKA__VERDICT_TOPIC": kafka.verdict_topic,
            "KAFKA__LABEL_TOPIC": kafka.label_topic,
            "KAFKA__CREATE_TOPICS": "true",
            "ENGINE__BUNDLE": str(bundle),
            "ENGINE__THREADS": "1",
            "POLICY__FILE": str(policy),
            "CONSOLE__TOKENS": ",".join(f"{name}:{ROLES[name]}:{token}" for name, token in TOKENS.items()),
            "CONSOLE__SIGNING_KEY": SIGNING_KEY,
            **more,
        }

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        variables = [f"WORKER_{name}={value}" for name, value in self._settings.items()]
        return ["/usr/bin/env", *variables, f"WORKER_CONSOLE__PORT={self.port}", sys.executable, "-m", "worker", "console"]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False

    def end(self, number: signal.Signals) -> tuple[int | None, float]:
        """Send a signal; exit code, and the seconds it took."""
        started = time.monotonic()
        self._signal(number)
        assert self._keeper is not None
        self._keeper.join(20.0)
        return self._returncode(), time.monotonic() - started

    def call(
        self, method: str, path: str, content: Any = None, person: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """One request with a person's bearer token; status and JSON."""
        sent = {"Authorization": f"Bearer {TOKENS[person]}"} if person else {}
        data = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {**sent, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


class Producer:
    """Publishes uploads and verdicts as a worker would."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        topics = (*kafka.upload_topics, kafka.verdict_topic, kafka.label_topic)
        kafka_clients.ensure_topics(kafka, Deadline(30), topics=topics, create=True)
        self._producer = kafka_clients.open_producer(kafka)

    def upload(self, data: bytes, event_id: str) -> Position:
        """A raw upload; where it stands."""
        headers = [("content-type", b"image/jpeg"), ("event_id", event_id.encode())]
        sent = self._producer.send(self._kafka.upload_topics[0], key=event_id.encode(), value=data, headers=headers)
        place = sent.get(timeout=10)
        return Position(place.topic, place.partition, place.offset, 0)

    def judged(self, seed: int, score: float, event_id: str = "", **more: Any) -> dict[str, Any]:
        """An upload and its verdict, acknowledged by the broker; the verdict."""
        data = picture(seed)
        event_id = event_id or f"event-{uuid.uuid4().hex[:10]}"
        found = verdict(event_id, score, hashlib.sha256(data).hexdigest(), self.upload(data, event_id), **more)
        self.publish(found)
        return found

    def publish(self, *verdicts: dict[str, Any]) -> None:
        """Verdicts, acknowledged."""
        for found in verdicts:
            key = found["event_id"].encode()
            self._producer.send(self._kafka.verdict_topic, key=key, value=json.dumps(found).encode())
        self._producer.flush(timeout=30)

    def label(self, said: dict[str, Any]) -> None:
        """A decision by others than the console, with the least that it must say, acknowledged."""
        at = rfc3339(time.time())
        record = {"specversion": SPECVERSION, "type": "decision", "record_id": str(uuid.uuid4()), "at": at, **said}
        sent = self._producer.send(self._kafka.label_topic, key=said["entry"].encode(), value=json.dumps(record).encode())
        sent.get(timeout=10)

    def close(self) -> None:
        """Close the client."""
        self._producer.close()


def verdict(
    event_id: str, score: float | None, sha256: str | None = None, source: Position | None = None, **more: Any
) -> dict[str, Any]:
    """A verdict as the worker publishes it; the policy is POLICY."""
    label = "undetermined" if score is None else "ai_generated" if score >= 0.5 else "authentic"
    action = "review" if score is None or 0.3 <= score < 0.95 else "block" if score >= 0.95 else "allow"
    timings = Timings(0.0, fetch=1.2, decode=3.4, queue=2.1, infer=9.8)
    built = build_verdict(
        event=Event(event_id, None, b"", tenant=more.get("tenant", "default"), item={"type": "post", "id": "7"}),
        source=source or Position("nowhere", 0, 0, 0),
        model=ModelRef("random", more.get("version", "1"), "linear", "openvino", "cpu"),
        decision=Decision(label, action, bool(score and 0.4 <= score < 0.6), "house", "2026-11"),
        processed_at=time.time(),
        scores=None if score is None else Scores({"linear": score, "knn": score * 0.9, "ocsvm": score * 0.8}, (score,)),
        image=None if score is None else ImageInfo(sha256 or "", 480, 360, "JPEG", 1),
        sha256=sha256,
        reason=more.get("reason"),
        cache_hit=more.get("cache_hit", False),
        timings=timings,
        finished=0.0185,
    )
    return built.model_dump(mode="json")


def label_records(kafka: KafkaSettings, wait_s: float = 5.0) -> Iterator[dict[str, Any]]:
    """Everything on the label topic, until nothing more comes."""
    from kafka import TopicPartition

    consumer = kafka_clients.open_consumer(kafka, group=False, auto_offset_reset="earliest")
    try:
        topic = kafka.label_topic
        consumer.assign([TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)])
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            batches = consumer.poll(timeout_ms=300)
            for records in batches.values():
                for record in records:
                    deadline = min(deadline, time.monotonic() + 1.0)
                    yield json.loads(record.value) | {"key": record.key.decode()}
    finally:
        consumer.close()


def environment() -> dict[str, str]:
    """This process's, without settings of the worker."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}


def run_console(**settings: str) -> subprocess.CompletedProcess[str]:
    """A console that is expected to end by itself."""
    variables = {f"WORKER_{name}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "worker", "console"], env=environment() | variables, capture_output=True, text=True, timeout=60
    )

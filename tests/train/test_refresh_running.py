"""The whole way on a real broker: uploads, decisions, `train refresh` (killed once), and the running worker's verdicts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from engine import bundle
from tests.train import refreshed
from tests.worker.kafka_topics import read_all
from train import labels_sample
from train.labels_topic import KafkaOptions, read_labels
from worker.clock import Deadline
from worker.kafka_clients import ensure_topics, open_producer
from worker.settings import KafkaSettings

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0


def wait_for(what: str, condition: Callable[[], Any], log: Path | None = None) -> Any:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.3)
    pytest.fail(f"{what}: not within {PATIENCE_S:.0f} s; {log.read_text()[-2000:] if log else ''}")


def environment(settings: KafkaSettings, **more: str) -> dict[str, str]:
    values = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    return values | {
        "WORKER_KAFKA__BOOTSTRAP_SERVERS": ",".join(settings.bootstrap_servers),
        "WORKER_KAFKA__GROUP_ID": settings.group_id,
        "WORKER_KAFKA__UPLOAD_TOPICS": ",".join(settings.upload_topics),
        "WORKER_KAFKA__VERDICT_TOPIC": settings.verdict_topic,
        "WORKER_KAFKA__RETRY_TOPIC": settings.retry_topic,
        "WORKER_KAFKA__DEAD_LETTER_TOPIC": settings.dead_letter_topic,
        "WORKER_KAFKA__LABEL_TOPIC": settings.label_topic,
        "OMP_NUM_THREADS": "1",
        **more,
    }


def upload(settings: KafkaSettings, images: list[tuple[str, bytes]]) -> list[tuple[int, int]]:
    """Publishes images as raw uploads; (partition, offset) of each."""
    producer = open_producer(settings)
    try:
        sent = [
            producer.send(settings.upload_topics[0], data, key=name.encode(),
                          headers=[("content-type", b"image/jpeg"), ("ce_id", name.encode())])
            for name, data in images
        ]  # fmt: skip
        return [(found.partition, found.offset) for found in (future.get(60) for future in sent)]
    finally:
        producer.close()


def decide(settings: KafkaSettings, samples: list[labels_sample.SampleImage], places: list[tuple[int, int]], file: Path) -> None:
    """Decisions that know of their images only where the uploads stand, and noise between them."""
    import hashlib

    lines = []
    for number, (sample, (partition, offset)) in enumerate(zip(samples, places, strict=True)):
        sha256 = hashlib.sha256(sample.data).hexdigest()
        reference = {"upload": {"topic": settings.upload_topics[0], "partition": partition, "offset": offset}, "url": None}
        image = {"sha256": sha256, "reference": reference}
        lines.append(json.dumps(labels_sample.record(sha256, sample.label, "ada", number, image=image)))
        lines.append(json.dumps({"entry": f"sha256:{sha256}", "specversion": "noise/1"}))
    file.write_text("\n".join(lines))
    labels_sample.publish(file, KafkaOptions(settings.bootstrap_servers, settings.label_topic, settings.upload_topics))


def versions(settings: KafkaSettings) -> dict[str, str]:
    """The model's version in the latest verdict of each event."""
    verdicts = [json.loads(record.value) for record in read_all(settings, settings.verdict_topic)]
    return {verdict["event_id"]: verdict["model"]["version"] for verdict in verdicts}


def test_decisions_on_the_topic_become_the_running_workers_model(
    tmp_path: Path, kafka_settings: Callable[..., KafkaSettings]
) -> None:
    settings = kafka_settings()
    topics = [*settings.upload_topics, settings.verdict_topic, settings.retry_topic]
    topics += [settings.dead_letter_topic, settings.label_topic]
    ensure_topics(settings, Deadline(60), topics=topics, create=True)
    models = refreshed.models(tmp_path / "models")
    samples = labels_sample.made_up(12, 0, seed=3)
    places = upload(settings, [(f"first-{i}", sample.data) for i, sample in enumerate(samples)])
    worker_environment = environment(
        settings, WORKER_ENGINE__BUNDLE=str(models), WORKER_ENGINE__BACKEND="torch", WORKER_ENGINE__WATCH_BUNDLE_S="1",
        WORKER_BATCH__MAX_BATCH_SIZE="2", WORKER_BATCH__PREFERRED_BATCH_SIZE="2", WORKER_CACHE__ENABLED="false",
        WORKER_HTTP__PORT="0", WORKER_HTTP__HOST="127.0.0.1",
    )  # fmt: skip
    log = tmp_path / "worker.log"
    with log.open("wb") as stream:
        worker = subprocess.Popen([sys.executable, "-m", "worker", "run"], cwd=ROOT, env=worker_environment, stderr=stream)
    try:
        wait_for("the first verdicts", lambda: len(versions(settings)) == 12 or worker.poll() is not None, log)
        assert worker.poll() is None, log.read_text()[-2000:]
        assert set(versions(settings).values()) == {"1"}
        decide(settings, samples, places, tmp_path / "labels.jsonl")
        labels, tally = read_labels(KafkaOptions(settings.bootstrap_servers, settings.label_topic, settings.upload_topics))
        assert len(labels) == 12 and tally.skipped == {"not code-label/1": 12}

        command = [sys.executable, "-m", "train", "refresh", "--models", str(models), "--work", str(tmp_path / "work")]
        killed = subprocess.Popen(command, cwd=ROOT, env=environment(settings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for("the first step", lambda: (tmp_path / "work" / "steps" / "embed").is_dir() or killed.poll() is not None)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
        # Where this process got no processor for long, the job may have been through already.
        through = bundle.read_manifest(models)[0].version == "1-r1"

        done = subprocess.run(command, cwd=ROOT, env=environment(settings), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 or (through and done.returncode == 3), done.stdout + done.stderr
        assert through or ("promoted 1-r1" in done.stdout and "embed: done before" in done.stderr)
        assert bundle.read_manifest(models)[0].version == "1-r1"

        names = (f"later-{i}" for i in range(10_000))

        def named_anew() -> bool:
            upload(settings, [(next(names), samples[0].data)])
            return "1-r1" in versions(settings).values()

        wait_for("a verdict of the new version", named_anew, log)
        again = subprocess.run(command, cwd=ROOT, env=environment(settings), capture_output=True, text=True, timeout=600)
        assert again.returncode == 3, again.stdout + again.stderr
        assert worker.poll() is None
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0
    finally:
        worker.kill()
        worker.wait(30)

"""No secret comes out: not in logs, errors, `check`, metrics, verdicts or dead letters, whatever goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaProducer

from tests.blackbox.worker_process import Topic, WorkerProcess
from worker.embedded import EmbeddedCache, free_port
from worker.settings import KafkaSettings

SECRETS = {
    "KAFKA__SASL_PASSWORD": "s3cret-of-the-broker",
    "CACHE__URL": "redis://moderation:s3cret-of-the-cache@127.0.0.1:{closed}/0",
    "CONSOLE__TOKENS": "ada:reviewer:s3cret-of-the-console",
    "CONSOLE__SIGNING_KEY": "s3cret-of-the-signature-which-is-long-enough",
}


def told(*command: str, folder: Path, **settings: str) -> str:
    """Everything a command writes, at the most talkative level; it must not end well, or nothing would be tried."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    environment |= {f"WORKER_{name}": value for name, value in settings.items()}
    environment |= {"WORKER_LOG__LEVEL": "DEBUG", "WORKER_KAFKA__STARTUP_TIMEOUT_S": "1", "WORKER_SECRETS_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-m", "worker", *command], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode in (1, 2, 3), done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("command", [("check",), ("run",), ("watch", "--count", "1"), ("console",)], ids=lambda words: words[0])
def test_a_broker_and_a_cache_that_are_away(command: tuple[str, ...], tmp_path: Path) -> None:
    closed = str(free_port())
    for name, value in SECRETS.items():
        (tmp_path / name).write_text(value.format(closed=closed))
    text = told(
        *command,
        folder=tmp_path,
        KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{closed}",
        KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
        KAFKA__SASL_MECHANISM="SCRAM-SHA-512",
        KAFKA__SASL_USERNAME="moderation",
        CONSOLE__PORT="0",
        HTTP__PORT="0",
    )
    assert text.strip()
    assert "s3cret" not in text


def test_a_setting_that_is_wrong_beside_secrets_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "KAFKA__SASL_PASSWORD").write_text("s3cret-of-the-broker")
    text = told(
        "run", folder=tmp_path, CACHE__URL="ftp://:s3cret@host", CONSOLE__SIGNING_KEY="s3cret", KAFKA__MAX_IN_FLIGHT="none"
    )
    assert "KAFKA__MAX_IN_FLIGHT" in text
    assert "s3cret" not in text


@pytest.mark.slow
def test_a_worker_at_work(kafka_settings: Callable[..., KafkaSettings], cache_server: EmbeddedCache, tmp_path: Path) -> None:
    """The cache refuses the login; uploads carry credentials and signatures in their addresses; everything said is searched."""
    kafka = kafka_settings()
    worker = WorkerProcess(
        tmp_path / "log",
        KAFKA__BOOTSTRAP_SERVERS=",".join(kafka.bootstrap_servers),
        KAFKA__GROUP_ID=kafka.group_id,
        KAFKA__UPLOAD_TOPICS=kafka.upload_topics[0],
        KAFKA__VERDICT_TOPIC=kafka.verdict_topic,
        KAFKA__RETRY_TOPIC=kafka.retry_topic,
        KAFKA__DEAD_LETTER_TOPIC=kafka.dead_letter_topic,
        CACHE__URL=cache_server.url.replace("redis://", "redis://moderation:s3cret-of-the-cache@"),
        FETCH__ATTEMPTS=1,
        LOG__LEVEL="DEBUG",
    )
    bad = [
        f"http://user:s3cret-of-a-user@127.0.0.1:{free_port()}/a.jpg",
        f"http://127.0.0.1:{free_port()}/a.jpg?X-Amz-Signature=s3cret-of-a-signature",
        "https://name.invalid/a.jpg?token=s3cret-of-a-token#s3cret-of-a-fragment",
        "s3://bucket/../s3cret-of-a-key",
        "file:///etc/s3cret-of-a-path",
    ]
    with worker:
        producer = KafkaProducer(bootstrap_servers=list(kafka.bootstrap_servers))
        for url in bad:
            producer.send(kafka.upload_topics[0], json.dumps({"event_id": str(uuid.uuid4()), "image": {"url": url}}).encode())
        producer.flush(30)
        producer.close()
        servers = ",".join(kafka.bootstrap_servers)
        verdicts, dead = Topic(servers, kafka.verdict_topic), Topic(servers, kafka.dead_letter_topic)
        deadline = time.monotonic() + 60
        while len(verdicts.records) < len(bad) or len(dead.records) < len(bad):
            assert time.monotonic() < deadline, worker.log()
            verdicts.look()
            dead.look()
        with urllib.request.urlopen(f"http://127.0.0.1:{worker.port}/metrics", timeout=10) as answer:
            page = answer.read().decode()
        assert worker.stop() == 0
    assert "s3cret" not in page
    assert "s3cret" not in (tmp_path / "log").read_text()
    for _, value, headers in verdicts.records:
        assert b"s3cret" not in (value or b"") + b"".join(headers.values())
    for _, _, headers in dead.records:  # the value is the upload's own, untouched
        assert b"s3cret" not in b"".join(headers.values())

"""`worker check` on a real broker and cache, and on everything that can be wrong: one line each, no traceback, in time."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.conftest import KafkaCluster, unique_settings
from worker import kafka_clients, probes
from worker.__main__ import main
from worker.clock import Deadline
from worker.embedded import EmbeddedBroker, EmbeddedCache, free_port
from worker.settings import KafkaSettings

PASSWORD = "hunter2"


@pytest.fixture(autouse=True)
def clean_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("WORKER_"):
            monkeypatch.delenv(name)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)


def set_all(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"WORKER_{name}", value)


def environment(monkeypatch: pytest.MonkeyPatch, kafka: KafkaSettings, cache_url: str) -> None:
    set_all(
        monkeypatch,
        KAFKA__BOOTSTRAP_SERVERS=",".join(kafka.bootstrap_servers),
        KAFKA__UPLOAD_TOPICS=",".join(kafka.upload_topics),
        KAFKA__VERDICT_TOPIC=kafka.verdict_topic,
        KAFKA__RETRY_TOPIC=kafka.retry_topic,
        KAFKA__DEAD_LETTER_TOPIC=kafka.dead_letter_topic,
        CACHE__URL=cache_url,
    )


class Report:
    """Exit code and lines of one `worker check`."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = main(["check", *arguments])
        written = capfd.readouterr()
        self.text = written.out + written.err
        assert "Traceback" not in self.text
        assert written.err == "" or self.code == 2
        assert PASSWORD not in self.text
        self.lines = written.out.splitlines()

    def of(self, subject: str, level: str | None = None) -> list[str]:
        found = []
        for line in self.lines:
            words = line.split(None, 2)
            if len(words) == 3 and words[0] in ("ok", "note", "problem") and words[1] == subject and level in (None, words[0]):
                found.append(words[2])
        return found


@pytest.fixture
def running(
    monkeypatch: pytest.MonkeyPatch,
    broker: EmbeddedBroker,
    cache_server: EmbeddedCache,
    kafka_settings: Callable[..., KafkaSettings],
) -> Iterator[KafkaSettings]:
    settings = kafka_settings()
    environment(monkeypatch, settings, cache_server.url)
    yield settings


@pytest.mark.broker
def test_all_is_well(running: KafkaSettings, capfd: pytest.CaptureFixture[str]) -> None:
    kafka_clients.ensure_topics(running, Deadline(20))
    report = Report(capfd, "--no-engine")
    assert report.code == 0, report.text
    assert len(report.of("topic", "ok")) == 4
    assert report.of("cache", "ok")
    assert report.of("broker", "ok")
    assert report.lines[-1] == "all is well"


@pytest.mark.broker
def test_missing_topics_are_named(
    running: KafkaSettings, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report(capfd, "--no-engine")
    assert report.code == 2
    assert [line.partition(":")[0] for line in report.of("topic", "problem")] == [
        *running.upload_topics,
        running.retry_topic,
        running.verdict_topic,
        running.dead_letter_topic,
    ]
    assert "WORKER_KAFKA__CREATE_TOPICS" in report.of("topic")[0]
    monkeypatch.setenv("WORKER_KAFKA__CREATE_TOPICS", "true")
    assert Report(capfd, "--no-engine").code == 0


def test_everything_dead_is_told_in_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    set_all(
        monkeypatch,
        KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{free_port()}",
        KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
        KAFKA__SASL_MECHANISM="PLAIN",
        KAFKA__SASL_USERNAME="worker",
        KAFKA__SASL_PASSWORD=PASSWORD,
        CACHE__URL=f"redis://:{PASSWORD}@127.0.0.1:{free_port()}/0?password={PASSWORD}",
        ENGINE__BUNDLE=str(tmp_path / "no-bundle"),
        POLICY__FILE=str(tmp_path / "no-policy.toml"),
        FETCH__FILE_ROOTS=str(tmp_path / "no-root"),
    )
    started = time.monotonic()
    report = Report(capfd, "--timeout", "1")
    assert time.monotonic() - started < 20
    assert report.code == 2
    for subject in ("broker", "cache", "files", "policy", "bundle"):
        assert len(report.of(subject, "problem")) == 1, report.text
    assert "WORKER_KAFKA__SASL_PASSWORD=********" in report.lines
    assert report.lines[-1] == "5 problems"


def test_what_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    port = listener.getsockname()[1]
    set_all(monkeypatch, KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{port}", CACHE__URL=f"redis://127.0.0.1:{port}")
    started = time.monotonic()
    report = Report(capfd, "--no-engine", "--timeout", "1")
    listener.close()
    assert time.monotonic() - started < 15
    assert report.code == 2
    assert len(report.of("broker", "problem")) == 1
    assert len(report.of("cache", "problem")) == 1


def test_a_probe_that_never_returns_is_given_up(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    forever = threading.Event()
    monkeypatch.setattr(probes, "files", lambda settings: forever.wait(60) and [])
    set_all(monkeypatch, KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{free_port()}", CACHE__ENABLED="false")
    try:
        report = Report(capfd, "--no-engine", "--timeout", "0.5")
    finally:
        forever.set()
    assert report.of("files", "problem") == ["no answer in 0 s"]
    assert report.of("cache", "note")


@pytest.mark.parametrize(("library", "level"), [("/site/pillow.libs/libjpeg-1.so", "ok"), (None, "note")])
def test_the_region_decoder_is_told(monkeypatch: pytest.MonkeyPatch, library: str | None, level: str) -> None:
    monkeypatch.setattr("engine.jpeg_region.library", lambda: library)
    finding = probes.decoding()
    assert (finding.level, finding.subject) == (level, "decode")
    assert ("libjpeg-1.so" in finding.message) is (library is not None)
    assert "/site" not in finding.message


def test_a_probe_that_stumbles_is_a_finding(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def stumbles(*_: Any) -> list[probes.Finding]:
        raise RuntimeError(f"at\nredis://:{PASSWORD}@h")

    for name in ("kafka", "cache", "files", "model"):
        monkeypatch.setattr(probes, name, stumbles)
    report = Report(capfd)
    assert report.code == 2
    assert report.of("engine", "problem") == ["RuntimeError: at redis://h"]


@pytest.mark.parametrize("seconds", ["0", "x", "nan", "-1", "1e9"])
def test_a_wrong_timeout_is_one_line(seconds: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "--timeout", seconds])
    assert ended.value.code == 2
    assert "--timeout" in capfd.readouterr().err


def test_the_effective_settings_are_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("kafka", "cache", "files", "model"):
        monkeypatch.setattr(probes, name, lambda *_: [])
    set_all(monkeypatch, KAFKA__UPLOAD_TOPICS="a, b", CACHE__URL=f"rediss://u:{PASSWORD}@cache:6380/1", FETCH__MAX_BYTES="5")
    report = Report(capfd)
    assert report.code == 0
    assert "WORKER_KAFKA__UPLOAD_TOPICS=a,b" in report.lines
    assert "WORKER_CACHE__URL=rediss://cache:6380/1" in report.lines
    assert "WORKER_FETCH__MAX_BYTES=5" in report.lines
    assert "WORKER_LOG__LEVEL=INFO  (default)" in report.lines


def test_wrong_settings_end_before_any_probe(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    set_all(monkeypatch, FETCH__MAX_BYTES="many", NOSUCH__FIELD="1")
    report = Report(capfd)
    assert report.code == 2
    assert "WORKER_FETCH__MAX_BYTES" in report.text
    assert "WORKER_NOSUCH__FIELD" in report.text


# -- what only a full broker tells -----------------------------------------------------------------------------------


SETTINGS = KafkaSettings(max_record_bytes=10_000_000)
LIMITS = {
    "image.uploads": 1_000_000,
    "image.uploads.retry": 1_000_000,
    "image.uploads.dead": 1_000_000,
    "image.verdicts": 1_000_000,
}


@pytest.mark.parametrize(
    ("limits", "levels", "word"),
    [
        (None, ["note"], "max.message.bytes"),
        (LIMITS, ["ok"], "image.uploads 1000000"),
        (LIMITS | {"image.uploads.dead": 999_999}, ["problem"], "image.uploads.dead"),
        (LIMITS | {"image.verdicts": 100_000}, ["problem"], "image.verdicts"),
        (dict.fromkeys(LIMITS, 20_000_000), ["note", "ok"], "event.too_large"),
        (LIMITS | {"image.uploads": 20_000_000}, ["note", "problem", "problem"], "image.uploads.retry"),
    ],
)
def test_record_sizes_are_compared(limits: dict[str, int] | None, levels: list[str], word: str) -> None:
    found = probes._sizes(SETTINGS, limits)
    assert [finding.level for finding in found] == levels
    assert any(word in finding.message for finding in found)


@pytest.mark.parametrize(
    ("changes", "level", "word"),
    [
        ({}, "ok", "2 partitions"),
        ({"authorized_operations": ["READ", "WRITE"]}, "ok", ""),
        ({"authorized_operations": ["DESCRIBE", "READ"]}, "problem", "may not WRITE"),
        ({"partitions": [{"partition_index": 3, "leader_id": -1}]}, "problem", "no leader for partition 3"),
        ({"error_code": 29}, "problem", "not visible"),
    ],
)
def test_topics_are_judged(changes: dict[str, Any], level: str, word: str) -> None:
    partitions = [{"partition_index": 0, "leader_id": 1}, {"partition_index": 1, "leader_id": 1}]
    topic = {"error_code": 0, "partitions": partitions, "authorized_operations": None} | changes
    found = probes._topic(SETTINGS, "t", topic, ("READ", "WRITE"))
    assert found.level == level
    assert word in found.message


@pytest.mark.cluster
def test_apache_kafka_tells_its_limits(
    kafka_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with KafkaCluster(kafka_cluster, tmp_path / "kafka") as cluster:
        bootstrap = cluster.start("--nodes", "1", options=())  # with Kafka's own limits
        _check_limits(bootstrap.splitlines()[-1], monkeypatch, capfd)


def _check_limits(bootstrap: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    settings = unique_settings(bootstrap)
    kafka_clients.ensure_topics(settings, Deadline(30))
    environment(monkeypatch, settings, "redis://127.0.0.1:1")
    monkeypatch.setenv("WORKER_CACHE__ENABLED", "false")
    report = Report(capfd, "--no-engine")
    assert report.code == 0, report.text
    assert "1048588" in report.of("sizes", "ok")[0]

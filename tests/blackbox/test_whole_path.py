"""The whole path, black box: events in by librdkafka, verdicts and dead letters out, offsets committed, nothing lost.

BLACKBOX_EVENTS sets how many (default 400; the acceptance run uses 20,000).
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blackbox import upload_events
from tests.blackbox.image_host import ImageHost
from tests.blackbox.worker_process import MemoryLog, Topic, WorkerProcess, uncommitted, verdicts_by_event
from worker.embedded import EmbeddedBroker, EmbeddedCache

pytestmark = [pytest.mark.slow, pytest.mark.broker]

EVENTS = int(os.environ.get("BLACKBOX_EVENTS", "400"))
SEED = int(os.environ.get("BLACKBOX_SEED", "1"))


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[EmbeddedBroker, EmbeddedCache]]:
    with EmbeddedBroker() as broker, EmbeddedCache() as cache:
        yield broker, cache


@pytest.fixture
def host() -> Iterator[ImageHost]:
    images = upload_events.Images(99)
    random_ = random.Random(5)
    with ImageHost([images.pick(random_)[0] for _ in range(40)], large_bytes=upload_events.MAX_IMAGE_BYTES + 1) as host:
        yield host


def _settings(broker: EmbeddedBroker, cache: EmbeddedCache, name: str, root: Path) -> dict[str, object]:
    return {
        "KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap,
        "KAFKA__GROUP_ID": name,
        "KAFKA__UPLOAD_TOPICS": f"{name}.uploads",
        "KAFKA__VERDICT_TOPIC": f"{name}.verdicts",
        "KAFKA__RETRY_TOPIC": f"{name}.retry",
        "KAFKA__DEAD_LETTER_TOPIC": f"{name}.dead",
        "CACHE__URL": cache.url,
        "FETCH__MAX_BYTES": upload_events.MAX_IMAGE_BYTES,
        "FETCH__ALLOW_PRIVATE_ADDRESSES": "true",
        "FETCH__ALLOWED_HOSTS": "127.0.0.1",
        "FETCH__FILE_ROOTS": root,
        "FETCH__TIMEOUT_S": 1.5,
        "FETCH__ATTEMPTS": 3,
        "FETCH__RETRY_DELAY_S": 0.3,
    }


@pytest.mark.timeout(max(180, EVENTS // 5))
def test_every_event_has_its_verdict_or_dead_letter(
    servers: tuple[EmbeddedBroker, EmbeddedCache], host: ImageHost, tmp_path: Path
) -> None:
    broker, cache = servers
    root = tmp_path / "root"
    root.mkdir()
    plans = list(upload_events.make(EVENTS, host.url, root, SEED, broken_share=0.15 if EVENTS < 1000 else 0.05))
    settings = _settings(broker, cache, "path", root)
    with WorkerProcess(tmp_path / "worker.log", **settings) as worker, MemoryLog(worker) as memory:
        upload_events.produce(plans, broker.bootstrap, "path.uploads")
        verdicts = Topic(broker.bootstrap, "path.verdicts")
        expected = {plan.event_id for plan in plans if plan.event_id is not None}
        deadline = time.monotonic() + max(120, EVENTS / 8)
        while len(found := verdicts_by_event(verdicts)) < len(expected):
            assert time.monotonic() < deadline, f"{len(found)} of {len(expected)}\n{worker.log()}"
            assert worker.process is not None
            assert worker.process.poll() is None, worker.log()
            time.sleep(0.5)
        time.sleep(1)
        metrics = worker.metrics()
        memory.sample()
        assert worker.stop(signal.SIGTERM) == 0, worker.log()
    found = verdicts_by_event(verdicts)

    assert set(found) == expected
    assert all(len(by_id) == 1 for by_id in found.values())
    reasons = {event_id: next(iter(by_id.values()))["reason"] for event_id, by_id in found.items()}
    wrong = [(p.kind, p.code, reasons[p.event_id]) for p in plans if p.event_id is not None and reasons[p.event_id] != p.code]
    assert not wrong, Counter(wrong)
    _check_dead_letters(plans, Topic(broker.bootstrap, "path.dead"))
    _check_verdicts([verdict for by_id in found.values() for verdict in by_id.values()])
    assert uncommitted(broker.bootstrap, "path", "path.uploads") == 0
    assert uncommitted(broker.bootstrap, "path", "path.retry") == 0
    assert sum(value for name, value in metrics.items() if name.startswith("code_worker_verdicts_total")) >= len(expected)
    assert metrics['code_worker_cache_requests_total{result="hit"}'] > 0
    _check_memory(memory.samples)


def _check_memory(samples: list[tuple[int, int]]) -> None:
    print(f"\nresident MiB by verdicts: {[(count, size >> 20) for count, size in samples[:: max(1, len(samples) // 25)]]}")
    assert max(size for _count, size in samples) < 2 * 2**30
    if EVENTS >= 20_000:
        early = [size for count, size in samples if 4_500 <= count <= 6_000]
        assert samples[-1][1] <= 1.05 * max(early), (samples[-1], max(early))


def _check_dead_letters(plans: list[upload_events.Plan], topic: Topic) -> None:
    broken = [plan for plan in plans if plan.code is not None]
    letters = topic.look()
    assert len(letters) == len(broken)
    by_value = Counter((value, headers["__streams.errors.exception"].decode()) for _key, value, headers in letters)
    assert by_value == Counter((plan.value, plan.code) for plan in broken)
    originals = {plan.event_id: plan.headers for plan in broken if plan.event_id}
    for key, _value, headers in letters:
        assert headers["__streams.errors.topic"] == b"path.uploads"
        assert {
            "__streams.errors.message",
            "__streams.errors.partition",
            "__streams.errors.offset",
            "attempt",
            "first_seen",
        } <= set(headers)
        for name, content in originals.get((key or b"").decode(), []):
            assert headers[name] == content
        if headers["__streams.errors.exception"] in (b"fetch.unavailable", b"fetch.timeout"):
            assert headers["attempt"] == b"3"


def _check_verdicts(verdicts: list[dict[str, object]]) -> None:
    for verdict in verdicts:
        text = json.dumps(verdict)
        assert "127.0.0.1" not in text
        assert verdict["specversion"] == "code-verdict/1"
        if verdict["reason"] is None:
            score = verdict["score"]
            assert isinstance(score, float)
            assert 0 <= score <= 1
            assert verdict["label"] in ("ai_generated", "authentic")
        else:
            assert (verdict["label"], verdict["score"], verdict["action"]) == ("undetermined", None, "review")


@pytest.mark.timeout(180)
def test_a_killed_cache_costs_no_event(servers: tuple[EmbeddedBroker, EmbeddedCache], host: ImageHost, tmp_path: Path) -> None:
    broker, _ = servers
    root = tmp_path / "root"
    root.mkdir()
    plans = list(upload_events.make(240, host.url, root, 7, broken_share=0))
    with (
        EmbeddedCache() as cache,
        WorkerProcess(tmp_path / "worker.log", **_settings(broker, cache, "cachekill", root)) as worker,
    ):
        verdicts = Topic(broker.bootstrap, "cachekill.verdicts")
        for step in range(3):
            if step == 1:
                cache.kill()
            upload_events.produce(plans[step * 80 : step * 80 + 80], broker.bootstrap, "cachekill.uploads")
            if step == 2:
                cache.restart()
            deadline = time.monotonic() + 60
            while len(verdicts_by_event(verdicts)) < (step + 1) * 80:
                assert time.monotonic() < deadline, worker.log()
        metrics = worker.metrics()
        assert worker.stop() == 0, worker.log()
    errors = (
        metrics['code_worker_cache_requests_total{result="error"}'] + metrics['code_worker_cache_requests_total{result="bypass"}']
    )
    assert errors > 0
    assert uncommitted(broker.bootstrap, "cachekill", "cachekill.uploads") == 0


@pytest.mark.timeout(180)
def test_a_killed_worker_loses_nothing(servers: tuple[EmbeddedBroker, EmbeddedCache], host: ImageHost, tmp_path: Path) -> None:
    broker, cache = servers
    root = tmp_path / "root"
    root.mkdir()
    plans = list(upload_events.make(200, host.url, root, 11, broken_share=0))
    settings = _settings(broker, cache, "kill", root) | {"KAFKA__SESSION_TIMEOUT_MS": 6000, "CACHE__ENABLED": "false"}
    verdicts = Topic(broker.bootstrap, "kill.verdicts")
    with WorkerProcess(tmp_path / "first.log", **settings) as first:
        upload_events.produce(plans, broker.bootstrap, "kill.uploads")
        while len(verdicts_by_event(verdicts)) < 40:
            time.sleep(0.05)
        assert first.process is not None
        first.process.kill()
        first.process.wait()
    with WorkerProcess(tmp_path / "second.log", **settings) as second:
        deadline = time.monotonic() + 90
        while len(verdicts_by_event(verdicts)) < len(plans):
            assert time.monotonic() < deadline, second.log()
            time.sleep(0.2)
        time.sleep(1.5)
        assert second.stop() == 0, second.log()
    found = verdicts_by_event(verdicts)
    assert set(found) == {plan.event_id for plan in plans}
    assert all(len(by_id) == 1 for by_id in found.values())
    assert uncommitted(broker.bootstrap, "kill", "kill.uploads") == 0
